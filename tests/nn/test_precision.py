import golden_rule
import pytest
import torch
from torch import nn

from edt.models import EDT, EDT_models
from edt.nn.precision import (
    PRECISIONS,
    autocast,
    round_weights,
    set_matmul_precision,
)


@pytest.fixture
def restored_tf32():
    """Put torch's two global flags back after a test."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize(
    ("precision", "is_allowed"), [("fp32", False), ("tf32", True), ("bf16", False)]
)
def test_tf32_is_allowed_by_its_own_precision_only(restored_tf32, precision, is_allowed):
    set_matmul_precision("fp32" if is_allowed else "tf32")
    set_matmul_precision(precision)
    assert torch.backends.cuda.matmul.allow_tf32 == is_allowed
    assert torch.backends.cudnn.allow_tf32 == is_allowed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16_lowers_matrix_products_and_no_other_precision_does(precision):
    a = torch.randn(4, 4)
    with autocast(torch.device("cpu"), precision):
        dtype = (a @ a).dtype
    assert dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.fixture
def tiny() -> EDT:
    return golden_rule.fill(EDT_models["EDT-Tiny/2"](input_size=16, num_classes=5)).eval()


@torch.no_grad()
def test_bfloat16_stays_near_float32(tiny):
    x, t, y = golden_rule.normal(1, 2, 4, 16, 16), torch.tensor([7, 307]), torch.tensor([0, 1])
    exact = tiny(x, t, y)
    with autocast(x.device, "bf16"):
        rounded = tiny(x, t, y)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() / exact.norm() < 0.03


@torch.no_grad()
def test_rounding_weights_once_gives_the_results_of_rounding_at_every_use(tiny):
    x, t, y = golden_rule.normal(1, 2, 4, 16, 16), torch.tensor([7, 307]), torch.tensor([0, 1])
    with autocast(x.device, "bf16"):
        expected = tiny(x, t, y)
        round_weights(tiny)
        assert torch.equal(tiny(x, t, y), expected)


def test_weights_of_linear_layers_are_rounded_and_no_others(tiny):
    round_weights(tiny)
    names = {"blocks.0.attn.qkv", "blocks.0.mlp.fc1", "down_blocks.1.reduction", "t_embedder.mlp.0"}
    for name in names:
        assert tiny.get_submodule(name).weight.dtype == torch.bfloat16, name
    rounded = {
        name for name, parameter in tiny.named_parameters() if parameter.dtype == torch.bfloat16
    }
    linear = {name for name, module in tiny.named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[0] for name in rounded} == {
        name for name in linear if not name.startswith("final_layer.")
    }


def test_a_module_with_full_precision_keeps_its_weights():
    exact = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    exact.full_precision = True
    model = nn.Sequential(exact, nn.Linear(2, 2))
    round_weights(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    rounded = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert rounded == {"1.weight", "1.bias"}
