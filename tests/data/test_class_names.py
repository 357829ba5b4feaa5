import pytest

from edt.data.class_names import class_names, find_class
from edt.utils.errors import UserError

FOLDERS = ["ant", "Bumble bee", "10", "cat"]


@pytest.mark.parametrize(
    ("text", "index"), [("0", 0), ("3", 3), ("CAT", 3), (" bumble bee ", 1), ("10", 2)]
)
def test_a_class_is_found_by_number_or_by_its_folder(text, index):
    assert find_class(text, class_names(4, FOLDERS)) == index


def test_classes_without_a_folder_are_numbered():
    assert class_names(6, FOLDERS)[4:] == [["class 4"], ["class 5"]]
    assert class_names(0, None) == [["class 0"]]


@pytest.mark.parametrize("folders", [None, [f"n{1440764 + i:08d}" for i in range(1000)]])
def test_imagenet_by_name(folders):
    names = class_names(1000, folders)
    for text in ("golden retriever", "Golden Retriever", "n02099601", "207"):
        assert find_class(text, names) == 207
    assert find_class("white shark", names) == 2
    assert find_class("great white shark", names) == 2
    with pytest.raises(UserError, match="did you mean .*golden retriever"):
        find_class("goldn retreiver", names)
    with pytest.raises(UserError, match="name of classes 134, 517; give one"):
        find_class("crane", names)


def test_a_thousand_folders_with_other_names_are_not_imagenet():
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
def test_an_unknown_class_is_named_with_suggestions(text, message):
    with pytest.raises(UserError) as error:
        find_class(text, class_names(4, FOLDERS))
    assert message in str(error.value)
    assert text in str(error.value)
