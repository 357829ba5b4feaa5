"""Weights on disk: the project's checkpoints, and the release's.

A checkpoint is a folder named by its step::

    model.safetensors  ema.safetensors      weights, named as in the released state dicts
    config.json                             the model's configuration, and what its features were
    optimizer.safetensors  sampler.safetensors  state.json    what only training needs
    manifest.json                           size and SHA-256 of the others

It is written under a temporary name and renamed when whole. Nothing in it is pickled.
"""

import argparse
import dataclasses
import logging
import math
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edt.models import EDT, EDT_models, EDTConfig
from edt.utils.errors import UserError
from edt.utils.files import file_sha256, read_json, sync, write_json

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, dict]
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: its final path; replaced if it exists.
        tensors: file stem -> named tensors, saved as safetensors.
        documents: file stem -> JSON value.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, named in tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in named.items()},
                temporary / f"{name}.safetensors",
            )
            sync(temporary / f"{name}.safetensors")
        for name, value in documents.items():
            write_json(temporary / f"{name}.json", value)
        write_json(
            temporary / MANIFEST,
            {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())},
        )
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the checkpoint {folder} ({error}); the ones before it are whole: make room"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fingerprint(file: Path) -> list:
    return [file.stat().st_size, file_sha256(file)]


def check_checkpoint(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        UserError: a file is missing or damaged.
    """
    for name, fingerprint in read_json(folder / MANIFEST).items():
        if not (folder / name).is_file() or _fingerprint(folder / name) != fingerprint:
            raise UserError(f"{folder / name} is damaged or missing")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``; damaged ones are named in a warning and passed
    over.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            check_checkpoint(checkpoint)
            return checkpoint
        except UserError as error:
            logger.warning("skipping checkpoint %s: %s", checkpoint.name, error)
    return None


def prune_checkpoints(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the last ``keep_last`` checkpoints and those whose step is a multiple of
    ``keep_every``.
    """
    for old in list_checkpoints(folder)[:-keep_last]:
        if int(old.name) % keep_every:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest step first."""
    return sorted(
        (path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name)
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); is it a whole checkpoint?") from None


def read_release(path: Path) -> dict:
    """The contents of a ``.pt`` of the release, {model, ema, opt, args} or a bare state dict,
    without unpickling code.

    ``args`` is an ``argparse.Namespace``, the one class allowed besides tensors.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and is not loaded; export its weights alone"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}); give a checkpoint folder or a .pt file"
        ) from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(contents).__name__}")
    return contents


def _strip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without what DDP and torch.compile put in front."""
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in weights.items()
    }


def weights_file(path: str | Path, which: str = "ema") -> Path:
    """The file that holds the weights ``which`` of a checkpoint folder, of a run's newest
    checkpoint, or the file itself.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"no checkpoint at {path}; give a checkpoint folder, a run folder or a .pt file"
        )
    if path.is_dir():
        newest = newest_checkpoint(path / "checkpoints")
        if newest is None and list_checkpoints(path / "checkpoints"):
            raise UserError(
                f"no whole checkpoint in {path / 'checkpoints'}; give another run folder or a .pt file"
            )
        path = (newest or path) / f"{which}.safetensors"
        if not path.exists():
            raise UserError(
                f"no {path.name} in {path.parent}; give a checkpoint folder, a run folder or a .pt file"
            )
    return path


def fingerprint_weights(path: str | Path, which: str = "ema") -> str:
    """SHA-256 of the file that :func:`weights_file` finds."""
    return file_sha256(weights_file(path, which))


def read_weights(
    path: str | Path, which: str = "ema"
) -> tuple[dict[str, torch.Tensor], EDTConfig, dict]:
    """Weights, model configuration and notes of a checkpoint.

    Args:
        path: a checkpoint folder, a run folder (its newest checkpoint), a .safetensors file with
            config.json beside it, or a .pt of the release.
        which: "ema" or "model".

    Returns:
        named tensors, their configuration (read off the tensors where none is saved), and
        config.json's contents.
    """
    path = weights_file(path, which)
    if path.suffix == ".safetensors":
        weights, notes = _strip(read_tensors(path)), path.with_name("config.json")
        notes = read_json(notes) if notes.exists() else {}
    else:
        contents = read_release(path)
        weights, notes = contents.get(which, contents), {}
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            mend = (
                "give --weights model, or export the weights alone"
                if "model" in contents
                else "export the weights alone"
            )
            raise UserError(f"{path} holds no named tensors as {which}; {mend}")
        weights = _strip(weights)
    config = (
        EDTConfig.from_dict(notes["model"])
        if "model" in notes
        else EDTConfig.from_state_dict(weights)
    )
    return weights, config, notes


def load_model(
    path: str | Path,
    model: str | None = None,
    *,
    which: str = "ema",
    input_size: int | None = None,
    num_classes: int | None = None,
) -> tuple[EDT, dict]:
    """An EDT in eval mode with the weights of a checkpoint, and the checkpoint's notes
    (config.json, or {}).

    The checkpoint says what it is; ``model``, ``input_size`` and ``num_classes`` are what the user
    takes it for.

    Raises:
        UserError: the checkpoint is something else, naming tensors with both shapes.
    """
    weights, config, notes = read_weights(path, which)
    wanted = {"input_size": input_size, "num_classes": num_classes}
    if model is not None:
        preset = build(model, device="meta").config
        wanted |= {"heads": preset.heads, "patch_size": preset.patch_size}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    _check_shapes(
        weights, dataclasses.replace(config, **wanted, amm=None), f"{path} as {model or 'an EDT'}"
    )
    if model is not None and model.endswith("_noAMM"):
        config = dataclasses.replace(config, amm=None)
    network = EDT(config)
    network.load_state_dict(weights)
    return network.eval(), notes


def init_from(model: EDT, weights: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Start a model from another's weights: what fits is taken, for fine-tuning on other classes or
    another resolution.

    Position biases of another grid are resized (bicubic over the offsets); of a label table of
    another class count the null class is kept.

    Returns:
        {"kept", "resized", "new"}: names of parameters.
    """
    report: dict[str, list[str]] = {"kept": [], "resized": [], "new": []}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = weights.get(name)
            if found is None or found.shape[1:] != parameter.shape[1:]:
                report["new"].append(name)
            elif found.shape == parameter.shape:
                parameter.copy_(found)
                report["kept"].append(name)
            elif name.endswith("relative_position_bias_table"):
                old, new = (math.isqrt(len(table)) for table in (found, parameter))
                grid = found.T.reshape(1, -1, old, old)
                resized = torch.nn.functional.interpolate(
                    grid, size=(new, new), mode="bicubic", align_corners=True
                )
                parameter.copy_(resized.reshape(-1, new * new).T)
                report["resized"].append(name)
            elif name == "y_embedder.embedding_table.weight":
                parameter[-1] = found[-1]
                report["resized"].append(name)
            else:
                report["new"].append(name)
    return report


def build(model: str, device: str = "cpu", **config) -> EDT:
    """``EDT_models[model](**config)``; an unknown name is a UserError."""
    if model not in EDT_models:
        raise UserError(f"unknown model {model!r}; choose one of {', '.join(EDT_models)}")
    with torch.device(device):
        return EDT_models[model](**config)


def _check_shapes(weights: dict[str, torch.Tensor], config: EDTConfig, title: str) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in EDT(config).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        shown = "; ".join(
            f"{name} is {found.get(name, 'absent')}, not {expected.get(name, 'expected')}"
            for name in wrong[:3]
        )
        raise UserError(
            f"checkpoint {title}: {len(wrong)} tensors do not fit: {shown}; give the --model, image size and classes it has"
        )


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> tuple[dict[str, torch.Tensor], dict]:
    """Optimizer state as tensors named "parameter/buffer", and the rest (step counters) as JSON
    values.
    """
    state, tensors, rest = optimizer.state_dict(), {}, {}
    for name, index in zip(names, state["param_groups"][0]["params"], strict=True):
        for key, value in state["state"].get(index, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}/{key}"] = value
            else:
                rest[f"{name}/{key}"] = value
    step = state["param_groups"][0].get("step")
    return tensors, {"step": None if step is None else int(step), "values": rest}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Iterable[str],
    tensors: dict[str, torch.Tensor],
    rest: dict,
) -> None:
    """Inverse of :func:`flatten_optimizer`."""
    state = optimizer.state_dict()
    index_of = dict(zip(names, state["param_groups"][0]["params"], strict=True))
    state["state"] = {}
    for key, value in {**tensors, **rest["values"]}.items():
        name, _, buffer = key.rpartition("/")
        state["state"].setdefault(index_of[name], {})[buffer] = value
    if rest["step"] is not None:
        state["param_groups"][0]["step"] = rest["step"]
    optimizer.load_state_dict(state)
