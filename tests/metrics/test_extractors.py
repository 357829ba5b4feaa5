"""Creating a feature extractor by its name."""

import inception_graph
import pytest

from edt.metrics import PixelFeatures, create_extractor
from edt.metrics.inception import InceptionFeatures
from edt.utils.errors import UserError


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractors") / "graph.pb"
    path.write_bytes(inception_graph.random_graph(0))
    return path


def test_pixels_need_no_weights(tmp_path):
    extractor = create_extractor("pixels", inception=tmp_path / "nowhere.pb")
    assert isinstance(extractor, PixelFeatures)
    assert extractor.name == "pixels"


def test_inception_runs_in_torch_by_default(graph_file):
    extractor = create_extractor(inception=graph_file)
    assert isinstance(extractor, InceptionFeatures)
    assert extractor.backend == "torch"


def test_unknown_features_are_refused(graph_file):
    with pytest.raises(UserError, match="'pixles'; choose one of inception, pixels"):
        create_extractor(features="pixles", inception=graph_file)


@pytest.mark.parametrize("features", ["inception", "pixels"])
def test_unknown_backend_is_refused(features, graph_file):
    with pytest.raises(UserError, match="'tf'; choose one of torch, tensorflow"):
        create_extractor(features, backend="tf", inception=graph_file)


def test_device_that_does_not_work_is_refused():
    with pytest.raises(UserError, match="--device abacus cannot be used"):
        create_extractor("pixels", device="abacus")
