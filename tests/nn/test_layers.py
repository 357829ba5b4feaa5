import math

import golden_rule
import pytest
import torch
from timm.models.swin_transformer import PatchMerging
from torch import nn

from edt.nn.attention import attention
from edt.nn.layers import (
    AdaLNModulation,
    Attention,
    Block,
    DownSample,
    FinalLayer,
    LongSkip,
    RelativePositionBias,
    TimestepEmbedder,
    UpSample,
    layer_norm,
    modulate,
    patch_merge,
    sincos_table,
    unpatchify,
)


def coordinates(grid_size: int) -> torch.Tensor:
    """Tokens whose channels are (row, column), (1, N, 2)."""
    index = torch.arange(grid_size * grid_size)
    return torch.stack([index // grid_size, index % grid_size], dim=1)[None]


# ---------------------------------------------------------------------------------------------
# Functions


def test_position_table_by_its_formula():
    table = sincos_table(8, 3).view(3, 3, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for position in (column, row):
                expected += [math.sin(position), math.sin(position / 100)]
                expected += [math.cos(position), math.cos(position / 100)]
            torch.testing.assert_close(table[row, column], torch.tensor(expected))


def test_a_larger_grid_continues_the_position_table():
    small, large = sincos_table(8, 4).view(4, 4, 8), sincos_table(8, 6).view(6, 6, 8)
    torch.testing.assert_close(large[:4, :4], small)


def test_neighbours_are_merged_column_by_column():
    merged = patch_merge(coordinates(4))
    assert merged.shape == (1, 4, 4, 2)
    assert merged[0, 0].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert merged[0, 1].tolist() == [[0, 2], [1, 2], [0, 3], [1, 3]]
    assert merged[0, 2].tolist() == [[2, 0], [3, 0], [2, 1], [3, 1]]


def test_merging_has_the_order_of_swin():
    x = torch.randn(2, 6, 6, 5)
    merging = PatchMerging(5)
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()
    expected = merging(x).flatten(1, 2)
    assert torch.equal(patch_merge(x.flatten(1, 2)).flatten(2), expected)


def test_patches_unfold_row_by_row():
    token, row, column = torch.meshgrid(*(torch.arange(n) for n in (4, 3, 3)), indexing="ij")
    x = torch.stack([token, row, column], dim=-1).view(1, 4, 3 * 3 * 3)  # 3 channels per pixel
    image = unpatchify(x, 3)
    assert image.shape == (1, 6, 6, 3)
    assert image[0, 1, 2].tolist() == [0, 1, 2]
    assert image[0, 1, 3].tolist() == [1, 1, 0]
    assert image[0, 5, 4].tolist() == [3, 2, 1]


def test_modulation_scales_and_shifts_each_image():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    for image in range(2):
        expected = x[image] * (1 + scale[image]) + shift[image]
        torch.testing.assert_close(modulate(x, shift, scale)[image], expected)


# ---------------------------------------------------------------------------------------------
# Conditioning


def test_timesteps_become_128_cosines_and_128_sines():
    embedder = TimestepEmbedder(8)
    embeddings = []
    embedder.mlp.register_forward_pre_hook(lambda mlp, inputs: embeddings.append(inputs[0]))
    embedder(torch.tensor([0, 999]))
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    for embedding, timestep in zip(embeddings[0], (0, 999), strict=True):
        expected = torch.cat([(timestep * frequencies).cos(), (timestep * frequencies).sin()])
        torch.testing.assert_close(embedding.double(), expected, atol=1e-4, rtol=0)


def test_neighbouring_timesteps_differ_under_bfloat16():
    embedder = golden_rule.fill(TimestepEmbedder(64))
    with torch.autocast("cpu", torch.bfloat16):
        embedded = embedder(torch.tensor([999, 1000]))
    assert not torch.equal(embedded[0], embedded[1])


def test_scales_of_adaln_are_float32_under_bfloat16():
    adaln = golden_rule.fill(AdaLNModulation(8, 4, parts=3))
    with torch.autocast("cpu", torch.bfloat16):
        vectors = adaln(torch.randn(2, 8))
    assert [vector.shape for vector in vectors] == [(2, 4)] * 3
    assert {vector.dtype for vector in vectors} == {torch.float32}


# ---------------------------------------------------------------------------------------------
# Attention


def test_position_bias_has_one_value_per_offset():
    grid_size, num_heads = 3, 2
    module = golden_rule.fill(RelativePositionBias(grid_size, num_heads))
    table = module.relative_position_bias_table.view(5, 5, num_heads)
    bias = module()
    assert bias.shape == (num_heads, 9, 9)
    assert bias.is_contiguous()
    for query, (query_row, query_column) in enumerate(coordinates(grid_size)[0].tolist()):
        for key, (key_row, key_column) in enumerate(coordinates(grid_size)[0].tolist()):
            expected = table[query_row - key_row + 2, query_column - key_column + 2]
            assert torch.equal(bias[:, query, key], expected)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_amm", [True, False])
def test_attention_between_its_projections(has_bias, has_amm):
    bias = RelativePositionBias(3, 2) if has_bias else None
    module = golden_rule.fill(Attention(8, 2, 3, bias))
    if has_amm:
        module.amm_matrix = torch.rand(9, 9)
    x = torch.randn(2, 9, 8)
    qkv = module.qkv(x).view(2, 9, 3, 2, 4)
    expected = module.proj(attention(qkv, bias() if has_bias else None, module.amm_matrix))
    torch.testing.assert_close(module(x), expected)


def test_a_block_is_adaln_zero():
    """The six vectors are shift, scale and gate of the attention, then of the MLP."""
    block = golden_rule.fill(Block(8, 2, 6, 3, RelativePositionBias(3, 2)))
    x, c = torch.randn(2, 9, 8), torch.randn(2, 6)
    vectors = [vector.unsqueeze(1) for vector in block.adaLN_modulation(c)]
    expected = x + vectors[2] * block.attn(layer_norm(x) * (1 + vectors[1]) + vectors[0])
    expected += vectors[5] * block.mlp(layer_norm(expected) * (1 + vectors[4]) + vectors[3])
    torch.testing.assert_close(block(x, c), expected)


# ---------------------------------------------------------------------------------------------
# Down-sampling, up-sampling, long skip, output


@pytest.fixture
def down() -> DownSample:
    """From 8 x 8 tokens of 12 channels to 4 x 4 of 20."""
    return golden_rule.fill(DownSample(12, 20, 6, 4, tie=True, pes=True))


@torch.no_grad()
def test_a_hidden_token_cannot_pass_the_reduction(down):
    tokens, c = golden_rule.normal(5, 1, 64, 12), golden_rule.normal(6, 1, 6)
    keep = torch.ones(1, 64, dtype=torch.bool)
    keep[0, 9] = False  # row 1, column 1: the fourth quarter of the first merged token
    changed = tokens.clone()
    # The same mean and variance, so that the LayerNorm of the merged token does not change.
    changed[0, 9] = changed[0, 9].flip(0)
    torch.testing.assert_close(down(tokens, c, keep), down(changed, c, keep))
    assert not torch.allclose(down(tokens, c), down(changed, c))


@torch.no_grad()
def test_the_quarters_that_are_kept_are_not_rescaled(down):
    tokens, c = golden_rule.normal(5, 1, 64, 12), golden_rule.normal(6, 1, 6)
    keep = torch.ones(1, 64, dtype=torch.bool)
    keep[0, 9] = False
    merged = down.norm_and_modulate(patch_merge(tokens).flatten(2), c)
    merged[0, 0, 36:] = 0
    expected = down.add_positions(down.reduction(merged))
    torch.testing.assert_close(down(tokens, c, keep), expected)


@torch.no_grad()
def test_without_tie_the_layer_norm_stays():
    down = golden_rule.fill(DownSample(12, 20, 6, 4, tie=False, pes=True))
    tokens, c = golden_rule.normal(5, 1, 64, 12), golden_rule.normal(6, 1, 6)
    torch.testing.assert_close(down(tokens, c), down(10 * tokens, c), atol=1e-4, rtol=1e-4)
    assert torch.equal(down(tokens, c), down(tokens, c + 1))


@torch.no_grad()
def test_with_tie_the_condition_acts(down):
    tokens, c = golden_rule.normal(5, 1, 64, 12), golden_rule.normal(6, 1, 6)
    assert not torch.allclose(down(tokens, c), down(tokens, c + 1))


@torch.no_grad()
def test_pes_adds_the_position_table_of_the_outgoing_grid(down):
    tokens, c = golden_rule.normal(5, 2, 64, 12), golden_rule.normal(6, 2, 6)
    without = golden_rule.fill(DownSample(12, 20, 6, 4, tie=True, pes=False))
    difference = down(tokens, c) - without(tokens, c)
    expected = sincos_table(20, 4).expand(2, -1, -1)
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_long_skip_reads_both_of_its_inputs():
    module = golden_rule.fill(LongSkip(12, 6, 4, tie=True, pes=True))
    x, skip, c = torch.randn(2, 16, 12), torch.randn(2, 16, 12), torch.randn(2, 6)
    out = module(x, skip, c)
    assert out.shape == x.shape
    for changed in (module(-x, skip, c), module(x, -skip, c), module(skip, x, c)):
        assert not torch.allclose(changed, out)


@torch.no_grad()
def test_up_sampling_unfolds_every_token_into_its_own_square():
    module = golden_rule.fill(UpSample(12, 5))
    x = torch.randn(2, 4, 12)
    out = module(x)
    assert out.shape == (2, 16, 5)
    changed = x.clone()
    changed[:, 1] += 1  # the upper right token
    is_changed = (module(changed) != out).any(dim=2)[0].view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, 2:] = True
    assert torch.equal(is_changed, expected)


@torch.no_grad()
def test_the_final_layer_computes_outside_autocast():
    module = golden_rule.fill(FinalLayer(12, 2, 8, 6))
    x, c = torch.randn(2, 16, 12), torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, c)
    assert out.shape == (2, 8, 8, 8)
    assert torch.equal(out, module(x, c))
