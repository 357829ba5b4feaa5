"""The fields and checks that the configurations of all model families share."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

from edt.utils.choices import check_json_fields
from edt.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of a family's configuration: everything that fixes a network, saved as JSON.

    A family's configuration sets ``family``, adds its fields, and has :meth:`from_state_dict`.
    """

    family: str = dataclasses.field(default="", init=False)
    """Name of the model family."""
    input_size: int = 32
    """Side of the square latent."""
    in_channels: int = 4
    """Latent channels; the output has twice as many, for noise and variance range."""
    num_classes: int = 1000
    """Classes without the null class; 0 is unconditional."""
    patch_size: int = 2
    image_size: int | None = None
    """Pixels per side of the images that the model was made for; None where it is not recorded."""

    def __post_init__(self) -> None:
        multiple = self.input_multiple
        if self.input_size < 1 or self.input_size % multiple:
            raise UserError(
                f"latent side {self.input_size} is not a multiple of {multiple}, as patch size "
                f"{self.patch_size} requires; choose another image size"
            )
        if self.num_classes < 0:
            raise UserError(f"number of classes must be 0 or more, got {self.num_classes}")

    @property
    def input_multiple(self) -> int:
        """The side of the latent is a multiple of this number."""
        return self.patch_size

    @functools.cached_property
    def grid_size(self) -> int:
        """Tokens per side behind the patch embedding."""
        return self.input_size // self.patch_size

    @property
    def uses_512_amm(self) -> bool:
        """Whether AMM takes its 512-pixel form and placement: for images of 512 pixels and more.

        An unknown image size is computed from the latent. With more than 3 channels it comes from
        the SD-VAE, which has 8 pixels per latent position. With up to 3 channels it is an image.
        """
        pixels_per_latent = 8 if self.in_channels > 3 else 1
        image_size = self.image_size or pixels_per_latent * self.input_size
        return image_size >= 512

    def with_width_of(self, other: Any) -> Self:
        """Copy with width and patch size of ``other``, which is of the same family.

        The checkpoint decides the depths.
        """
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``dataclasses.asdict``.

        Raises:
            UserError: a key is unknown, or a value has another type.
        """
        values = {key: value for key, value in values.items() if key != "family"}
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := ", ".join(sorted(set(values) - names)):
            raise UserError(f"unknown model configuration {unknown}; is it from a newer version?")
        check_json_fields(cls, values)
        return cls(**values)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Any]) -> Self:
        """Read the configuration off the tensors of a checkpoint that carries none.

        Raises:
            UserError: these are not the tensors of this family.
        """
        raise NotImplementedError
