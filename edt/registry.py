"""Models by name, and the family that a configuration or a state dict belongs to."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from edt.baselines.dit import DiT, DiT_models, DiTConfig
from edt.baselines.mdtv2 import MDTv2, MDTv2_models, MDTv2Config
from edt.models import EDT, EDT_models, EDTConfig
from edt.nn.config import ModelConfig
from edt.nn.transformer import DiffusionTransformer
from edt.utils.errors import UserError


class Family(NamedTuple):
    """A model family, and how its checkpoints are recognised."""

    network: type[DiffusionTransformer]
    config: type[ModelConfig]
    prefix: str  # of a tensor's name, in no family that comes later


# A new family adds an entry to both tables.
MODELS: dict[str, Callable[..., DiffusionTransformer]] = {
    **EDT_models,
    **DiT_models,
    **MDTv2_models,
}
FAMILIES = {
    "EDT": Family(EDT, EDTConfig, "down_blocks."),
    "MDTv2": Family(MDTv2, MDTv2Config, "sideblocks."),
    "DiT": Family(DiT, DiTConfig, "blocks."),
}


def create_model(
    name: str, *, device: torch.device | str | None = None, **config: Any
) -> DiffusionTransformer:
    """Create a freshly initialised network.

    Args:
        name: a key of :data:`MODELS`, e.g. "EDT-S/2", "DiT-XL/2" or "MDTv2-S/2".
        device: where the parameters are made; None is torch's default device, "meta" allocates
            nothing.
        **config: fields of the family's configuration, e.g. input_size (side of the latent),
            in_channels, num_classes, image_size (pixels).

    Raises:
        UserError: the name is unknown, or the configuration is invalid.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    with torch.device(device or torch.get_default_device()):
        return MODELS[name](**config)


def create_from_config(config: ModelConfig) -> DiffusionTransformer:
    """Create the network that a configuration describes."""
    return FAMILIES[config.family].network(config)


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Configuration from the JSON document of a checkpoint.

    Raises:
        UserError: the family or a key is unknown.
    """
    family = values.get("family", "EDT")  # version 0.1 had one family and did not record it
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}; is it from a newer version?")
    return FAMILIES[family].config.from_dict(values)


def config_from_state_dict(weights: Mapping[str, torch.Tensor]) -> ModelConfig:
    """Configuration read off the tensors of a checkpoint that carries none.

    Raises:
        UserError: the tensors belong to no known family.
    """
    for family in FAMILIES.values():
        if any(name.startswith(family.prefix) for name in weights):
            return family.config.from_state_dict(weights)
    prefixes = ", ".join(family.prefix for family in FAMILIES.values())
    raise UserError(
        f"the checkpoint is not an {', '.join(FAMILIES)}: no tensor's name begins with {prefixes}"
    )
