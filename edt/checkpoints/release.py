"""The release's .pt files, read without unpickling code, and the names of weights in them."""

import argparse
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edt.utils.errors import UserError
from edt.utils.weights_format import ZIP, check_is_plain, check_is_utf8

logger = logging.getLogger(__name__)
READ_SIZE = 2**20  # bytes

# What wrappers of a network add to the names of its weights. Those of torch.compile, FSDP,
# activation checkpointing, Lightning Fabric and Opacus stand around any module, the others around
# the whole network only.
INNER_WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_module",
}
OUTER_WRAPPERS = {"module", "model", "ema_model", "net"}


def read_release(path: Path) -> dict[str, Any]:
    """The content of a .pt file: {model, ema, opt, args}, or a bare state dict.

    ``args`` of the release is an ``argparse.Namespace``, the only class that is allowed in
    addition to tensors.

    Args:
        path: a file of torch.save, see :func:`edt.utils.weights_format.weights_format`.

    Raises:
        UserError: the file cannot be read, or it holds other classes.
    """
    if path.suffix == ".safetensors":  # torch.load would believe the name
        raise UserError(f"{path} was written by torch.save; rename it to {path.stem}.pt")
    # torch.save before 1.6 wrote no zip archive, and only an archive can be mapped into memory.
    is_zip = _is_zip(path)
    if is_zip:
        check_is_utf8(path)
        _check_checksums(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the bytes of a damaged file can make torch raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} holds more than tensors ({refused[1]}) and is not loaded; "
                "export its weights alone"
            ) from None
        raise UserError(
            f"{path} is damaged or cut short ({type(error).__name__}); get it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def read_release_weights(path: Path, weights: str) -> tuple[dict[Any, Any], str | None]:
    """The state dict in a .pt file, and which of its entries it is.

    Args:
        path: the file.
        weights: "ema" or "model", the entry to take; a bare state dict has neither, nor has
            {state_dict: ...}.

    Returns:
        the state dict, which :func:`bare_weights` checks, and ``weights``, or None for a bare one.

    Raises:
        UserError: the file cannot be read, or the entry holds no tensors.
    """
    content = read_release(path)
    tensors = content.get(weights, content)
    state_dicts = [key for key, value in content.items() if _is_state_dict(value)]
    if weights not in content and state_dicts == ["state_dict"]:  # as Lightning saves it
        tensors = content["state_dict"]
    if not _is_state_dict(tensors):
        remedy = "export the weights alone"
        if "model" in content and weights != "model":
            remedy = f"give --weights model, or {remedy}"
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise UserError(f"{path} holds no named tensors as {weights} (it holds {found}); {remedy}")
    return tensors, weights if weights in content else None


def _is_state_dict(values: object) -> bool:
    """Whether this is a dict of tensors, apart from single numbers."""
    if not isinstance(values, dict):
        return False
    containers = (dict, list, tuple, argparse.Namespace)
    has_tensor = any(map(torch.is_tensor, values.values()))
    return has_tensor and not any(isinstance(value, containers) for value in values.values())


def bare_weights(values: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """Weights under the network's own names.

    Single numbers, such as the ``n_averaged`` of torch's AveragedModel, are no weights of a
    transformer. A warning names them.

    Args:
        values: a state dict.
        path: where it comes from, for messages.

    Raises:
        UserError: two weights have one name, or a tensor holds no plain floating-point numbers.
    """
    weights: dict[str, torch.Tensor] = {}
    dropped = []
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(
                f"{path} is no state dict: its key {name!r} is no name; export the weights alone"
            )
        bare = _bare_name(name)
        if not torch.is_tensor(value) or value.numel() == 1:
            dropped.append(name)
        elif bare in weights:
            raise UserError(
                f"{path} holds {bare} twice, once as {name}; export one set of weights alone"
            )
        else:
            check_is_plain(name, value, path)
            weights[bare] = value
    scales = [name for name in dropped if "scale" in name]
    if scales and any(value.dtype.itemsize == 1 for value in weights.values()):
        raise UserError(
            f"{path} holds 8-bit weights with scales, such as {scales[0]}; "
            "quantized weights are not supported; export float ones"
        )
    if dropped:
        names = ", ".join(dropped[:8])
        logger.warning("%s: left out what is no weight: %s", path, names)
    return weights


def _bare_name(name: str) -> str:
    """A name without wrappers, in whatever order and number they were put around the network."""
    parts = [part for part in name.split(".") if part not in INNER_WRAPPERS]
    while len(parts) > 1 and parts[0] in OUTER_WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def _check_checksums(path: Path) -> None:
    """Read the whole archive and compare its checksums, which torch does not.

    A checksum of 0 means that none was written, see torch.serialization.set_crc32_options.

    Raises:
        UserError: one of them differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in filter(lambda member: member.CRC, archive.infolist()):
                with archive.open(member) as file:
                    while file.read(READ_SIZE):
                        pass
    except Exception as error:  # as above
        raise UserError(f"{path} is damaged ({error}); get it again") from None
