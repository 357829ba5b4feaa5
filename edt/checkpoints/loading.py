"""Models from checkpoint folders, run folders and .pt files."""

import dataclasses
import hashlib
import logging
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from edt.checkpoints.folder import MANIFEST, list_checkpoints, read_tensors, verify_file
from edt.checkpoints.release import bare_weights, read_release_weights
from edt.data.features import FeatureInfo
from edt.models import EDTConfig
from edt.nn.config import ModelConfig
from edt.nn.transformer import DiffusionTransformer
from edt.registry import config_from_state_dict, create_from_config, create_model, read_config
from edt.utils.choices import check_choice, choices
from edt.utils.errors import UserError
from edt.utils.files import file_sha256, read_json
from edt.utils.weights_format import read_index, weights_format

logger = logging.getLogger(__name__)

WeightsKind = Literal["ema", "model"]


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Information about a checkpoint, apart from its weights."""

    weights_file: Path
    """The file that the weights were read from."""
    weights_sha256: str
    """Its hash; of a sharded file, a hash over those of its shards."""
    weights: str
    """Which weights were read: "ema" or "model"; or the name of a file that holds one set only."""
    name: str | None
    """Name of the model, e.g. "EDT-S/2"; None for a .pt file."""
    features: FeatureInfo
    """The features that the model was trained on; fields are None where unknown."""


class Weights(NamedTuple):
    """Weights, model configuration and origin of a checkpoint."""

    tensors: dict[str, torch.Tensor]
    config: ModelConfig
    info: CheckpointInfo


def load_model(
    path: str | Path,
    model: str | None = None,
    *,
    weights: WeightsKind = "ema",
    input_size: int | None = None,
    num_classes: int | None = None,
) -> tuple[DiffusionTransformer, CheckpointInfo]:
    """Load a network in eval mode, on the CPU.

    The architecture is read from the checkpoint. ``model``, ``input_size`` and ``num_classes`` are
    optional expectations; a mismatch raises.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, a .safetensors file or the
            index of a sharded one, with config.json beside it, or a .pt file.
        model: name of a model; its width and patch size are expected.
        weights: "ema" or "model", of a checkpoint that holds both.
        input_size: expected side of the latent.
        num_classes: expected number of classes.

    Raises:
        UserError: the checkpoint cannot be read, or it is another model; the message names tensors
            with both shapes.
    """
    tensors, config, info = read_weights(path, weights)
    expected = config
    if model is not None:
        named = create_model(model, device="meta").config
        if named.family != config.family:
            raise UserError(
                f"{path} holds a model of the family {config.family}, not {model}; "
                "give its own --model"
            )
        expected = expected.with_width_of(named)
    if input_size is not None:
        expected = dataclasses.replace(expected, input_size=input_size)
    if num_classes is not None:
        expected = dataclasses.replace(expected, num_classes=num_classes)
    _check_shapes(tensors, expected, f"{path} as {model or config.family}")
    # AMM has no weights, so only the name tells that a model is meant to run without it.
    if isinstance(config, EDTConfig) and model is not None and model.endswith("_noAMM"):
        config = dataclasses.replace(config, amm=None)
    network = create_from_config(config)
    network.load_state_dict(tensors)
    return network.eval(), info


def read_weights(path: str | Path, weights: WeightsKind = "ema") -> Weights:
    """Weights, configuration and information of a checkpoint.

    Args:
        path: as in :func:`load_model`.
        weights: "ema" or "model".

    Raises:
        UserError: the checkpoint cannot be read, or weights are NaN or infinite.
    """
    check_choice("weights", weights, WeightsKind)
    file, sha256 = _find_weights_file(Path(path), weights)
    tensors, kind = _read_file(file, weights)
    check_finite(tensors, file)
    if weights == "model" and kind == "ema":
        logger.warning("%s holds EMA weights; --weights model is ignored", file)
    config, name, features = _read_config(file, tensors)
    if config.image_size is None:  # not recorded in the configurations of version 0.1
        config = dataclasses.replace(config, image_size=features.image_size)
    info = CheckpointInfo(file, sha256, kind, name, features)
    return Weights(tensors, config, info)


def _read_config(
    file: Path, tensors: dict[str, torch.Tensor]
) -> tuple[ModelConfig, str | None, FeatureInfo]:
    """The configuration, the model's name and the features, from config.json or the tensors.

    Raises:
        UserError: config.json is damaged, or the tensors are of no known family.
    """
    config_file = file.with_name("config.json")
    document: dict[str, Any] = {}
    # A .pt file stands alone: a config.json beside it may be another model's.
    if weights_format(file) != "torch" and config_file.exists():
        document = read_json(config_file)
    try:
        features = FeatureInfo.from_dict(document.get("features", {}))
        if isinstance(document.get("model"), dict):
            return read_config(document["model"]), document.get("name"), features
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from None
    except (TypeError, ValueError) as error:  # such as an AMM of two entries
        raise UserError(f"{config_file} is damaged ({error}); get it again") from None
    try:
        return config_from_state_dict(tensors), document.get("name"), features
    except UserError as error:
        names = ", ".join(list(tensors)[:3]) or "none"
        raise UserError(f"{file}: {error}; its first tensors: {names}") from None


def _read_file(file: Path, weights: WeightsKind) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a file or, if it is an index, of its shards; and which weights they are.

    What they are is "ema" or "model", or the file's name.
    """
    if weights_format(file) != "index":
        held, kind = _read_one_file(file, weights)
        return bare_weights(held, file), kind
    values: dict[Any, Any] = {}
    for shard, names in _shards(file).items():
        held, _ = _read_one_file(shard, weights)
        if absent := [name for name in names if name not in held]:
            raise UserError(f"{shard} lacks {absent[0]}, which {file} lists; get both again")
        # A shard may hold more, such as another version of a tensor that the index has elsewhere.
        values |= {name: held[name] for name in names}
    return bare_weights(values, file), _kind_by_name(file)


def _read_one_file(file: Path, weights: WeightsKind) -> tuple[dict[Any, Any], str]:
    """The state dict of a file that is no index, as it stands there; and which weights it is."""
    if weights_format(file) == "torch":
        values, entry = read_release_weights(file, weights)
        return values, entry or file.name
    # read_tensors refuses an index that lists itself.
    return read_tensors(file), _kind_by_name(file)


def _kind_by_name(file: Path) -> str:
    """Either "ema" or "model" for the files of a checkpoint folder, else the file's name."""
    stem = file.name.split(".")[0]
    return stem if stem in choices(WeightsKind) else file.name


def _shards(index: Path) -> dict[Path, list[str]]:
    """The files that an index lists, and the names of the tensors that each contributes.

    Raises:
        UserError: one of them is missing or outside the index's folder.
    """
    weight_map = read_index(index) or {}
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not index.with_name(name).is_file():
            raise UserError(
                f"{index} lists {len(files)} shards, and {name} is not beside it; "
                "put all of them into its folder"
            )
    return {
        index.with_name(file): [name for name, its_file in weight_map.items() if its_file == file]
        for file in files
    }


def _check_is_no_shard(file: Path) -> None:
    """Refuse one shard of several, which holds a part of the weights only."""
    shard = re.search(r"(.*)-(\d{5})-of-(\d{5})\.(\w+)$", file.name)
    if shard and int(shard[3]) > 1:
        index = file.with_name(f"{shard[1]}.{shard[4]}.index.json")
        raise UserError(
            f"{file} is shard {int(shard[2])} of {int(shard[3])}, a part of the weights; "
            f"give the index of all shards, {index}"
        )


def _find_weights_file(path: Path, weights: WeightsKind) -> tuple[Path, str]:
    """The file that holds the weights, and its SHA-256. No other file of weights is hashed."""
    if not path.exists():
        raise UserError(
            f"no checkpoint at {path}; give a checkpoint folder, a run folder or a .pt file"
        )
    if path.is_file():
        _check_is_no_shard(path)
        return path, _sha256_with_warning(path)
    name = f"{weights}.safetensors"
    checkpoints = list_checkpoints(path / "checkpoints")
    for checkpoint in reversed(checkpoints):
        try:
            return checkpoint / name, verify_file(checkpoint, name)
        except UserError as error:
            logger.warning("skipping checkpoint %s: %s", checkpoint.name, error)
    if checkpoints:
        raise UserError(
            f"every checkpoint in {path / 'checkpoints'} is damaged; give another run folder or a "
            ".pt file"
        )
    if (path / f"{name}.index.json").exists():
        name += ".index.json"
    if not (path / name).exists():
        raise UserError(
            f"no {name} in {path}; give a checkpoint folder, a run folder or a .pt file"
        )
    return path / name, _sha256_with_warning(path / name)


def _sha256_with_warning(file: Path) -> str:
    """SHA-256 of a file that the user named.

    Users edit such files on purpose, so a difference from the manifest is a warning.
    """
    if weights_format(file) == "index":
        hashes = [file_sha256(shard) for shard in _shards(file)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    sha256 = file_sha256(file)
    manifest = file.with_name(MANIFEST)
    if file.suffix == ".safetensors" and manifest.exists():
        recorded = read_json(manifest).get(file.name)
        if recorded is not None and recorded[-1] != sha256:
            logger.warning(
                "%s differs from its %s: it was changed or damaged after it was saved",
                file,
                MANIFEST,
            )
    return sha256


def check_finite(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Raise a UserError if weights are NaN or infinite. Every image would be, too."""
    # Networks compute in float32, and float8 has no isfinite.
    broken = [name for name, value in tensors.items() if not value.float().isfinite().all()]
    if broken:
        raise UserError(
            f"{file}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity, {broken[0]} "
            "first; give an earlier checkpoint, or a new copy of the file"
        )


def _check_shapes(tensors: dict[str, torch.Tensor], config: ModelConfig, title: str) -> None:
    """Compare names and shapes with those that a configuration expects."""
    with torch.device("meta"):
        network = create_from_config(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in tensors.items()}
    names = expected | actual
    wrong = [name for name in names if expected.get(name) != actual.get(name)]
    if wrong:
        details = "; ".join(
            f"{name} is {actual.get(name, 'absent')}, not {expected.get(name, 'expected')}"
            for name in wrong[:3]
        )
        raise UserError(
            f"checkpoint {title}: {len(wrong)} tensors do not fit: {details}; "
            "give the checkpoint's own --model, image size and number of classes"
        )
