import pytest
import torch

from edt.amm import modulation_matrix
from edt.nn.attention import attention
from edt.utils.errors import UserError


def inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(3, tokens, 3, 2, 52, generator=generator).to(dtype)
    return [
        qkv,
        0.5 * torch.randn(2, tokens, tokens, generator=generator),
        torch.randn(3, tokens, 104, generator=generator),
    ]


def results(compute, qkv, bias, grad) -> list[torch.Tensor]:
    qkv, bias = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    out = compute(qkv, bias)
    return [out.detach(), *torch.autograd.grad(out, (qkv, bias), grad.to(out.dtype))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grid", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("modulated", [False, True])
def test_outputs_and_gradients_are_those_of_float64(dtype, tolerance, autocast, grid, modulated):
    modulation = modulation_matrix(grid) if modulated else None

    def exact(qkv, bias):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) / 52**0.5 + bias).softmax(dim=-1)
        weights = weights if modulation is None else weights * modulation.double()
        return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)

    def ours(qkv, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return attention(qkv, bias, modulation)

    given = inputs(grid**2, dtype)
    for value, wanted in zip(
        results(ours, *given), results(exact, *(each.double() for each in given)), strict=True
    ):
        assert (value.double() - wanted).norm() <= tolerance * wanted.norm()  # NaN fails
    assert ours(*given[:2]).dtype == dtype  # autocast does not lower what was asked for


def test_a_path_that_does_not_run_here_is_refused():
    with pytest.raises(UserError, match="GPU"):
        attention(*inputs(4, torch.bfloat16)[:2], path="triton")
