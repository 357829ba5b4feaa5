"""EDT's attention in Triton: one pass over packed qkv, with the gradient of the position bias and
the modulation.

Four kernels: ``_forward``, ``_grad_q`` (which also leaves delta, the row sums of grad_out * out),
``_grad_kv`` and ``_grad_bias``. Each output cell is written by exactly one program and in a fixed
order of additions, so that results repeat bit for bit; there are no atomics. Scores, bias, softmax
and every accumulator are float32 whatever the inputs are.

With M the modulation, or ones: P = softmax(S), out = (P * M) v, and backwards dV = (P * M)^T dO, dP
= M * (dO v^T), delta = rowsum(dO * out) = rowsum(P * dP), dS = P * (dP - delta), dQ = dS k /
sqrt(d), dK = dS^T q / sqrt(d), and the bias receives dS summed over the images.

In the kernels N is the number of tokens, D the head width, D_PAD its power of two; QUERIES x KEYS
is the tile of scores."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from edt.utils.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UserError(
        "Triton attention needs the triton package (Linux: pip install triton); use the plain attention"
    ) from error

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: Triton's interpreter, on the CPU
MAX_HEAD_WIDTH = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has exp2 and log2 only


def triton_attention(qkv: Tensor, bias: Tensor, modulation: Tensor | None = None) -> Tensor:
    """``(softmax(q k^T / sqrt(d) + bias) * modulation) v`` for every head, as
    :func:`edt.nn.attention.attention` defines it.

    Args:
        qkv: (B, N, 3, heads, d), packed as the qkv projection leaves it; float32, float16 or
            bfloat16, d at most 128.
        bias: (heads, N, N), added to the scores; of any float dtype, in which its gradient comes
            back.
        modulation: (N, N) factor on the softmax's result, a constant, or None.

    Returns:
        (B, N, heads * d) in the dtype of ``qkv``.

    Raises:
        UserError: a device, dtype or head width the kernels do not do.
    """
    _, tokens, _, heads, width = qkv.shape
    if not (qkv.is_cuda or INTERPRETED):
        raise UserError(
            f"Triton attention needs a GPU, got a tensor on {qkv.device}; use the plain attention"
        )
    if qkv.dtype not in DTYPES or width > MAX_HEAD_WIDTH:
        raise UserError(
            f"Triton attention does 16- and 32-bit heads up to 128 wide, got {qkv.dtype}, {width}"
        )
    if modulation is not None:
        if modulation.requires_grad:
            raise UserError(
                "Triton attention has no gradient for the modulation; detach it, or use the plain attention"
            )
        modulation = modulation.expand(tokens, tokens).contiguous()
    bias = bias.expand(heads, tokens, tokens).contiguous()
    return torch.ops.edt.nn.attention(qkv.contiguous(), bias, modulation)[0]


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _head(HEADS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """(image, head, first row) of this program: tiles vary fastest, then heads, whose rows share
    cache lines.

    One axis for all, since the others end at 65,535; images in 64 bits, since their offsets pass
    2^31."""
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    image_head = program // tiles
    return (image_head // HEADS).to(tl.int64), image_head % HEADS, program % tiles * BLOCK


@triton.jit
def _rows(pointer, rows, stride, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Pointers and mask of a (rows, D_PAD) tile whose row r begins at ``pointer + r * stride``."""
    columns = tl.arange(0, D_PAD)
    return pointer + rows[:, None] * stride + columns[None, :], (rows < N)[:, None] & (columns < D)[
        None, :
    ]


@triton.jit
def _load_rows(pointer, rows, stride, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    pointers, mask = _rows(pointer, rows, stride, N, D, D_PAD)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_rows(
    pointer, rows, stride, values, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    pointers, mask = _rows(pointer, rows, stride, N, D, D_PAD)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_pairs(matrix, queries, keys, N: tl.constexpr, PADDED: tl.constexpr):
    """Tile of an (N, N) matrix in float32; ``queries`` and ``keys`` are a column and a row, or a
    row and a column.
    """
    if PADDED:
        tile = tl.load(matrix + queries * N + keys, mask=(queries < N) & (keys < N), other=0.0)
    else:
        tile = tl.load(matrix + queries * N + keys)
    return tile.to(tl.float32)


@triton.jit
def _scores(
    a,
    b,
    bias,
    queries,
    keys,
    SCALE: tl.constexpr,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores times log2(e): those of q k^T for (a, b) = (q, k), their transpose for (k, q). Keys
    past N have -inf.
    """
    products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    scores = (products * SCALE + _load_pairs(bias, queries, keys, N, PADDED)) * _LOG2_E
    return tl.where(keys < N, scores, float("-inf")) if PADDED else scores


@triton.jit
def _forward(
    qkv,
    bias,
    modulation,
    out,
    lse,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out`` and ``lse`` (log2 of the sum of 2^scores) of one tile of queries, by one sweep over
    the keys.
    """
    image, head, first = _head(HEADS, N, QUERIES)
    PADDED: tl.constexpr = N % QUERIES != 0 or N % KEYS != 0
    stride = 3 * HEADS * D
    query_base = qkv + image * (N * stride) + head * D
    key_base, value_base = query_base + HEADS * D, query_base + 2 * HEADS * D
    bias += head * N * N
    rows = first + tl.arange(0, QUERIES)
    q = _load_rows(query_base, rows, stride, N, D, D_PAD)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, D_PAD], tl.float32)
    for start in range(0, N, KEYS):
        columns = start + tl.arange(0, KEYS)
        k = _load_rows(key_base, columns, stride, N, D, D_PAD)
        v = _load_rows(value_base, columns, stride, N, D, D_PAD)
        scores = _scores(q, k, bias, rows[:, None], columns[None, :], SCALE, N, PADDED, PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)  # before the modulation: nothing is renormalised
        if modulation is not None:
            p *= _load_pairs(modulation, rows[:, None], columns[None, :], N, PADDED)
        result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    out_base = out + image * (N * HEADS * D) + head * D
    _store_rows(out_base, rows, HEADS * D, result / total[:, None], N, D, D_PAD)
    tl.store(lse + (image * HEADS + head) * N + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def _grad_q(
    qkv,
    bias,
    modulation,
    out,
    grad_out,
    lse,
    delta,
    grad_qkv,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``delta`` and the gradient of q for one tile of queries, by one sweep over the keys."""
    image, head, first = _head(HEADS, N, QUERIES)
    PADDED: tl.constexpr = N % QUERIES != 0 or N % KEYS != 0
    stride = 3 * HEADS * D
    query_base = qkv + image * (N * stride) + head * D
    key_base, value_base = query_base + HEADS * D, query_base + 2 * HEADS * D
    out_offset = image * (N * HEADS * D) + head * D
    bias += head * N * N
    rows = first + tl.arange(0, QUERIES)
    q = _load_rows(query_base, rows, stride, N, D, D_PAD)
    do = _load_rows(grad_out + out_offset, rows, HEADS * D, N, D, D_PAD)
    o = _load_rows(out + out_offset, rows, HEADS * D, N, D, D_PAD)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row_offset = (image * HEADS + head) * N + rows
    tl.store(delta + row_offset, row_delta, mask=rows < N)
    row_lse = tl.load(lse + row_offset, mask=rows < N, other=0.0)
    result = tl.zeros([QUERIES, D_PAD], tl.float32)
    for start in range(0, N, KEYS):
        columns = start + tl.arange(0, KEYS)
        k = _load_rows(key_base, columns, stride, N, D, D_PAD)
        v = _load_rows(value_base, columns, stride, N, D, D_PAD)
        p = tl.exp2(
            _scores(q, k, bias, rows[:, None], columns[None, :], SCALE, N, PADDED, PRECISION)
            - row_lse[:, None]
        )
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if modulation is not None:
            dp *= _load_pairs(modulation, rows[:, None], columns[None, :], N, PADDED)
        ds = p * (dp - row_delta[:, None])
        result += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    grad_base = grad_qkv + image * (N * stride) + head * D
    _store_rows(grad_base, rows, stride, result * SCALE, N, D, D_PAD)


@triton.jit
def _grad_kv(
    qkv,
    bias,
    modulation,
    grad_out,
    lse,
    delta,
    grad_qkv,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of k and v for one tile of keys, by one sweep over the queries. Tiles of scores
    are transposed.
    """
    image, head, first = _head(HEADS, N, KEYS)
    PADDED: tl.constexpr = N % QUERIES != 0 or N % KEYS != 0
    stride = 3 * HEADS * D
    query_base = qkv + image * (N * stride) + head * D
    out_base = grad_out + image * (N * HEADS * D) + head * D
    row_base = (image * HEADS + head) * N
    bias += head * N * N
    columns = first + tl.arange(0, KEYS)
    k = _load_rows(query_base + HEADS * D, columns, stride, N, D, D_PAD)
    v = _load_rows(query_base + 2 * HEADS * D, columns, stride, N, D, D_PAD)
    grad_k = tl.zeros([KEYS, D_PAD], tl.float32)
    grad_v = tl.zeros([KEYS, D_PAD], tl.float32)
    for start in range(0, N, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        q = _load_rows(query_base, rows, stride, N, D, D_PAD)
        do = _load_rows(out_base, rows, HEADS * D, N, D, D_PAD)
        # A query past N has p = 1, but its do, delta and q are 0: it adds nothing.
        row_lse = tl.load(lse + row_base + rows, mask=rows < N, other=0.0)
        row_delta = tl.load(delta + row_base + rows, mask=rows < N, other=0.0)
        p = tl.exp2(
            _scores(k, q, bias, rows[None, :], columns[:, None], SCALE, N, PADDED, PRECISION)
            - row_lse[None, :]
        )
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        weights = p
        if modulation is not None:
            factor = _load_pairs(modulation, rows[None, :], columns[:, None], N, PADDED)
            weights *= factor
            dp *= factor
        grad_v += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        grad_k += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    grad_base = grad_qkv + image * (N * stride) + head * D
    _store_rows(grad_base + HEADS * D, columns, stride, grad_k * SCALE, N, D, D_PAD)
    _store_rows(grad_base + 2 * HEADS * D, columns, stride, grad_v, N, D, D_PAD)


@triton.jit
def _grad_bias(
    qkv,
    bias,
    modulation,
    grad_out,
    lse,
    delta,
    partial,
    images,
    chunk,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of one tile of one head's bias, summed over one chunk of the images: ``partial``
    (chunks, heads, N, N).
    """
    PADDED: tl.constexpr = N % QUERIES != 0 or N % KEYS != 0
    COLUMN_TILES: tl.constexpr = (N + KEYS - 1) // KEYS
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile // COLUMN_TILES * QUERIES + tl.arange(0, QUERIES)
    columns = tile % COLUMN_TILES * KEYS + tl.arange(0, KEYS)
    stride = 3 * HEADS * D
    bias += head * N * N
    result = tl.zeros([QUERIES, KEYS], tl.float32)
    for image in range(part * chunk, tl.minimum((part + 1) * chunk, images)):
        query_base = qkv + image * (N * stride) + head * D
        q = _load_rows(query_base, rows, stride, N, D, D_PAD)
        k = _load_rows(query_base + HEADS * D, columns, stride, N, D, D_PAD)
        v = _load_rows(query_base + 2 * HEADS * D, columns, stride, N, D, D_PAD)
        do = _load_rows(grad_out + image * (N * HEADS * D) + head * D, rows, HEADS * D, N, D, D_PAD)
        row_offset = (image * HEADS + head) * N + rows
        row_lse = tl.load(lse + row_offset, mask=rows < N, other=0.0)
        row_delta = tl.load(delta + row_offset, mask=rows < N, other=0.0)
        p = tl.exp2(
            _scores(q, k, bias, rows[:, None], columns[None, :], SCALE, N, PADDED, PRECISION)
            - row_lse[:, None]
        )
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if modulation is not None:
            dp *= _load_pairs(modulation, rows[:, None], columns[None, :], N, PADDED)
        result += p * (dp - row_delta[:, None])
    cells = partial + (part * HEADS + head) * (N * N) + rows[:, None] * N + columns[None, :]
    tl.store(cells, result, mask=(rows < N)[:, None] & (columns < N)[None, :])


# -- launches ----------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Of the scores: the rows a program owns, and those of the other operand that it takes at a
    time.
    """

    owned: int
    taken: int
    warps: int
    stages: int  # of the software pipeline


KERNELS = {"forward": _forward, "grad_q": _grad_q, "grad_kv": _grad_kv, "grad_bias": _grad_bias}


def choose_tile(tokens: int, width: int, dtype: torch.dtype, precision: str) -> Tile:
    """The largest that compile for an H100 without spills, benchmarks/results; its wgmma needs 64
    owned rows.
    """
    no_tensor_cores = dtype == torch.float32 and precision == "ieee"
    if tokens <= 16:
        return Tile(16, 16, 2 if no_tensor_cores else 1, 1)
    if dtype != torch.float32:
        return Tile(64, 64 if width <= 64 else 32, 4, 2)
    return Tile(32, 16, 4, 2) if no_tensor_cores or width > 64 else Tile(64, 32, 4, 2)


def constants(kernel: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    """What one of KERNELS is compiled for, given the shape and dtype of qkv; options of the
    compiler in lower case.
    """
    _, tokens, _, heads, width = shape
    precision = (
        "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    )  # of float32 products
    owned, taken, warps, stages = choose_tile(tokens, width, dtype, precision)
    queries, keys = (taken, owned) if kernel == "grad_kv" else (owned, taken)
    return {
        "HEADS": heads,
        "N": tokens,
        "D": width,
        "D_PAD": max(16, triton.next_power_of_2(width)),
        "SCALE": width**-0.5,
        "QUERIES": queries,
        "KEYS": keys,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


def chunk_images(images: int, heads: int, tiles: int) -> int:
    """Images that one program of ``_grad_bias`` sums over: about 768 programs share the work,
    enough to fill an H100.

    The device is not asked, so that the order of the sum is the same on all.
    """
    return max(1, triton.cdiv(images, max(1, 768 // (heads * tiles))))


def _launch(kernel: str, qkv: Tensor, *others: Tensor | None) -> None:
    """Run a kernel whose programs own rows of one head of one image."""
    images, tokens, _, heads, _ = qkv.shape
    meta = constants(kernel, qkv.shape, qkv.dtype)
    programs = (
        images * heads * triton.cdiv(tokens, meta["KEYS" if kernel == "grad_kv" else "QUERIES"])
    )
    with torch.cuda.device_of(qkv):
        KERNELS[kernel][(programs,)](qkv, *others, **meta)


# Opaque operators rather than triton_op: torch's FLOP counter does not run the kernels that it sees
# inside one, and TF32 is looked up at each call, as torch's own products do.
@torch.library.custom_op("edt::attention", mutates_args=())
def _attention(qkv: Tensor, bias: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N, heads * d) and, for the backward pass, lse (B, heads, N) float32. Inputs are
    contiguous, here and below.
    """
    out, lse = _empty_outputs(qkv, bias, modulation)
    _launch("forward", qkv, bias, modulation, out, lse)
    return out, lse


@_attention.register_fake
def _empty_outputs(qkv: Tensor, bias: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(images, tokens, heads * width), qkv.new_empty(
        images, heads, tokens, dtype=torch.float32
    )


@torch.library.custom_op("edt::attention_grad_qkv", mutates_args=())
def _attention_grad_qkv(
    qkv: Tensor, bias: Tensor, modulation: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of ``qkv``, and delta (B, heads, N) float32."""
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    _launch(
        "grad_q", qkv, bias, modulation, out, grad_out, lse, delta, grad_qkv
    )  # first: it writes delta
    _launch("grad_kv", qkv, bias, modulation, grad_out, lse, delta, grad_qkv)
    return grad_qkv, delta


@_attention_grad_qkv.register_fake
def _(qkv, bias, modulation, out, grad_out, lse):
    return torch.empty_like(qkv), torch.empty_like(lse)


@torch.library.custom_op("edt::attention_grad_bias", mutates_args=())
def _attention_grad_bias(
    qkv: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> Tensor:
    """The gradient of ``bias``, in its dtype."""
    images, tokens, _, heads, _ = qkv.shape
    meta = constants("grad_bias", qkv.shape, qkv.dtype)
    tiles = triton.cdiv(tokens, meta["QUERIES"]) * triton.cdiv(tokens, meta["KEYS"])
    chunk = chunk_images(images, heads, tiles)
    partial = qkv.new_empty(triton.cdiv(images, chunk), heads, tokens, tokens, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _grad_bias[(tiles, heads, len(partial))](
            qkv, bias, modulation, grad_out, lse, delta, partial, images, chunk, **meta
        )
    return partial.sum(0).to(bias.dtype)


@_attention_grad_bias.register_fake
def _(qkv, bias, modulation, grad_out, lse, delta):
    return torch.empty_like(bias)


# -- autograd ----------------------------------------------------------------------------------------------------------


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_out: Tensor, _) -> tuple:
    *inputs, out, lse = ctx.saved_tensors
    grad_out = grad_out.contiguous()
    grad_qkv, delta = torch.ops.edt.attention_grad_qkv(*inputs, out, grad_out, lse)
    grad_bias = (
        torch.ops.edt.attention_grad_bias(*inputs, grad_out, lse, delta)
        if ctx.needs_input_grad[1]
        else None
    )
    return grad_qkv, grad_bias, None


_attention.register_autograd(_backward, setup_context=_save)


# Counted as the plain definition is: what the kernels compute twice or on padding is not the
# model's work.
@register_flop_formula(torch.ops.edt.nn.attention)
def _attention_flops(qkv_shape: tuple[int, ...], *_, **__) -> int:
    images, tokens, _, heads, width = qkv_shape
    return 4 * images * heads * tokens**2 * width


@register_flop_formula(torch.ops.edt.attention_grad_qkv)
def _attention_grad_flops(qkv_shape: tuple[int, ...], *_, **__) -> int:
    return 2 * _attention_flops(qkv_shape)
