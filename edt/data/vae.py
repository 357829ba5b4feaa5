"""Images to latents and back: the SD-VAE through diffusers, or no VAE at all ("pixels").

:mod:`edt.data.vae_files` finds the files of a VAE and checks them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from edt.data.vae_files import load_autoencoder
from edt.utils.errors import UserError

# Images decoded at once. The last layers hold 34 MB per tensor and image of 256 x 256 pixels (128
# channels, fp32). 32 images keep a GPU busy; a full sampling batch could exceed its memory.
DECODE_BATCH = 32

# The fields of an AutoencoderKL's configuration that change its numbers, but perhaps no tensor.
# Scaling and shift are recorded on their own. Changing this list changes the hash.
CONFIG_FIELDS = (
    "act_fn",
    "down_block_types",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "up_block_types",
    "use_post_quant_conv",
    "use_quant_conv",
)


class VAE(Protocol):
    """The interface of a VAE: images to latents and back.

    Attributes:
        channels: C, channels of a latent.
        downsampling: image pixels per latent pixel along one side, so H = downsampling * h.
        scaling_factor, shift_factor: a latent is (the autoencoder's latent - shift_factor) *
            scaling_factor, which has about zero mean and unit variance, as diffusion expects. The
            SD-VAE has no shift; its shift_factor is 0.
        sha256: of the weights; None without weights.
        config_sha256: of the configuration that decides how they are used; None without weights.
    """

    channels: int
    downsampling: int
    scaling_factor: float
    shift_factor: float
    sha256: str | None
    config_sha256: str | None

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents' posterior.

        Both are (B, C, h, w) float32.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1]."""
        ...


class PixelVAE(VAE):
    """No VAE: images in [-1, 1] are the latents."""

    channels = 3
    downsampling = 1
    scaling_factor = 1.0
    shift_factor = 0.0
    sha256 = None
    config_sha256 = None

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The images themselves, with a standard deviation of zero."""
        return images, torch.zeros_like(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents themselves."""
        return latents


class LatentVAE(VAE):
    """A diffusers ``AutoencoderKL`` with its scaling and shift.

    Args:
        autoencoder: the ``AutoencoderKL``, in the precision of its file. It is converted in place.
        dtype: precision of the network's arithmetic. Inputs and outputs are float32 in any case.
    """

    def __init__(self, autoencoder: Any, dtype: torch.dtype = torch.float32):
        self.channels = autoencoder.config.latent_channels
        # Every block but the last of the encoder halves the image.
        self.downsampling = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        self.scaling_factor = float(autoencoder.config.scaling_factor)
        self.shift_factor = float(autoencoder.config.shift_factor or 0)
        # Hashed before the conversion, so that the hash does not depend on dtype.
        self.sha256 = _weights_sha256(autoencoder.state_dict())
        self.config_sha256 = _config_sha256(autoencoder.config)
        # diffusers' own .to() warns about layers that need float32; an autoencoder has none.
        torch.nn.Module.to(autoencoder, dtype=dtype)
        # Tensor cores need channels last. In the default layout cuDNN would transpose the input
        # and output of every convolution.
        torch.nn.Module.to(autoencoder, memory_format=torch.channels_last)
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`VAE.encode`."""
        posterior = self.autoencoder.encode(images.to(self.autoencoder.dtype)).latent_dist
        return (
            (posterior.mean.float() - self.shift_factor) * self.scaling_factor,
            posterior.std.float() * self.scaling_factor,
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :meth:`VAE.decode`. At most ``DECODE_BATCH`` images are decoded at once."""
        own_latents = latents / self.scaling_factor + self.shift_factor
        parts = own_latents.to(self.autoencoder.dtype).split(DECODE_BATCH)
        return torch.cat([self.autoencoder.decode(part).sample.float() for part in parts])


def _weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors, by name.

    A hash of the files would differ for equal weights: they are published as .safetensors or .bin,
    in one file or several.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content = value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()


def _config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of the fields that decide how a VAE computes with its weights."""
    values = json.dumps([(name, config.get(name)) for name in CONFIG_FIELDS])
    return hashlib.sha256(values.encode()).hexdigest()


def vae_source(name: str) -> str:
    """The folder or hub id that ``name`` stands for.

    "ema" and "mse" are stabilityai/sd-vae-ft-ema and -mse. A clone of one in the working directory
    is used instead of the hub, for machines without access to it. Other names are returned as they
    are.
    """
    if name not in ("ema", "mse"):
        return name
    clone = Path(f"sd-vae-ft-{name}")
    return str(clone) if clone.is_dir() else f"stabilityai/{clone}"


def load_vae(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VAE:
    """Load a VAE.

    Args:
        name: "pixels" for no VAE; or "ema", "mse" (see :func:`vae_source`), a
            folder with an ``AutoencoderKL`` or with a pipeline around one, or a hub id of such.
        device: where the VAE computes.
        dtype: precision of its arithmetic; inputs and outputs are float32 in any case.

    Raises:
        UserError: there is no such VAE, it cannot be fetched, or it is incomplete.
    """
    if name == "pixels":
        return PixelVAE()
    return LatentVAE(load_autoencoder(vae_source(name)).to(device), dtype)


def latent_shape(vae: VAE, image_size: int) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latent of one image.

    Args:
        vae: the VAE that encodes the image.
        image_size: side of the image in pixels.

    Raises:
        UserError: the side is not a multiple of the VAE's down-sampling.
    """
    if image_size < 1 or image_size % vae.downsampling:
        raise UserError(
            f"image size {image_size} is not supported; choose a multiple of {vae.downsampling}"
        )
    side = image_size // vae.downsampling
    return (vae.channels, side, side)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8: truncate(clamp(127.5 x + 128)).

    ADM adds 128, not 127.5. Its reference statistics and published scores are of such bytes.
    """
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
