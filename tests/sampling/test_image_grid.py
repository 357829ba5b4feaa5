import pytest
import torch
from PIL import ImageFont

from edt.sampling import image_grid
from edt.sampling.image_grid import difference, make_captioned_grid, make_grid


def test_grid_places_every_image_on_white():
    images = torch.arange(2 * 3 * 4 * 5 * 3).reshape(2, 3, 4, 5, 3).to(torch.uint8)
    grid = make_grid(images, gap=2)
    assert grid.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    for row in range(2):
        for column in range(3):
            top, left = 2 + row * 6, 2 + column * 7
            tile = grid[top : top + 4, left : left + 5]
            assert torch.equal(tile, images[row, column])
            grid[top : top + 4, left : left + 5] = 255
    assert (grid == 255).all()


def test_captioned_grid_scales_small_images_up_and_leaves_large_ones():
    small = torch.arange(2 * 3 * 4 * 4 * 3).reshape(2, 3, 4, 4, 3).to(torch.uint8)
    picture = make_captioned_grid(small, ["first", "second"], ["a", "b", "c"], min_side=10)
    assert picture.size == (3 * 14 + 2, 20 + 2 * (20 + 16))
    top, left = 20 + 20 + 2, 2 + 14  # of the second image in the first row
    assert picture.getpixel((left, top)) == tuple(small[0, 1, 0, 0])
    assert picture.getpixel((left + 2, top + 2)) == tuple(small[0, 1, 0, 0])
    unscaled = make_captioned_grid(small, ["1", "2"], min_side=4)
    assert unscaled.size == (3 * 6 + 2, 2 * (20 + 8))


def caption_pixels(caption: str) -> bytes:
    """The strip with the caption of a row."""
    picture = make_captioned_grid(torch.zeros(1, 2, 128, 128, 3, dtype=torch.uint8), [caption])
    return picture.crop((0, 0, picture.width, 20)).tobytes()


@pytest.mark.parametrize("fonts", ["those installed", "Pillow's"])
def test_captions_keep_letters_beyond_ascii(fonts, monkeypatch):
    if fonts == "Pillow's":
        monkeypatch.setattr(image_grid, "_fonts", lambda: [ImageFont.load_default(14)])
    names = ["caf", "café", "cafà", "Кот", "Код", "犬", "猫", "\udce9", "\udcea", "cafe\u0301"]
    strips = [caption_pixels(f"0 {name}") for name in names]
    assert strips[-1] == strips[1]  # the same letter, encoded differently
    assert len(set(strips)) == len(names) - 1
    assert caption_pixels("0 \udce9") == caption_pixels(r"0 \udce9")


def test_difference_is_grey_where_images_agree():
    a = torch.tensor([0, 255, 7, 0], dtype=torch.uint8)
    b = torch.tensor([255, 0, 7, 2], dtype=torch.uint8)
    assert difference(a, b).tolist() == [0, 255, 128, 127]
