import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from edt.amm import modulation_matrix
from edt.nn.attention import ATTENTION_BACKENDS, AttentionBackend, attention, no_autocast
from edt.utils.choices import choices
from edt.utils.errors import UserError

IMAGES, NUM_HEADS, HEAD_DIM = 3, 2, 52


def make_inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, a bias shared by the images, and the gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(IMAGES, tokens, 3, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype)
    bias = 0.5 * torch.randn(NUM_HEADS, tokens, tokens, generator=generator)
    grad_out = torch.randn(IMAGES, tokens, NUM_HEADS * HEAD_DIM, generator=generator)
    return qkv, bias, grad_out


def differentiate(compute, qkv: Tensor, bias: Tensor, grad_out: Tensor) -> list[Tensor]:
    """The output, and the gradients of qkv and the bias."""
    qkv, bias = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    out = compute(qkv, bias)
    return [out.detach(), *torch.autograd.grad(out, (qkv, bias), grad_out.to(out.dtype))]


def definition(qkv: Tensor, bias: Tensor | float, amm_matrix: Tensor | None = None) -> Tensor:
    """Attention in float64, written down by its formula."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / HEAD_DIM**0.5 + bias
    weights = scores.softmax(dim=-1)
    if amm_matrix is not None:
        weights = weights * amm_matrix.double()
    return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grid_size", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("amm", [False, True])
def test_outputs_and_gradients_equal_float64(dtype, tolerance, autocast, grid_size, amm):
    amm_matrix = modulation_matrix(grid_size) if amm else None

    def reference(qkv, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return attention(qkv, bias, amm_matrix)

    def exact(qkv, bias):
        return definition(qkv, bias, amm_matrix)

    qkv, bias, grad_out = make_inputs(grid_size**2, dtype)
    results = differentiate(reference, qkv, bias, grad_out)
    exact_results = differentiate(exact, qkv.double(), bias.double(), grad_out.double())
    for actual, expected in zip(results, exact_results, strict=True):
        # A product instead of a ratio: at one token the gradient of the bias is 0. NaN fails.
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()
    assert results[0].dtype == dtype  # autocast does not lower the dtype of the inputs


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_bias_equals_a_bias_of_zeros(backend):
    qkv, bias, grad_out = make_inputs(16)
    qkv.requires_grad_()
    out = attention(qkv, None, backend=backend)
    grad_qkv = torch.autograd.grad(out, qkv, grad_out)[0]
    exact_qkv = qkv.detach().double().requires_grad_()
    exact = definition(exact_qkv, 0.0)
    exact_grad_qkv = torch.autograd.grad(exact, exact_qkv, grad_out.double())[0]
    assert relative_error(out, exact) < 1e-5
    assert relative_error(grad_qkv, exact_grad_qkv) < 1e-5
    if backend == "reference":
        assert torch.equal(out, attention(qkv, torch.zeros_like(bias), backend=backend))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_bias_per_image_equals_float64(backend):
    qkv, bias, grad_out = make_inputs(9)
    per_image_bias = torch.stack([bias, -bias, bias.flip(0)])  # (B, num_heads, N, N)
    results = differentiate(
        lambda qkv, bias: attention(qkv, bias, backend=backend), qkv, per_image_bias, grad_out
    )
    expected_results = differentiate(
        definition, qkv.double(), per_image_bias.double(), grad_out.double()
    )
    for actual, expected in zip(results, expected_results, strict=True):
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 1e-5


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="unknown attention backend 'trition'; choose one of auto,"):
        attention(*make_inputs(4)[:2], backend="trition")


def test_every_backend_has_a_description():
    assert tuple(ATTENTION_BACKENDS) == choices(AttentionBackend)


def test_the_check_of_the_backend_compiles():
    """Blocks are compiled with fullgraph=True, and each calls attention."""
    qkv, bias, _ = make_inputs(4)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(qkv, bias), attention(qkv, bias))


class RecordedOperators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "dtype", "bias_shape", "is_triton"),
    [
        ("cuda", torch.bfloat16, (2, 4, 4), True),
        ("cuda", torch.float16, (2, 4, 4), True),
        ("cuda", torch.bfloat16, (3, 2, 4, 4), False),  # a bias per image
        ("cuda", torch.float32, (2, 4, 4), False),
        ("cpu", torch.bfloat16, (2, 4, 4), False),
    ],
)
def test_auto_takes_triton_for_16_bit_types_on_a_gpu(device, dtype, bias_shape, is_triton):
    """Fake tensors have a device and a shape, but no values, so no GPU is needed."""
    pytest.importorskip("triton")
    with FakeTensorMode(), RecordedOperators() as operators:
        qkv = torch.empty(3, 4, 3, 2, 52, device=device, dtype=dtype)
        bias = None if bias_shape is None else torch.empty(bias_shape, device=device)
        out = attention(qkv, bias)
    assert out.shape == (3, 4, 104)
    assert ("edt.attention.default" in operators.names) == is_triton
    assert ("aten._softmax.default" in operators.names) != is_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_torchs_own_attention_without_bias_and_amm(dtype):
    def is_fused(backend: str, *pairs: torch.Tensor | None) -> bool:
        with RecordedOperators() as operators:
            attention(qkv, *pairs, backend=backend)
        return any("scaled_dot_product" in name for name in operators.names)

    qkv, bias, _ = make_inputs(4, dtype)
    assert is_fused("auto", None, None)
    assert not is_fused("reference", None, None)
    assert not is_fused("auto", bias, None)
    assert not is_fused("auto", None, torch.ones(4, 4))


def test_amm_of_each_image_is_that_of_the_images_one_by_one():
    qkv, bias, _ = make_inputs(16)
    amm_matrix = torch.rand(len(qkv), 1, 16, 16)
    for bias_of_image in (None, bias):
        expected = torch.cat(
            [
                attention(image[None], bias_of_image, matrix[0])
                for image, matrix in zip(qkv, amm_matrix, strict=True)
            ]
        )
        torch.testing.assert_close(attention(qkv, bias_of_image, amm_matrix), expected)


def test_a_backend_that_cannot_run_here_is_refused():
    pytest.importorskip("triton")
    with pytest.raises(UserError, match="GPU"):
        attention(*make_inputs(4, torch.bfloat16)[:2], backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast_operations_keep_the_types_of_their_inputs(dtype):
    a = torch.randn(4, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16), no_autocast(a.device):
        assert (a @ a).dtype == dtype
        assert a.softmax(0).dtype == dtype


def test_the_meta_device_has_no_autocast_to_leave():
    a = torch.empty(4, 4, device="meta")
    with no_autocast(a.device):
        assert (a @ a).dtype == torch.float32
