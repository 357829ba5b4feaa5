"""Models from checkpoint folders, run folders and .pt files."""

import dataclasses
import logging
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from edt.checkpoints.folder import MANIFEST, list_checkpoints, read_tensors, verify_file
from edt.checkpoints.release import read_release_weights, strip_prefixes
from edt.data.features import FeatureInfo
from edt.models import EDTConfig
from edt.nn.transformer import DiffusionTransformer
from edt.registry import config_from_state_dict, create_from_config, create_model, read_config
from edt.utils.choices import check_choice
from edt.utils.errors import UserError
from edt.utils.files import file_sha256, read_json

logger = logging.getLogger(__name__)

WeightsKind = Literal["ema", "model"]


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Information about a checkpoint, apart from its weights."""

    weights_file: Path
    """The file that the weights were read from."""
    weights_sha256: str
    """Its hash."""
    name: str | None
    """Name of the model, e.g. "EDT-S/2"; None for a .pt file."""
    features: FeatureInfo
    """The features that the model was trained on; fields are None where unknown."""


class Weights(NamedTuple):
    """Weights, model configuration and origin of a checkpoint."""

    tensors: dict[str, torch.Tensor]
    config: EDTConfig
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
        path: a run folder (its newest checkpoint), a checkpoint folder, a .safetensors file with
            config.json beside it, or a .pt file.
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
        expected = expected.with_width_of(create_model(model, device="meta").config)
    if input_size is not None:
        expected = dataclasses.replace(expected, input_size=input_size)
    if num_classes is not None:
        expected = dataclasses.replace(expected, num_classes=num_classes)
    _check_shapes(tensors, expected, f"{path} as {model or config.family}")
    # AMM has no weights, so only the name tells that a model is meant to run without it.
    if model is not None and model.endswith("_noAMM"):
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
    document = {}
    if file.suffix == ".safetensors":
        tensors = strip_prefixes(read_tensors(file))
        if file.with_name("config.json").exists():
            document = read_json(file.with_name("config.json"))
    else:
        tensors = read_release_weights(file, weights)
    _check_finite(tensors, file)
    features = FeatureInfo.from_dict(document.get("features", {}))
    if "model" in document:
        config = read_config(document["model"])
    else:
        config = config_from_state_dict(tensors)
    if config.image_size is None:  # not recorded in the configurations of version 0.1
        config = dataclasses.replace(config, image_size=features.image_size)
    info = CheckpointInfo(file, sha256, document.get("name"), features)
    return Weights(tensors, config, info)


def _find_weights_file(path: Path, weights: WeightsKind) -> tuple[Path, str]:
    """The file that holds the weights, and its SHA-256. No other file of weights is hashed."""
    if not path.exists():
        raise UserError(
            f"no checkpoint at {path}; give a checkpoint folder, a run folder or a .pt file"
        )
    if path.is_file():
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
    if not (path / name).exists():
        raise UserError(
            f"no {name} in {path}; give a checkpoint folder, a run folder or a .pt file"
        )
    return path / name, _sha256_with_warning(path / name)


def _sha256_with_warning(file: Path) -> str:
    """SHA-256 of a file that the user named.

    Users edit such files on purpose, so a difference from the manifest is a warning.
    """
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


def _check_finite(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Raise a UserError if weights are NaN or infinite. Every image would be, too."""
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{file}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity, {broken[0]} "
            "first; give an earlier checkpoint, or a new copy of the file"
        )


def _check_shapes(tensors: dict[str, torch.Tensor], config: EDTConfig, title: str) -> None:
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
