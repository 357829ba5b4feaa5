import copy
import zipfile

import golden_rule
import numpy as np
import pytest
import torch

from edt.checkpoints.folder import build
from edt.data.vae import PixelVAE
from edt.nn.precision import round_weights
from edt.sampling.generate import Recipe, generate
from edt.sampling.npz_writer import SampleArchive
from edt.utils.errors import UserError


@pytest.fixture(scope="module")
def model():
    return golden_rule.fill(build("EDT-Tiny/2", input_size=8, in_channels=3, num_classes=5)).eval()


def draw(model, recipe: Recipe, indices: list[int], batch_size: int) -> dict:
    batches = generate(model, PixelVAE(), recipe, torch.tensor(indices), batch_size)
    return {
        int(i): (image, int(label))
        for batch in batches
        for i, image, label in zip(*batch, strict=True)
    }


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_an_image_depends_on_its_index_only(model, solver):
    recipe = Recipe(seed=3, num_sampling_steps="5", solver=solver, cfg_scale=1.5)
    together, apart = (
        draw(model, recipe, [0, 1, 2, 3, 4, 5, 6], 4),
        draw(model, recipe, [6, 2, 5], 2),
    )
    for index, (image, label) in apart.items():
        assert label == together[index][1]
        difference = (image.int() - together[index][0].int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    other = draw(
        model, Recipe(seed=4, num_sampling_steps="5", solver=solver, cfg_scale=1.5), [0], 1
    )
    assert not torch.equal(other[0][0], together[0][0])


def test_labels():
    indices = torch.arange(1000)
    uniform = Recipe(labels="uniform").labels_of(indices, 10)
    assert (
        set(uniform.tolist()) == set(range(10)) and len(set(torch.bincount(uniform).tolist())) > 1
    )
    assert torch.equal(Recipe(labels="uniform").labels_of(indices[500:], 10), uniform[500:])
    assert Recipe(labels="balanced").labels_of(indices, 10).bincount().tolist() == [100] * 10
    assert Recipe(labels="7,2").labels_of(indices[:4], 10).tolist() == [7, 2, 7, 2]
    assert Recipe().labels_of(indices, 0).tolist() == [0] * 1000
    for labels in ("10", "-1", "cat", "1,,2"):
        with pytest.raises(UserError):
            Recipe(labels=labels).labels_of(indices, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cfg_scale": 0.5},
        {"cfg_scale": float("nan")},
        {"solver": "euler"},
        {"num_sampling_steps": "0"},
    ],
)
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(UserError):
        Recipe(**wrong)


def test_images_that_are_not_finite_are_named(model):
    broken = build("EDT-Tiny/2", input_size=8, in_channels=3, num_classes=5).eval()
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[2] = float("nan")
    with pytest.raises(UserError, match=r"images \[12\] are not finite"):
        draw(broken, Recipe(num_sampling_steps="2", labels="balanced"), [10, 12, 13], 3)


def test_rounded_weights_draw_the_same_images(model):
    recipe = Recipe(num_sampling_steps="3", cfg_scale=2.0, precision="bf16")
    rounded = copy.deepcopy(model)
    round_weights(rounded)
    drawn = [draw(one, recipe, [0, 1, 2], 3) for one in (model, rounded)]
    assert all(torch.equal(drawn[0][i][0], drawn[1][i][0]) for i in range(3))
    kinds = {name: p.dtype for name, p in rounded.named_parameters()}
    assert (
        kinds["blocks.0.mlp.fc1.weight"] == torch.bfloat16
        and kinds["final_layer.linear.weight"] == torch.float32
    )


def test_archive_is_an_npz_whoever_fills_it(tmp_path):
    shape = (23, 4, 5, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    first, second = SampleArchive(tmp_path, shape), SampleArchive(tmp_path, shape)
    for archive in (first, second):
        archive.open()
    first.write(np.arange(0, 23, 2), images[::2])
    assert not first.finish() and not first.path.exists()
    assert second.missing().tolist() == list(range(1, 23, 2))
    assert all(
        np.array_equal(a, b) for a, b in zip(second.read([4, 0]), images[[4, 0]], strict=True)
    )
    second.write(np.arange(1, 23, 2), images[1::2])
    assert second.finish() and first.finish()
    assert first.path.name == "samples_23x4x5x3.npz"
    with np.load(first.path, allow_pickle=False) as file:
        assert file.files == ["arr_0"] and np.array_equal(file["arr_0"], images)
    with zipfile.ZipFile(first.path) as archive:
        assert archive.testzip() is None
        with archive.open("arr_0.npy") as member:  # as ADM's evaluator streams it
            assert np.lib.format.read_magic(member) == (1, 0)
    again = SampleArchive(tmp_path, shape)
    again.open()
    assert again.missing().size == 0 and again.finish()
    assert np.array_equal(next(again.read([22])), images[22])


@pytest.mark.slow
def test_archive_of_more_than_four_gib(tmp_path):
    shape = (
        30_000,
        256,
        200,
        3,
    )  # 4.3 GiB, never written: room for it is all that is asked of the disk
    archive = SampleArchive(tmp_path, shape)
    archive.open()
    archive.write(np.array([29_999]), np.full((1, 256, 200, 3), 7, np.uint8))
    archive._done_file.write_bytes(bytes([1]) * 30_000)
    assert archive.finish()
    with zipfile.ZipFile(archive.path) as file, file.open("arr_0.npy") as member:
        assert member._orig_file_size == archive._end - archive._npy_offset > 1 << 32
    assert (
        np.load(archive.path, mmap_mode="r") is not None
    ) and archive.path.stat().st_size > 1 << 32
    archive.path.unlink()


def test_too_little_room_is_said_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match="images need .* GiB"):
        SampleArchive(tmp_path, (10**9, 256, 256, 3)).open()
    assert [path.name for path in tmp_path.iterdir()] == ["samples_1000000000x256x256x3.lock"]
