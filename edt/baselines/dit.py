"""DiT, the Diffusion Transformer (Peebles and Xie, ICCV 2023, arXiv 2212.09748).

State-dict names and shapes are those of the official checkpoints.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edt.baselines.isotropic import (
    IsotropicConfig,
    IsotropicTransformer,
    count_blocks,
    read_embeddings,
)
from edt.nn.initialisation import initialize_as_dit
from edt.nn.layers import Attention, Block, sincos_table
from edt.utils.errors import UserError

# (depth, width, heads) of every size. No two sizes have one width.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
HEADS_OF_WIDTH = {width: num_heads for _, width, num_heads in SIZES.values()}


@dataclasses.dataclass(frozen=True)
class DiTConfig(IsotropicConfig):
    """Everything that fixes the network; saved as JSON beside the weights."""

    family: str = dataclasses.field(default="DiT", init=False)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, torch.Tensor]) -> "DiTConfig":
        """Read the configuration off the tensors of a checkpoint that carries none.

        Raises:
            UserError: these are not the tensors of a DiT, or of a width that no size has.
        """
        try:
            fields = read_embeddings(weights)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint is not a DiT: a tensor is missing or has another shape ({error})"
            ) from None
        width = fields["hidden_size"]
        if width not in HEADS_OF_WIDTH:  # no tensor shows the number of heads
            raise UserError(
                f"the number of heads of a DiT of width {width} is not known; "
                f"known widths are {', '.join(map(str, HEADS_OF_WIDTH))}, and for another one put "
                "the checkpoint's config.json beside it"
            )
        depth = count_blocks(weights, "blocks")
        return cls(**fields, depth=depth, num_heads=HEADS_OF_WIDTH[width])


class DiT(IsotropicTransformer):
    """Diffusion Transformer: predicts noise and variance range of a noised latent."""

    config: DiTConfig
    can_batch_passes = False
    published_amm = {(384, 12): (8, 10), (1152, 28): (15, 17, 19, 22, 24)}

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, grid_size = config.hidden_size, config.grid_size
        # As in the official code, the fixed table is a parameter without a gradient.
        self.pos_embed = nn.Parameter(sincos_table(width, grid_size), requires_grad=False)
        blocks = (
            Block(width, config.num_heads, width, grid_size, None) for _ in range(config.depth)
        )
        self.blocks = nn.ModuleList(blocks)
        initialize_as_dit(self)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, masks: Any = None
    ) -> torch.Tensor:
        """Predict noise and variance range; see DiffusionTransformer. DiT has no masked pass."""
        if masks is not None:
            raise UserError("DiT has no masked pass; choose the masking none")
        c = self.embed_condition(t, y)  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)  # (B, 2C, S, S)

    def attention_blocks(self) -> list[Attention]:
        """The attention module of every block."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def compilable_modules(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.blocks)


# Parameters, position table included, and multiply-accumulates at 256 pixels and patch size 2:
# S 33.0 M, 6.06 G; B 130.5 M, 23.0 G; L 458.1 M, 80.7 G; XL 675.1 M, 118.6 G.
def _create(preset: dict[str, int], **config: Any) -> DiT:
    return DiT(DiTConfig(**{**preset, **config}))


DiT_models = {
    f"DiT-{size}/{patch_size}": functools.partial(
        _create,
        {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch_size},
    )
    for size, (depth, width, heads) in SIZES.items()
    for patch_size in (2, 4, 8)
}
