"""The 2015 Inception network: the same numbers as TensorFlow's run of its graph."""

from pathlib import Path

import inception_graph
import numpy as np
import pytest
import torch

from edt.metrics.inception import InceptionFeatures, resize
from edt.metrics.inception_weights import load_weights


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    path.write_bytes(inception_graph.random_graph(0, gamma="used"))
    return path


@pytest.fixture(scope="module")
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


# The features that TensorFlow 2.21 computes with the generated graph (seed 0, gamma used) on
# sample_images, by side: pool features, then spatial features, one row for each image. A row has
# their mean and three entries (see summary).
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
    """Mean of each row, with its first, middle and last entry."""
    columns = [0, features.shape[1] // 2, features.shape[1] - 1]
    return np.concatenate([features.mean(1, keepdims=True), features[:, columns]], 1)


@pytest.mark.parametrize("side", [32, 256, 512])
def test_network_meets_tensorflow_values(extractor, side):
    pool, spatial = (features.numpy() for features in extractor.extract(sample_images(side, side)))
    for features, expected in zip((pool, spatial), TENSORFLOW[side], strict=True):
        np.testing.assert_allclose(summary(features), expected, rtol=0, atol=1e-5 * features.max())


@pytest.mark.slow
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
            (ours.probabilities(pool), tensorflow.probabilities(pool.numpy())),
        ]
        for actual, expected in pairs:
            tolerance = float(1e-5 * expected.abs().max())
            torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_network_leaves_the_random_generator_alone(graph_file):
    before = torch.get_rng_state()
    InceptionFeatures(load_weights(graph_file)).extract(sample_images(8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_does_not_change_features(extractor):
    images = sample_images(40, 40)
    of_batch = extractor.extract(images)
    of_image = extractor.extract(images[2:3])
    for features, expected in zip(of_image, of_batch, strict=True):
        tolerance = float(1e-6 * expected.max())
        torch.testing.assert_close(features, expected[2:3], rtol=0, atol=tolerance)
