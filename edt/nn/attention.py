"""The attention operation of the transformer blocks: softmax attention with an optional bias before
the softmax and an optional factor after it.
"""

import contextlib
from typing import Literal

import torch
import torch.nn.functional as F

from edt.utils.choices import unknown_choice

AttentionBackend = Literal["auto", "reference", "triton"]

ATTENTION_BACKENDS: dict[AttentionBackend, str] = {
    "auto": "torch's fused attention where there is neither position bias nor AMM, else triton for "
    "16-bit types on a GPU, else reference",
    "reference": "plain matrix products (the definition; fastest on a CPU)",
    "triton": "fused GPU kernels that never store the attention matrix",
}


def attention(
    qkv: torch.Tensor,
    bias: torch.Tensor | None = None,
    amm_matrix: torch.Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> torch.Tensor:
    """Compute ``(softmax(q k^T / sqrt(d) + bias) * amm_matrix) v`` for every head.

    The rows of ``softmax(...) * amm_matrix`` are not normalised again (paper, section 3.2).

    With neither bias nor factor, "auto" takes ``scaled_dot_product_attention``. Its fused kernels
    accept neither a factor after the softmax nor, at a head_dim of 52, a bias that needs a
    gradient.

    Args:
        qkv: (B, N, 3, num_heads, head_dim), as the qkv projection returns it.
        bias: added to the scores. (num_heads, N, N) is shared by all images, and
            (B, num_heads, N, N) has one bias per image. None adds nothing. The triton backend
            accepts only a shared bias; "auto" computes a per-image bias with the reference.
        amm_matrix: (N, N) factor on the result of the softmax (see :mod:`edt.amm`), or None. A
            masked pass has one per image, (B, 1, N, N), with the same restriction as the bias.
        backend: a key of :data:`ATTENTION_BACKENDS`.

    Returns:
        (B, N, num_heads * head_dim) in the dtype of ``qkv``.

    Raises:
        UserError: the backend is unknown, or it cannot compute these inputs on this device.
    """
    if backend not in ATTENTION_BACKENDS:
        raise unknown_choice("attention backend", backend, AttentionBackend)
    if backend == "auto" and bias is None and amm_matrix is None:
        return _without_bias(qkv)
    if backend == "auto":
        is_16_bit = qkv.dtype in (torch.bfloat16, torch.float16)
        is_shared = all(pairs is None or pairs.ndim <= 3 for pairs in (bias, amm_matrix))
        backend = "triton" if qkv.is_cuda and is_16_bit and is_shared else "reference"
    if backend == "triton":
        # Imported here because only this backend needs the triton package.
        from edt.nn.attention_triton import triton_attention

        return triton_attention(qkv, bias, amm_matrix)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, num_heads, N, head_dim) each
    # The inputs decide the precision: autocast would lower float32 inputs to bfloat16. The softmax
    # needs no cast, since torch sums a bfloat16 softmax in float32.
    with no_autocast(qkv.device):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores += bias.to(scores.dtype)
        weights = scores.softmax(dim=-1)
        if amm_matrix is not None:
            weights = weights * amm_matrix.to(weights.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)


def _without_bias(qkv: torch.Tensor) -> torch.Tensor:
    """Plain softmax attention of (B, N, 3, num_heads, head_dim), in torch's fused kernels."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with no_autocast(qkv.device):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A region whose operations run in the types of their inputs."""
    # The meta device has no autocast. torch.amp.is_autocast_available would say so, but torch 2.11
    # cannot compile that call.
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
