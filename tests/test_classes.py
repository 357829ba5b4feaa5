import pytest
import torch

from edt.data.class_names import class_names, find_class
from edt.sampling.image_grid import captioned_grid, difference
from edt.utils.errors import UserError

FOLDERS = ["ant", "Bumble bee", "10", "cat"]


def test_classes_by_number_or_by_the_users_folders():
    names = class_names(4, FOLDERS)
    assert [find_class(text, names) for text in ("0", "3", "CAT", " bumble bee ", "10")] == [
        0,
        3,
        3,
        1,
        2,
    ]
    assert class_names(6, FOLDERS)[4:] == [["class 4"], ["class 5"]] and class_names(0, None) == [
        ["class 0"]
    ]


@pytest.mark.parametrize("folders", [None, [f"n{1440764 + i:08d}" for i in range(1000)]])
def test_imagenet_by_name(folders):
    names = class_names(1000, folders)
    for text in ("golden retriever", "Golden Retriever", "n02099601", "207"):
        assert find_class(text, names) == 207
    assert find_class("white shark", names) == find_class("great white shark", names) == 2
    with pytest.raises(UserError, match="did you mean .*golden retriever"):
        find_class("goldn retreiver", names)
    with pytest.raises(UserError, match="name of classes 134, 517; give one"):
        find_class("crane", names)


def test_a_thousand_classes_of_the_users_own_are_not_imagenet():
    assert find_class("thing 207", class_names(1000, [f"thing {i}" for i in range(1000)])) == 207


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cats", "did you mean cat?"),
        ("bee", "did you mean bumble bee?"),
        ("xyzzy", "from 0 to 3"),
        ("4", "outside"),
        ("-1", "outside"),
    ],
)
def test_a_miss_is_named_with_what_is_near(text, message):
    with pytest.raises(UserError) as error:
        find_class(text, class_names(4, FOLDERS))
    assert message in str(error.value) and repr(text).strip("'") in str(error.value)


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
