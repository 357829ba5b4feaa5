"""The recipe.json beside a folder of samples, which says how they were made."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch

import edt
from edt.amm import Modulation
from edt.sampling.config import SamplingConfig
from edt.utils.files import check_settings, make_folder, read_json, write_json

SIDECAR = "recipe.json"


def amm_settings(modulations: tuple[Modulation, ...]) -> dict[str, Any]:
    """The AMM of a model as JSON values."""
    return {
        "blocks": [modulation.block for modulation in modulations],
        "form": modulations[0].form if modulations else None,
        "radii": [modulation.radius for modulation in modulations],
    }


def sample_settings(
    config: SamplingConfig,
    model: Any,
    modulations: tuple[Modulation, ...],
    weights: str,
    weights_sha256: str,
    vae: str,
    vae_sha256: str | None,
    image_size: int,
    vae_config_sha256: str | None = None,
) -> dict[str, Any]:
    """Everything that the samples depend on, as JSON values.

    Args:
        config: how they are sampled.
        model: configuration of the network, a dataclass.
        modulations: the AMM in use.
        weights: which weights they are, see edt.checkpoints.loading.CheckpointInfo.
        weights_sha256: hash of the file that the weights were read from.
        vae: name of the VAE.
        vae_sha256: hash of its weights; None for "pixels", which has none.
        image_size: pixels per side.
        vae_config_sha256: hash of the configuration that the VAE computes with; None for "pixels".
    """
    config_hash = {} if vae_config_sha256 is None else {"vae_config_sha256": vae_config_sha256}
    return {
        **dataclasses.asdict(config),
        "weights": weights,
        "weights_sha256": weights_sha256,
        "model": dataclasses.asdict(model),
        "vae": vae,
        "vae_sha256": vae_sha256,
        "image_size": image_size,
        **config_hash,
        "amm": amm_settings(modulations),
    }


def library_versions() -> dict[str, str]:
    """Versions of what computes images, for the record."""
    return {
        "python": platform.python_version(),
        "edt": edt.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def open_sample_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings in a new folder of samples, or compare them with the recorded ones.

    Args:
        folder: of the samples; created if it does not exist.
        settings: see :func:`sample_settings`.

    Raises:
        UserError: the folder holds samples of other settings; the message names the fields.
    """
    path = make_folder(folder) / SIDECAR
    if path.exists():
        recorded = read_json(path)
        recorded["model"] = _upgrade_model(recorded.get("model", {}), settings["model"])
        check_settings(folder, recorded, settings, "give another --output-dir")
        return
    write_json(path, {**settings, "versions": library_versions()})


def _upgrade_model(recorded: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """A recorded model configuration with today's keys.

    Version 0.1 called num_heads "heads", and it did not record every field of today.
    """
    renamed = {"num_heads" if key == "heads" else key: recorded[key] for key in recorded}
    return {**current, **renamed}
