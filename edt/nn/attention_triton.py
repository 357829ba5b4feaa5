"""The "triton" backend of :func:`edt.nn.attention.attention`, with gradients for qkv and the bias.

The kernels are in :mod:`edt.nn.triton_kernels`. This module checks the inputs, chooses the tiles,
launches the kernels and registers them with torch as operators: for autograd, for torch.compile and
for the FLOP counter.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from edt.utils.errors import UserError

try:
    import triton
except ImportError as error:
    raise UserError(
        'the attention backend "triton" needs the triton package; '
        'install it (on Linux: pip install triton) or use the backend "reference"'
    ) from error

from edt.nn.triton_kernels import (
    attention_forward,
    attention_grad_bias,
    attention_grad_kv,
    attention_grad_q,
)

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: Triton's interpreter, on the CPU
MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

KernelName = Literal["forward", "grad_q", "grad_kv", "grad_bias"]
KERNELS: dict[KernelName, Any] = {
    "forward": attention_forward,
    "grad_q": attention_grad_q,
    "grad_kv": attention_grad_kv,
    "grad_bias": attention_grad_bias,
}

Float32Precision = Literal["tf32", "ieee"]  # Triton's names for float32 products


def triton_attention(
    qkv: Tensor, bias: Tensor | None = None, amm_matrix: Tensor | None = None
) -> Tensor:
    """Compute ``(softmax(q k^T / sqrt(d) + bias) * amm_matrix) v`` for every head.

    :func:`edt.nn.attention.attention` defines the operation.

    Args:
        qkv: (B, N, 3, num_heads, head_dim), as the qkv projection returns it; float32, float16 or
            bfloat16, with a head_dim of at most 128.
        bias: (num_heads, N, N), added to the scores, or None for zeros. It may have any float
            dtype; its gradient has the same.
        amm_matrix: (N, N) factor on the result of the softmax, a constant, or None.

    Returns:
        (B, N, num_heads * head_dim) in the dtype of ``qkv``.

    Raises:
        UserError: the kernels do not support the device, a dtype, the head_dim, a bias per image,
            or a gradient for ``amm_matrix``.
    """
    _check_support(qkv, bias, amm_matrix)
    _, tokens, _, num_heads, _ = qkv.shape
    if bias is None:
        # One compiled kernel serves both cases: (num_heads, N, N) zeros are small beside qkv.
        bias = qkv.new_zeros(num_heads, tokens, tokens, dtype=torch.float32)
    # The kernels compute addresses from the shape alone, so their inputs must be contiguous.
    bias = bias.expand(num_heads, tokens, tokens).contiguous()
    if amm_matrix is not None:
        amm_matrix = amm_matrix.expand(tokens, tokens).contiguous()
    return torch.ops.edt.attention(qkv.contiguous(), bias, amm_matrix)[0]


def _check_support(qkv: Tensor, bias: Tensor | None, amm_matrix: Tensor | None) -> None:
    """Raise a UserError for inputs that the kernels do not support."""
    backend, advice = 'the attention backend "triton"', 'use the backend "reference"'
    if not (qkv.is_cuda or INTERPRETED):
        raise UserError(f"{backend} needs a GPU, but the inputs are on {qkv.device}; {advice}")
    if qkv.dtype not in DTYPES:
        raise UserError(f"{backend} needs a 16- or 32-bit dtype, got {qkv.dtype}; {advice}")
    head_dim = qkv.shape[-1]
    if head_dim > MAX_HEAD_DIM:
        raise UserError(
            f"{backend} needs a head_dim of at most {MAX_HEAD_DIM}, got {head_dim}; {advice}"
        )
    if bias is not None and bias.ndim > 3:
        raise UserError(
            f"{backend} has no bias per image: it needs the shape (num_heads, N, N), "
            f"got {tuple(bias.shape)}; {advice}"
        )
    if amm_matrix is not None and amm_matrix.requires_grad:
        raise UserError(f"{backend} has no gradient for amm_matrix; detach it, or {advice}")


# -- tiles and launches ----------------------------------------------------------------------------


class Tile(NamedTuple):
    """How the scores are split among programs, and how a program is compiled."""

    owned_rows: int  # rows of the output that one program computes
    streamed_rows: int  # rows of the other operand that it loads per iteration of its loop
    num_warps: int
    num_stages: int  # of the software pipeline


def choose_tile(
    tokens: int, head_dim: int, dtype: torch.dtype, precision: Float32Precision
) -> Tile:
    """The largest tile whose kernels compile for an H100 without register spills.

    benchmarks/report_kernels.py counts the spills; benchmarks/results has its tables. An H100's
    tensor cores work on 64 rows at a time (wgmma), so a program owns 64 rows unless it would spill.
    """
    no_tensor_cores = dtype == torch.float32 and precision == "ieee"
    if tokens <= 16:
        return Tile(16, 16, 2 if no_tensor_cores else 1, 1)
    if dtype != torch.float32:
        return Tile(64, 64 if head_dim <= 64 else 32, 4, 2)
    return Tile(32, 16, 4, 2) if no_tensor_cores or head_dim > 64 else Tile(64, 32, 4, 2)


def kernel_constants(
    kernel: KernelName, qkv_shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """The constants that a kernel is compiled for, in upper case, and the compiler's options.

    ``dtype`` is that of qkv.
    """
    _, tokens, _, num_heads, head_dim = qkv_shape
    # The setting is read at each launch, as torch does for its own matrix products. torch derives
    # fp32_precision from the older allow_tf32 flag that set_matmul_precision sets.
    allows_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision: Float32Precision = "tf32" if allows_tf32 else "ieee"
    tile = choose_tile(tokens, head_dim, dtype, precision)
    # Programs own queries, except those of grad_kv, which own keys.
    queries, keys = tile.owned_rows, tile.streamed_rows
    if kernel == "grad_kv":
        queries, keys = keys, queries
    return {
        "NUM_HEADS": num_heads,
        "N": tokens,
        "D": head_dim,
        "D_PAD": max(16, triton.next_power_of_2(head_dim)),  # tl.dot needs 16 at least
        "SCALE": head_dim**-0.5,
        "BLOCK_QUERIES": queries,
        "BLOCK_KEYS": keys,
        "PRECISION": precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def images_per_chunk(num_images: int, num_heads: int, num_tiles: int) -> int:
    """How many images one program of ``attention_grad_bias`` sums.

    About 768 programs share the work, which is enough to fill an H100. The number does not depend
    on the device, so that the order of the sum, and with it the result, is the same on every GPU.
    """
    chunks = max(1, 768 // (num_heads * num_tiles))
    return max(1, triton.cdiv(num_images, chunks))


def _launch(kernel: KernelName, qkv: Tensor, *tensors: Tensor | None) -> None:
    """Run a kernel whose programs each own rows of one head of one image."""
    num_images, tokens, _, num_heads, _ = qkv.shape
    constants = kernel_constants(kernel, qkv.shape, qkv.dtype)
    owned_rows = constants["BLOCK_KEYS" if kernel == "grad_kv" else "BLOCK_QUERIES"]
    programs = num_images * num_heads * triton.cdiv(tokens, owned_rows)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        KERNELS[kernel][(programs,)](qkv, *tensors, **constants)


# -- operators -------------------------------------------------------------------------------------
# The operators are custom_ops, so torch does not look inside. It would look inside a triton_op: the
# FLOP counter would then count the kernels without running them, and torch.compile would freeze the
# TF32 setting at tracing. The inputs of all operators are contiguous.


@torch.library.custom_op("edt::attention", mutates_args=())
def _attention(qkv: Tensor, bias: Tensor, amm_matrix: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output (B, N, num_heads * head_dim), and lse (B, num_heads, N) float32.

    The backward pass needs lse (see :mod:`edt.nn.triton_kernels`).
    """
    out, lse = _empty_outputs(qkv, bias, amm_matrix)
    _launch("forward", qkv, bias, amm_matrix, out, lse)
    return out, lse


@_attention.register_fake
def _empty_outputs(qkv: Tensor, bias: Tensor, amm_matrix: Tensor | None) -> tuple[Tensor, Tensor]:
    num_images, tokens, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty(num_images, tokens, num_heads * head_dim)
    lse = qkv.new_empty(num_images, num_heads, tokens, dtype=torch.float32)
    return out, lse


@torch.library.custom_op("edt::attention_grad_qkv", mutates_args=())
def _attention_grad_qkv(
    qkv: Tensor, bias: Tensor, amm_matrix: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of ``qkv``, and delta (B, num_heads, N) float32."""
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    # grad_q comes first because it writes delta, which grad_kv reads.
    _launch("grad_q", qkv, bias, amm_matrix, out, grad_out, lse, delta, grad_qkv)
    _launch("grad_kv", qkv, bias, amm_matrix, grad_out, lse, delta, grad_qkv)
    return grad_qkv, delta


@_attention_grad_qkv.register_fake
def _empty_grad_qkv(
    qkv: Tensor, bias: Tensor, amm_matrix: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(lse)


@torch.library.custom_op("edt::attention_grad_bias", mutates_args=())
def _attention_grad_bias(
    qkv: Tensor,
    bias: Tensor,
    amm_matrix: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> Tensor:
    """The gradient of ``bias``, in its dtype."""
    num_images, tokens, _, num_heads, _ = qkv.shape
    constants = kernel_constants("grad_bias", qkv.shape, qkv.dtype)
    row_tiles = triton.cdiv(tokens, constants["BLOCK_QUERIES"])
    num_tiles = row_tiles * triton.cdiv(tokens, constants["BLOCK_KEYS"])
    chunk_size = images_per_chunk(num_images, num_heads, num_tiles)
    num_chunks = triton.cdiv(num_images, chunk_size)
    partial_sums = qkv.new_empty(num_chunks, num_heads, tokens, tokens, dtype=torch.float32)
    tensors = (qkv, bias, amm_matrix, grad_out, lse, delta, partial_sums)
    with torch.cuda.device_of(qkv):
        attention_grad_bias[(num_tiles, num_heads, num_chunks)](
            *tensors, num_images, chunk_size, **constants
        )
    return partial_sums.sum(0).to(bias.dtype)


@_attention_grad_bias.register_fake
def _empty_grad_bias(
    qkv: Tensor,
    bias: Tensor,
    amm_matrix: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> Tensor:
    return torch.empty_like(bias)


# -- autograd --------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """Gradients of qkv and bias. ``grad_lse`` is ignored: lse never leaves this module."""
    *inputs, out, lse = ctx.saved_tensors
    grad_out = grad_out.contiguous()
    grad_qkv, delta = torch.ops.edt.attention_grad_qkv(*inputs, out, grad_out, lse)
    grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_bias = torch.ops.edt.attention_grad_bias(*inputs, grad_out, lse, delta)
    return grad_qkv, grad_bias, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


# The counts are those of the reference backend. Recomputed scores and padding are not the model's
# work, so both are left out.
@register_flop_formula(torch.ops.edt.attention)
def _attention_flops(qkv_shape: tuple[int, ...], *inputs: Any, **options: Any) -> int:
    num_images, tokens, _, num_heads, head_dim = qkv_shape
    return 4 * num_images * num_heads * tokens**2 * head_dim


@register_flop_formula(torch.ops.edt.attention_grad_qkv)
def _attention_grad_flops(qkv_shape: tuple[int, ...], *inputs: Any, **options: Any) -> int:
    return 2 * _attention_flops(qkv_shape)
