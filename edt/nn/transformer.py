"""The interface that every network of the project offers to trainer, sampler and AMM."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from edt.nn.attention import AttentionBackend
from edt.nn.layers import Attention
from edt.utils.choices import check_choice


class DiffusionTransformer(nn.Module):
    """A transformer that predicts noise and variance range of a noised latent.

    A model family is a subclass. It implements every method here that raises NotImplementedError.

    Attributes:
        config: frozen dataclass that fixes the network (see edt.nn.config.ModelConfig).
        in_channels: channels of the latent; the output has twice as many.
        num_classes: classes without the null class, whose label is this number.
        modulations: the AMM settings of each modulated block (edt.amm.Modulation), made by
            :meth:`set_amm`; empty if AMM is off.
        maskings: the choices of edt.masking.Masking that the family has.
        can_batch_passes: whether the full and the masked pass can be one batch. The masked pass
            must not drop tokens: both passes need the same token count in every layer.
    """

    config: Any
    in_channels: int
    num_classes: int
    modulations: tuple[Any, ...]
    maskings: ClassVar[tuple[str, ...]] = ("none",)
    can_batch_passes: ClassVar[bool]

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, masks: Any = None
    ) -> torch.Tensor:
        """Predict noise and variance range, (B, 2C, S, S).

        Args:
            x: noised latents, (B, C, S, S).
            t: timesteps of the 1000-step process, (B,).
            y: class labels, (B,) int; ``num_classes`` is the null class, None means it for all.
            masks: the family's masks for a masked training pass, or None.
        """
        raise NotImplementedError

    def attention_blocks(self) -> list[Attention]:
        """The attention modules, in the order of AMM's block numbers."""
        raise NotImplementedError

    def compilable_modules(self) -> list[nn.Module]:
        """The modules that ``--compile block`` compiles one by one."""
        raise NotImplementedError

    def freeze_masked_pass(self) -> None:
        """Exclude parameters from training that a masked pass alone uses; most families have none.

        Training without a masked pass calls it. DistributedDataParallel refuses parameters that
        never get a gradient.
        """

    def set_amm(
        self,
        blocks: str | Sequence[int] | None,
        *,
        form: Any = None,
        radius: float | None = None,
        cfg_scale: float = 1.0,
    ) -> tuple[int, ...]:
        """Switch the Attention Modulation Matrix on or off; see ``edt.models.EDT.set_amm``."""
        raise NotImplementedError

    def set_attention(self, backend: AttentionBackend) -> None:
        """Choose how attention is computed, see :data:`edt.nn.attention.ATTENTION_BACKENDS`."""
        check_choice("attention backend", backend, AttentionBackend)
        # All attention modules, and not attention_blocks(), which leaves MDTv2's side block out.
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None,
        cfg_scale: float,
        *,
        channels: int | None = None,
    ) -> torch.Tensor:
        """Predict with classifier-free guidance, (B, 2C, S, S).

        With scale 1 the result is the conditional prediction, and without labels it is the
        unconditional one. Both cost one forward pass of B rows. In all other cases the network runs
        once on 2B rows, and :func:`guide` combines the two halves.

        Args:
            x: noised latents, (B, C, S, S).
            t: timesteps of the 1000-step process, (B,).
            y: class labels, (B,) int, or None.
            cfg_scale: guidance scale s.
            channels: how many noise channels are guided; see :func:`guide`.
        """
        raise NotImplementedError


def guide(output: torch.Tensor, cfg_scale: float, channels: int | None = None) -> torch.Tensor:
    """Classifier-free guidance: eps_uncond + s (eps_cond - eps_uncond).

    Channels that are not guided come from the conditional half.

    Args:
        output: of the network, (2B, 2C, S, S): B rows with labels, then the same B without.
        cfg_scale: guidance scale s.
        channels: how many noise channels are guided, counted from the first. None guides 3 of 4
            channels as the release does, and all channels of any other latent.

    Returns:
        (B, 2C, S, S).
    """
    cond, uncond = output.chunk(2)
    if channels is None:
        latent_channels = output.shape[1] // 2
        channels = 3 if latent_channels == 4 else latent_channels
    eps = uncond[:, :channels] + cfg_scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([eps, cond[:, channels:]], dim=1)
