"""Reading a GraphDef without TensorFlow."""

import inception_graph
import numpy as np
import pytest

from edt.metrics.graphdef import read_graph
from edt.utils.errors import UserError


@pytest.fixture
def read(tmp_path):
    """Writes the bytes of a graph to a file, and reads it."""
    path = tmp_path / "graph.pb"

    def write_and_read(graph: bytes):
        path.write_bytes(graph)
        return read_graph(path)

    return write_and_read


def test_generated_graph_has_the_size_of_the_published_file(read):
    graph = inception_graph.random_graph(0, gamma="used")
    assert len(graph) == inception_graph.PUBLISHED_BYTES
    assert len(read(graph)) == 1004


def test_node_has_its_operation_inputs_and_attributes(read):
    attributes = {
        "scale": inception_graph.flag(True),
        "off": inception_graph.flag(False),
        "epsilon": inception_graph.single(4, 0.25),
    }
    [(name, node)] = read(inception_graph.node("norm", "Norm", "a", "b", **attributes)).items()
    assert name == "norm"
    assert node.op == "Norm"
    assert node.inputs == ["a", "b"]
    assert node.flag("scale")
    assert not node.flag("off")
    assert not node.flag("missing")
    assert node.number("epsilon") == 0.25
    assert node.number("missing") == 0


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6).reshape(2, 3)),
        (np.array([299, 300], np.int32), [299, 300]),
        (0.5, 0.5),
        (3, 3),
    ],
)
def test_constants_are_read(read, value, expected):
    array = read(inception_graph.constant("c", value))["c"].array()
    assert array.dtype == (np.int32 if np.asarray(value).dtype.kind == "i" else np.float32)
    assert array.shape == np.shape(expected)
    np.testing.assert_array_equal(array, expected)


def test_single_value_fills_the_shape(read):
    g = inception_graph
    shape = g.text(2, g.text(2, g.number(1, 2)) + g.text(2, g.number(1, 3)))
    tensor = g.number(1, g.FLOAT) + shape + g.text(5, np.float32(7).tobytes())
    array = read(g.node("c", "Const", value=g.text(8, tensor)))["c"].array()
    np.testing.assert_array_equal(array, np.full((2, 3), 7))


@pytest.mark.parametrize(
    "graph",
    [
        b"",
        b"<html>404 Not Found</html>",
        inception_graph.node("a", "Relu")[:-1],
        inception_graph.number(1, 5),  # a node that is an integer
        inception_graph.text(1, inception_graph.text(5, inception_graph.text(2, b""))),  # no key
        inception_graph.text(1, inception_graph.text(1, b"\xff")),  # a name that is no text
    ],
)
def test_files_that_are_no_graph_are_refused(read, graph):
    with pytest.raises(UserError, match=r"graph\.pb is not a TensorFlow GraphDef"):
        read(graph)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere.pb"):
        read_graph(tmp_path / "nowhere.pb")
