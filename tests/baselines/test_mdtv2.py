import json
import math

import golden_rule
import pytest
import torch

from edt.baselines.mdtv2 import (
    InputMasks,
    MDTBlock,
    MDTv2,
    MDTv2_models,
    MDTv2Config,
    masks_from_noise,
)
from edt.nn.compilation import compile_network
from edt.nn.flops import forward_flops
from edt.nn.layers import layer_norm
from edt.utils.errors import UserError

SMALL = {
    **{"input_size": 8, "in_channels": 3, "num_classes": 5},
    **{"depth": 6, "decode_layer": 2, "hidden_size": 48, "num_heads": 2},
}


@pytest.fixture
def small() -> MDTv2:
    model = golden_rule.fill(MDTv2_models["MDTv2-S/2"](**SMALL)).eval()
    with torch.no_grad():  # equal tables would hide that one stands in for the other
        model.decoder_pos_embed.copy_(golden_rule.normal(4, *model.decoder_pos_embed.shape))
    return model


def small_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return golden_rule.normal(1, 2, 3, 8, 8), torch.tensor([7, 307]), torch.tensor([0, 4])


def small_masks(ratio: float = 0.4) -> InputMasks:
    return masks_from_noise(golden_rule.normal(2, 2, 16), ratio)


@torch.no_grad()
def test_outputs_are_those_of_the_official_code():
    model = golden_rule.fill(MDTv2_models["MDTv2-S/2"](mask_ratio=0.3, decode_layer=6)).eval()
    x, t = golden_rule.normal(3, 2, 4, 32, 32), torch.tensor([17, 801])
    output = model(x, t, torch.tensor([3, 999]))
    expected = torch.from_numpy(golden_rule.load("baselines.npz")["MDTv2-S/2.noamm"])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_state_dict_is_that_of_the_official_checkpoints():
    official = json.loads((golden_rule.GOLDEN / "baselines_keys.json").read_text())["MDTv2-S/2"]
    with torch.device("meta"):
        state = MDTv2_models["MDTv2-S/2"]().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == official


# Trainable parameters (None: not published), and multiply-accumulates at 256 pixels in G.
COUNTS = [
    ("MDTv2-S/2", 6, 38_454_872, 6.735),
    ("MDTv2-B/2", 4, 150_931_856, 25.421),
    ("MDTv2-B/2", 6, None, 25.723),
    ("MDTv2-XL/2", 4, 742_263_904, 129.493),
]


@pytest.mark.parametrize(("name", "decode_layer", "parameters", "macs"), COUNTS)
def test_parameters_and_multiply_accumulates(name, decode_layer, parameters, macs):
    with torch.device("meta"):
        model = MDTv2_models[name](decode_layer=decode_layer)
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert parameters in (None, trainable)
    assert forward_flops(model) / 2e9 == pytest.approx(macs, abs=5e-4)


@pytest.mark.parametrize("name", MDTv2_models)
def test_configuration_is_read_off_the_tensors(name):
    with torch.device("meta"):
        model = MDTv2_models[name](input_size=64, num_classes=7)
    assert MDTv2Config.from_state_dict(model.state_dict()) == model.config
    assert model.config.decode_layer == (6 if name == "MDTv2-S/2" else 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"decode_layer": 13}, "decode_layer must be 0 to 12, got 13"),
        ({"decode_layer": -1}, "decode_layer"),
        ({"mask_ratio": 1.0}, "mask_ratio must be 0 to below 1, got 1.0"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_heads"),
    ],
)
def test_a_configuration_that_no_network_has_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        MDTv2Config(**config)


def test_other_tensors_are_refused():
    with torch.device("meta"):
        state = MDTv2_models["MDTv2-S/2"](**SMALL).state_dict()
    del state["sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"]
    with pytest.raises(UserError, match="no MDTv2: .*sideblocks.0"):
        MDTv2Config.from_state_dict(state)


# ---------------------------------------------------------------------------------------------
# The masked pass


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 256), (0.3, 179), (0.4, 153), (0.5, 128)])
def test_the_tokens_of_least_noise_are_kept(ratio, count):
    noise = torch.rand(3, 256, generator=torch.Generator().manual_seed(0))
    kept = masks_from_noise(noise, ratio).kept
    assert kept.shape == (3, count)
    for row, numbers in zip(noise, kept, strict=True):
        assert numbers.unique().tolist() == numbers.tolist()  # in raster order, none twice
        hidden = torch.ones(256, dtype=torch.bool).scatter(0, numbers, False)
        assert count == 256 or row[numbers].max() < row[hidden].min()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, 0.95])
def test_a_ratio_that_keeps_no_token_is_refused(ratio):
    with pytest.raises(UserError, match="mask ratio .* leaves none of 16 tokens"):
        masks_from_noise(torch.zeros(1, 16), ratio)


def masked_pass(model: MDTv2, masks: InputMasks) -> torch.Tensor:
    """The masked pass of the small inputs, on all tokens.

    The encoder computes hidden tokens too, but no token attends to them, and their values are
    replaced by the mask token in the end.
    """
    x, t, y = small_inputs()
    tokens = model.config.grid_size**2
    c = model.t_embedder(t) + model.y_embedder(y)
    is_hidden = torch.ones(len(x), tokens, dtype=torch.bool).scatter(1, masks.kept, False)

    def run(
        block: MDTBlock, x: torch.Tensor, skip: torch.Tensor | None, sees_all: bool
    ) -> torch.Tensor:
        if skip is not None:
            x = block.skip_linear(torch.cat([x, skip], dim=-1))
        parts = [part.unsqueeze(1) for part in block.adaLN_modulation(c)]
        qkv = block.attn.qkv(layer_norm(x) * (1 + parts[1]) + parts[0])
        q, k, v = qkv.view(len(x), tokens, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + block.attn.rel_pos_bias()
        if not sees_all:
            scores = scores.masked_fill(is_hidden[:, None, None], -math.inf)
        weights = scores.softmax(dim=-1)
        if block.attn.amm_matrix is not None:
            weights = weights * block.attn.amm_matrix
        attended = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + parts[2] * attended
        return x + parts[5] * block.mlp(layer_norm(x) * (1 + parts[4]) + parts[3])

    x = embedded = model.x_embedder(x) + model.pos_embed
    skips = []
    for block in model.en_inblocks:
        x = run(block, x, None, sees_all=False)
        skips.append(x)
    for block, skip in zip(model.en_outblocks, reversed(skips), strict=True):
        x = run(block, x, skip, sees_all=False)
    x = torch.where(is_hidden.unsqueeze(-1), model.mask_token, x) + model.decoder_pos_embed
    (side_block,) = model.sideblocks
    interpolated = run(side_block, x, None, sees_all=True)
    x = torch.where(is_hidden.unsqueeze(-1), interpolated, x)
    for block in model.de_blocks:
        x = run(block, x, embedded, sees_all=True)
    return model.final_layer(x, c)


@torch.no_grad()
@pytest.mark.parametrize("amm", [None, [0, 3, 5]])
def test_hidden_tokens_leave_the_encoder_and_are_interpolated(small, amm):
    small.set_amm(amm, radius=2.0)
    output = small(*small_inputs(), small_masks())
    expected = masked_pass(small, small_masks())
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert (output - small(*small_inputs())).norm() > 0.01 * output.norm()


@torch.no_grad()
def test_the_order_of_kept_tokens_makes_no_difference(small):
    output = small(*small_inputs(), small_masks())
    shuffled = InputMasks(small_masks().kept.flip(1))
    torch.testing.assert_close(small(*small_inputs(), shuffled), output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_masked_pass_that_hides_nothing_is_the_full_pass(small):
    full = small(*small_inputs())
    output = small(*small_inputs(), small_masks(ratio=0.0))
    torch.testing.assert_close(output, full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_of_some_images(small):
    x, t, y = small_inputs()
    rows = slice(1, 2)
    output = small(x, t, y, small_masks())[rows]
    alone = small(x[rows], t[rows], y[rows], small_masks().select(rows))
    torch.testing.assert_close(alone, output, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient_in_a_masked_pass(small):
    small.train()(*small_inputs(), small_masks()).square().mean().backward()
    assert [n for n, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_only_the_masked_pass_uses_the_side_block_and_the_mask_token(small):
    small.train()(*small_inputs()).square().mean().backward()
    unused = {name.split(".")[0] for name, p in small.named_parameters() if p.grad is None}
    assert unused == {"sideblocks", "mask_token"}


def test_a_network_without_a_mask_ratio_has_no_masked_pass():
    model = MDTv2_models["MDTv2-S/2"](**SMALL, mask_ratio=None)
    assert not model.mask_token.requires_grad
    assert not model.mask_token.any()
    with pytest.raises(UserError, match="mask_ratio is None"):
        model(*small_inputs(), small_masks())
    assert not MDTv2.can_batch_passes


# ---------------------------------------------------------------------------------------------
# AMM and the interface of a network


def test_amm_counts_encoder_and_decoder_blocks_without_the_side_block():
    with torch.device("meta"):
        model = MDTv2_models["MDTv2-S/2"]()
    assert model.set_amm("auto", cfg_scale=3.8) == (8,)
    modulated = [
        name for name, m in model.named_modules() if getattr(m, "amm_matrix", None) is not None
    ]
    assert modulated == ["de_blocks.2.attn"]
    names = {id(module): name for name, module in model.named_modules()}
    lists = [name for name in ("en_inblocks", "en_outblocks") for _ in range(3)] + 6 * ["de_blocks"]
    order = [names[id(attention)].split(".")[0] for attention in model.attention_blocks()]
    assert order == lists
    with pytest.raises(UserError, match="block 12 does not exist; the model has blocks 0 to 11"):
        model.set_amm([12])


@pytest.mark.parametrize(
    ("name", "decode_layer", "block", "module"),
    [
        ("MDTv2-B/2", 4, 8, "de_blocks.0"),
        ("MDTv2-B/2", 6, 8, "de_blocks.2"),
        ("MDTv2-L/2", 4, 20, "de_blocks.0"),
        ("MDTv2-XL/2", 4, 24, "de_blocks.0"),
        ("MDTv2-B/2", 5, 7, "de_blocks.1"),  # 3 + 3 + 5 blocks
    ],
)
def test_auto_placement_beyond_s_is_that_of_s_counted_from_the_end(
    name, decode_layer, block, module, caplog
):
    with torch.device("meta"):
        model = MDTv2_models[name](decode_layer=decode_layer)
    assert model.set_amm("auto") == (block,)
    assert model.get_submodule(module).attn.amm_matrix is not None
    assert "no AMM placement is published for MDTv2" in caplog.text


@torch.no_grad()
def test_guidance(small):
    x, t, y = small_inputs()
    cond, uncond = small(x, t, y), small(x, t)
    guided = small.forward_with_cfg(x, t, y, 3.0)
    noise = uncond[:, :3] + 3 * (cond - uncond)[:, :3]
    expected = torch.cat([noise, cond[:, 3:]], dim=1)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


def test_the_attention_backend_of_every_block_is_set(small):
    small.set_attention("reference")
    blocks = [module for module in small.modules() if isinstance(module, MDTBlock)]
    assert len(blocks) == 7
    assert {block.attn.backend for block in blocks} == {"reference"}


def test_masked_passes_of_other_lengths_compile_nothing_new(small):
    compile_network(small, "block")
    calls = []
    for block in small.compilable_modules():
        block._compiled_call_impl = lambda *args, block=block, **kwargs: (
            calls.append(block) or block._call_impl(*args, **kwargs)
        )
    small(*small_inputs())
    encoder, decoder = [*small.en_inblocks, *small.en_outblocks], list(small.de_blocks)
    assert calls == encoder + decoder
    calls.clear()
    small(*small_inputs(), small_masks())
    assert calls == [*small.sideblocks, *decoder]


def test_both_position_tables_are_learned_and_begin_fixed():
    torch.manual_seed(0)
    model = MDTv2_models["MDTv2-S/2"](**{**SMALL, "hidden_size": 384})
    assert torch.equal(model.pos_embed, model.decoder_pos_embed)
    assert model.pos_embed.requires_grad and model.decoder_pos_embed.requires_grad
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    for module in model.modules():
        if isinstance(module, MDTBlock):
            table = module.attn.rel_pos_bias.relative_position_bias_table
            assert table.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model(*small_inputs()).any()  # adaLN-Zero


@torch.no_grad()
@pytest.mark.parametrize("is_masked", [False, True])
def test_bfloat16_is_close(small, is_masked):
    masks = small_masks() if is_masked else None
    exact = small(*small_inputs(), masks)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = small(*small_inputs(), masks)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03
