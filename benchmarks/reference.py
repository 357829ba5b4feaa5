"""The public release's arithmetic, which the benchmarks compare with: eager fp32 (TF32 on a GPU),
two independent passes, tables, timesteps, masks and loss history on the host, an EMA tensor by
tensor, a guided sampler that keeps both halves."""

import types

import numpy as np
import timm.optim
import torch
from torch import nn

from edt.diffusion import GaussianDiffusion, linear_betas, respaced_timesteps
from edt.diffusion.gaussian import NoiseAt
from edt.masking import MID_RATIO, TokenMasks, draw_masks
from edt.models import EDT
from edt.nn.layers import HEAD_DIM, Attention, Block, layer_norm
from edt.training.optim import BETAS
from edt.training.step_inputs import PassDraws, StepDraws


def released(model: EDT) -> EDT:
    """The same network with its blocks computed operation by operation."""
    for block in model.blocks:
        block.forward = types.MethodType(_block, block)
        block.attn.forward = types.MethodType(_attention, block.attn)
        block.attn.host_index = (
            block.attn.rel_pos_bias.index.cpu()
        )  # stays there, and travels at every use
    return model


def _block(self: Block, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    parts = [part.unsqueeze(1) for part in self.adaLN_modulation(c)]
    x = x + parts[2] * self.attn(layer_norm(x) * (1 + parts[1]) + parts[0])
    return x + parts[5] * self.mlp(layer_norm(x) * (1 + parts[4]) + parts[3])


def _attention(self: Attention, x: torch.Tensor) -> torch.Tensor:
    batch, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
    bias = self.rel_pos_bias
    table = bias.relative_position_bias_table[self.host_index.to(x.device)]
    scores = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1) + table.view(tokens, tokens, -1).permute(
        2, 0, 1
    ).contiguous()
    weights = scores.softmax(dim=-1)
    if self.modulation is not None:
        weights = weights * self.modulation
    return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class HostTables(GaussianDiffusion):
    """Schedule tables that stay on the host and travel at every use."""

    def __init__(self, steps: str = ""):
        super().__init__(linear_betas(), respaced_timesteps(steps))
        self.tables["timestep_map"] = self.timestep_map

    def _table(self, name: str, like: torch.Tensor) -> torch.Tensor:
        table = torch.from_numpy(self.tables[name]).to(like.device)
        return table if name == "timestep_map" else table.float()


class ReferenceStep:
    """A training step as released; call it with latents and labels on the model's device."""

    def __init__(self, model: EDT, ema: nn.Module, decay: float = 0.9999, lr: float = 1e-3):
        self.model, self.ema, self.decay, self.diffusion = released(model), ema, decay, HostTables()
        self.optimizer = timm.optim.Adan(model.parameters(), lr=lr, betas=BETAS)
        self.history, self.counts = np.zeros((1000, 10)), np.zeros(1000, dtype=int)
        self.rng, self.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        t, weight = (torch.from_numpy(each).to(x.device) for each in self._timesteps(len(x)))
        mid = MID_RATIO if self.model.config.mid_mask_block is not None else None
        masks = draw_masks(len(x), self.model.config.grid, self.generator, mid=mid)
        masks = TokenMasks(*(mask if mask is None else mask.to(x.device) for mask in masks))
        full, masked = (
            PassDraws(torch.randn_like(x), torch.rand(len(y), device=y.device) < 0.1)
            for _ in range(2)
        )
        self.update(x, y, StepDraws(t, weight, (full, masked._replace(masks=masks))))

    def backward(self, x: torch.Tensor, y: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        """Gradients; returns the losses, (B, passes)."""
        losses = []
        for one in draws.passes:
            kwargs = {"y": torch.where(one.drop, self.model.num_classes, y), "masks": one.masks}
            losses.append(
                self.diffusion.training_losses(self.model, x, draws.t, one.noise, kwargs)["loss"]
            )
        (sum(losses) * draws.weight).mean().backward()
        return torch.stack(losses, dim=1).detach()

    def update(self, x: torch.Tensor, y: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        """A whole step with these draws; returns the losses, (B, passes)."""
        self.optimizer.zero_grad()
        losses = self.backward(x, y, draws)
        for step, loss in zip(draws.t, losses.sum(dim=1), strict=True):
            self._remember(step.item(), loss.item())
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(
                self.ema.parameters(), self.model.parameters(), strict=True
            ):
                average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)
        return losses

    def _timesteps(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        p = np.full(1000, 1e-3)
        if (self.counts == 10).all():
            rms = np.sqrt((self.history**2).mean(axis=1))
            p = rms / rms.sum() * 0.999 + 1e-6
        t = self.rng.choice(1000, count, p=p / p.sum())
        return t, (1 / (1000 * p[t])).astype(np.float32)

    def _remember(self, t: int, loss: float) -> None:
        if self.counts[t] == 10:
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
    """Guided ancestral sampling with the state of both halves, as released; ``model`` went through
    :func:`released`.

    ``noise_at`` gives the noise of one half; None draws that of both, as released.
    """
    diffusion, null = HostTables(steps), torch.full_like(y, model.num_classes)

    def guided(state: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        half = state[: len(state) // 2]
        output = model(torch.cat([half, half]), t, y)
        cond, uncond = output[:, :3].chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), output[:, 3:]], dim=1)

    both = noise_at and (lambda i: torch.cat([noise_at(i)] * 2))
    return diffusion.p_sample_loop(
        guided, torch.cat([x, x]), {"y": torch.cat([y, null])}, noise_at=both
    )[: len(x)]
