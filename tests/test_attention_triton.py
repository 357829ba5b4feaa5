"""Triton attention against float64 autograd of the plain definition.

What launches kernels runs on a GPU where there is one; and always, by ``test_in_the_interpreter``,
in Triton's interpreter on the CPU, which is a process of its own since Triton must be imported with
TRITON_INTERPRET set."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager

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
import triton.language as tl  # noqa: E402

from edt import attention_triton  # noqa: E402
from edt.nn.attention_triton import triton_attention  # noqa: E402

INTERPRETED = attention_triton.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
launches = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter"
)
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
outside = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")


@pytest.fixture(autouse=INTERPRETED)
def bfloat16_in_the_interpreter(monkeypatch):
    """The interpreter keeps bfloat16 as the 16 bits: it would cast by cutting off, and multiply the
    bits as integers.

    As the hardware does, and as the interpreter does for other types: casts round to nearest, ties
    to even; the products of two bfloat16 are exact in the float32 in which they are added."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.bfloat16).float()
        return TensorHandle(values.numpy(), tl.float32)

    def cast_rounding(self, source, dtype):
        if dtype.scalar != tl.bfloat16:
            return cast(self, widened(source), dtype)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_rounding)
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )


@outside
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton before 3.7 fails with numpy from 2.4",
)
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40


def inputs(tokens: int, dtype=torch.float32, modulated=False, images=2, heads=2, width=52) -> tuple:
    """qkv, a bias laid out as the model makes it, a modulation with zeros, the gradient of the
    output.
    """
    torch.manual_seed(0)
    qkv = torch.randn(images, tokens, 3, heads, width).to(DEVICE, dtype)
    bias = torch.randn(tokens, tokens, heads).to(DEVICE).permute(2, 0, 1)
    modulation = (
        (1.4 * torch.rand(tokens, tokens) * (torch.rand(tokens, tokens) > 0.3)).to(DEVICE)
        if modulated
        else None
    )
    return qkv, bias, modulation, torch.randn(images, tokens, heads * width).to(DEVICE, dtype)


def differentiate(
    function: Callable, qkv: Tensor, bias: Tensor, modulation: Tensor | None, grad_out: Tensor
) -> dict:
    qkv, bias = (tensor.detach().requires_grad_() for tensor in (qkv, bias))
    out = function(qkv, bias, modulation)
    grad_qkv, grad_bias = torch.autograd.grad(out, (qkv, bias), grad_out)
    return {"out": out.detach(), "grad_qkv": grad_qkv, "grad_bias": grad_bias}


@contextmanager
def empty_is_nan():
    """What torch allocates without filling it holds NaN, so that a cell no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).new_empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors(*case) -> dict[str, float]:
    """Relative errors; absolute where the exact result is (nearly) zero, as the bias gradient of a
    single token is.
    """
    with empty_is_nan():
        got = differentiate(triton_attention, *case)
    exact = differentiate(
        attention, *(None if tensor is None else tensor.double() for tensor in case)
    )
    for name, tensor in zip(got, (case[3], case[0], case[1]), strict=True):
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
    return {
        name: float((got[name] - exact[name]).norm() / exact[name].norm().clamp(min=1))
        for name in got
    }


def within(found: dict[str, float], limit: float) -> bool:
    """False for NaN, too, which max() may pass over."""
    return all(error < limit for error in found.values())


@launches
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 36, 64, 144, 256])
def test_output_and_gradients(tokens, modulated, dtype):
    images, heads = (1, 1) if tokens > 64 and INTERPRETED else (3, 2)
    found = errors(*inputs(tokens, dtype, modulated, images, heads))
    assert within(found, LIMITS[dtype]), found


@launches
@pytest.mark.parametrize("width", [3, 16, 64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_head_widths(width, dtype):
    found = errors(*inputs(36, dtype, modulated=True, width=width))
    assert within(found, LIMITS[dtype]), found


@launches
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
def test_bias_gradient_of_images_in_ragged_chunks(chunk, monkeypatch):
    monkeypatch.setattr(attention_triton, "chunk_images", lambda images, heads, tiles: chunk)
    found = errors(*inputs(9, images=5))
    assert within(found, 1e-5), found


def test_chunks_are_many_but_not_too_many():
    for images, heads, tiles in [(1, 1, 1), (256, 6, 16), (256, 8, 1), (64, 6, 256), (2048, 30, 1)]:
        chunk = attention_triton.chunk_images(images, heads, tiles)
        assert 1 <= chunk <= images
        assert heads * tiles * -(-images // chunk) <= max(768, heads * tiles)
        assert chunk == 1 or heads * tiles * -(-images // (chunk - 1)) > 768


@launches
def test_scores_of_any_size():
    """No overflow where scores are far from zero, and none from padding where every score is far
    below it.
    """
    for shift in (-300, 300):
        qkv, bias, modulation, grad_out = inputs(9, modulated=True)
        found = errors(4 * qkv, bias + shift, modulation, grad_out)
        assert within(found, 2e-4), found  # a float32 near 300 is that coarse


@launches
def test_modulation_of_the_paper():
    qkv, bias, _, grad_out = inputs(64)
    found = errors(qkv, bias, modulation_matrix(8).to(DEVICE), grad_out)
    assert within(found, 1e-5), found


@launches
def test_bias_of_another_dtype_and_fewer_dimensions():
    qkv, _, modulation, grad_out = inputs(9, modulated=True)
    for bias in (torch.randn(2, 9, 9, dtype=torch.float16), torch.randn(9, 9, dtype=torch.float64)):
        found = errors(qkv, bias.to(DEVICE), modulation, grad_out)
        assert within(found, 1e-3), found  # a float16 gradient


@launches
def test_only_what_asks_for_a_gradient_gets_one():
    qkv, bias, modulation, grad_out = inputs(16, modulated=True)
    both = differentiate(triton_attention, qkv, bias, modulation, grad_out)
    for wanted, name in ((0, "grad_qkv"), (1, "grad_bias")):
        leaves = [qkv.detach().clone(), bias.detach().clone()]
        leaves[wanted].requires_grad_()
        triton_attention(*leaves, modulation).backward(grad_out)
        assert torch.equal(leaves[wanted].grad, both[name])
        assert leaves[1 - wanted].grad is None
    assert not triton_attention(qkv, bias).requires_grad


@launches
def test_operators_are_registered_soundly():
    qkv, bias, modulation, grad_out = inputs(4, modulated=True)
    bias, ops = bias.contiguous(), torch.ops.edt
    for factor in (None, modulation):
        out, lse = ops.attention(qkv, bias, factor)
        _, delta = ops.attention_grad_qkv(qkv, bias, factor, out, grad_out, lse)
        leaves = qkv.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
        torch.library.opcheck(ops.attention.default, (*leaves, factor))
    first_order = {
        "test_utils": ("test_schema", "test_faketensor")
    }  # gradients of gradients do not exist
    torch.library.opcheck(
        ops.attention_grad_qkv.default, (qkv, bias, modulation, out, grad_out, lse), **first_order
    )
    torch.library.opcheck(
        ops.attention_grad_bias.default,
        (qkv, bias, modulation, grad_out, lse, delta),
        **first_order,
    )


def check_compiled(backend: str) -> None:
    qkv, bias, modulation, grad_out = inputs(16, modulated=True)

    def block(qkv, bias, modulation):
        return triton_attention(1.5 * qkv, bias.sin(), modulation).cos()

    torch.compiler.reset()
    eager = differentiate(block, qkv, bias, modulation, grad_out)
    compiled = differentiate(
        torch.compile(block, backend=backend, fullgraph=True), qkv, bias, modulation, grad_out
    )
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
    qkv, bias, modulation, grad_out = inputs(36, DTYPES[-1], modulated=True)
    with torch.autocast(DEVICE, dtype=DTYPES[-1]):
        found = errors(qkv, bias, modulation, grad_out)
    assert within(found, 1e-2), found


@launches
def test_counts_the_operations_of_the_plain_definition():
    totals = []
    for function in (attention, triton_attention):
        with FlopCounterMode(display=False) as counter:
            differentiate(function, *inputs(36))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 4 * 2 * 2 * 36**2 * 52


@launches
@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.new_zeros(1, 4, 3, 2, 129)],
    ids=["float64", "head width 129"],
)
def test_what_the_kernels_cannot_do_is_refused(change):
    qkv, bias, modulation, _ = inputs(4, modulated=True)
    with pytest.raises(UserError, match="16- and 32-bit"):
        triton_attention(change(qkv), bias)
    with pytest.raises(UserError, match="no gradient for the modulation"):
        triton_attention(qkv, bias, modulation.requires_grad_())


@outside
def test_a_cpu_is_refused():
    with pytest.raises(UserError, match="needs a GPU"):
        triton_attention(torch.zeros(1, 4, 3, 2, 52), torch.zeros(2, 4, 4))


@outside
def test_absence_of_triton_is_said_in_one_line():
    script = "import sys; sys.modules['triton'] = None; import edt.nn.attention; import edt.nn.attention_triton"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "edt.utils.errors.UserError: Triton attention needs the triton package"
    )


def report(*options) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "report_kernels.py", "--json", *options]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_report(found: dict, count: int) -> None:
    assert len(found["rows"]) == count
    for row in found["rows"]:
        assert row["shared_bytes"] <= found["shared_kib"] * 1024, row
        if found["target"] != "sm_90":
            assert row["spills"] < 100, (
                row
            )  # what they are tuned for is an H100; elsewhere they must run
            continue
        assert row["spills"] == 0, row
        if found["head_width"] == 52:
            assert row["wgmma"] or row["tokens"] == 16 or row["arithmetic"] == "fp32", row


@outside
def test_kernels_compile_for_sm90():
    check_report(report("--image-sizes", "256", "--tokens", "256"), 3 * 8)


@outside
@pytest.mark.slow
def test_kernels_compile_for_sm90_at_every_shape():
    check_report(report(), 3 * 6 * 8)


@outside
@pytest.mark.slow
@pytest.mark.parametrize("width", [72, 128])
def test_wide_heads_compile_for_sm90(width):
    check_report(
        report("--head-width", str(width), "--image-sizes", "256", "--tokens", "256"), 3 * 8
    )


@outside
@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 86, 89, 100, 120])
def test_kernels_compile_for_other_gpus(sm):
    check_report(report("--sm", str(sm), "--image-sizes", "256", "--tokens", "256"), 3 * 8)


@outside
def test_benchmark_measures_every_path(tmp_path):
    command = [
        sys.executable,
        "benchmarks/bench_attention.py",
        *"--images 2 --tokens 16 --repeats 2 --json".split(),
    ]
    done = subprocess.run(
        [*command, tmp_path / "report.json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    paths = json.loads((tmp_path / "report.json").read_text())["paths"]
    assert list(paths) == ["released", "plain", "sdpa"] + ["triton"] * torch.cuda.is_available()
    for path in paths.values():
        assert path["forward"]["milliseconds"] > 0 and path["gradients"]["milliseconds"] > 0
        assert within(path["relative_error"], 2e-2)


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
def test_gradients_repeat_bit_for_bit(tokens, dtype):
    case = inputs(tokens, dtype, images=32, heads=6)
    first = differentiate(triton_attention, *case)
    for _ in range(3):
        again = differentiate(triton_attention, *case)
        assert all(torch.equal(again[name], first[name]) for name in first)


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_training(dtype):
    found = errors(*inputs(256, dtype, images=32, heads=6))
    assert within(found, LIMITS[dtype]), found


@on_a_gpu
def test_tf32_where_it_is_allowed(monkeypatch):
    case = inputs(256, heads=6)
    exact = errors(*case)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert all(exact[name] < error < 2e-3 for name, error in errors(*case).items())


@on_a_gpu
def test_more_than_two_billion_numbers():
    """Offsets past 2^31: the last image of a large batch is computed as it is alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    images, tokens, heads = 768, 1024, 18
    qkv = torch.randn(images, tokens, 3, heads, 52, dtype=torch.bfloat16, device=DEVICE)
    assert qkv.numel() > 2**31
    bias, grad_out = (
        torch.randn(heads, tokens, tokens, device=DEVICE),
        torch.randn_like(qkv[:, :, 0].flatten(2)),
    )
    many, one = (
        differentiate(triton_attention, x, bias, None, g)
        for x, g in ((qkv, grad_out), (qkv[-1:], grad_out[-1:]))
    )
    assert torch.equal(many["out"][-1:], one["out"])
    assert torch.equal(many["grad_qkv"][-1:], one["grad_qkv"])
