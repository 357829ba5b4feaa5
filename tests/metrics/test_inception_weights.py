"""The weights of the Inception network: read, checked, converted, found."""

import hashlib
from pathlib import Path

import inception_graph
import numpy as np
import pytest

from edt.metrics import inception_weights
from edt.metrics.inception_weights import InceptionWeights, find_weights, load_weights, save_weights
from edt.utils.errors import UserError


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    path.write_bytes(inception_graph.random_graph(0, gamma="used"))
    return path


def test_gamma_counts_only_when_the_graph_says_so(tmp_path):
    for gamma in ("one", "ignored", "used"):
        (tmp_path / gamma).write_bytes(inception_graph.random_graph(3, gamma=gamma))
    name = "mixed_6/conv/batchnorm/gamma"
    one, ignored, used = (
        load_weights(tmp_path / gamma).tensors[name] for gamma in ("one", "ignored", "used")
    )
    assert (one == 1).all()
    assert (ignored == 1).all()
    assert (used != 1).any()


def test_converted_weights_are_the_same(graph_file, tmp_path):
    weights = load_weights(graph_file)
    save_weights(weights, tmp_path / "w.safetensors")
    converted = load_weights(tmp_path / "w.safetensors")
    assert converted.sha256 == weights.sha256
    assert converted.tensors.keys() == weights.tensors.keys()
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(converted.tensors[name], tensor)


def test_damaged_converted_weights_are_refused(graph_file, tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_weights(load_weights(graph_file), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged.safetensors"):
        load_weights(path)


def test_missing_and_misshapen_converted_weights_are_refused(graph_file, tmp_path):
    weights = load_weights(graph_file)
    path = tmp_path / "w.safetensors"
    name = "mixed_6/conv/conv2d_params"
    tensors = {**weights.tensors, name: weights.tensors[name][..., :1].copy()}
    save_weights(InceptionWeights(tensors, ""), path)
    with pytest.raises(UserError, match=r"mixed_6/conv/conv2d_params has shape \(1, 1, 768, 1\)"):
        load_weights(path)
    del tensors[name]
    save_weights(InceptionWeights(tensors, ""), path)
    with pytest.raises(UserError, match="mixed_6/conv/conv2d_params is missing"):
        load_weights(path)


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
    valid, path = graph_file.read_bytes(), tmp_path / "bad.pb"
    for data in (b"", b"<html>404 Not Found</html>", valid[: len(valid) // 2], valid[:1000]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.pb"):
            load_weights(path)
    path.write_bytes(valid.replace(b"mixed_6/conv/conv2d_params", b"mixed_6/conv/conv2d_parama"))
    with pytest.raises(UserError, match="no usable constant mixed_6/conv/conv2d_params"):
        load_weights(path)


@pytest.fixture
def empty_places(tmp_path, monkeypatch) -> Path:
    """A working directory and a cache without weights; the download comes from this folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception_weights, "URL", (tmp_path / "published.pb").as_uri())
    return tmp_path


def test_weights_are_found_where_adm_keeps_them(empty_places):
    with pytest.raises(UserError, match="no Inception weights.*published.pb.*--inception"):
        find_weights()
    with pytest.raises(UserError, match="nowhere.pb"):
        find_weights(Path("nowhere.pb"))
    Path("classify_image_graph_def.pb").touch()
    assert find_weights() == Path("classify_image_graph_def.pb")


def test_download_is_kept_only_with_the_right_checksum(empty_places, monkeypatch):
    (empty_places / "published.pb").write_bytes(b"weights")
    with pytest.raises(UserError, match="wrong checksum"):
        find_weights()
    assert list((empty_places / "cache" / "edt").iterdir()) == []
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert find_weights().read_bytes() == b"weights"
    (empty_places / "published.pb").unlink()
    assert find_weights().read_bytes() == b"weights"  # from the cache
