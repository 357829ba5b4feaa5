import torch

from edt.sampling.image_grid import captioned_grid, difference


def test_captioned_grid_scales_small_images_up_and_leaves_large_ones():
    small = torch.arange(2 * 3 * 4 * 4 * 3).reshape(2, 3, 4, 4, 3).to(torch.uint8)
    picture = captioned_grid(small, ["first", "second"], ["a", "b", "c"], min_side=10)
    assert picture.size == (3 * 14 + 2, 20 + 2 * (20 + 16))
    assert (
        picture.getpixel((2 + 14, 20 + 20 + 2))
        == picture.getpixel((2 + 14 + 2, 20 + 20 + 2 + 2))
        == tuple(small[0, 1, 0, 0])
    )
    assert captioned_grid(small, ["1", "2"], min_side=4).size == (3 * 6 + 2, 2 * (20 + 8))


def test_difference_is_grey_where_images_agree():
    a, b = (
        torch.tensor([0, 255, 7, 0], dtype=torch.uint8),
        torch.tensor([255, 0, 7, 2], dtype=torch.uint8),
    )
    assert difference(a, b).tolist() == [0, 255, 128, 127]
