"""Building blocks of EDT (paper, section 3.1 and Figure 3). Shapes: B images, N = grid^2 tokens, C
channels, D = width of c.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from edt.nn.attention import attention
from edt.nn.precision import no_autocast

HEAD_DIM = 52  # head width in every stage of every model size


def sincos_table(dim: int, grid: int) -> torch.Tensor:
    """Fixed 2-D sin-cos position table, (1, grid^2, dim) float32.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos]
    of position * 10000^(-i / (dim / 4)). Positions are token indices at every resolution."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    half = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column = half.expand(grid, grid, -1)
    row = half[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, dim).float()


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the channels without affine parameters; what follows it always modulates."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AdaLN's x (1 + scale) + shift, with (B, C) parameters for (B, N, C) tokens."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def merge_2x2(x: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B, N/4, 4, C): the four neighbours (row, column) = (0,0), (1,0), (0,1),
    (1,1).
    """
    batch, tokens, channels = x.shape
    half = math.isqrt(tokens) // 2
    x = x.view(batch, half, 2, half, 2, channels).permute(0, 1, 3, 4, 2, 5)
    return x.reshape(batch, half * half, 4, channels)


def unmerge(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, N, size^2 C) with channels laid out (row, column, C) -> (B, grid * size, grid * size,
    C).
    """
    batch, tokens, channels = x.shape
    grid = math.isqrt(tokens)
    x = x.view(batch, grid, grid, size, size, channels // size**2).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, grid * size, grid * size, -1)


class AdaLN(nn.Sequential):
    """SiLU-Linear from the condition c (B, D) to ``parts`` vectors of ``dim`` channels."""

    def __init__(self, cond_dim: int, dim: int, parts: int = 2):
        super().__init__(nn.SiLU(), nn.Linear(cond_dim, parts * dim))
        self.parts = parts

    def forward(self, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        vectors = super().forward(c)
        vectors = vectors.to(
            torch.promote_types(vectors.dtype, torch.float32)
        )  # bfloat16 has no room for 1 + scale
        return vectors.chunk(self.parts, dim=1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B, D): 128 cosines and sines, then Linear-SiLU-Linear."""

    frequencies = 128

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # float32 whatever the autocast dtype: 999 is 1000 in bfloat16.
        steps = torch.arange(self.frequencies, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * steps / self.frequencies)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) -> (B, D). The last row of the table is the null class."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class RelativePositionBias(nn.Module):
    """Learned bias of BEiT's form: one value per head and per offset of query and key on the
    grid.
    """

    def __init__(self, grid: int, heads: int):
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, heads))
        row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        row, column = row.flatten(), column.flatten()
        delta_row = row[:, None] - row + grid - 1  # query minus key, from 0
        delta_column = column[:, None] - column + grid - 1
        self.register_buffer(
            "index", (delta_row * (2 * grid - 1) + delta_column).flatten(), persistent=False
        )

    def forward(self) -> torch.Tensor:
        """(heads, N, N), contiguous: added to every image's scores, it must be read in order."""
        tokens = self.grid**2
        bias = self.relative_position_bias_table.index_select(0, self.index)
        return bias.T.contiguous().view(-1, tokens, tokens)


class Attention(nn.Module):
    """Multi-head self-attention with relative position bias; local where ``modulation`` is set."""

    def __init__(self, dim: int, grid: int):
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_bias = RelativePositionBias(grid, self.heads)
        self.register_buffer("modulation", None, persistent=False)  # (N, N), see edt.amm
        self.path = "auto"  # see edt.nn.attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_DIM))
        return self.proj(attention(qkv, self.rel_pos_bias(), self.modulation, self.path))


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, grid: int, cond_dim: int):
        super().__init__()
        self.attn = Attention(dim, grid)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = AdaLN(cond_dim, dim, parts=6)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x = torch.addcmul(
            x, gate_attn.unsqueeze(1), self.attn(modulate(layer_norm(x), shift_attn, scale_attn))
        )
        return torch.addcmul(
            x, gate_mlp.unsqueeze(1), self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))
        )


class _Enhanced(nn.Module):
    """What down-sampling and long skip share: token information enhancement before their linear
    layer (TIE: AdaLN from c) and the positional encoding supplement after it (PES: a fixed table).
    Switched off, TIE leaves the plain LayerNorm and PES adds nothing."""

    def __init__(self, dim: int, out_dim: int, cond_dim: int, grid: int, tie: bool, pes: bool):
        super().__init__()
        self.adaLN_modulation = AdaLN(cond_dim, dim) if tie else None
        self.register_buffer("pos_embed", sincos_table(out_dim, grid) if pes else None)

    def enhance(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        x = layer_norm(x)
        return x if self.adaLN_modulation is None else modulate(x, *self.adaLN_modulation(c))

    def supplement(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.pos_embed is None else x + self.pos_embed


class DownSample(_Enhanced):
    """Merge 2x2 tokens: (B, N, C) -> (B, N/4, C'), optionally hiding some of the incoming tokens.

    ``grid`` is the side of the smaller, outgoing grid.
    """

    def __init__(self, dim: int, out_dim: int, cond_dim: int, grid: int, tie: bool, pes: bool):
        super().__init__(4 * dim, out_dim, cond_dim, grid, tie, pes)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        merged = self.enhance(merge_2x2(x).flatten(2), c)  # (B, N/4, 4C)
        if (
            keep is not None
        ):  # (B, N) -> (B, N/4, 4, 1): a hidden token's quarter is zeroed, the rest not rescaled
            merged = (merged.unflatten(-1, (4, -1)) * merge_2x2(keep.unsqueeze(-1))).flatten(2)
        return self.supplement(self.reduction(merged))


class UpSample(nn.Module):
    """Unfold every token into 2x2: (B, N, C) -> (B, 4N, C')."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.expand = nn.Linear(dim, 4 * out_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return unmerge(self.expand(x), 2).flatten(1, 2)


class LongSkip(_Enhanced):
    """Fuse decoder tokens with an encoder stage's input: two (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, cond_dim: int, grid: int, tie: bool, pes: bool):
        super().__init__(2 * dim, dim, cond_dim, grid, tie, pes)
        self.cat = nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor, skip: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.supplement(self.cat(self.enhance(torch.cat([x, skip], dim=-1), c)))


class FinalLayer(nn.Module):
    """Tokens to patches: (B, N, C) -> (B, out_channels, side, side), in the weights' precision
    under autocast too.
    """

    def __init__(self, dim: int, patch_size: int, out_channels: int, cond_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = AdaLN(cond_dim, dim)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        dtype = self.linear.weight.dtype
        with no_autocast(x.device):
            x, c = x.to(dtype), c.to(dtype)
            x = self.linear(modulate(layer_norm(x), *self.adaLN_modulation(c)))
        return unmerge(x, self.patch_size).permute(0, 3, 1, 2)
