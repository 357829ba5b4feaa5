"""Triton kernels of attention: one for the forward pass and three for its gradients.

:mod:`edt.nn.attention_triton` launches them. S are the scores, M is the AMM matrix (or ones) and *
multiplies element by element::

    P = softmax(S)            out = (P * M) v
    dV = (P * M)^T dO         dP = M * (dO v^T)
    delta = rowsum(dO * out) = rowsum(P * dP)
    dS = P * (dP - delta)     dQ = dS k / sqrt(D)     dK = dS^T q / sqrt(D)

The gradient of the bias is dS summed over the images.

Each output element is written by exactly one program, and each sum has a fixed order. There are no
atomics, so results repeat bit for bit. Scores, bias, softmax and accumulators are float32 for every
dtype of the inputs.

In the kernels N is the number of tokens, D the head_dim and D_PAD the next power of two, which
Triton's tiles need. BLOCK_QUERIES x BLOCK_KEYS is one tile of the scores. ``lse`` is
log2(sum(exp(S))) of each row. PADDED is true if N is not a multiple of both block sizes. Only then
do tiles of (N, N) matrices need a mask.
"""

import triton
import triton.language as tl

# Exponentials are computed as 2^(x log2(e)), because GPUs have instructions for exp2 and log2 only.
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _program_position(NUM_HEADS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Image, head and first row of this program.

    The launch grid has one axis, because CUDA limits the other axes to 65,535 programs. Row blocks
    vary fastest, because those of one head read the same keys and values. Heads vary next, because
    the heads of one token share cache lines.
    """
    num_blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    image_head = program // num_blocks
    # An image's offset can exceed 2^31 elements, so its index is 64 bits wide.
    image = (image_head // NUM_HEADS).to(tl.int64)
    return image, image_head % NUM_HEADS, program % num_blocks * BLOCK


@triton.jit
def _row_pointers(pointer, rows, stride, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Pointers and mask of a (rows, D_PAD) tile. Row r begins at ``pointer + r * stride``."""
    columns = tl.arange(0, D_PAD)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    return pointers, (rows < N)[:, None] & (columns < D)[None, :]


@triton.jit
def _load_rows(pointer, rows, stride, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Load a (rows, D_PAD) tile. Rows past N and columns past D are 0."""
    pointers, mask = _row_pointers(pointer, rows, stride, N, D, D_PAD)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_rows(
    pointer, rows, stride, values, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Store a (rows, D_PAD) tile in the dtype of ``pointer``, without its padding."""
    pointers, mask = _row_pointers(pointer, rows, stride, N, D, D_PAD)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_matrix_tile(matrix, queries, keys, N: tl.constexpr, PADDED: tl.constexpr):
    """Load a tile of an (N, N) matrix as float32.

    Indices ``queries`` (n, 1) and ``keys`` (1, m) give the tile (n, m). Indices ``queries`` (1, n)
    and ``keys`` (m, 1) give its transpose (m, n).
    """
    if PADDED:
        tile = tl.load(matrix + queries * N + keys, mask=(queries < N) & (keys < N), other=0.0)
    else:
        tile = tl.load(matrix + queries * N + keys)
    return tile.to(tl.float32)


@triton.jit
def _log2_scores(
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
    """Scores times log2(e): (queries, keys) for (a, b) = (q, k), (keys, queries) for (k, q).

    Keys past N are -inf, so that the softmax gives them no weight.
    """
    products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    scores = (products * SCALE + _load_matrix_tile(bias, queries, keys, N, PADDED)) * _LOG2_E
    return tl.where(keys < N, scores, float("-inf")) if PADDED else scores


@triton.jit
def attention_forward(
    qkv,
    bias,
    amm_matrix,
    out,
    lse,
    NUM_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out`` and ``lse`` of one block of queries, by one loop over the keys."""
    image, head, first_row = _program_position(NUM_HEADS, N, BLOCK_QUERIES)
    PADDED: tl.constexpr = N % BLOCK_QUERIES != 0 or N % BLOCK_KEYS != 0
    stride = 3 * NUM_HEADS * D
    query_base = qkv + image * (N * stride) + head * D
    key_base, value_base = query_base + NUM_HEADS * D, query_base + 2 * NUM_HEADS * D
    bias += head * N * N
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    q = _load_rows(query_base, rows, stride, N, D, D_PAD)
    row_max = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    weighted_v = tl.zeros([BLOCK_QUERIES, D_PAD], tl.float32)
    for first_key in range(0, N, BLOCK_KEYS):
        columns = first_key + tl.arange(0, BLOCK_KEYS)
        k = _load_rows(key_base, columns, stride, N, D, D_PAD)
        v = _load_rows(value_base, columns, stride, N, D, D_PAD)
        scores = _log2_scores(
            q, k, bias, rows[:, None], columns[None, :], SCALE, N, PADDED, PRECISION
        )
        # Online softmax: the sums so far are rescaled to the new maximum of the row.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        # The sum excludes AMM's factor, because AMM does not normalise the rows again.
        row_sum = row_sum * rescale + tl.sum(p, 1)
        if amm_matrix is not None:
            p *= _load_matrix_tile(amm_matrix, rows[:, None], columns[None, :], N, PADDED)
        weighted_v = weighted_v * rescale[:, None] + tl.dot(
            p.to(v.dtype), v, input_precision=PRECISION
        )
        row_max = new_max
    out_base = out + image * (N * NUM_HEADS * D) + head * D
    _store_rows(out_base, rows, NUM_HEADS * D, weighted_v / row_sum[:, None], N, D, D_PAD)
    lse_pointers = lse + (image * NUM_HEADS + head) * N + rows
    tl.store(lse_pointers, row_max + tl.log2(row_sum), mask=rows < N)


@triton.jit
def attention_grad_q(
    qkv,
    bias,
    amm_matrix,
    out,
    grad_out,
    lse,
    delta,
    grad_qkv,
    NUM_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``delta`` and the gradient of q for one block of queries, by one loop over the keys."""
    image, head, first_row = _program_position(NUM_HEADS, N, BLOCK_QUERIES)
    PADDED: tl.constexpr = N % BLOCK_QUERIES != 0 or N % BLOCK_KEYS != 0
    stride = 3 * NUM_HEADS * D
    query_base = qkv + image * (N * stride) + head * D
    key_base, value_base = query_base + NUM_HEADS * D, query_base + 2 * NUM_HEADS * D
    out_offset = image * (N * NUM_HEADS * D) + head * D
    bias += head * N * N
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    q = _load_rows(query_base, rows, stride, N, D, D_PAD)
    do = _load_rows(grad_out + out_offset, rows, NUM_HEADS * D, N, D, D_PAD)
    o = _load_rows(out + out_offset, rows, NUM_HEADS * D, N, D, D_PAD)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row_offset = (image * NUM_HEADS + head) * N + rows
    tl.store(delta + row_offset, row_delta, mask=rows < N)
    row_lse = tl.load(lse + row_offset, mask=rows < N, other=0.0)
    grad_q = tl.zeros([BLOCK_QUERIES, D_PAD], tl.float32)
    for first_key in range(0, N, BLOCK_KEYS):
        columns = first_key + tl.arange(0, BLOCK_KEYS)
        k = _load_rows(key_base, columns, stride, N, D, D_PAD)
        v = _load_rows(value_base, columns, stride, N, D, D_PAD)
        scores = _log2_scores(
            q, k, bias, rows[:, None], columns[None, :], SCALE, N, PADDED, PRECISION
        )
        p = tl.exp2(scores - row_lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if amm_matrix is not None:
            dp *= _load_matrix_tile(amm_matrix, rows[:, None], columns[None, :], N, PADDED)
        ds = p * (dp - row_delta[:, None])
        grad_q += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    grad_base = grad_qkv + image * (N * stride) + head * D
    _store_rows(grad_base, rows, stride, grad_q * SCALE, N, D, D_PAD)


@triton.jit
def attention_grad_kv(
    qkv,
    bias,
    amm_matrix,
    grad_out,
    lse,
    delta,
    grad_qkv,
    NUM_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of k and v for one block of keys, by one loop over the queries.

    Tiles of scores are (keys, queries), so that no product transposes a computed tile.
    """
    image, head, first_row = _program_position(NUM_HEADS, N, BLOCK_KEYS)
    PADDED: tl.constexpr = N % BLOCK_QUERIES != 0 or N % BLOCK_KEYS != 0
    stride = 3 * NUM_HEADS * D
    query_base = qkv + image * (N * stride) + head * D
    out_base = grad_out + image * (N * NUM_HEADS * D) + head * D
    row_base = (image * NUM_HEADS + head) * N
    bias += head * N * N
    columns = first_row + tl.arange(0, BLOCK_KEYS)
    k = _load_rows(query_base + NUM_HEADS * D, columns, stride, N, D, D_PAD)
    v = _load_rows(query_base + 2 * NUM_HEADS * D, columns, stride, N, D, D_PAD)
    grad_k = tl.zeros([BLOCK_KEYS, D_PAD], tl.float32)
    grad_v = tl.zeros([BLOCK_KEYS, D_PAD], tl.float32)
    for first_query in range(0, N, BLOCK_QUERIES):
        rows = first_query + tl.arange(0, BLOCK_QUERIES)
        q = _load_rows(query_base, rows, stride, N, D, D_PAD)
        do = _load_rows(out_base, rows, NUM_HEADS * D, N, D, D_PAD)
        # A query past N has p = 1, but its do, delta and q are 0, so it adds nothing.
        row_lse = tl.load(lse + row_base + rows, mask=rows < N, other=0.0)
        row_delta = tl.load(delta + row_base + rows, mask=rows < N, other=0.0)
        scores = _log2_scores(
            k, q, bias, rows[None, :], columns[:, None], SCALE, N, PADDED, PRECISION
        )
        p = tl.exp2(scores - row_lse[None, :])
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        weights = p
        if amm_matrix is not None:
            factor = _load_matrix_tile(amm_matrix, rows[None, :], columns[:, None], N, PADDED)
            weights *= factor
            dp *= factor
        grad_v += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        grad_k += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    grad_base = grad_qkv + image * (N * stride) + head * D
    _store_rows(grad_base + NUM_HEADS * D, columns, stride, grad_k * SCALE, N, D, D_PAD)
    _store_rows(grad_base + 2 * NUM_HEADS * D, columns, stride, grad_v, N, D, D_PAD)


@triton.jit
def attention_grad_bias(
    qkv,
    bias,
    amm_matrix,
    grad_out,
    lse,
    delta,
    partial_sums,
    num_images,
    chunk_size,
    NUM_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the gradient of one head's bias, summed over ``chunk_size`` images.

    ``partial_sums`` is (chunks, heads, N, N). The launching code adds the chunks.
    """
    PADDED: tl.constexpr = N % BLOCK_QUERIES != 0 or N % BLOCK_KEYS != 0
    COLUMN_TILES: tl.constexpr = (N + BLOCK_KEYS - 1) // BLOCK_KEYS
    tile, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile // COLUMN_TILES * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    columns = tile % COLUMN_TILES * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    stride = 3 * NUM_HEADS * D
    bias += head * N * N
    grad_tile = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for image in range(chunk * chunk_size, tl.minimum((chunk + 1) * chunk_size, num_images)):
        query_base = qkv + image * (N * stride) + head * D
        q = _load_rows(query_base, rows, stride, N, D, D_PAD)
        k = _load_rows(query_base + NUM_HEADS * D, columns, stride, N, D, D_PAD)
        v = _load_rows(query_base + 2 * NUM_HEADS * D, columns, stride, N, D, D_PAD)
        out_base = grad_out + image * (N * NUM_HEADS * D) + head * D
        do = _load_rows(out_base, rows, NUM_HEADS * D, N, D, D_PAD)
        row_offset = (image * NUM_HEADS + head) * N + rows
        row_lse = tl.load(lse + row_offset, mask=rows < N, other=0.0)
        row_delta = tl.load(delta + row_offset, mask=rows < N, other=0.0)
        scores = _log2_scores(
            q, k, bias, rows[:, None], columns[None, :], SCALE, N, PADDED, PRECISION
        )
        p = tl.exp2(scores - row_lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if amm_matrix is not None:
            dp *= _load_matrix_tile(amm_matrix, rows[:, None], columns[None, :], N, PADDED)
        grad_tile += p * (dp - row_delta[:, None])
    pointers = (
        partial_sums + (chunk * NUM_HEADS + head) * (N * N) + rows[:, None] * N + columns[None, :]
    )
    tl.store(pointers, grad_tile, mask=(rows < N)[:, None] & (columns < N)[None, :])
