"""Arrays that are not RGB images in uint8: the advice, followed, gives the images."""

import re

import numpy as np
import pytest

from edt.metrics.image_arrays import check_array, check_values
from edt.utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
GREY = IMAGES[..., :1].repeat(3, 3)
BLACK_AND_WHITE = (IMAGES > 127) * np.uint8(255)
SIGNED = IMAGES / 127.5 - 1  # in [-1, 1]


def refusal(array: np.ndarray) -> str:
    with pytest.raises(UserError, match="^a.npz h") as error:
        check_array("a.npz", array.shape, array.dtype, [array[:7], array[7:]])
    assert "\n" not in str(error.value)
    return str(error.value)


def follow(array: np.ndarray) -> np.ndarray:
    """Convert an array by the expressions of the messages, until it is accepted."""
    while array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        expression = re.search(r"(np\.|x\.|x\[).*?(?= restores|$)", refusal(array))
        array = eval(expression.group(), {"np": np, "x": array})
    check_array("a.npz", array.shape, array.dtype, [array])
    return array


CONVERTED = {
    "float32 in [0, 1]": (IMAGES / np.float32(255), IMAGES),
    "float16 in [0, 1]": ((IMAGES / 255).astype(np.float16), IMAGES),
    "float64 that overshoots [0, 1]": (np.where(IMAGES == 0, -0.05, IMAGES / 255), IMAGES),
    "float32 in [-1, 1]": (SIGNED.astype(np.float32), IMAGES),
    "float16 in [-1, 1]": (SIGNED.astype(np.float16), IMAGES),
    "decoded values": (np.where(IMAGES == 255, 1.35, np.where(IMAGES == 0, -1.3, SIGNED)), IMAGES),
    "float64 in [0, 255]": (IMAGES.astype(np.float64), IMAGES),
    "float32 around whole numbers": (IMAGES - np.float32(0.1), IMAGES),
    "float32 of 16 bits": (IMAGES * np.float32(257), IMAGES),
    "int64": (IMAGES.astype(np.int64), IMAGES),
    "int32": (IMAGES.astype(">i4"), IMAGES),
    "uint16 of 8 bits": (IMAGES.astype(np.uint16), IMAGES),
    "uint16": (IMAGES.astype(np.uint16) * 257, IMAGES),
    "int32 of 16 bits": (IMAGES.astype(np.int32) * 257, IMAGES),
    "int8 cast from uint8": (IMAGES.astype(np.int8), IMAGES),
    "bool": (BLACK_AND_WHITE > 0, BLACK_AND_WHITE),
    "float32 in {0, 1}": ((BLACK_AND_WHITE > 0).astype(np.float32), BLACK_AND_WHITE),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), IMAGES),
    "grey": (GREY[..., 0], GREY),
    "grey with a channel": (GREY[..., :1], GREY),
    "grey, channel first": (GREY[..., :1].transpose(0, 3, 1, 2), GREY),
    "alpha": (np.concatenate([IMAGES, GREY[..., :1]], 3), IMAGES),
    "alpha, channels first": (
        np.concatenate([IMAGES, GREY[..., :1]], 3).transpose(0, 3, 1, 2),
        IMAGES,
    ),
    "tensors of torchvision": ((IMAGES / np.float32(255)).transpose(0, 3, 1, 2), IMAGES),
    "grey floats": (GREY[..., 0] / 255, GREY),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_advice_followed_gives_the_images(case):
    array, expected = CONVERTED[case]
    np.testing.assert_array_equal(follow(array), expected)


WITHOUT_CONVERSION = {
    "NaN": (np.where(IMAGES > 250, np.nan, SIGNED), "NaN; the sampler diverged"),
    "infinity": (np.where(IMAGES > 250, np.inf, SIGNED), "infinity; the sampler diverged"),
    "complex": (SIGNED.astype(np.complex64), "complex64, not uint8; give real numbers"),
    "objects": (np.array([IMAGES[0], IMAGES[1, :4]], object), "Python objects.*one size"),
    "text": (np.array(["images"]), "str192, not uint8"),
    "standardised": (SIGNED * 2.2, r"float64 in \[-2.2, 2.2\], not uint8; scale"),
    "centred": (SIGNED / 2, r"float64 in \[-0.5, 0.5\], not uint8; scale"),
    "12 bits": (IMAGES.astype(np.uint16) * 16, r"uint16 in \[0, 4080\], not uint8; scale"),
    "4 bits": (IMAGES // 16 * 1.0, r"float64 in \[0, 15\], not uint8; scale"),
    "negative": (-IMAGES.astype(np.int16), r"int16 in \[-255, 0\], not uint8; scale"),
    "no image": (SIGNED[:0], "float64 in .*, not uint8; scale"),
    "flattened": (IMAGES.reshape(20, -1), r"shape \(20, 144\), not \(count, height, width, 3\)"),
    "one image": (IMAGES[0], "shape .*; this is one image"),
}


@pytest.mark.parametrize("case", WITHOUT_CONVERSION)
def test_no_conversion_is_guessed_for_other_arrays(case):
    array, message = WITHOUT_CONVERSION[case]
    assert re.search(f"^a.npz h(olds|as) {message}", refusal(array))
    assert ".astype" not in refusal(array)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8])
def test_floats_that_were_cast_to_integers_are_lost(dtype):
    assert "in [0, 1]: floats were cast without scaling" in refusal((IMAGES // 128).astype(dtype))


@pytest.mark.parametrize(
    "cast, floats",
    [(np.eye(3, dtype=np.uint8), "[0, 1]"), (np.array([0, 1, 255], np.uint8), "[-1, 1]")],
)
def test_advice_for_cast_floats_follows_their_sign(cast, floats):
    with pytest.raises(UserError, match="floats were cast") as error:
        check_values("a.npz", cast)
    assert f"if they were in {floats}, convert them before the cast" in str(error.value)


@pytest.mark.parametrize("values", [[0], [0, 255], [0, 1, 2], [7]])
def test_images_of_few_values_are_accepted(values):
    check_values("a.npz", np.array(values, np.uint8))


def test_the_range_is_that_of_all_images():
    bright_first = np.concatenate([IMAGES / 255, SIGNED])
    assert "if -1 is black" in refusal(bright_first)
