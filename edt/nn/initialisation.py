"""Initial weights of a diffusion transformer: DiT's rules, with the additions of EDT's release."""

import itertools
from typing import TypeVar

from timm.layers import PatchEmbed
from torch import nn

from edt.nn.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    RelativePositionBias,
    TimestepEmbedder,
)

Module = TypeVar("Module", bound=nn.Module)


def initialize_as_dit(model: nn.Module) -> None:
    """Initialise every layer of a network in place. Position tables are left as they are."""
    # Linear layers: Xavier uniform, zero bias.
    for linear in _modules(model, nn.Linear):
        nn.init.xavier_uniform_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    # Patch embedding: its convolution is a linear layer on flattened patches.
    for patch_embedding in _modules(model, PatchEmbed):
        weight, bias = patch_embedding.proj.parameters()
        nn.init.xavier_uniform_(weight.view(len(weight), -1))
        nn.init.zeros_(bias)
    # Label table and weights of the timestep MLP: normal with standard deviation 0.02.
    for label_embedder in _modules(model, LabelEmbedder):
        nn.init.normal_(label_embedder.embedding_table.weight, std=0.02)
    for timestep_embedder in _modules(model, TimestepEmbedder):
        for linear in _modules(timestep_embedder, nn.Linear):
            nn.init.normal_(linear.weight, std=0.02)
    # Position biases: truncated normal with standard deviation 0.02.
    for position_bias in _modules(model, RelativePositionBias):
        nn.init.trunc_normal_(position_bias.relative_position_bias_table, std=0.02)
    # adaLN-Zero: every block begins as the identity, and the output begins at zero. The AdaLN of
    # EDT's down-sampling and long skips is not zeroed, as in the release.
    zeroed: list[nn.Module] = [block.adaLN_modulation for block in _modules(model, Block)]
    for final_layer in _modules(model, FinalLayer):
        zeroed += [final_layer.adaLN_modulation, final_layer.linear]
    for parameter in itertools.chain(*(module.parameters() for module in zeroed)):
        nn.init.zeros_(parameter)


def _modules(model: nn.Module, kind: type[Module]) -> list[Module]:
    """The modules of a type, in the order of their definition."""
    return [module for module in model.modules() if isinstance(module, kind)]
