import pytest

from edt.data.class_names import class_names, find_class, find_classes
from edt.utils.errors import UserError

FOLDERS = ["ant", "Bumble bee", "10", "cat"]


@pytest.mark.parametrize(
    ("text", "index"), [("0", 0), ("3", 3), ("CAT", 3), (" bumble bee ", 1), ("10", 2)]
)
def test_a_class_is_found_by_number_or_by_its_folder(text, index):
    assert find_class(text, class_names(4, FOLDERS)) == index


NUMBERS = sorted(map(str, range(1, 13)))  # 1, 10, 11, 12, 2, ...: the order of folders


@pytest.mark.parametrize(
    ("text", "index"),
    [("index:2", 2), ("name:2", 4), ("name:11", 2), ("12", 3), ("index:0", 0)],
)
def test_a_folder_named_by_a_number_is_told_from_the_number_of_a_class(text, index):
    assert find_class(text, class_names(12, NUMBERS)) == index


@pytest.mark.parametrize(
    ("text", "name", "other"), [("2", "11", 4), ("1", "10", 0), (" 4 ", "2", 6)]
)
def test_a_number_that_two_classes_have_is_refused(text, name, other):
    number = text.strip()
    message = f"'{name}' has this number and class {other} has this name; "
    with pytest.raises(UserError, match=f"{message}give index:{number} or name:{number}"):
        find_class(text, class_names(12, NUMBERS))


@pytest.mark.parametrize("folders", [["0", "1", "2"], ["2", "0", "1"], ["002", "000", "001"]])
def test_names_that_are_no_number_of_another_class_need_no_prefix(folders):
    names = class_names(3, folders)
    unambiguous = [name for name in folders if len(name) == 3 or folders[int(name)] == name]
    assert [find_class(name, names) for name in unambiguous] == [
        folders.index(name) for name in unambiguous
    ]


def test_an_exact_name_wins_over_one_in_another_case():
    names = class_names(4, ["cat", "Cat", "CAT", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"])
    assert [find_class(text, names) for text in ("cat", "Cat", "CAT")] == [0, 1, 2]
    assert find_class("cafe\N{COMBINING ACUTE ACCENT}", names) == 3
    with pytest.raises(UserError, match="name of classes 0, 1, 2; give one"):
        find_class("cAT", names)


@pytest.mark.parametrize("text", ["name:3", "index:12", "index:ant", "index:-1", "name:"])
def test_a_prefix_never_falls_back_on_the_other_meaning(text):
    with pytest.raises(UserError):
        find_class(text, class_names(4, FOLDERS))


def test_a_list_of_classes():
    names = class_names(4, ["ant", "bee", "dog, small", "3"])
    assert find_classes("bee, 0,name:3", names) == [1, 0, 3]
    assert find_classes("dog, small", names) == [2]
    assert find_classes("name:dog, small", names) == [2]
    with pytest.raises(UserError, match="no class is named 'cow'"):
        find_classes("bee,cow", names)


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
