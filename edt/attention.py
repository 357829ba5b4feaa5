"""The attention operation of EDT: biased softmax attention, optionally modulated after the softmax."""

import torch


def attention(qkv: torch.Tensor, bias: torch.Tensor, modulation: torch.Tensor | None = None) -> torch.Tensor:
    """``(softmax(q k^T / sqrt(d) + bias) * modulation) v`` for every head.

    Written out rather than handed to ``scaled_dot_product_attention``: the fused kernels take neither a bias that
    needs a gradient at head width 52 nor a factor after the softmax, and under bf16 on a CPU they are slower.

    Args:
        qkv: (B, N, 3, heads, d), packed as the qkv projection leaves it.
        bias: (heads, N, N), added to the scores.
        modulation: (N, N) factor on the softmax's result, or None.

    Returns:
        (B, N, heads * d).
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    with torch.autocast(qkv.device.type, enabled=False):  # a softmax of bfloat16 sums in float32 as it is
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores += bias.to(scores.dtype)
        weights = scores.softmax(dim=-1)
        if modulation is not None:
            weights = weights * modulation.to(weights.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)
