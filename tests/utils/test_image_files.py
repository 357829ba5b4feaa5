"""Image files of every kind of pixel, and files that are no images."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import HUGE_PNG, png
from PIL import Image

from edt.data.images import center_crop
from edt.utils.errors import UserError
from edt.utils.image_files import open_image, read_image

GREY = np.random.default_rng(0).integers(0, 256, (12, 16), dtype=np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (12, 16, 4), dtype=np.uint8)
GREY_16 = GREY.astype(np.uint16) * 257  # 0 to 65535


def png_rows(values: np.ndarray) -> bytes:
    """Rows of (H, W, C) values, each after the byte of "no filter"."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def tiff_12_bits(values: np.ndarray) -> bytes:
    """A little-endian TIFF of grey values (H, W) of 12 bits, two of them in three bytes."""
    height, width = values.shape
    first, second = values.reshape(-1, 2).T.astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def write_grey_of_more_than_8_bits(kind: str, file: Path) -> None:
    match kind:
        case "png":
            Image.fromarray(GREY_16).save(file, format="png")
        case "tiff":
            Image.fromarray(GREY_16).save(file, format="tiff")
        case "big-endian tiff":
            image = Image.frombytes("I;16B", (16, 12), GREY_16.astype(">u2").tobytes())
            image.save(file, format="tiff")
        case "compressed tiff":
            Image.fromarray(GREY_16).save(file, format="tiff", compression="tiff_lzw")
        case "tiff of 12 bits":
            file.write_bytes(tiff_12_bits(GREY_16 >> 4))
        case "tiff whose zero is white":
            Image.fromarray(65535 - GREY_16).save(file, format="tiff", tiffinfo={262: 0})
        case "pgm":
            file.write_bytes(b"P5 16 12 65535\n" + GREY_16.astype(">u2").tobytes())
        case "pgm of 10 bits":
            values = np.round(GREY_16 * (1023 / 65535)).astype(">u2")
            file.write_bytes(b"P5 16 12 1023\n" + values.tobytes())


@pytest.mark.parametrize(
    "kind",
    [
        "png",
        "tiff",
        "big-endian tiff",
        "compressed tiff",
        "tiff of 12 bits",
        "tiff whose zero is white",
        "pgm",
        "pgm of 10 bits",
    ],
)
def test_grey_values_of_more_than_8_bits_are_scaled(kind, tmp_path):
    write_grey_of_more_than_8_bits(kind, tmp_path / "file")
    expected = np.stack([GREY] * 3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "file")), expected)
    with open_image(tmp_path / "file") as image:
        np.testing.assert_array_equal(np.asarray(center_crop(image, 12)), expected[:, 2:14])


def test_grey_and_colours_of_16_bits_agree(tmp_path):
    values = np.random.default_rng(2).integers(0, 65536, (12, 16, 1)).astype(">u2")
    kinds = {0: [0], 2: [0, 0, 0], 4: [0, 0], 6: [0, 0, 0, 0]}  # grey, RGB, with alpha each
    images = []
    for colour_type, channels in kinds.items():
        file = tmp_path / f"{colour_type}.png"
        file.write_bytes(png(16, colour_type, png_rows(values[..., channels])))
        images.append(np.asarray(read_image(file)))
        np.testing.assert_array_equal(images[-1], np.repeat(values >> 8, 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"])
def test_pixels_of_8_bits_are_converted_as_pillow_does(mode, tmp_path):
    image = Image.fromarray(COLOURS).convert(mode)
    file = tmp_path / ("image.tif" if mode in ("CMYK", "PA") else "image.png")
    image.save(file, **({"transparency": 3} if mode == "P" else {}))
    with Image.open(file) as opened:
        assert opened.mode == mode
        expected = np.asarray(opened.convert("RGB"))
    result = read_image(file)
    assert result.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result), expected)


def unreadable(kind: str) -> bytes:
    return {
        "empty": b"",
        "text": b"<html>not found</html>",
        "cut short": png(8, 2, png_rows(COLOURS[..., :3]))[:200],
        "too large": HUGE_PNG,
        "a damaged chunk": b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x02IHDR\0\0" + b"\0" * 50,
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut short", "too large", "a damaged chunk"])
def test_a_file_that_cannot_be_read_is_named(kind, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(unreadable(kind))
    with pytest.raises(
        UserError, match=r"cannot read the image .*image\.png \(.+\); do this$"
    ) as e:
        read_image(file, "do this")
    assert "\n" not in str(e.value)


def test_names_that_are_no_text_are_read_and_named(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.fromarray(COLOURS).save(file)
    assert read_image(file).size == (16, 12)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="caf\udce9.png"):
        read_image(file)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(dtype, tmp_path):
    Image.fromarray(GREY.astype(dtype)).save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match=r"depth\.tif \(mode [IF]: the range .* is unknown"):
        read_image(tmp_path / "depth.tif")
    with pytest.raises(UserError, match="the range"):
        center_crop(Image.fromarray(GREY.astype(dtype)), 8)


def test_signed_pixels_of_16_bits_are_not_called_others(tmp_path):
    image = Image.fromarray(GREY_16)
    image.save(tmp_path / "depth.tif", tiffinfo={339: 2})  # SampleFormat: signed
    with pytest.raises(UserError, match=r"\(mode I: the range .*, save unsigned 8 or 16 bits") as e:
        read_image(tmp_path / "depth.tif")
    assert "32" not in str(e.value)
