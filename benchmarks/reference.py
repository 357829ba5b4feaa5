"""The arithmetic of the public release, which the benchmarks compare with.

It computes eagerly in fp32 (TF32 on a GPU), in two independent passes. Tables, timesteps, masks and
the history of losses live on the host. The EMA is updated tensor by tensor, and the guided sampler
keeps the state of both halves.
"""

import types

import numpy as np
import timm.optim
import torch
from torch import nn

from edt.diffusion import DDPMSampler, GaussianDiffusion, linear_betas, respaced_timesteps
from edt.diffusion.samplers import NoiseAt
from edt.masking import MID_RATIO, TokenMasks, draw_masks
from edt.models import EDT
from edt.nn.layers import Attention, Block, layer_norm
from edt.training.optim import BETAS
from edt.training.step_inputs import PassInputs, StepInputs

HISTORY_LENGTH = 10  # losses that the release remembers per timestep
LABEL_DROPOUT = 0.1


def as_released(model: EDT) -> EDT:
    """Make a network compute its blocks operation by operation, in place."""
    for block in model.blocks:
        block.forward = types.MethodType(_block, block)
        block.attn.forward = types.MethodType(_attention, block.attn)
        # As in the release, the index stays on the host and is copied to the GPU at every use.
        block.attn.host_index = block.attn.rel_pos_bias.relative_position_index.flatten().cpu()
    return model


def _block(self: Block, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    parts = [part.unsqueeze(1) for part in self.adaLN_modulation(c)]
    x = x + parts[2] * self.attn(layer_norm(x) * (1 + parts[1]) + parts[0])
    return x + parts[5] * self.mlp(layer_norm(x) * (1 + parts[4]) + parts[3])


def _attention(self: Attention, x: torch.Tensor) -> torch.Tensor:
    batch, tokens, dim = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    table = self.rel_pos_bias.relative_position_bias_table[self.host_index.to(x.device)]
    bias = table.view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
    scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1) + bias
    weights = scores.softmax(dim=-1)
    if self.amm_matrix is not None:
        weights = weights * self.amm_matrix
    return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class HostTables(GaussianDiffusion):
    """A diffusion whose tables stay on the host and are copied to the device at every use."""

    def __init__(self, steps: str = "") -> None:
        super().__init__(linear_betas(), respaced_timesteps(steps))

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        if name == "timestep_map":
            return torch.from_numpy(self.timestep_map).to(device)
        return torch.from_numpy(self.tables[name]).to(device).float()


class ReferenceStep:
    """A training step as released; call it with latents and labels on the model's device."""

    def __init__(
        self, model: EDT, ema: nn.Module | None, decay: float = 0.9999, lr: float = 1e-3
    ) -> None:
        self.model, self.ema, self.decay = as_released(model), ema, decay
        self.diffusion = HostTables()
        self.optimizer = timm.optim.Adan(model.parameters(), lr=lr, betas=BETAS)
        steps = self.diffusion.num_timesteps
        self.history, self.counts = np.zeros((steps, HISTORY_LENGTH)), np.zeros(steps, dtype=int)
        self.rng, self.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.update(x, y, self.draw_inputs(x, y))

    def draw_inputs(self, x: torch.Tensor, y: torch.Tensor) -> StepInputs:
        """Draw timesteps and masks on the host, noise and label dropout on the device."""
        t, weight = (torch.from_numpy(values).to(x.device) for values in self._timesteps(len(x)))
        config = self.model.config
        mid_ratio = None if config.mid_mask_block is None else MID_RATIO
        masks = draw_masks(len(x), config.grid_size, self.generator, mid_ratio=mid_ratio)
        masks = TokenMasks(*(None if mask is None else mask.to(x.device) for mask in masks))
        full, masked = (
            PassInputs(torch.randn_like(x), torch.rand(len(y), device=y.device) < LABEL_DROPOUT)
            for _ in range(2)
        )
        return StepInputs(t, weight, (full, masked._replace(masks=masks)))

    def backward(self, x: torch.Tensor, y: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Compute the gradients; returns the losses, (B, passes)."""
        losses = []
        for pass_inputs in inputs.passes:
            labels = torch.where(pass_inputs.drop, self.model.num_classes, y)
            x_t = self.diffusion.q_sample(x, inputs.t, pass_inputs.noise)
            full_t = self.diffusion.full_timesteps(inputs.t)
            output = self.model(x_t, full_t, labels, pass_inputs.masks)
            terms = self.diffusion.losses(output, x, x_t, inputs.t, pass_inputs.noise)
            losses.append(terms.loss)
        (sum(losses) * inputs.weight).mean().backward()
        return torch.stack(losses, dim=1).detach()

    def update(self, x: torch.Tensor, y: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Take a step with these inputs; returns the losses, (B, passes)."""
        self.optimizer.zero_grad()
        losses = self.backward(x, y, inputs)
        for t, loss in zip(inputs.t, losses.sum(dim=1), strict=True):
            self._remember(int(t.item()), loss.item())
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.model.parameters(), strict=True)
            for average, parameter in pairs:
                average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)
        return losses

    def _timesteps(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and their importance weights, (count,) each."""
        steps = len(self.counts)
        p = np.full(steps, 1 / steps)
        if (self.counts == HISTORY_LENGTH).all():
            rms = np.sqrt((self.history**2).mean(axis=1))
            p = rms / rms.sum() * 0.999 + 1e-6
        t = self.rng.choice(steps, count, p=p / p.sum())
        return t, (1 / (steps * p[t])).astype(np.float32)

    def _remember(self, t: int, loss: float) -> None:
        if self.counts[t] == HISTORY_LENGTH:
            self.history[t, :-1] = self.history[t, 1:]
        else:
            self.counts[t] += 1
        self.history[t, self.counts[t] - 1] = loss


@torch.no_grad()
def reference_sampling(
    model: EDT,
    steps: str,
    x: torch.Tensor,
    y: torch.Tensor,
    cfg_scale: float,
    noise_at: NoiseAt | None = None,
) -> torch.Tensor:
    """Guided ancestral sampling with the state of both halves, as released, (B, C, S, S).

    Args:
        model: went through :func:`as_released`.
        steps: number of sampling steps.
        x: noise that the loop starts from, (B, C, S, S).
        y: labels, (B,).
        cfg_scale: scale of guidance.
        noise_at: noise of each step, used for both halves; None draws separate noise for each
            half, as released.
    """
    sampler = DDPMSampler(steps)
    sampler.diffusion = HostTables(steps)

    def guided(state: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        half = state[: len(state) // 2]
        output = model(torch.cat([half, half]), t, y)
        cond, uncond = output[:, :3].chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), output[:, 3:]], dim=1)

    def both_halves(i: int) -> torch.Tensor:
        return torch.cat([noise_at(i)] * 2)

    labels = torch.cat([y, torch.full_like(y, model.num_classes)])
    noise = None if noise_at is None else both_halves
    return sampler.sample(guided, torch.cat([x, x]), {"y": labels}, noise_at=noise)[: len(x)]
