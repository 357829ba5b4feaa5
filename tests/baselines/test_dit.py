import json

import golden_rule
import pytest
import torch

from edt.amm import modulation_matrix
from edt.baselines.dit import DiT, DiT_models, DiTConfig
from edt.nn.flops import forward_flops
from edt.utils.errors import UserError

GOLDEN = golden_rule.load("baselines.npz")
SMALL = {
    **{"input_size": 8, "in_channels": 3, "num_classes": 5},
    **{"depth": 3, "hidden_size": 48, "num_heads": 2},
}


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return golden_rule.normal(3, 2, 4, 32, 32), torch.tensor([17, 801]), torch.tensor([3, 999])


@pytest.fixture
def small() -> DiT:
    return golden_rule.fill(DiT_models["DiT-S/2"](**SMALL)).eval()


def small_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return golden_rule.normal(1, 2, 3, 8, 8), torch.tensor([7, 307]), torch.tensor([0, 4])


@torch.no_grad()
@pytest.mark.parametrize("size", ["S", pytest.param("XL", marks=pytest.mark.slow)])
def test_outputs_are_those_of_the_official_code(size):
    model = golden_rule.fill(DiT_models[f"DiT-{size}/2"]()).eval()
    names = {"noamm": None, "amm": "auto"}
    cases = [case for case in names if f"DiT-{size}/2.{case}" in GOLDEN]
    assert len(cases) == {"S": 2, "XL": 1}[size]
    for case in cases:
        model.set_amm(names[case])
        expected = torch.from_numpy(GOLDEN[f"DiT-{size}/2.{case}"])
        torch.testing.assert_close(model(*golden_inputs()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/4", "DiT-XL/2"])
def test_state_dict_is_that_of_the_official_checkpoints(name):
    official = json.loads((golden_rule.GOLDEN / "baselines_keys.json").read_text())[name]
    with torch.device("meta"):
        state = DiT_models[name]().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == official


def test_every_size_has_three_patch_sizes():
    sizes = [f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]
    assert list(DiT_models) == sizes


# Parameters, position table included, and multiply-accumulates at 256 pixels in G, as published.
COUNTS = {
    "DiT-S/2": (32_963_360, 6.056),
    "DiT-B/2": (130_512_416, 23.005),
    "DiT-L/2": (458_102_816, 80.698),
    "DiT-XL/2": (675_129_632, 118.621),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_accumulates(name):
    parameters, giga_multiply_accumulates = COUNTS[name]
    with torch.device("meta"):
        model = DiT_models[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(value.numel() for value in model.state_dict().values()) == parameters
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert set(model.state_dict()) - set(trainable) == {"pos_embed"}
    expected = pytest.approx(giga_multiply_accumulates, abs=5e-4)
    assert forward_flops(model) / 2e9 == expected


@pytest.mark.parametrize("name", DiT_models)
def test_configuration_is_read_off_the_tensors(name):
    with torch.device("meta"):
        model = DiT_models[name](input_size=64, num_classes=7)
    assert DiTConfig.from_state_dict(model.state_dict()) == model.config


@pytest.mark.parametrize(("width", "num_heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_the_head_count_follows_from_the_width(width, num_heads):
    with torch.device("meta"):
        state = DiT(DiTConfig(input_size=8, depth=1, hidden_size=width, num_heads=4)).state_dict()
    assert DiTConfig.from_state_dict(state).num_heads == num_heads


def test_tensors_that_do_not_show_a_size_are_refused():
    with torch.device("meta"):
        state = DiT(DiTConfig(input_size=8, depth=1, hidden_size=96, num_heads=4)).state_dict()
    with pytest.raises(UserError, match=r"heads of a DiT of width 96 is not known.*config\.json"):
        DiTConfig.from_state_dict(state)
    del state["pos_embed"]
    with pytest.raises(UserError, match="not a DiT: .*pos_embed"):
        DiTConfig.from_state_dict(state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size 100 is not a multiple of num_heads"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size 6 is not a multiple of 4"),
        ({"num_heads": 0}, "num_heads"),
        ({"depth": 0}, "depth"),
        ({"input_size": 9}, "latent side 9 is not a multiple of 2"),
        ({"num_classes": -1}, "number of classes"),
    ],
)
def test_a_configuration_that_no_network_has_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        DiTConfig(**config)


# ---------------------------------------------------------------------------------------------
# AMM


@pytest.mark.parametrize(
    ("name", "blocks", "is_published"),
    [
        ("DiT-S/2", (8, 10), True),
        ("DiT-S/8", (8, 10), True),
        ("DiT-B/2", (8, 10), False),  # those of S, which has as many blocks
        ("DiT-L/4", (11, 13, 15, 18, 20), False),  # those of XL, counted from the end
        ("DiT-XL/2", (15, 17, 19, 22, 24), True),
    ],
)
def test_auto_placement(name, blocks, is_published, caplog):
    with torch.device("meta"):
        model = DiT_models[name]()
    for cfg_scale in (1.0, 4.0):
        assert model.set_amm("auto", cfg_scale=cfg_scale) == blocks
    modulated = [block.attn.amm_matrix is not None for block in model.blocks]
    assert [i for i, is_modulated in enumerate(modulated) if is_modulated] == list(blocks)
    assert model.modulations[0].form == "256"
    is_logged = f"no AMM placement is published for DiT of width {model.config.hidden_size}"
    assert (is_logged in caplog.text) == (not is_published)
    assert model.set_amm(None) == ()


def test_blocks_before_the_first_one_are_left_out(small, caplog):
    assert small.set_amm("auto") == (1,)
    assert "blocks 1" in caplog.text
    with pytest.raises(UserError, match="block 3 does not exist"):
        small.set_amm([3])
    with pytest.raises(UserError, match="'1,2'"):
        small.set_amm("1,2")


def test_the_512_form_follows_the_images():
    with torch.device("meta"):
        model = DiT_models["DiT-S/2"](input_size=64)
    assert model.set_amm("auto") == (8, 10)
    assert model.modulations[0].form == "512"
    model.set_amm([3], form="256", radius=4.0)
    assert model.modulations == ((3, "256", 4.0),)


@torch.no_grad()
def test_amm_multiplies_the_attention_of_its_block(small):
    plain = small(*small_inputs())
    small.set_amm([2], radius=1.5)
    assert torch.equal(small.blocks[2].attn.amm_matrix, modulation_matrix(4, "256", 1.5))
    assert not torch.allclose(small(*small_inputs()), plain)
    small.set_amm(None)
    assert torch.equal(small(*small_inputs()), plain)


# ---------------------------------------------------------------------------------------------
# The interface of a network


@torch.no_grad()
def test_guidance(small):
    x, t, y = small_inputs()
    cond, uncond = small(x, t, y), small(x, t, torch.full_like(y, 5))
    assert torch.equal(small(x, t), uncond)
    assert torch.equal(small.forward_with_cfg(x, t, y, 1.0), cond)
    assert torch.equal(small.forward_with_cfg(x, t, None, 3.0), uncond)
    guided = small.forward_with_cfg(x, t, y, 3.0)
    noise = uncond[:, :3] + 3 * (cond - uncond)[:, :3]
    expected = torch.cat([noise, cond[:, 3:]], dim=1)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_backends_agree(small):
    fused = small(*small_inputs())
    small.set_attention("reference")
    assert {block.attn.backend for block in small.blocks} == {"reference"}
    torch.testing.assert_close(small(*small_inputs()), fused, atol=1e-5, rtol=0)


def test_the_blocks_are_compiled_one_by_one(small):
    assert small.compilable_modules() == list(small.blocks)
    assert small.attention_blocks() == [block.attn for block in small.blocks]


def test_there_is_no_masked_pass(small):
    assert not small.can_batch_passes
    with pytest.raises(UserError, match="DiT has no masked pass"):
        small(*small_inputs(), masks=object())


def test_a_new_network_predicts_zero_and_its_position_table_is_fixed():
    model = DiT_models["DiT-S/2"](**SMALL)
    output = model(*small_inputs())
    assert not output.any()
    output.sum().backward()
    assert model.pos_embed.grad is None
    assert model.final_layer.linear.weight.grad is not None


@torch.no_grad()
def test_bfloat16_is_close(small):
    exact = small(*small_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = small(*small_inputs())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03
