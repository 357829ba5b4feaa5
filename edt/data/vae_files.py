"""The files of an ``AutoencoderKL``: where they are, and whether they are complete."""

import http.client
import json
import math
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from edt.utils.errors import UserError
from edt.utils.weights_format import check_is_plain, check_is_utf8, weights_format

REACH_TIMEOUT = 5  # seconds
SUBFOLDERS = ("", "vae")  # of a VAE alone, and of a pipeline with a VAE in it
REMEDY = "give --vae a folder with a diffusers AutoencoderKL, a hub id, or pixels"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # of an AutoencoderKL


def load_autoencoder(source: str) -> Any:
    """Load a diffusers ``AutoencoderKL`` on the CPU, in the precision of its file.

    Files in the cache of the hub are used without asking the hub, so that a machine without a
    network loads them at once.

    Args:
        source: a folder or a hub id, of an ``AutoencoderKL`` or of a pipeline with one in vae/.

    Raises:
        UserError: there is no such VAE, it cannot be fetched, or it is incomplete.
    """
    if Path(source).is_file():
        raise _error(source, "it is a file", "give --vae the folder with it and its config.json")
    autoencoder = _load_from_folder_or_hub(source)
    _check_tensors(_folder_of(source, _find_subfolder(source, local_files_only=True)))
    return autoencoder


def _load_from_folder_or_hub(source: str) -> Any:
    """Load from a folder, else from the hub's cache, else from the hub."""
    if Path(source).is_dir():
        return _load(source)
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", source):
        raise _error(source, "there is no such folder", REMEDY)
    try:
        return _load(source, local_files_only=True)
    except UserError:  # it is not in the cache, or not complete there
        _check_hub_is_reachable(source)
        return _load(source)


def _load(source: str, **options: Any) -> Any:
    """Load from a folder, the hub's cache or the hub, with diffusers' options."""
    from diffusers import AutoencoderKL  # slow to import, and pixels do without

    subfolder = _find_subfolder(source, **options)
    try:
        with _silent_diffusers():
            autoencoder, report = AutoencoderKL.from_pretrained(
                source, subfolder=subfolder, output_loading_info=True, **options
            )
    except Exception as error:  # damaged files and configurations can make diffusers raise anything
        _check_files(Path(source) / subfolder)
        raise _error(source, _first_lines(error), REMEDY) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise _error(
            source,
            f"{len(missing)} tensors are missing, such as {', '.join(missing[:3])}",
            "get a complete copy of it",
        )
    unused = sorted(name for name in report["unexpected_keys"] if name.startswith(PARTS))
    if unused:
        names = ", ".join(unused[:3])
        raise _error(
            source,
            f"its config.json has no place for {len(unused)} tensors, such as {names}",
            "get the config.json that belongs to the weights",
        )
    return autoencoder


def _find_subfolder(source: str, **options: Any) -> str:
    """The subfolder with the ``AutoencoderKL``, whose configuration is checked.

    Raises:
        UserError: there is none, or its latents cannot be brought to the range that is needed.
    """
    from diffusers import AutoencoderKL

    reasons = []
    for subfolder in SUBFOLDERS:
        if Path(source).is_dir() and not (Path(source) / subfolder / "config.json").is_file():
            reasons.append(f"{Path(subfolder) / 'config.json'} is missing")
            continue
        try:
            config = AutoencoderKL.load_config(source, subfolder=subfolder or None, **options)
        except (OSError, ValueError) as error:
            reasons.append(_first_lines(error))
            continue
        name = config.get("_class_name", "AutoencoderKL") if isinstance(config, dict) else "list"
        if name == "AutoencoderKL":
            _check_config(source, config)
            return subfolder
        reasons.append(f"it is a {name}")
    raise _error(source, reasons[0], REMEDY)


def _check_config(source: str, config: dict[str, Any]) -> None:
    """Check what brings the latents to the range that diffusion expects."""
    scaling = config.get("scaling_factor", 1.0)  # diffusers has a default for a missing one
    shift = config.get("shift_factor") or 0.0
    for name, value, is_right in (
        ("scaling_factor", scaling, _is_number(scaling) and scaling > 0),
        ("shift_factor", shift, _is_number(shift)),
    ):
        if not is_right:
            reason = f"the {name} in its config.json is {json.dumps(value)}"
            raise _error(source, reason, "write the number of its authors there")
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise _error(source, f"latents with a {name} are not supported", "give another --vae")


def _is_number(value: object) -> bool:
    is_bool = isinstance(value, bool)
    return isinstance(value, int | float) and not is_bool and math.isfinite(value)


def _weights_files(folder: Path) -> list[Path]:
    """The files of weights that diffusers reads in a folder."""
    for suffix in ("safetensors", "bin"):
        names = (f"diffusion_pytorch_model.{suffix}", f"diffusion_pytorch_model-*.{suffix}")
        files = sorted(file for name in names for file in folder.glob(name))
        if files:  # diffusers then reads no file of the next suffix
            return files
    return []


def _check_files(folder: Path) -> None:
    """Raise a UserError that says what a file is that diffusers could not read, if it is known."""
    for file in _weights_files(folder):
        weights_format(file)
        check_is_utf8(file)


def _folder_of(source: str, subfolder: str) -> Path:
    """The folder of a loaded VAE's files, which of a hub id is in the hub's cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source) / subfolder
    name = (Path(subfolder) / "config.json").as_posix()
    cached = try_to_load_from_cache(source, name, cache_dir=constants.HF_HUB_CACHE)
    return Path(str(cached)).parent


def _check_tensors(folder: Path) -> None:
    """Refuse tensors that diffusers would convert silently, and NaN and infinity.

    Raises:
        UserError: there are such tensors; the message names file and tensor.
    """
    for file in _weights_files(folder):
        is_bin = file.suffix == ".bin"
        tensors = torch.load(file, "cpu", weights_only=True) if is_bin else load_file(file)
        for name, value in tensors.items():
            if name.startswith(PARTS):
                check_is_plain(name, value, file)
                if not value.float().isfinite().all():
                    raise UserError(f"{file}: {name} holds NaN or infinity; get another copy of it")


def _check_hub_is_reachable(source: str) -> None:
    """Ask the hub once. diffusers repeats a request for half a minute before it gives up.

    Raises:
        UserError: there is no network.
    """
    from huggingface_hub import constants

    clone = source.rpartition("/")[2]
    remedy = f"put a clone of it into the working directory and give --vae ./{clone}"
    reason = "there is no such folder, it is not in the cache, and HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        if not re.match("https?://", constants.ENDPOINT):
            raise UserError(f"HF_ENDPOINT is {constants.ENDPOINT}; write https:// before it")
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=REACH_TIMEOUT).close()
            return
        except (urllib.error.HTTPError, http.client.HTTPException):
            return  # an answer
        except OSError as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLError):  # diffusers may have other certificates
                return
            reason = (
                "there is no such folder, it is not in the cache, and there is no network: "
                f"{constants.ENDPOINT} cannot be reached, {cause}"
            )
    raise _error(source, reason, remedy)


@contextmanager
def _silent_diffusers() -> Iterator[None]:
    """Without diffusers' messages, which list every missing tensor and every file it looked for."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_lines(error: Exception) -> str:
    """The beginning of an error's text, as one line."""
    return " ".join(str(error).split())[:200]


def _error(source: str, reason: str, remedy: str) -> UserError:
    return UserError(f"cannot load the VAE {source} ({reason}); {remedy}")
