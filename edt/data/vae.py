"""Images to latents and back: the SD-VAE through diffusers, or none at all ("pixels")."""

import hashlib
from pathlib import Path

import torch

from edt.utils.errors import UserError

DECODE_BATCH = 32  # images: one of 256 pixels takes 34 MB a tensor in the decoder's last layers, as much as a GPU needs


class PixelVAE:
    """No VAE: images in [-1, 1] are the latents."""

    channels, downsampling, scaling_factor = 3, 1, 1.0
    sha256 = None

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images are their own latents, without doubt."""
        return images, torch.zeros_like(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class LatentVAE:
    """A diffusers ``AutoencoderKL`` with its scaling factor.

    Args:
        dtype: what it computes in; takes and returns float32.

    Attributes:
        channels: of the latent.
        downsampling: image pixels per latent pixel along a side.
        scaling_factor: the network's latents are the VAE's times this.
        sha256: of the weights, whatever file they came from.
    """

    def __init__(self, autoencoder: torch.nn.Module, dtype: torch.dtype = torch.float32):
        self.channels = autoencoder.config.latent_channels
        self.downsampling = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        self.scaling_factor = autoencoder.config.scaling_factor
        digest = hashlib.sha256()
        for name, value in sorted(autoencoder.state_dict().items()):
            digest.update(
                name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
        self.sha256 = digest.hexdigest()
        # diffusers' own .to() warns of layers that want float32; an autoencoder has none.
        torch.nn.Module.to(autoencoder, dtype=dtype, memory_format=torch.channels_last)
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and deviation of the latents' posterior, (B, C, h,
        w) each.
        """
        posterior = self.autoencoder.encode(images.to(self.autoencoder.dtype)).latent_dist
        return (
            posterior.mean.float() * self.scaling_factor,
            posterior.std.float() * self.scaling_factor,
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W), nominally in [-1, 1]."""
        parts = (latents / self.scaling_factor).to(self.autoencoder.dtype).split(DECODE_BATCH)
        return torch.cat([self.autoencoder.decode(part).sample.float() for part in parts])


def load_vae(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PixelVAE | LatentVAE:
    """Load a VAE.

    Args:
        name: "ema" or "mse" (stabilityai/sd-vae-ft-..., or a clone of it in the working directory),
            a folder, a hub id, or "pixels".

    Raises:
        UserError: there is no such VAE, or it cannot be fetched.
    """
    if name == "pixels":
        return PixelVAE()
    if name in ("ema", "mse"):
        clone = Path(f"sd-vae-ft-{name}")
        name = str(clone) if clone.is_dir() else f"stabilityai/{clone}"
    from diffusers import AutoencoderKL  # slow to import, and pixels do without

    try:
        return LatentVAE(AutoencoderKL.from_pretrained(name).to(device), dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"cannot load the VAE {name} ({reason}); give --vae a folder with a diffusers AutoencoderKL, a hub id, or pixels"
        ) from None


def latent_shape(vae: PixelVAE | LatentVAE, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of ``image_size`` pixels.

    Raises:
        UserError: the VAE does not divide that size.
    """
    if image_size < 1 or image_size % vae.downsampling:
        raise UserError(
            f"image size {image_size} is not supported; choose a multiple of {vae.downsampling}"
        )
    return (vae.channels, image_size // vae.downsampling, image_size // vae.downsampling)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 as ADM does: truncate(clamp(127.5 x + 128))."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
