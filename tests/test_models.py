import dataclasses
import json

import golden_rule
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edt.masking import EDT_RATIOS, MID_RATIO, TokenMasks, draw_masks
from edt.models import EDT, HEAD_DIM, EDT_models, EDTConfig
from edt.utils.errors import UserError

GOLDEN = golden_rule.load("edt.npz")


@pytest.fixture(scope="module", params=["S", "B"])
def sized(request):
    return request.param, golden_rule.fill(EDT_models[f"EDT-{request.param}/2"]()).eval()


@pytest.fixture
def tiny() -> EDT:
    return golden_rule.fill(EDT_models["EDT-Tiny/2"](input_size=16, num_classes=5)).eval()


def inputs(batch: int = 2, side: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        golden_rule.normal(1, batch, 4, side, side),
        torch.arange(batch) * 300 + 7,
        torch.arange(batch) % 5,
    )


@torch.no_grad()
def test_outputs_are_those_of_the_release(sized):
    size, model = sized
    x, t, y = golden_rule.normal(0, 2, 4, 32, 32), torch.tensor([17, 801]), torch.tensor([3, 999])
    met = 0
    for case, blocks, cfg_scale in (
        ("noamm", None, 1),
        ("amm", "auto", 1.5),
        ("amm.highcfg", "auto", 2.0),
    ):
        if f"{size}.256.{case}" in GOLDEN:
            model.set_amm(blocks, cfg_scale=cfg_scale)
            expected = torch.from_numpy(GOLDEN[f"{size}.256.{case}"])
            torch.testing.assert_close(model(x, t, y), expected, atol=1e-5, rtol=0)
            met += 1
    assert met == {"S": 3, "B": 1}[size]


@torch.no_grad()
def test_masked_pass_is_that_of_the_release():
    model = golden_rule.fill(EDT_models["EDT-S/2"]()).eval()
    masks = TokenMasks(
        *(torch.from_numpy(GOLDEN[f"S.256.masked.keep_{m}"]).bool() for m in ("down0", "down1"))
    )
    out = model(
        golden_rule.normal(2, 2, 4, 32, 32), torch.tensor([250, 990]), torch.tensor([1, 2]), masks
    )
    torch.testing.assert_close(out, torch.from_numpy(GOLDEN["S.256.masked"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["S", "B", "XL"])
def test_state_dict_is_that_of_the_released_checkpoints(size):
    released = json.loads((golden_rule.GOLDEN / "edt_keys.json").read_text())[f"EDT-{size}/2"]
    with torch.device("meta"):
        state = EDT_models[f"EDT-{size}/2"]().state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == released


# Parameters, state-dict elements, multiply-accumulates at 256 and 512 px in G: the release's, and
# for "-paper" the paper's published totals.
COUNTS = {
    "EDT-S/2": (38_329_146, 38_550_458, 2.667, 13.299),
    "EDT-B/2": (152_262_100, 152_704_724, 10.218, 46.059),
    "EDT-XL/2": (698_523_098, 699_187_034, 53.440, 233.66),
    "EDT-XL/2-paper": (708_444_968, None, 51.834, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_accumulates(name):
    parameters, elements, *macs = COUNTS[name]
    for side, expected in zip((32, 64), macs, strict=True):
        with torch.device("meta"):
            model = EDT_models[name](input_size=side)
            with FlopCounterMode(display=False) as counter:
                model(
                    torch.empty(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
                )
        if expected is not None:
            assert counter.get_total_flops() / 2e9 == pytest.approx(
                expected, abs=0.005 if expected > 100 else 5e-4
            )
        if side == 32:
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
            assert elements in (None, sum(value.numel() for value in model.state_dict().values()))


def test_every_parameter_gets_a_gradient_in_a_masked_pass(tiny):
    x, t, y = inputs()
    tiny.train()(
        x, t, y, draw_masks(2, 8, torch.Generator().manual_seed(0))
    ).square().mean().backward()
    assert [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_a_hidden_token_reaches_the_output_only_past_its_module(tiny):
    """What down0 hides cannot pass the first reduction; an unmasked pass would show the change
    there.
    """
    x, t, y = inputs(1)
    keep = torch.ones(1, 64, dtype=torch.bool)
    keep[0, 9] = False  # row 1, column 1: the fourth quarter of the first merged token
    tokens = golden_rule.normal(5, 1, 64, 2 * HEAD_DIM)
    other = tokens.clone()
    other[0, 9] = other[0, 9].flip(
        0
    )  # another value of the same mean and variance, so the norm sees no difference
    down, c = tiny.down_blocks[0], golden_rule.normal(6, 1, 2 * HEAD_DIM)
    torch.testing.assert_close(down(tokens, c, keep), down(other, c, keep))
    assert not torch.allclose(down(tokens, c), down(other, c))
    kept_all = TokenMasks(torch.ones(1, 64, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool))
    torch.testing.assert_close(tiny(x, t, y, kept_all), tiny(x, t, y))


@torch.no_grad()
def test_mid_mask_leaves_a_hidden_token_its_position_only():
    config = {"depths": (3, 1, 1, 1, 1), "num_heads": (1, 1, 1), "num_classes": 5, "input_size": 16}
    model = golden_rule.fill(EDT(EDTConfig(**config, mid_mask_block=2))).eval()
    plain = golden_rule.fill(EDT(EDTConfig(**config))).eval()
    x, t, y = inputs()
    ones = TokenMasks(torch.ones(2, 64, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool))
    hidden = torch.zeros(2, 64, dtype=torch.bool)

    seen = []
    model.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(x, t, y, ones._replace(mid=hidden))
    torch.testing.assert_close(seen[0], model.pos_embed.expand(2, -1, -1))
    assert not torch.allclose(out, plain(x, t, y))
    torch.testing.assert_close(model(x, t, y, ones._replace(mid=~hidden)), plain(x, t, y))


@pytest.mark.parametrize("mid", [None, 0, 1])
def test_masks_of_more_rows_repeat_the_batch_after_the_common_part(mid):
    model = golden_rule.fill(
        EDT_models["EDT-Tiny/2"](input_size=16, depths=(2, 1, 1, 1, 1), mid_mask_block=mid)
    )
    x, t, y = golden_rule.normal(3, 2, 4, 16, 16), torch.tensor([10, 900]), torch.tensor([5, 1000])
    masked = draw_masks(
        2, 8, torch.Generator().manual_seed(0), mid_ratio=MID_RATIO if mid is not None else None
    )
    forked = model(x, t, y, masked.prepend_full_pass())
    torch.testing.assert_close(
        forked, torch.cat([model(x, t, y), model(x, t, y, masked)]), rtol=1e-5, atol=1e-5
    )
    assert (forked[:2] - forked[2:]).norm() > 1e-2 * forked.norm()


@pytest.mark.parametrize(
    ("name", "saved"), [("EDT-S/2", 0.1279), ("EDT-B/2", 0.1255), ("EDT-XL/2", 0.1056)]
)
def test_a_common_part_saves_operations(name, saved):
    def operations(copies):
        rows = [torch.ones(copies, tokens, dtype=torch.bool) for tokens in (256, 64, 256)]
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 32, 32), torch.zeros(1), None, TokenMasks(*rows))
        return counter.get_total_flops()

    with torch.device("meta"):
        model = EDT_models[name]()
        assert 1 - operations(2) / (2 * operations(1)) == pytest.approx(saved, abs=1e-4)


def test_drawn_masks_have_the_papers_ratios_and_follow_the_generator():
    drawn = [
        draw_masks(64, 16, torch.Generator().manual_seed(seed), EDT_RATIOS, MID_RATIO)
        for seed in range(200)
    ]
    for name, (low, high), tokens in (
        ("down0", EDT_RATIOS[0], 256),
        ("down1", EDT_RATIOS[1], 64),
        ("mid", MID_RATIO, 256),
    ):
        shares = torch.stack([1 - getattr(masks, name).float().mean() for masks in drawn])
        assert (
            getattr(drawn[0], name).shape == (64, tokens)
            and getattr(drawn[0], name).dtype == torch.bool
        )
        assert low - 0.02 < shares.min() < low + 0.02 and high - 0.02 < shares.max() < high + 0.02
        assert shares.mean() == pytest.approx((low + high) / 2, abs=0.01)
    again = draw_masks(64, 16, torch.Generator().manual_seed(3), EDT_RATIOS, MID_RATIO)
    assert all(torch.equal(a, b) for a, b in zip(again, drawn[3], strict=True))
    assert draw_masks(1, 8, torch.Generator()).mid is None


@torch.no_grad()
def test_guidance(tiny):
    x, t, y = inputs()
    null = torch.full_like(y, 5)
    cond, uncond = tiny(x, t, y), tiny(x, t, null)
    torch.testing.assert_close(uncond, tiny(x, t), rtol=0, atol=0)
    assert torch.equal(tiny.forward_with_cfg(x, t, y, 1.0), cond)
    guided = tiny.forward_with_cfg(x, t, y, 3.0)
    torch.testing.assert_close(
        guided[:, :3], uncond[:, :3] + 3 * (cond[:, :3] - uncond[:, :3]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(guided[:, 3:], cond[:, 3:], atol=1e-5, rtol=1e-5)

    rgb = golden_rule.fill(
        EDT_models["EDT-Tiny/2"](input_size=16, num_classes=5, in_channels=3)
    ).eval()
    cond, uncond = rgb(x[:, :3], t, y), rgb(x[:, :3], t, null)
    guided = rgb.forward_with_cfg(x[:, :3], t, y, 3.0)
    torch.testing.assert_close(
        guided[:, :3], uncond[:, :3] + 3 * (cond[:, :3] - uncond[:, :3]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(guided[:, 3:], cond[:, 3:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_amm_is_off_until_set_and_acts_in_training_mode_too(tiny):
    x, t, y = inputs()
    plain = tiny(x, t, y)
    assert tiny.set_amm("auto") == (4, 6)
    modulated = tiny(x, t, y)
    assert not torch.allclose(plain, modulated)
    assert torch.equal(tiny.train()(x, t, y), modulated)
    assert tiny.set_amm("auto", cfg_scale=2.0) == (4,)
    tiny.set_amm([4, 6], form="512")
    assert not torch.allclose(tiny(x, t, y), modulated)
    tiny.set_amm([4, 6], radius=0.0)
    assert not torch.allclose(tiny(x, t, y), modulated)
    tiny.set_amm(None)
    assert torch.equal(tiny(x, t, y), plain)
    assert not any("amm_matrix" in name for name in tiny.state_dict())


@pytest.mark.parametrize(
    ("name", "side", "cfg_scale", "blocks", "form"),
    [
        ("EDT-S/2", 32, 1.0, (7, 10), "256"),
        ("EDT-B/2", 32, 1.5, (7, 10), "256"),
        ("EDT-S/2", 32, 2.0, (8,), "256"),
        ("EDT-B/2", 32, 4.0, (8,), "256"),
        ("EDT-S/2", 64, 1.0, (10,), "512"),
        ("EDT-B/2", 64, 4.0, (10,), "512"),
        ("EDT-XL/2", 32, 1.0, (23, 25), "256"),
        ("EDT-XL/2", 32, 2.0, (24,), "256"),
        ("EDT-XL/2", 64, 1.0, (23, 25), "512"),
        ("EDT-XL/2-paper", 32, 1.0, (23, 25), "256"),
        ("EDT-XL/2-paper", 64, 3.0, (24,), "512"),
    ],
)
def test_auto_placement(name, side, cfg_scale, blocks, form):
    with torch.device("meta"):
        model = EDT_models[name](input_size=side)
    for block in model.blocks:  # matrices are made on the CPU; so is the bias they go beside
        block.attn.to_empty(device="cpu")
    assert model.set_amm("auto", cfg_scale=cfg_scale) == blocks
    on = [i for i, block in enumerate(model.blocks) if block.attn.amm_matrix is not None]
    assert on == list(blocks)
    peak = model.blocks[blocks[0]].attn.amm_matrix.max().item()
    assert peak == pytest.approx(0.5 * np.e if form == "256" else 1.3)


def test_amm_mistakes_are_named():
    custom = EDT_models["EDT-Tiny/2"](input_size=16, depths=(1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="--amm-blocks"):
        custom.set_amm("auto")
    assert custom.set_amm([4]) == (4,)
    with pytest.raises(UserError, match="--amm-blocks"):
        EDT_models["EDT-Tiny/2_noAMM"](input_size=16).set_amm("auto")
    with pytest.raises(UserError, match="block 5 does not exist"):
        custom.set_amm([5])


@torch.no_grad()
def test_switches_of_the_ablations(tiny):
    full = EDT_models["EDT-Tiny/2"](input_size=16, num_classes=5)
    without_tie = EDT_models["EDT-Tiny/2"](input_size=16, num_classes=5, tie=False)
    without_pes = EDT_models["EDT-Tiny/2"](input_size=16, num_classes=5, pes=False)
    keys = [set(model.state_dict()) for model in (full, without_tie, without_pes)]
    modules = ("down_blocks.0", "down_blocks.1", "concat_blocks.0", "concat_blocks.1")
    assert keys[0] - keys[1] == {
        f"{m}.adaLN_modulation.1.{w}" for m in modules for w in ("weight", "bias")
    }
    assert keys[0] - keys[2] == {f"{m}.pos_embed" for m in modules}
    x, t, y = inputs()
    full_out = golden_rule.fill(full)(x, t, y)
    for other in (without_tie, without_pes):
        assert not torch.allclose(golden_rule.fill(other)(x, t, y), full_out)
    # Without TIE the LayerNorm stays: scaling the input of the module changes nothing.
    down, c, tokens = (
        without_tie.down_blocks[0],
        golden_rule.normal(0, 1, 104),
        golden_rule.normal(1, 1, 64, 104),
    )
    torch.testing.assert_close(down(tokens, c), down(10 * tokens, c), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"num_classes": 0},
        {"num_classes": 3, "in_channels": 1},
        {"in_channels": 16, "input_size": 8},
        {"patch_size": 1, "input_size": 4},
        {"patch_size": 4, "input_size": 32},
        {"input_size": 24},
    ],
)
def test_other_shapes(config):
    model = EDT_models["EDT-Tiny/2"](**config)
    config = model.config
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    t = torch.tensor([1, 2])
    assert model(x, t).shape == (2, 2 * config.in_channels, *x.shape[2:])
    assert model.y_embedder.embedding_table.weight.shape[0] == config.num_classes + 1
    model.set_amm("auto")
    assert model.forward_with_cfg(x, t, torch.zeros(2, dtype=torch.long), 2.0).isfinite().all()
    assert EDTConfig.from_state_dict(model.state_dict()) == config
    assert EDTConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name", EDT_models)
def test_configuration_is_read_off_the_tensors(name):
    with torch.device("meta"):
        model = EDT_models[name](num_classes=7)
    expected = (
        model.config
        if not name.endswith("_noAMM")
        else EDT_models[name.removesuffix("_noAMM")].args[0]
    )
    found = EDTConfig.from_state_dict(model.state_dict())
    assert (
        found.depths == model.config.depths
        and found.num_heads == model.config.num_heads
        and found.num_classes == 7
    )
    assert found.mid_mask_block == model.config.mid_mask_block
    assert found.amm == (expected.amm if isinstance(expected, EDTConfig) else expected["amm"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": 30}, "latent side 30"),
        ({"input_size": 0}, "latent side 0"),
        ({"num_classes": -1}, "classes"),
        ({"depths": (1, 1, 1)}, "five depths"),
        ({"mid_mask_block": 9}, "mid_mask_block 9"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        EDTConfig(**config)
    with pytest.raises(UserError, match="unknown model configuration width"):
        EDTConfig.from_dict({"width": 3})


def test_initial_output_is_zero_and_tie_is_not():
    model = EDT_models["EDT-Tiny/2"](input_size=16)
    x, t, y = inputs()
    assert not model(x, t, y).any()
    assert (
        model.down_blocks[0].adaLN_modulation[1].weight.any()
        and model.concat_blocks[1].adaLN_modulation[1].weight.any()
    )


def test_bfloat16_autocast_stays_near_float32(tiny):
    x, t, y = inputs()
    with torch.no_grad():
        exact = tiny(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tiny(x, t, y)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03
