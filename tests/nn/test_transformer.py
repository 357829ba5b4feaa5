"""The interface of a network, with a network that is no EDT, and the switches that use it."""

import golden_rule
import pytest
import torch
from torch import nn

from edt.amm import set_amm_matrices
from edt.models import EDT_models, EDTConfig
from edt.nn.attention import attention
from edt.nn.compilation import compile_network
from edt.nn.flops import forward_flops
from edt.nn.layers import Attention, FinalLayer, RelativePositionBias
from edt.nn.precision import autocast, round_weights, set_matmul_precision
from edt.nn.transformer import DiffusionTransformer, guide
from edt.utils.errors import UserError


class Plain(DiffusionTransformer):
    """A network of another family: two attention layers without a position bias."""

    can_batch_passes = False

    def __init__(self, config: EDTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels, self.num_classes = config.in_channels, config.num_classes
        self.embed = nn.Linear(4, 24)
        self.layers = nn.ModuleList(Attention(24, 3, config.input_size) for _ in range(2))
        self.head = FinalLayer(24, 1, 8, 24)

    def forward(self, x, t, y=None, masks=None):
        tokens = self.embed(x.flatten(2).transpose(1, 2))
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.head(tokens, tokens.mean(dim=1))

    def attention_blocks(self):
        return list(self.layers)

    def compilable_modules(self):
        return list(self.layers)


@pytest.fixture
def plain() -> Plain:
    torch.manual_seed(0)
    return Plain(EDTConfig(input_size=8, num_classes=5)).eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return golden_rule.normal(0, 2, 4, 8, 8), torch.tensor([3, 700])


@torch.no_grad()
def test_amm_asks_each_attention_for_its_grid(plain, inputs):
    before = plain(*inputs)
    (modulation,) = set_amm_matrices(plain.attention_blocks(), [1], "256")
    assert modulation.radius == pytest.approx((49 + 4) ** 0.5)
    assert plain.layers[1].amm_matrix.shape == (64, 64)
    assert not torch.allclose(plain(*inputs), before)
    with pytest.raises(UserError, match="block 2 does not exist"):
        set_amm_matrices(plain.attention_blocks(), [0, 2], "256")
    assert plain.layers[0].amm_matrix is None, "a refused call changed something"
    set_amm_matrices(plain.attention_blocks(), [], "256")
    assert torch.equal(plain(*inputs), before)


@torch.no_grad()
def test_attention_without_a_bias_is_that_of_a_zero_bias(plain):
    tokens = golden_rule.normal(1, 2, 64, 24)
    without = plain.layers[0]
    zero = Attention(24, 3, 8, RelativePositionBias(8, 3))
    zero.load_state_dict(without.state_dict(), strict=False)
    torch.testing.assert_close(without(tokens), zero(tokens))


def test_weights_are_rounded_but_for_layers_that_keep_full_precision(plain):
    round_weights(plain)
    assert plain.embed.weight.dtype == torch.bfloat16
    assert plain.layers[0].qkv.weight.dtype == torch.bfloat16
    assert plain.head.linear.weight.dtype == torch.float32


def test_operations_of_any_family_are_counted(plain):
    # Multiply-accumulates: embedding, per layer qkv, q k^T, weights v and projection, head.
    tokens = 64
    layer = 3 * 24 * 24 * tokens + 2 * tokens * tokens * 24 + 24 * 24 * tokens
    head = 24 * 48 + 24 * 8 * tokens
    assert forward_flops(plain) == 2 * (4 * 24 * tokens + 2 * layer + head)


def test_guidance_combines_the_halves():
    cond, uncond = golden_rule.normal(0, 2, 8, 3, 3), golden_rule.normal(1, 2, 8, 3, 3)
    guided = guide(torch.cat([cond, uncond]), 3.0)
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 3 * (cond - uncond)[:, :3])
    assert torch.equal(guided[:, 3:], cond[:, 3:])
    guided = guide(torch.cat([cond, uncond]), 3.0, channels=4)
    torch.testing.assert_close(guided[:, :4], uncond[:, :4] + 3 * (cond - uncond)[:, :4])


@pytest.mark.parametrize(
    ("config", "uses_512_amm"),
    [
        ({"input_size": 64}, True),
        ({"input_size": 32}, False),
        ({"input_size": 64, "in_channels": 3}, False),
        ({"input_size": 64, "in_channels": 3, "image_size": 64}, False),
        ({"input_size": 64, "image_size": 256}, False),
        ({"input_size": 32, "image_size": 512}, True),
    ],
)
def test_the_512_form_follows_the_images(config, uses_512_amm):
    model = EDT_models["EDT-S/2"](num_classes=3, **config)
    blocks = model.set_amm("auto")
    assert blocks == ((10,) if uses_512_amm else (7, 10))
    assert model.modulations[0].form == ("512" if uses_512_amm else "256")


def test_a_text_that_is_no_placement_is_refused():
    model = EDT_models["EDT-Tiny/2"](input_size=16)
    with pytest.raises(UserError, match="'7,10'"):
        model.set_amm("7,10")


def test_unknown_choices_are_refused(plain):
    qkv = torch.zeros(1, 4, 3, 2, 8)
    with pytest.raises(UserError, match="'trition'.*reference"):
        attention(qkv, backend="trition")
    with pytest.raises(UserError, match="'trition'.*reference"):
        plain.set_attention("trition")
    with pytest.raises(UserError, match="'blok'.*block"):
        compile_network(plain, "blok")
    with pytest.raises(UserError, match="'fp8'.*bf16"):
        set_matmul_precision("fp8")
    with pytest.raises(UserError, match="'fp8'.*bf16"):
        autocast(torch.device("cpu"), "fp8")
