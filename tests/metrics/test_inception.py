"""The 2015 Inception network: reading its graph, and the same numbers as TensorFlow's run of it."""

import hashlib
from pathlib import Path

import inception_graph
import numpy as np
import pytest
import torch

from edt.metrics import inception_weights
from edt.metrics.graphdef import read_graph
from edt.metrics.inception import InceptionFeatures, resize
from edt.metrics.inception_graph import GRAPH, UNITS, Join, Pool
from edt.metrics.inception_weights import find_weights, load_weights, save_weights
from edt.utils.errors import UserError


@pytest.fixture(scope="session")
def graph_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    path.write_bytes(inception_graph.random_graph(0, gamma="used"))
    return path


@pytest.fixture(scope="session")
def extractor(graph_file) -> InceptionFeatures:
    return InceptionFeatures(load_weights(graph_file))


def sample_images(height: int, width: int) -> np.ndarray:
    """Noise, a smooth ramp, a checkerboard and blocks, uint8 (4, height, width, 3)."""
    rows, columns = np.indices((height, width))
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    ramp = np.stack(
        [rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)],
        -1,
    )
    checkerboard = ((rows + columns) % 2 * 255)[..., None].repeat(3, -1)
    blocks = np.random.default_rng(width).integers(0, 256, (8, 8, 3))[
        rows * 8 // height, columns * 8 // width
    ]
    return np.stack([noise, ramp, checkerboard, blocks]).astype(np.uint8)


def test_generated_graph_has_the_size_of_the_published_file(graph_file):
    assert graph_file.stat().st_size == inception_graph.PUBLISHED_BYTES
    assert len(read_graph(graph_file)) == 1004


def test_network_has_the_nodes_of_the_graph():
    units = [
        f"{u.name} {u.source} {u.kernel[0]},{u.kernel[1]},{u.channels_in},{u.channels_out} {u.stride} {u.padding}"
        for u in UNITS
    ]
    assert units == inception_graph.UNITS.strip().splitlines()
    pools = {node.name: node for node in GRAPH if isinstance(node, Pool)}
    maxima = {
        name: (p.source, p.stride, p.padding) for name, p in pools.items() if p.op == "MaxPool"
    }
    assert maxima == inception_graph.MAX_POOLS
    averages = {name: p.source for name, p in pools.items() if p.op == "AvgPool"}
    assert averages == {
        f"{block}/tower_2/pool": inception_graph.INPUTS[block]
        for block in inception_graph.AVERAGE_POOLS
    }
    joins = {node.name: node.sources for node in GRAPH if isinstance(node, Join)}
    assert joins == {
        f"{block}/join": tuple(f"{block}/{end}" for end in ends.split())
        for block, ends in inception_graph.JOINS.items()
    }


@pytest.mark.parametrize("size", [(2, 3), (32, 32), (299, 299), (300, 512)])
def test_resize_is_that_of_tensorflow_1(size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 1)).astype(np.float32)

    def position(i: int, length: int) -> tuple[int, int, np.float32]:
        x = np.float32(i) * (np.float32(length) / np.float32(299))
        return int(x), min(int(x) + 1, length - 1), x - np.float32(int(x))

    resized = resize(torch.from_numpy(image)[None])[0, ..., 0]
    assert resized.shape == (299, 299)
    for i, j in np.random.default_rng(2).integers(0, 299, (200, 2)).tolist() + [[298, 298], [0, 0]]:
        (top, bottom, y), (left, right, x) = position(i, size[0]), position(j, size[1])
        a, b = (
            image[row, left] + (image[row, right] - image[row, left]) * x for row in (top, bottom)
        )
        assert resized[i, j] == (a + (b - a) * y).item()


# What TensorFlow 2.21 gives for the generated graph (seed 0, gamma used) and sample_images: mean of
# the pool features and of the spatial features of each image, with three entries of each.
TENSORFLOW = {
    32: (
        [
            [4.280917, 0.06957605, 5.172248, 3.734095],
            [2.838587, 0.2508433, 2.814288, 3.564699],
            [4.190538, 0.07263365, 4.848876, 3.097059],
            [3.778589, 0.04386245, 4.207798, 3.772041],
        ],
        [
            [1.422494, 5.67359, 2.851627, 0],
            [1.053724, 4.36522, 2.718453, 0],
            [1.493551, 5.678733, 2.554736, 0],
            [1.286308, 4.022495, 4.491447, 0.4078213],
        ],
    ),
    256: (
        [
            [4.97859, 0.1057143, 6.110611, 4.284926],
            [2.836397, 0.2524652, 2.809321, 3.554375],
            [3.767522, 0.1275708, 4.782349, 2.992915],
            [4.25575, 0.1044794, 4.60551, 4.519117],
        ],
        [
            [1.676128, 6.085001, 2.986144, 0],
            [1.053017, 4.358859, 2.706088, 0],
            [1.193809, 4.33586, 2.216815, 0],
            [1.494579, 8.401284, 2.258832, 0],
        ],
    ),
    512: (
        [
            [4.941494, 0.1113021, 6.04761, 4.429807],
            [2.833866, 0.2520062, 2.806197, 3.550909],
            [3.767491, 0.1868286, 4.376497, 3.25911],
            [4.430594, 0.04925044, 5.099841, 4.084173],
        ],
        [
            [1.679041, 6.149979, 3.078036, 0],
            [1.052082, 4.351794, 2.705785, 0],
            [1.318807, 4.657455, 2.898498, 0],
            [1.443179, 6.17195, 4.014822, 0],
        ],
    ),
}


def summary(features: np.ndarray) -> np.ndarray:
    columns = [0, features.shape[1] // 2, features.shape[1] - 1]
    return np.concatenate([features.mean(1, keepdims=True), features[:, columns]], 1)


@pytest.mark.parametrize("side", [32, 256, 512])
def test_network_meets_tensorflow_values(extractor, side):
    pool, spatial = (features.numpy() for features in extractor.extract(sample_images(side, side)))
    for features, expected in zip((pool, spatial), TENSORFLOW[side], strict=True):
        np.testing.assert_allclose(summary(features), expected, rtol=0, atol=1e-5 * features.max())


@pytest.mark.parametrize("gamma", ["one", "ignored", "used"])
def test_network_meets_tensorflow(tmp_path, gamma):
    pytest.importorskip("tensorflow")
    from edt.metrics.inception_tensorflow import TensorFlowInceptionFeatures

    path = tmp_path / "graph.pb"
    path.write_bytes(inception_graph.random_graph(1, gamma=gamma))
    tensorflow, ours = TensorFlowInceptionFeatures(path), InceptionFeatures(load_weights(path))
    weights = torch.tensor(load_weights(path).tensors["softmax/weights"])
    for height, width in ((32, 32), (256, 256), (512, 512), (200, 320)):
        images = sample_images(height, width)
        expected_pool, expected_spatial = tensorflow.extract(images)
        pool, spatial = ours.extract(images)
        pairs = [
            (pool, expected_pool),
            (spatial, expected_spatial),
            (pool @ weights, expected_pool @ weights),
        ]
        pairs.append((ours.probabilities(pool), tensorflow.probabilities(pool.numpy())))
        for found, expected in pairs:
            torch.testing.assert_close(
                found, expected, rtol=0, atol=float(1e-5 * expected.abs().max())
            )


def test_network_leaves_the_random_generator_alone(graph_file):
    before = torch.get_rng_state()
    InceptionFeatures(load_weights(graph_file)).extract(sample_images(8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_does_not_change_features(extractor):
    images = sample_images(40, 40)
    whole = extractor.extract(images)
    single = extractor.extract(images[2:3])
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a[2:3], b, rtol=0, atol=float(1e-6 * a.max()))


def test_gamma_counts_only_when_the_graph_says_so(tmp_path):
    for gamma in ("one", "ignored", "used"):
        (tmp_path / gamma).write_bytes(inception_graph.random_graph(3, gamma=gamma))
    name = "mixed_6/conv/batchnorm/gamma"
    one, ignored, used = (
        load_weights(tmp_path / gamma).tensors[name] for gamma in ("one", "ignored", "used")
    )
    assert (one == 1).all() and (ignored == 1).all() and (used != 1).any()


def test_converted_weights_are_the_same(graph_file, tmp_path):
    weights = load_weights(graph_file)
    save_weights(weights, tmp_path / "w.safetensors")
    converted = load_weights(tmp_path / "w.safetensors")
    assert converted.sha256 == weights.sha256
    assert converted.tensors.keys() == weights.tensors.keys()
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(converted.tensors[name], tensor)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="broken.safetensors"):
        load_weights(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"side": 224}, "ResizeBilinear/size is"),
        ({"epsilon": 1e-5}, "epsilon"),
        ({"last_pool": "AvgPool"}, "mixed_10/tower_2/pool is AvgPool, expected MaxPool"),
    ],
)
def test_graph_of_another_network_is_refused(tmp_path, options, message):
    path = tmp_path / "other.pb"
    path.write_bytes(inception_graph.random_graph(0, **options))
    with pytest.raises(UserError, match=f"other.pb is not the 2015 Inception network.*{message}"):
        load_weights(path)


def test_damaged_graphs_are_refused(graph_file, tmp_path):
    whole, path = graph_file.read_bytes(), tmp_path / "bad.pb"
    for data in (b"", b"<html>404 Not Found</html>", whole[: len(whole) // 2], whole[:1000]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.pb"):
            load_weights(path)
    path.write_bytes(whole.replace(b"mixed_6/conv/conv2d_params", b"mixed_6/conv/conv2d_parama"))
    with pytest.raises(UserError, match="no usable constant mixed_6/conv/conv2d_params"):
        load_weights(path)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory and a cache without weights, and a publisher that is a folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception_weights, "URL", (tmp_path / "published.pb").as_uri())
    return tmp_path


def test_weights_are_found_where_adm_keeps_them(elsewhere):
    with pytest.raises(UserError, match="no Inception weights.*published.pb.*--inception"):
        find_weights()
    with pytest.raises(UserError, match="nowhere.pb"):
        find_weights(Path("nowhere.pb"))
    Path("classify_image_graph_def.pb").touch()
    assert find_weights() == Path("classify_image_graph_def.pb")


def test_download_is_kept_only_with_the_right_checksum(elsewhere, monkeypatch):
    (elsewhere / "published.pb").write_bytes(b"weights")
    with pytest.raises(UserError, match="wrong checksum"):
        find_weights()
    assert list((elsewhere / "cache" / "edt").iterdir()) == []
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert find_weights().read_bytes() == b"weights"
    (elsewhere / "published.pb").unlink()
    assert find_weights().read_bytes() == b"weights"  # from the cache
