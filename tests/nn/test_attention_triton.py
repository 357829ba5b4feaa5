"""Triton attention against float64 autograd of the reference backend.

Tests that launch kernels run on a GPU if the machine has one. On every machine,
``test_in_the_interpreter`` runs them in Triton's interpreter on the CPU, in a process of its own,
because TRITON_INTERPRET must be set before triton is imported.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edt.amm import modulation_matrix
from edt.nn.attention import attention
from edt.utils.errors import UserError

triton = pytest.importorskip("triton")
from interpreter_bfloat16 import install_bfloat16  # noqa: E402

from edt.nn import attention_triton  # noqa: E402
from edt.nn.attention_triton import triton_attention  # noqa: E402

INTERPRETED = attention_triton.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
launches = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter"
)
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")


@pytest.fixture(autouse=INTERPRETED)
def bfloat16_in_the_interpreter(monkeypatch):
    install_bfloat16(monkeypatch)


@not_interpreted
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton before 3.7 fails with numpy from 2.4",
)
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed is not None
    assert int(passed[1]) > 40


class Inputs(NamedTuple):
    qkv: Tensor
    bias: Tensor | None
    amm_matrix: Tensor | None
    grad_out: Tensor  # the gradient of the output

    def double(self) -> "Inputs":
        return Inputs(*(None if tensor is None else tensor.double() for tensor in self))


def make_inputs(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    amm: bool = False,
    images: int = 2,
    num_heads: int = 2,
    head_dim: int = 52,
) -> Inputs:
    """Random inputs. The bias has the memory layout that the model's bias table gives it."""
    torch.manual_seed(0)
    qkv = torch.randn(images, tokens, 3, num_heads, head_dim).to(DEVICE, dtype)
    bias = torch.randn(tokens, tokens, num_heads).to(DEVICE).permute(2, 0, 1)
    amm_matrix = None
    if amm:  # with zeros, as the paper's matrix has
        gain = 1.4 * torch.rand(tokens, tokens)
        amm_matrix = (gain * (torch.rand(tokens, tokens) > 0.3)).to(DEVICE)
    grad_out = torch.randn(images, tokens, num_heads * head_dim).to(DEVICE, dtype)
    return Inputs(qkv, bias, amm_matrix, grad_out)


def differentiate(function: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """The output and the gradients of a function of (qkv, bias, AMM matrix)."""
    leaves = {"grad_qkv": inputs.qkv.detach().requires_grad_()}
    if inputs.bias is not None:
        leaves["grad_bias"] = inputs.bias.detach().requires_grad_()
    out = function(leaves["grad_qkv"], leaves.get("grad_bias"), inputs.amm_matrix)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


@contextmanager
def nan_in_empty_tensors() -> Iterator[None]:
    """Fill what torch allocates without a value with NaN, so that an element that no kernel writes
    is found.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).new_empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors(inputs: Inputs) -> dict[str, float]:
    """Errors of Triton attention relative to float64.

    They are absolute where the norm of the exact result is below 1, because the gradient of the
    bias of a single token is zero.
    """
    with nan_in_empty_tensors():
        actual = differentiate(triton_attention, inputs)
    exact = differentiate(attention, inputs.double())
    like = {"out": inputs.grad_out, "grad_qkv": inputs.qkv, "grad_bias": inputs.bias}
    for name, tensor in actual.items():
        assert tensor.shape == like[name].shape, name
        assert tensor.dtype == like[name].dtype, name
    return {
        name: float((actual[name] - exact[name]).norm() / exact[name].norm().clamp(min=1))
        for name in actual
    }


def within(relative_errors: dict[str, float], tolerance: float) -> bool:
    """Whether all errors are below the tolerance. NaN is not; max() could pass over it."""
    return all(error < tolerance for error in relative_errors.values())


@launches
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amm", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 36, 64, 144, 256])
def test_output_and_gradients(tokens, amm, dtype):
    images, num_heads = (1, 1) if tokens > 64 and INTERPRETED else (3, 2)
    measured = errors(make_inputs(tokens, dtype, amm, images, num_heads))
    assert within(measured, TOLERANCES[dtype]), measured


@launches
@pytest.mark.parametrize("head_dim", [3, 16, 64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_head_dims(head_dim, dtype):
    measured = errors(make_inputs(36, dtype, amm=True, head_dim=head_dim))
    assert within(measured, TOLERANCES[dtype]), measured


@launches
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bias_equals_a_bias_of_zeros(dtype):
    inputs = make_inputs(36, dtype, amm=True)
    measured = errors(inputs._replace(bias=None))
    assert sorted(measured) == ["grad_qkv", "out"]
    assert within(measured, TOLERANCES[dtype]), measured
    no_bias = differentiate(triton_attention, inputs._replace(bias=None))
    zeros = differentiate(triton_attention, inputs._replace(bias=torch.zeros_like(inputs.bias)))
    assert torch.equal(no_bias["out"], zeros["out"])
    assert torch.equal(no_bias["grad_qkv"], zeros["grad_qkv"])


@launches
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_bias_gradient_of_images_in_unequal_chunks(chunk_size, monkeypatch):
    monkeypatch.setattr(
        attention_triton, "images_per_chunk", lambda images, num_heads, num_tiles: chunk_size
    )
    measured = errors(make_inputs(9, images=5))
    assert within(measured, 1e-5), measured


@pytest.mark.parametrize(
    ("images", "num_heads", "num_tiles"),
    [(1, 1, 1), (256, 6, 16), (256, 8, 1), (64, 6, 256), (2048, 30, 1)],
)
def test_chunks_are_as_many_as_768_programs_allow(images, num_heads, num_tiles):
    chunk_size = attention_triton.images_per_chunk(images, num_heads, num_tiles)

    def programs(chunk_size: int) -> int:
        return num_heads * num_tiles * -(-images // chunk_size)

    assert 1 <= chunk_size <= images
    assert programs(chunk_size) <= max(768, num_heads * num_tiles)
    if chunk_size > 1:
        assert programs(chunk_size - 1) > 768


@launches
@pytest.mark.parametrize("shift", [-300, 300])
def test_scores_of_any_size(shift):
    """Scores far from zero do not overflow, and scores far below zero do not lose to padding."""
    inputs = make_inputs(9, amm=True)
    measured = errors(inputs._replace(qkv=4 * inputs.qkv, bias=inputs.bias + shift))
    assert within(measured, 2e-4), measured  # float32 near 300 has this resolution


@launches
def test_the_amm_matrix_of_the_paper():
    measured = errors(make_inputs(64)._replace(amm_matrix=modulation_matrix(8).to(DEVICE)))
    assert within(measured, 1e-5), measured


@launches
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 9, 9), torch.float16), ((9, 9), torch.float64)], ids=str
)
def test_bias_of_another_dtype_or_fewer_dimensions(shape, dtype):
    inputs = make_inputs(9, amm=True)
    measured = errors(inputs._replace(bias=torch.randn(shape, dtype=dtype).to(DEVICE)))
    assert within(measured, 1e-3), measured  # the resolution of a float16 gradient


@launches
@pytest.mark.parametrize("name", ["grad_qkv", "grad_bias"])
def test_only_tensors_that_require_a_gradient_get_one(name):
    inputs = make_inputs(16, amm=True)
    both = differentiate(triton_attention, inputs)
    leaves = {
        "grad_qkv": inputs.qkv.detach().clone(),
        "grad_bias": inputs.bias.detach().clone(),
    }
    leaves[name].requires_grad_()
    triton_attention(*leaves.values(), inputs.amm_matrix).backward(inputs.grad_out)
    assert torch.equal(leaves.pop(name).grad, both[name])
    (other,) = leaves.values()
    assert other.grad is None


@launches
def test_no_gradient_is_recorded_without_need():
    inputs = make_inputs(16)
    assert not triton_attention(inputs.qkv, inputs.bias).requires_grad


@launches
def test_operators_pass_torchs_opcheck():
    qkv, bias, amm_matrix, grad_out = make_inputs(4, amm=True)
    bias, ops = bias.contiguous(), torch.ops.edt
    for factor in (None, amm_matrix):
        leaves = qkv.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
        torch.library.opcheck(ops.attention.default, (*leaves, factor))
    out, lse = ops.attention(qkv, bias, amm_matrix)
    _, delta = ops.attention_grad_qkv(qkv, bias, amm_matrix, out, grad_out, lse)
    # The gradients have no gradients of their own, so the autograd tests do not apply to them.
    first_order = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(
        ops.attention_grad_qkv.default, (qkv, bias, amm_matrix, out, grad_out, lse), **first_order
    )
    torch.library.opcheck(
        ops.attention_grad_bias.default,
        (qkv, bias, amm_matrix, grad_out, lse, delta),
        **first_order,
    )


def check_compiled(compiler: str) -> None:
    """Compile operations around attention as one graph, and compare with eager results."""

    def block(qkv, bias, amm_matrix):
        return triton_attention(1.5 * qkv, bias.sin(), amm_matrix).cos()

    inputs = make_inputs(16, amm=True)
    torch.compiler.reset()
    eager = differentiate(block, inputs)
    compiled = differentiate(torch.compile(block, backend=compiler, fullgraph=True), inputs)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-5)


@launches
def test_compiles_as_one_graph():
    check_compiled("aot_eager")


@on_a_gpu
def test_compiles_as_one_graph_by_inductor():
    check_compiled("inductor")


@launches
def test_autocast_keeps_the_bias_in_float32():
    inputs = make_inputs(36, torch.bfloat16, amm=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        measured = errors(inputs)
    assert within(measured, 1e-2), measured


@launches
@pytest.mark.parametrize("function", [attention, triton_attention])
def test_flops_are_those_of_the_reference(function):
    with FlopCounterMode(display=False) as counter:
        differentiate(function, make_inputs(36))
    assert counter.get_total_flops() == 3 * 4 * 2 * 2 * 36**2 * 52


@launches
def test_float64_is_refused():
    inputs = make_inputs(4)
    with pytest.raises(UserError, match="16- or 32-bit dtype"):
        triton_attention(inputs.qkv.double(), inputs.bias)


@launches
def test_a_wide_head_is_refused():
    inputs = make_inputs(4, head_dim=129)
    with pytest.raises(UserError, match="head_dim of at most 128, got 129"):
        triton_attention(inputs.qkv, inputs.bias)


@launches
def test_a_bias_per_image_is_refused():
    inputs = make_inputs(4)
    per_image_bias = inputs.bias.expand(2, -1, -1, -1)
    with pytest.raises(UserError, match=r"no bias per image.*\(2, 2, 4, 4\)"):
        attention(inputs.qkv, per_image_bias, backend="triton")


@launches
def test_a_gradient_of_the_amm_matrix_is_refused():
    inputs = make_inputs(4, amm=True)
    with pytest.raises(UserError, match="no gradient for amm_matrix"):
        triton_attention(inputs.qkv, inputs.bias, inputs.amm_matrix.requires_grad_())


@not_interpreted
def test_a_cpu_is_refused():
    with pytest.raises(UserError, match="needs a GPU"):
        triton_attention(torch.zeros(1, 4, 3, 2, 52), torch.zeros(2, 4, 4))


@not_interpreted
def test_a_missing_triton_package_is_reported_in_one_line():
    script = (
        "import sys; sys.modules['triton'] = None; "
        "import edt.nn.attention; import edt.nn.attention_triton"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert process.stderr.splitlines()[-1].startswith(
        'edt.utils.errors.UserError: the attention backend "triton" needs the triton package'
    )


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
def test_gradients_repeat_bit_for_bit(tokens, dtype):
    inputs = make_inputs(tokens, dtype, images=32, num_heads=6)
    first = differentiate(triton_attention, inputs)
    for _ in range(3):
        repeated = differentiate(triton_attention, inputs)
        for name in first:
            assert torch.equal(repeated[name], first[name]), name


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_training(dtype):
    measured = errors(make_inputs(256, dtype, images=32, num_heads=6))
    assert within(measured, TOLERANCES[dtype]), measured


@on_a_gpu
def test_tf32_where_it_is_allowed(monkeypatch):
    inputs = make_inputs(256, num_heads=6)
    float32_errors = errors(inputs)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    for name, error in errors(inputs).items():
        assert float32_errors[name] < error < 2e-3, name


@on_a_gpu
def test_more_than_two_billion_numbers():
    """Offsets past 2^31: the last image of a large batch gives the same bits as it does alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    images, tokens, num_heads = 768, 1024, 18
    qkv = torch.randn(images, tokens, 3, num_heads, 52, dtype=torch.bfloat16, device=DEVICE)
    assert qkv.numel() > 2**31
    bias = torch.randn(num_heads, tokens, tokens, device=DEVICE)
    grad_out = torch.randn_like(qkv[:, :, 0].flatten(2))
    batch = differentiate(triton_attention, Inputs(qkv, bias, None, grad_out))
    alone = differentiate(triton_attention, Inputs(qkv[-1:], bias, None, grad_out[-1:]))
    assert torch.equal(batch["out"][-1:], alone["out"])
    assert torch.equal(batch["grad_qkv"][-1:], alone["grad_qkv"])
