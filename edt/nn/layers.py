"""Building blocks of diffusion transformers (paper, section 3.1 and Figure 3).

Shapes: B images, N tokens of a square grid in raster order, C channels, D channels of the condition
c, which is the sum of timestep and label embedding.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from edt.nn.attention import AttentionBackend, attention, no_autocast

# ---------------------------------------------------------------------------------------------
# Functions


def sincos_table(dim: int, grid_size: int) -> torch.Tensor:
    """Fixed 2-D sin-cos position table, (1, grid_size^2, dim) float32.

    The first half of the channels encodes the column, the second half the row. Each half is
    [sin, cos] of position * 10000^(-i / (dim / 4)). Positions are token indices at every
    resolution: a larger grid has larger indices, and nothing is rescaled.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    half = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid_size, dim / 2)
    column = half.expand(grid_size, grid_size, -1)
    row = half[:, None].expand(grid_size, grid_size, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid_size * grid_size, dim).float()


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the channels, without affine parameters: AdaLN scales and shifts after it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AdaLN's x (1 + scale) + shift, with (B, C) parameters for (B, N, C) tokens."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def patch_merge(x: torch.Tensor) -> torch.Tensor:
    """Collect 2x2 neighbours: (B, N, C) -> (B, N/4, 4, C).

    The neighbours stand column by column, as in the released weights: (row, column) = (0,0), (1,0),
    (0,1), (1,1).
    """
    batch, tokens, channels = x.shape
    half = math.isqrt(tokens) // 2
    x = x.view(batch, half, 2, half, 2, channels).permute(0, 1, 3, 4, 2, 5)
    return x.reshape(batch, half * half, 4, channels)


def unpatchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Unfold tokens into patches: (B, N, p^2 C) -> (B, grid_size p, grid_size p, C).

    Channels of a token are laid out as (row in the patch, column in the patch, C).
    """
    batch, tokens, channels = x.shape
    grid_size = math.isqrt(tokens)
    x = x.view(batch, grid_size, grid_size, patch_size, patch_size, channels // patch_size**2)
    x = x.permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, grid_size * patch_size, grid_size * patch_size, -1)


# ---------------------------------------------------------------------------------------------
# Conditioning


class AdaLNModulation(nn.Sequential):
    """AdaLN's parameters: SiLU-Linear from c (B, D) to ``parts`` vectors (B, dim).

    Two parts are (shift, scale). A block's six are (shift, scale, gate) of attention, then MLP."""

    def __init__(self, cond_dim: int, dim: int, parts: int = 2) -> None:
        super().__init__(nn.SiLU(), nn.Linear(cond_dim, parts * dim))
        self.parts = parts

    def forward(self, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        vectors = super().forward(c)
        # modulate computes 1 + scale. bfloat16 would round a scale below 2^-8 away, so the
        # parameters become float32 here.
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return vectors.chunk(self.parts, dim=1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B, D): 128 cosines and 128 sines, then Linear-SiLU-Linear."""

    num_frequencies = 128

    def __init__(self, dim: int) -> None:
        super().__init__()
        first = nn.Linear(2 * self.num_frequencies, dim)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # The embedding is computed in float32: bfloat16 would round timestep 999 to 1000.
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(10000) * index / self.num_frequencies)
        angle = t.float()[:, None] * frequency
        embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
        weights_dtype = next(self.mlp.parameters()).dtype
        return self.mlp(embedding.to(weights_dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) -> (B, D). The last row of the table is the null class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------
# Attention


class RelativePositionBias(nn.Module):
    """Learned bias of BEiT's form: one value per head and per offset of query and key.

    Args:
        grid_size: tokens per side, sqrt(N).
        num_heads: heads.
        has_class_token: use BEiT's whole layout, as MDTv2's checkpoints do. The table then has
            three more rows, for a class token that no network here has, and the index is saved.
    """

    relative_position_index: torch.Tensor  # (N, N) int64, row of the table for query and key

    def __init__(self, grid_size: int, num_heads: int, has_class_token: bool = False) -> None:
        super().__init__()
        side = 2 * grid_size - 1  # offsets from -(grid_size - 1) to grid_size - 1
        rows = side**2 + (3 if has_class_token else 0)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        token = torch.arange(grid_size)
        row, column = torch.meshgrid(token, token, indexing="ij")
        row, column = row.flatten(), column.flatten()
        delta_row = row[:, None] - row + grid_size - 1  # query minus key, counted from 0
        delta_column = column[:, None] - column + grid_size - 1
        index = delta_row * side + delta_column
        self.register_buffer("relative_position_index", index, persistent=has_class_token)

    def forward(self, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Bias of every pair of query and key.

        Args:
            kept: (B, n) int64, the tokens of each image in a masked pass; None means all tokens.

        Returns:
            (num_heads, N, N), or (B, num_heads, n, n) of the kept tokens.
        """
        index = self.relative_position_index
        if kept is not None:
            index = _pairs(index, kept)
        bias = self.relative_position_bias_table.index_select(0, index.flatten())
        if kept is not None:
            return bias.unflatten(0, index.shape).permute(0, 3, 1, 2)
        # The copy is contiguous because every image's scores read the bias in (head, N, N) order.
        return bias.T.contiguous().view(-1, *index.shape)


def _pairs(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Entries of (N, N) for the kept tokens (B, n) of each image, (B, n, n)."""
    return matrix[kept[:, :, None], kept[:, None, :]]


class Attention(nn.Module):
    """Multi-head self-attention on a square grid of tokens, (B, N, C) -> (B, N, C).

    Args:
        dim: channels C.
        num_heads: heads; C is divided among them.
        grid_size: tokens per side, sqrt(N).
        bias: makes the position bias that is added to the scores, see
            :class:`RelativePositionBias`; None adds none.

    Attributes:
        amm_matrix: (N, N) factor on the attention weights, or None; see edt.amm.
        backend: how attention is computed; see :data:`edt.nn.attention.ATTENTION_BACKENDS`.
    """

    amm_matrix: torch.Tensor | None

    def __init__(
        self, dim: int, num_heads: int, grid_size: int, bias: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.grid_size = num_heads, dim // num_heads, grid_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_bias = bias
        self.register_buffer("amm_matrix", None, persistent=False)
        self.backend: AttentionBackend = "auto"

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """``kept`` is (B, n) int64 if ``x`` (B, n, C) has only these tokens of the grid."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(kept)
        amm_matrix = self.amm_matrix
        if amm_matrix is not None and kept is not None:
            amm_matrix = _pairs(amm_matrix, kept).unsqueeze(1)
        return self.proj(attention(qkv, bias, amm_matrix, self.backend))


class _TanhGELU(nn.GELU):
    """GELU in its tanh approximation, as a class for timm's Mlp."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning, (B, N, C) -> (B, N, C)."""

    def __init__(
        self, dim: int, num_heads: int, cond_dim: int, grid_size: int, bias: nn.Module | None
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, grid_size, bias)
        self.mlp = Mlp(dim, 4 * dim, act_layer=_TanhGELU)
        self.adaLN_modulation = AdaLNModulation(cond_dim, dim, parts=6)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``kept`` is (B, n) int64 if ``x`` (B, n, C) has only these tokens of the grid."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        attended = self.attn(modulate(layer_norm(x), shift_attn, scale_attn), kept)
        x = torch.addcmul(x, gate_attn.unsqueeze(1), attended)
        transformed = self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))
        return torch.addcmul(x, gate_mlp.unsqueeze(1), transformed)


# ---------------------------------------------------------------------------------------------
# Down-sampling, up-sampling, long skip, output


class AdaLNProjection(nn.Module):
    """Base of DownSample and LongSkip: LayerNorm, AdaLN (TIE), linear layer, position table (PES).

    ``tie`` (token information enhancement) switches the AdaLN; the LayerNorm always runs. ``pes``
    (positional encoding supplement) switches the position table. A subclass has the linear layer.
    """

    pos_embed: torch.Tensor | None  # (1, grid_size^2, out_dim)

    def __init__(
        self, dim: int, out_dim: int, cond_dim: int, grid_size: int, tie: bool, pes: bool
    ) -> None:
        super().__init__()
        self.adaLN_modulation = AdaLNModulation(cond_dim, dim) if tie else None
        self.register_buffer("pos_embed", sincos_table(out_dim, grid_size) if pes else None)

    def norm_and_modulate(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """LayerNorm, then with TIE AdaLN's scale and shift from c; (B, N, C) -> (B, N, C)."""
        x = layer_norm(x)
        return x if self.adaLN_modulation is None else modulate(x, *self.adaLN_modulation(c))

    def add_positions(self, x: torch.Tensor) -> torch.Tensor:
        """With PES, add the position table; (B, N, C) -> (B, N, C)."""
        return x if self.pos_embed is None else x + self.pos_embed


class DownSample(AdaLNProjection):
    """Merge 2x2 tokens: (B, N, C) -> (B, N/4, C'), hiding incoming tokens in a masked pass.

    ``grid_size`` is the side of the smaller, outgoing grid.
    """

    def __init__(
        self, dim: int, out_dim: int, cond_dim: int, grid_size: int, tie: bool, pes: bool
    ) -> None:
        super().__init__(4 * dim, out_dim, cond_dim, grid_size, tie, pes)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``keep`` is (B, N) bool, True where a token is kept; None keeps all."""
        merged = self.norm_and_modulate(patch_merge(x).flatten(2), c)  # (B, N/4, 4C)
        if keep is not None:
            # The C channels of a hidden token are zeroed. The others are not scaled up as dropout
            # does, because the release does not scale them either.
            keep = patch_merge(keep.unsqueeze(-1))  # (B, N/4, 4, 1)
            merged = (merged.unflatten(-1, (4, -1)) * keep).flatten(2)
        return self.add_positions(self.reduction(merged))


class UpSample(nn.Module):
    """Unfold every token into 2x2: (B, N, C) -> (B, 4N, C')."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 4 * out_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return unpatchify(self.expand(x), 2).flatten(1, 2)


class LongSkip(AdaLNProjection):
    """Fuse decoder tokens with an encoder stage's input: two (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, cond_dim: int, grid_size: int, tie: bool, pes: bool) -> None:
        super().__init__(2 * dim, dim, cond_dim, grid_size, tie, pes)
        self.cat = nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor, skip: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        x = self.norm_and_modulate(torch.cat([x, skip], dim=-1), c)  # (B, N, 2C)
        return self.add_positions(self.cat(x))


class FinalLayer(nn.Module):
    """Tokens to image: (B, N, C) -> (B, out_channels, S, S) with S = grid_size * patch_size.

    It runs outside autocast: its output is the prediction, and bfloat16 would round it.
    """

    full_precision = True  # read by edt.nn.precision.round_weights

    def __init__(self, dim: int, patch_size: int, out_channels: int, cond_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = AdaLNModulation(cond_dim, dim)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        dtype = self.linear.weight.dtype
        with no_autocast(x.device):
            x, c = x.to(dtype), c.to(dtype)
            x = self.linear(modulate(layer_norm(x), *self.adaLN_modulation(c)))
        return unpatchify(x, self.patch_size).permute(0, 3, 1, 2)
