"""Common parts of the baselines: all their blocks have one width and one grid of tokens."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from timm.layers import PatchEmbed

from edt.amm import AMMForm, Modulation, check_auto, default_form, set_amm_matrices
from edt.nn.config import ModelConfig
from edt.nn.layers import FinalLayer, LabelEmbedder, TimestepEmbedder
from edt.nn.transformer import DiffusionTransformer, guide
from edt.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class IsotropicConfig(ModelConfig):
    """Everything that fixes the network; saved as JSON beside the weights."""

    depth: int = 12
    """Transformer blocks."""
    hidden_size: int = 384
    """Channels of every token."""
    num_heads: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise UserError(f"depth must be at least 1, got {self.depth}")
        # The two halves of the position table need sines and cosines each.
        for divisor, what in ((self.num_heads, "num_heads"), (4, "4")):
            if divisor < 1 or self.hidden_size < 1 or self.hidden_size % divisor:
                raise UserError(f"hidden_size {self.hidden_size} is not a multiple of {what}")

    def with_width_of(self, other: "IsotropicConfig") -> Self:
        """Copy with the width and patch size of ``other``. The checkpoint decides the depths."""
        return dataclasses.replace(
            self,
            hidden_size=other.hidden_size,
            num_heads=other.num_heads,
            patch_size=other.patch_size,
        )


def read_embeddings(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Fields of the configuration that the embeddings of a checkpoint show.

    Raises:
        KeyError, ValueError: a tensor is missing or has another number of dimensions.
    """
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    _, tokens, _ = weights["pos_embed"].shape
    labels, _ = weights["y_embedder.embedding_table.weight"].shape
    return {
        "hidden_size": hidden_size,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "input_size": math.isqrt(tokens) * patch_size,
        "num_classes": labels - 1,
    }


def count_blocks(weights: Mapping[str, torch.Tensor], name: str) -> int:
    """How many blocks a checkpoint has in a list of them, e.g. "de_blocks"."""
    return len({key.split(".")[1] for key in weights if key.startswith(f"{name}.")})


class IsotropicTransformer(DiffusionTransformer):
    """Base of the baselines: embeddings, output layer, guidance and AMM.

    Attributes:
        published_amm: the blocks that the paper's authors modulate, by (hidden_size, depth). They
            do not depend on the guidance scale.
    """

    config: IsotropicConfig
    published_amm: ClassVar[Mapping[tuple[int, int], tuple[int, ...]]]

    def __init__(self, config: IsotropicConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels, self.num_classes = config.in_channels, config.num_classes
        self.modulations: tuple[Modulation, ...] = ()
        width, patch_size = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbed(config.input_size, patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.final_layer = FinalLayer(width, patch_size, 2 * config.in_channels, width)

    def embed_condition(self, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """The condition c (B, D) of timesteps (B,) and labels (B,); None is the null class."""
        if y is None:
            y = torch.full_like(t, self.num_classes, dtype=torch.long)
        return self.t_embedder(t) + self.y_embedder(y)

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None,
        cfg_scale: float,
        *,
        channels: int | None = None,
    ) -> torch.Tensor:
        """Predict with classifier-free guidance; see DiffusionTransformer."""
        if cfg_scale == 1 or y is None:
            return self(x, t, y)
        labels = torch.cat([y, torch.full_like(y, self.num_classes)])
        return guide(self(torch.cat([x, x]), torch.cat([t, t]), labels), cfg_scale, channels)

    def set_amm(
        self,
        blocks: str | Sequence[int] | None,
        *,
        form: AMMForm | None = None,
        radius: float | None = None,
        cfg_scale: float = 1.0,
    ) -> tuple[int, ...]:
        """Switch AMM on or off; see EDT.set_amm. "auto" is the same at every guidance scale."""
        if isinstance(blocks, str):
            check_auto(blocks)
            blocks = self._auto_blocks()
        form = form or default_form(self.config.uses_512_amm)
        self.modulations = set_amm_matrices(self.attention_blocks(), blocks or (), form, radius)
        return tuple(modulation.block for modulation in self.modulations)

    def _auto_blocks(self) -> tuple[int, ...]:
        """The published blocks, or those of the nearest depth, counted from the last block."""
        config, count = self.config, len(self.attention_blocks())
        size = (config.hidden_size, config.depth)
        if size in self.published_amm:
            return self.published_amm[size]
        nearest = min(self.published_amm, key=lambda known: abs(known[1] - config.depth))
        shifted = [block + count - nearest[1] for block in self.published_amm[nearest]]
        blocks = tuple(block for block in shifted if block >= 0)
        logger.warning(
            "no AMM placement is published for %s of width %d and depth %d; taking that of width "
            "%d and depth %d, counted from the last block: blocks %s",
            *(config.family, *size, *nearest, ", ".join(map(str, blocks)) or "none"),
        )
        return blocks
