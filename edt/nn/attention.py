"""The attention operation of EDT: biased softmax attention, optionally modulated after the
softmax.
"""

from typing import Literal

import torch

from edt.nn.precision import no_autocast

AttentionBackend = Literal["auto", "reference", "triton"]
ATTENTION_BACKENDS: dict[AttentionBackend, str] = {
    "auto": "triton for 16-bit types on a GPU, else reference",
    "reference": "plain matrix products: the definition, and the fastest on a CPU",
    "triton": "one kernel that never writes the attention matrix; a GPU only",
}


def attention(
    qkv: torch.Tensor,
    bias: torch.Tensor | None = None,
    amm_matrix: torch.Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> torch.Tensor:
    """``(softmax(q k^T / sqrt(d) + bias) * amm_matrix) v`` for every head.

    ``scaled_dot_product_attention`` is no path: its fused kernels take neither a bias that needs a
    gradient at head width 52 nor a factor after the softmax, and under bf16 on a CPU they are
    slower.

    Args:
        qkv: (B, N, 3, heads, d), packed as the qkv projection leaves it.
        bias: (heads, N, N), added to the scores.
        amm_matrix: (N, N) factor on the softmax's result, or None.
        path: a key of :data:`PATHS`.

    Returns:
        (B, N, heads * d) in the type of ``qkv``.

    Raises:
        UserError: the path does not run here.
    """
    if backend == "triton" or (
        backend == "auto" and qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16)
    ):
        from edt.nn.attention_triton import triton_attention  # needs the triton package

        return triton_attention(qkv, bias, amm_matrix)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    with no_autocast(qkv.device):  # a softmax of bfloat16 sums in float32 as it is
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores += bias.to(scores.dtype)
        weights = scores.softmax(dim=-1)
        if amm_matrix is not None:
            weights = weights * amm_matrix.to(weights.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)
