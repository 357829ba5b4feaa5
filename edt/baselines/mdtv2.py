"""MDTv2, the Masked Diffusion Transformer (Gao et al., ICCV 2023, arXiv 2303.14389, version 2).

In a masked pass the encoder sees some of the tokens only. A side block then interpolates the
others, and the decoder sees all of them. State-dict names and shapes are those of the official
checkpoints.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from edt.baselines.dit import SIZES
from edt.baselines.isotropic import (
    IsotropicConfig,
    IsotropicTransformer,
    count_blocks,
    read_embeddings,
)
from edt.nn.initialisation import initialize_as_dit
from edt.nn.layers import Attention, Block, RelativePositionBias, sincos_table
from edt.utils.errors import UserError

# ---------------------------------------------------------------------------------------------
# Input masks


MASK_RATIO_SPAN = 0.2  # a training step draws its ratio from mask_ratio to mask_ratio + 0.2


class InputMasks(NamedTuple):
    """Which tokens enter the encoder in a masked pass."""

    kept: torch.Tensor  # (B, n) int64, numbers of the kept tokens in raster order of the grid

    def select(self, rows: slice) -> "InputMasks":
        """The masks of some images of the batch."""
        return InputMasks(self.kept[rows])


def masks_from_noise(noise: torch.Tensor, ratio: float) -> InputMasks:
    """Keep the int(N (1 - ratio)) tokens of least noise.

    Args:
        noise: (B, N), one number per token.
        ratio: the share of tokens that is hidden.

    Raises:
        UserError: the ratio is not from 0 up to 1, or no token is left.
    """
    count = int(noise.shape[1] * (1 - ratio)) if 0 <= ratio <= 1 else 0
    if count < 1:
        raise UserError(
            f"mask ratio {ratio} leaves none of {noise.shape[1]} tokens; give one from 0 to below 1"
        )
    kept = noise.argsort(dim=1, stable=True)[:, :count]
    return InputMasks(kept.sort(dim=1).values)


# ---------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class MDTv2Config(IsotropicConfig):
    """Everything that fixes the network; saved as JSON beside the weights."""

    family: str = dataclasses.field(default="MDTv2", init=False)
    mask_ratio: float | None = 0.3
    """Least share of hidden tokens in training; None makes a network without a masked pass."""
    decode_layer: int = 6
    """Decoder blocks. Half of the other blocks take a long skip from the other half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decode_layer <= self.depth:
            raise UserError(f"decode_layer must be 0 to {self.depth}, got {self.decode_layer}")
        if self.mask_ratio is not None and not 0 <= self.mask_ratio < 1:
            raise UserError(f"mask_ratio must be 0 to below 1, got {self.mask_ratio}")

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, torch.Tensor]) -> "MDTv2Config":
        """Read the configuration off the tensors of a checkpoint that carries none.

        Raises:
            UserError: these are not the tensors of an MDTv2.
        """
        try:
            fields = read_embeddings(weights)
            table = "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"
            _, num_heads = weights[table].shape
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint is no MDTv2: a tensor is missing or has another shape ({error})"
            ) from None
        decode_layer = count_blocks(weights, "de_blocks")
        depth = 2 * count_blocks(weights, "en_inblocks") + decode_layer
        return cls(**fields, num_heads=num_heads, depth=depth, decode_layer=decode_layer)


# ---------------------------------------------------------------------------------------------
# Network


class MDTBlock(Block):
    """DiT's block with a position bias; with a long skip, a linear layer fuses it in first."""

    def __init__(self, dim: int, num_heads: int, grid_size: int, has_skip: bool = False) -> None:
        bias = RelativePositionBias(grid_size, num_heads, has_class_token=True)
        super().__init__(dim, num_heads, dim, grid_size, bias)
        self.skip_linear = nn.Linear(2 * dim, dim) if has_skip else None

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        kept: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``kept`` as in Block; ``skip`` (B, n, D) are the tokens that the long skip carries."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return super().forward(x, c, kept)


class MDTv2(IsotropicTransformer):
    """Masked Diffusion Transformer: predicts noise and variance range of a noised latent.

    AMM counts the blocks in the order en_inblocks, en_outblocks, de_blocks. The side block acts in
    the masked pass only and has no number.
    """

    config: MDTv2Config
    maskings = ("mdt", "none")
    can_batch_passes = False  # the encoder has fewer tokens in the masked pass
    published_amm = {(384, 12): (8,)}

    def __init__(self, config: MDTv2Config) -> None:
        super().__init__(config)
        width, num_heads, grid_size = config.hidden_size, config.num_heads, config.grid_size

        def blocks(count: int, has_skip: bool) -> nn.ModuleList:
            return nn.ModuleList(
                MDTBlock(width, num_heads, grid_size, has_skip) for _ in range(count)
            )

        half = (config.depth - config.decode_layer) // 2
        self.en_inblocks = blocks(half, has_skip=False)
        self.en_outblocks = blocks(half, has_skip=True)
        self.de_blocks = blocks(config.decode_layer, has_skip=True)
        self.sideblocks = blocks(1, has_skip=False)
        initialize_as_dit(self)
        # Both position tables are learned, and begin as the fixed table of DiT.
        self.pos_embed = nn.Parameter(sincos_table(width, grid_size))
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, grid_size))
        mask_token = torch.zeros(1, 1, width)
        if config.mask_ratio is not None:
            nn.init.normal_(mask_token, std=0.02)
        self.mask_token = nn.Parameter(mask_token, requires_grad=config.mask_ratio is not None)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        masks: InputMasks | None = None,
    ) -> torch.Tensor:
        """Predict noise and variance range; see DiffusionTransformer.

        Args:
            x: noised latents, (B, C, S, S).
            t: timesteps of the 1000-step process, (B,).
            y: class labels, (B,) int; the null class is ``num_classes``, and None means it for all.
            masks: of :func:`masks_from_noise`. The encoder then sees n of the N tokens.
        """
        if masks is not None and self.config.mask_ratio is None:
            raise UserError("this MDTv2 has no masked pass: its mask_ratio is None")
        kept = None if masks is None else masks.kept
        c = self.embed_condition(t, y)  # (B, D)
        x = embedded = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        if kept is not None:
            x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (B, n, D)
        skips = []
        for block in self.en_inblocks:
            x = self._encode(block, x, c, kept)
            skips.append(x)
        for block in self.en_outblocks:
            x = self._encode(block, x, c, kept, skips.pop())
        if kept is None:
            x = x + self.decoder_pos_embed
        else:
            x = self._interpolate(x, c, kept)  # (B, N, D)
        for block in self.de_blocks:
            x = block(x, c, skip=embedded)
        return self.final_layer(x, c)  # (B, 2C, S, S)

    def attention_blocks(self) -> list[Attention]:
        """The attention modules of encoder and decoder, in AMM's order."""
        return [block.attn for block in [*self.en_inblocks, *self.en_outblocks, *self.de_blocks]]

    def compilable_modules(self) -> list[nn.Module]:
        """The transformer blocks; in the masked pass the encoder's run uncompiled."""
        return [module for module in self.modules() if isinstance(module, MDTBlock)]

    def freeze_masked_pass(self) -> None:
        """Exclude side block and mask token from training."""
        self.sideblocks.requires_grad_(False)
        self.mask_token.requires_grad_(False)

    def _encode(
        self,
        block: nn.Module,
        x: torch.Tensor,
        c: torch.Tensor,
        kept: torch.Tensor | None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a block of the encoder."""
        if kept is None:
            return block(x, c, skip=skip)
        # Every training step has another number of kept tokens, and torch.compile would make
        # another graph for each. Calling forward passes by the compiled call.
        return block.forward(x, c, kept, skip)

    def _interpolate(self, x: torch.Tensor, c: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The side interpolater: kept tokens (B, n, D) to all tokens (B, N, D).

        The mask token stands for the hidden ones. The side block predicts them from all tokens, and
        the kept tokens pass by it.
        """
        batch, tokens = len(x), self.config.grid_size**2
        mask_tokens = self.mask_token.to(x.dtype).expand(batch, tokens, -1)
        index = kept.unsqueeze(-1).expand_as(x)
        before = mask_tokens.scatter(1, index, x) + self.decoder_pos_embed
        after = before
        for block in self.sideblocks:
            after = block(after, c)
        is_kept = torch.zeros(batch, tokens, dtype=torch.bool, device=x.device)
        is_kept = is_kept.scatter(1, kept, True).unsqueeze(-1)
        return torch.where(is_kept, before, after)


# The decoder of the published models: 6 blocks in S, 4 in the others. Trainable parameters and
# multiply-accumulates at 256 pixels: S 38.5 M, 6.74 G; B 150.9 M, 25.4 G; XL 742.3 M, 129.5 G.
def _create(preset: dict[str, int], **config: Any) -> MDTv2:
    return MDTv2(MDTv2Config(**{**preset, **config}))


MDTv2_models = {
    f"MDTv2-{size}/2": functools.partial(
        _create,
        {
            "depth": depth,
            "hidden_size": width,
            "num_heads": num_heads,
            "decode_layer": 6 if size == "S" else 4,
        },
    )
    for size, (depth, width, num_heads) in SIZES.items()
}
