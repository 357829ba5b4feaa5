"""Models by name, and the family that a state dict belongs to."""

from collections.abc import Mapping
from typing import Any

import torch

from edt.models import EDT, EDT_models, EDTConfig
from edt.nn.transformer import DiffusionTransformer
from edt.utils.errors import UserError

# A new family adds its models here, and a branch to create_from_config, read_config and
# config_from_state_dict.
MODELS = dict(EDT_models)


def create_model(
    name: str, *, device: torch.device | str | None = None, **config: Any
) -> DiffusionTransformer:
    """Create a freshly initialised network.

    Args:
        name: a key of :data:`MODELS`, e.g. "EDT-S/2".
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


def create_from_config(config: EDTConfig) -> DiffusionTransformer:
    """Create the network that a configuration describes."""
    return EDT(config)


def read_config(values: Mapping[str, Any]) -> EDTConfig:
    """Configuration from the JSON document of a checkpoint.

    Raises:
        UserError: a key is unknown.
    """
    return EDTConfig.from_dict(values)


def config_from_state_dict(weights: Mapping[str, torch.Tensor]) -> EDTConfig:
    """Configuration read off the tensors of a checkpoint that carries none.

    Raises:
        UserError: the tensors belong to no known family.
    """
    return EDTConfig.from_state_dict(weights)
