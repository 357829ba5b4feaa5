"""Image sets: the same images from every kind of file, and refusal of files that are no images."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from evaluation_helpers import write_pngs
from PIL import Image

from edt.data.images import CroppedImages
from edt.metrics.images import ArrayImages, FolderImages, ImageSet, NpzImages
from edt.utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def read(images: ImageSet) -> np.ndarray:
    return np.concatenate(list(images.batches(7)))


@pytest.fixture(params=["array", "npz", "compressed", "fortran", "folder"])
def images(request, tmp_path) -> ImageSet:
    path = tmp_path / "images.npz"
    match request.param:
        case "array":
            return ArrayImages(IMAGES)
        case "folder":
            return FolderImages(write_pngs(tmp_path / "images", IMAGES))
        case "compressed":
            np.savez_compressed(path, IMAGES)
        case "fortran":
            np.savez(path, np.asfortranarray(IMAGES))
        case "npz":
            np.savez(path, IMAGES)
    return NpzImages(path)


def test_every_kind_of_set_gives_the_same_images(images):
    assert images.count == 20
    assert images.resolution == (8, 8)
    np.testing.assert_array_equal(read(images), IMAGES)


def test_hash_depends_on_the_content(images):
    other = ArrayImages(255 - IMAGES)
    assert images.sha256() == images.sha256()
    assert images.sha256() != other.sha256()


def test_hash_of_an_array_does_not_depend_on_its_memory_layout():
    assert ArrayImages(np.asfortranarray(IMAGES)).sha256() == ArrayImages(IMAGES).sha256()


def test_folder_of_class_folders_is_read_in_path_order_and_cropped(tmp_path):
    write_pngs(tmp_path / "b", IMAGES[:10])
    write_pngs(tmp_path / "a", IMAGES[10:])
    images = FolderImages(tmp_path, crop=lambda image: image.crop((0, 0, 4, 4)))
    expected = np.concatenate([IMAGES[10:], IMAGES[:10]])[:, :4, :4]
    np.testing.assert_array_equal(read(images), expected)
    assert images.sorted_by_class


@pytest.mark.parametrize(
    "labels, in_order", [(np.arange(20) // 5, True), (np.arange(20) % 5, False)]
)
def test_labels_tell_whether_images_are_sorted_by_class(tmp_path, labels, in_order):
    np.savez(tmp_path / "a.npz", IMAGES, labels)
    assert NpzImages(tmp_path / "a.npz").sorted_by_class == in_order


REFUSED = {
    "nan": (np.full((4, 8, 8, 3), np.nan, np.float32), "NaN"),
    "signed range": (
        np.linspace(-1, 1, 768, dtype=np.float32).reshape(4, 8, 8, 3),
        r"\[-1, 1\].*127.5",
    ),
    "float dtype": (IMAGES.astype(np.float64), "float64"),
    "integer dtype": (IMAGES.astype(np.int64), "int64"),
    "objects": (np.array([None, 1]), "object"),
    "cast floats": (IMAGES // 128, r"\[0, 1\]"),
    "one image": (IMAGES[:1], "at least 2"),
    "no image": (IMAGES[:0], "at least 2"),
    "grey": (IMAGES[..., 0], "shape"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arrays_are_refused(tmp_path, case):
    array, message = REFUSED[case]
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(UserError, match=message) as error:
        NpzImages(tmp_path / "a.npz")
    assert "a.npz" in str(error.value)
    assert "\n" not in str(error.value)


def damaged(kind: str) -> bytes:
    """The content of an .npz file with this damage."""
    file = io.BytesIO()
    np.savez(file, IMAGES)
    valid = file.getvalue()
    if kind == "truncated":
        return valid[:-200]
    if kind == "flipped bit":
        return valid[:1000] + bytes([valid[1000] ^ 1]) + valid[1001:]
    if kind == "header of a terabyte":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
        )
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + b"\0" * 100)
        return file.getvalue()
    return {"empty": b"", "text": b"not an npz"}[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "flipped bit", "header of a terabyte"]
)
def test_damaged_files_are_refused(tmp_path, kind):
    path = tmp_path / "a.npz"
    path.write_bytes(damaged(kind))
    with pytest.raises(UserError, match="a.npz"):
        read(NpzImages(path))


def test_missing_images_are_named(tmp_path):
    with pytest.raises(UserError, match="no images below"):
        FolderImages(tmp_path)
    np.savez(tmp_path / "a.npz", images=IMAGES)
    with pytest.raises(UserError, match="no array arr_0.*images.npy"):
        NpzImages(tmp_path / "a.npz")


def test_picture_of_another_size_is_named(tmp_path):
    write_pngs(tmp_path, IMAGES[:3])
    Image.fromarray(IMAGES[0][:4]).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match="odd.png has 8x4 pixels, others have 8x8.*--image-size"):
        FolderImages(tmp_path)


def test_damaged_picture_is_named(tmp_path):
    write_pngs(tmp_path, IMAGES[:3])
    (tmp_path / "damaged.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    with pytest.raises(UserError, match="damaged.png"):
        read(FolderImages(tmp_path))


def test_grey_pictures_of_16_bits_are_those_of_8_bits(tmp_path):
    write_pngs(tmp_path / "8", IMAGES[..., 0])
    write_pngs(tmp_path / "16", IMAGES[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        read(FolderImages(tmp_path / "16")), read(FolderImages(tmp_path / "8"))
    )
    Image.fromarray(IMAGES[0, ..., 0].astype(np.float32)).save(tmp_path / "8" / "depth.tif")
    with pytest.raises(UserError, match=r"depth\.tif \(mode F"):
        read(FolderImages(tmp_path / "8"))


def test_evaluation_sees_the_images_of_training(tmp_path):
    write_pngs(tmp_path / "elsewhere", IMAGES[:5])
    root = write_pngs(tmp_path / "root" / "bee", IMAGES[5:]).parent
    (root / "ant").symlink_to(tmp_path / "elsewhere")
    (root / "ant" / "up").symlink_to(root)
    for hidden in (root / ".cache", root / "bee" / ".ipynb_checkpoints", root / "__MACOSX" / "bee"):
        write_pngs(hidden, IMAGES[:3])
    (root / "bee" / "._000.png").write_bytes(b"\0")
    evaluated, trained = FolderImages(root), CroppedImages(root, 8)
    np.testing.assert_array_equal(read(evaluated), IMAGES)
    pixels = torch.stack([image for _, image in trained]).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(((pixels + 1) * 127.5).round().byte().numpy(), IMAGES)
    assert trained.labels.tolist() == [0] * 5 + [1] * 15


def test_a_picture_whose_name_is_no_text_is_read(tmp_path):
    write_pngs(tmp_path, IMAGES)
    before = FolderImages(tmp_path).sha256()
    (tmp_path / "019.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    images = FolderImages(tmp_path)
    np.testing.assert_array_equal(read(images), IMAGES)
    assert images.sha256() == images.sha256() != before
