"""Image folders of many shapes: their images, their classes, and folders given by mistake."""

import os
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from edt.metrics.images import FolderImages
from edt.utils.errors import UserError
from edt.utils.image_folder import list_images


def make(root: Path, *paths: str) -> Path:
    """Create empty files of these paths below a folder; returns the folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_paths_and_labels_are_those_of_torchvision(tmp_path):
    root = make(
        *(tmp_path, "b/2.png", "b/10.PNG", "b/1.jpeg", "a-b/1.webp", "a/z.tif", "a/b/1.ppm"),
        *("a/b/c/2.JPEG", "a/a-b/3.bmp", "a/0.tiff", "Z/1.pgm", "a/1.jpg", "a/.hidden.b/x.txt"),
    )
    expected = ImageFolder(str(root))
    paths, labels = list_images(root).labelled_paths()
    assert [(str(root / path), label) for path, label in zip(paths, labels, strict=True)] == (
        expected.samples
    )
    assert list_images(root).classes == expected.classes
    assert list_images(root).paths() == [
        str(path.relative_to(root))
        for path in sorted(root.rglob("*"))
        if path.suffix and path.is_file() and path.suffix != ".txt"
    ]


def test_links_are_followed_and_end(tmp_path):
    root = make(tmp_path / "root", "ant/1.png", "ant/more/2.png")
    make(tmp_path / "elsewhere", "bees/3.png", "4.png")
    (root / "bee").symlink_to(tmp_path / "elsewhere" / "bees")
    (root / "cat").mkdir()
    (root / "cat" / "5.png").symlink_to(tmp_path / "elsewhere" / "4.png")
    (root / "loop").symlink_to(root)
    (root / "ant" / "more" / "up").symlink_to(root / "ant")
    (tmp_path / "elsewhere" / "bees" / "self").symlink_to(".")
    make(tmp_path / "shared", "dogs/6.png")
    (tmp_path / "shared" / "dogs" / "up").symlink_to("../..")
    (root / "dog").symlink_to(tmp_path / "shared" / "dogs")
    paths, labels = list_images(root).labelled_paths()
    assert paths == ["ant/1.png", "ant/more/2.png", "bee/3.png", "cat/5.png", "dog/6.png"]
    assert labels.tolist() == [0, 0, 1, 2, 3]
    assert list_images(root).paths() == paths
    # dog/up is the folder that holds the root.
    assert list_images(root).describe() == (
        f"{root}: 5 images of 4 classes; skipped 4 linked folders, listed already or above it"
    )


def test_a_class_lists_a_folder_once_however_many_links_lead_to_it(tmp_path):
    root = make(tmp_path / "data" / "ds", *(f"{name}/{name}.png" for name in "abcde"))
    for name in "abcde":  # Without a limit there would be 5! ways through these links.
        for other in "abcde":
            (root / name / other).symlink_to(root / other)
    make(tmp_path / "data", "other/1.png", "elsewhere/deep/2.png")
    (root / "a" / "up").symlink_to("../..")
    (root / "a" / "1").symlink_to(tmp_path / "data" / "elsewhere" / "deep")
    (root / "a" / "2").symlink_to(tmp_path / "data" / "elsewhere")
    folder = list_images(root)
    paths, labels = folder.labelled_paths()
    assert np.bincount(labels).tolist() == [6] * 5
    # a/a is listed as a, and a/2/deep as a/1.
    assert [path for path in paths if path.startswith("a/")] == [
        *("a/a.png", "a/1/2.png"),
        *(f"a/{name}/{name}.png" for name in "bcde"),
    ]
    assert "; skipped" in folder.describe()


@pytest.mark.parametrize("name", ["class", "1.png"])
@pytest.mark.parametrize("target", ["absent", None])
def test_links_that_lead_nowhere_are_named(name, target, tmp_path):
    root = make(tmp_path / "root", "ant/1.png", "bee/2.png")
    (root / "bee" / name).symlink_to(target or root / "bee" / name)
    with pytest.raises(UserError, match=f"bee/{name} is a link that leads nowhere"):
        list_images(root)


def test_hidden_files_and_folders_are_skipped(tmp_path):
    hidden = (
        *(".DS_Store", "ant/.DS_Store", ".ipynb_checkpoints/1.png", "ant/.ipynb_checkpoints/1.png"),
        *(".cache/x/1.png", "__MACOSX/ant/._1.png", "ant/._1.png", "bee/Thumbs.db", "desktop.ini"),
        *("ant/@eaDir/1.jpg", "lost+found/1.png", "$RECYCLE.BIN/1.png"),
    )
    # The root itself may be hidden.
    root = make(tmp_path / ".data", "ant/1.png", "bee/2.png", *hidden)
    folder = list_images(root)
    assert folder.labelled_paths()[0] == folder.paths() == ["ant/1.png", "bee/2.png"]
    assert folder.classes == ["ant", "bee"]
    assert folder.describe() == f"{root}: 2 images of 2 classes"


def test_what_is_left_out_is_counted(tmp_path):
    names = [f"ant/{i}.gif" for i in range(3)] + ["ant/a.TXT", "ant/b.txt", "bee/README", "c.csv"]
    root = make(tmp_path, "ant/1.png", "bee/2.png", *names)
    assert list_images(root).describe() == (
        f"{root}: 2 images of 2 classes; left out: 3 .gif, 2 .txt, 1 .csv, 1 without an ending"
    )
    os.mkfifo(root / "ant" / "pipe.png")  # Opening it would wait for a writer.
    make(root, *(f"x.{ending}" for ending in "abc"), "1.png")
    assert list_images(root).describe() == (
        f"{root}: 3 images; left out: 3 .gif, 2 .txt, 1 .a, 1 .b, 1 .c, 3 others"
    )


SPLITS = {
    "train and val": (("train/ant/1.png", "val/ant/2.png"), "train"),
    "beside other files": (("Train/ant/1.png", "Test/ant/2.png", "3.png", "x.txt"), "Train"),
    "three and more": (("test/1.png", "train/1.png", "val/1.png", "extra/ant/1.png"), "train"),
    "without classes": (("train/1.png", "val/2.png"), "train"),
    "of COCO": (("train2017/1.jpg", "val2017/2.jpg", "annotations/x.json"), "train2017"),
    "of ImageNet": (
        ("ILSVRC2012_img_train/n1/1.JPEG", "ILSVRC2012_img_val/1.JPEG"),
        "ILSVRC2012_img_train",
    ),
    "of tiny-imagenet": (
        ("train/n1/images/1.JPEG", "train/n2/images/2.JPEG", "val/images/3.JPEG", "wnids.txt"),
        "train",
    ),
    "of YOLO": (
        (
            *("data/train/images/1.jpg", "data/train/labels/1.txt"),
            *("data/val/images/2.jpg", "data/val/labels/2.txt"),
        ),
        "data/train",
    ),
    "around folders of images": (
        ("train/images/ant/1.png", "train/images/bee/2.png", "val/images/ant/3.png"),
        "train/images",
    ),
    "validation and test": (("validation/ant/1.png", "test/ant/1.png"), "test"),
    "of Intel's images": (
        (
            *("seg_train/seg_train/sea/1.jpg", "seg_train/seg_train/street/2.jpg"),
            *("seg_test/seg_test/sea/3.jpg", "seg_pred/seg_pred/4.jpg"),
        ),
        "seg_train/seg_train",
    ),
    "of FER2013": (
        ("PrivateTest/0/1.png", "PublicTest/0/2.png", "Training/0/3.png", "Training/1/4.png"),
        "Training",
    ),
    "in one word": (("testset/1.png", "trainset/2.png"), "trainset"),
    "in one longer word": (("TestingData/1.png", "trainingset/2.png"), "trainingset"),
    "called images": (("test_images/1.png", "train_images/2.png"), "train_images"),
    "of DIV2K": (("DIV2K_train_HR/1.png", "DIV2K_valid_HR/2.png"), "DIV2K_train_HR"),
    "of CycleGAN": (("testA/1.jpg", "testB/1.jpg", "trainA/1.jpg", "trainB/1.jpg"), "trainA"),
    "beside unlabelled images": (("train/ant/1.png", "unlabeled/all/2.png"), "train"),
    "beside samples": (("sample/ant/1.png", "train/ant/1.png", "train/bee/2.png"), "train"),
    "below wrappers, as Kaggle's": (
        (
            *("ILSVRC/Data/CLS-LOC/train/n1/1.JPEG", "ILSVRC/Data/CLS-LOC/train/n2/2.JPEG"),
            *("ILSVRC/Data/CLS-LOC/val/3.JPEG", "ILSVRC/Data/CLS-LOC/test/4.JPEG"),
            *("ILSVRC/Annotations/CLS-LOC/train/n1/1.xml", "LOC_synset_mapping.txt"),
        ),
        "ILSVRC/Data/CLS-LOC/train",
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_refused_and_the_right_one_is_named(case, tmp_path):
    paths, meant = SPLITS[case]
    root = make(tmp_path, *paths)
    message = rf"holds splits of a data set .*; give one of them, probably {root / meant}$"
    with pytest.raises(UserError, match=message):
        list_images(root).labelled_paths()
    with pytest.raises(UserError, match=message):
        FolderImages(root)


@pytest.mark.parametrize(
    ("paths", "meant"),
    [
        (("images/ant/1.png", "images/bee/2.png", "meta/classes.txt"), "images"),
        (("a/b/c/ant/1.png", "a/b/c/bee/2.png"), "a/b/c"),
        (("train/ant/1.png", "train/bee/2.png"), "train"),
        (("train/ant/1.png",), "train"),
        (("CLS-LOC/train/n1/1.JPEG", "CLS-LOC/train/n2/2.JPEG"), "CLS-LOC/train"),
    ],
)
def test_a_folder_around_the_class_folders_is_refused(paths, meant, tmp_path):
    root = make(tmp_path, *paths)
    with pytest.raises(UserError, match=rf"its images lie deeper; give {root / meant}$"):
        list_images(root).labelled_paths()
    list_images(root).refuse_splits()  # The images are the same: evaluation takes them.


@pytest.mark.parametrize(
    "paths",
    [
        ("all/1.png",),
        ("ant/images/1.png",),
        ("ant/images/1.png", "bee/images/2.png"),
        ("all/1.png", "all/more/2.png"),
        ("train/1.png", "car/2.png"),
        ("train/1.png",),
        ("test1/1.png", "test2/2.png"),
        ("bullet_train/1.png", "test_tube/2.png"),
        ("train/steam/1.png", "car/red/2.png"),
        ("bullet_train/fast/1.png", "car/red/2.png"),
        ("train/1.png", "training_bench/2.png", "val_d_isere/3.png"),
        ("train/1.png", "unlabeled/2.png"),
        ("Train/steam/1.png", "Training bench/2.png", "ant/3.png"),
    ],
)
def test_classes_that_only_look_like_other_folders_are_taken(paths, tmp_path):
    assert list_images(make(tmp_path, *paths)).labelled_paths()[0] == sorted(paths)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), r"\(0 images lie directly in it\); put the images of each class into a sub-folder"),
        (("1.png", "2.gif"), r"\(1 images lie directly in it; left out: 1 .gif\); put the images"),
        (("ant/1.gif",), r"class folders without images \(ant; left out: 1 .gif\)"),
        (
            ("ant/1.png", "bee/2.gif", "cow/.DS_Store"),
            r"class folders without images \(bee, cow; left out: 1 .gif\).* \.jpg",
        ),
        (
            ("ant/1.png", "b.png", "c.png", "d.png", "e.png"),
            r"images beside the class folders \(b.png, c.png, d.png and 1 more\)",
        ),
    ],
)
def test_a_folder_that_is_not_one_of_class_folders_is_described(paths, message, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} .*{message}"):
        list_images(make(tmp_path, *paths)).labelled_paths()


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no image folder at .*absent"):
        list_images(tmp_path / "absent")
    make(tmp_path, "ant/1.png")
    # Tests may run as the superuser, who may read anything.
    scandir = os.scandir

    def refuse(path: Path):
        if path.name == "ant":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot list .*ant \(Permission denied\)"):
        list_images(tmp_path)
