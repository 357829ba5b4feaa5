"""Finding, fetching, checking and converting the weights of the 2015 Inception network."""

import logging
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from edt.metrics.graphdef import GraphNode, read_graph
from edt.metrics.inception_graph import (
    BATCH_NORM_EPSILON,
    CLASSES,
    FEATURES,
    GRAPH,
    UNITS,
    Join,
    Pool,
    Unit,
)
from edt.utils.errors import UserError
from edt.utils.files import atomic_write, file_sha256

logger = logging.getLogger(__name__)

FILE_NAME = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{FILE_NAME}"
SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
BATCH_NORM = {
    "beta": "beta",
    "gamma": "gamma",
    "mean": "moving_mean",
    "variance": "moving_variance",
}


@dataclass(frozen=True)
class InceptionWeights:
    """Weights by their name in the graph, float32.

    Attributes:
        tensors: for each unit U ``U/conv2d_params`` (kh, kw, cin, cout) and
            ``U/batchnorm/{beta,gamma,moving_mean, moving_variance}`` (cout,), and
            ``softmax/weights`` (2048, 1008).
        sha256: hash of the .pb file they come from.
    """

    tensors: dict[str, np.ndarray]
    sha256: str


def find_weights(path: Path | None = None) -> Path:
    """The weights at ``path``; else beside the user, where ADM keeps them; else in the cache,
    downloaded if need be.
    """
    if path is not None:
        if not path.is_file():
            raise UserError(f"no Inception weights at {path}; get {URL}")
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edt" / FILE_NAME
    for place in (Path(FILE_NAME), cache):
        if place.is_file():
            return place
    _download(cache)
    return cache


def _download(target: Path) -> None:
    """Fetch the published file; it appears at ``target`` only when its checksum is right."""
    mend = f"put the file from {URL} at ./{FILE_NAME} or name it with --inception"
    logger.info("downloading %s (96 MB) to %s", URL, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        try:
            with urllib.request.urlopen(URL, timeout=20) as response, open(temporary, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
        except OSError as error:
            raise UserError(
                f"no Inception weights, and the download failed ({error}); {mend}"
            ) from None
        if file_sha256(temporary) != SHA256:
            raise UserError(f"the downloaded Inception weights have a wrong checksum; {mend}")


def load_weights(path: Path) -> InceptionWeights:
    """Weights from ``classify_image_graph_def.pb`` or a file of :func:`save_weights`, known to fit
    the network.
    """
    if path.suffix == ".safetensors":
        tensors, sha256 = _read_safetensors(path)
    else:
        graph = read_graph(path)
        _check_graph(path, graph)
        tensors, sha256 = _read_constants(path, graph), file_sha256(path)
    for name, shape in _shapes().items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"has shape {tensors[name].shape}" if name in tensors else "is missing"
            raise _not_inception(path, f"{name} {found}, expected {shape}")
    if sha256 != SHA256:
        logger.warning(
            "warning: %s is not the published Inception network; its scores compare with none", path
        )
    return InceptionWeights(tensors, sha256)


def save_weights(weights: InceptionWeights, path: Path) -> None:
    """Write the weights as safetensors, with the hash of the file they come from."""
    with atomic_write(path) as temporary:
        safetensors.numpy.save_file(
            weights.tensors, temporary, metadata={"source_sha256": weights.sha256}
        )


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, (file.metadata() or {}).get("source_sha256", "")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); convert {FILE_NAME} again") from None


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"softmax/weights": (FEATURES, CLASSES)}
    for unit in UNITS:
        shapes[f"{unit.name}/conv2d_params"] = (*unit.kernel, unit.channels_in, unit.channels_out)
        for name in BATCH_NORM.values():
            shapes[f"{unit.name}/batchnorm/{name}"] = (unit.channels_out,)
    return shapes


def _read_constants(path: Path, graph: dict[str, GraphNode]) -> dict[str, np.ndarray]:
    tensors = {name: _constant(path, graph, name) for name in _shapes()}
    for unit in UNITS:
        # TensorFlow ignores gamma unless the node asks for it.
        if not graph[f"{unit.name}/batchnorm"].flag("scale_after_normalization"):
            gamma = f"{unit.name}/batchnorm/gamma"
            tensors[gamma] = np.ones_like(tensors[gamma])
    return tensors


def _constant(path: Path, graph: dict[str, GraphNode], name: str) -> np.ndarray:
    try:
        if graph[name].op == "Const":
            return graph[name].array()
    except (KeyError, ValueError, IndexError):
        pass
    raise _not_inception(path, f"there is no usable constant {name}")


def _check_graph(path: Path, graph: dict[str, GraphNode]) -> None:
    """Refuse a graph that computes something else, so that it fails with a sentence and not with a
    wrong FID.
    """
    expected_constants = {"ResizeBilinear/size": [299, 299], "Sub/y": 128, "Mul/y": 1 / 128}
    for name, value in expected_constants.items():
        found = _constant(path, graph, name)
        if not np.array_equal(found, value):
            raise _not_inception(path, f"{name} is {found.tolist()}, expected {value}")
    operations = {
        "ResizeBilinear": "ResizeBilinear",
        "pool_3": "AvgPool",
        "softmax/logits/MatMul": "MatMul",
    }
    for node in GRAPH:
        match node:
            case Unit(name):
                operations |= {
                    name: "Relu",
                    f"{name}/batchnorm": "BatchNormWithGlobalNormalization",
                }
            case Pool(name, _, op):
                operations[name] = op
            case Join(name):
                operations[name] = "Concat"
    for name, op in operations.items():
        found = graph[name].op if name in graph else "missing"
        if found != op:
            raise _not_inception(path, f"{name} is {found}, expected {op}")
    for unit in UNITS:
        epsilon = graph[f"{unit.name}/batchnorm"].number("variance_epsilon")
        if abs(epsilon - BATCH_NORM_EPSILON) > 1e-8:
            raise _not_inception(
                path, f"{unit.name}/batchnorm has epsilon {epsilon}, expected {BATCH_NORM_EPSILON}"
            )


def _not_inception(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not the 2015 Inception network: {reason}; get {URL}")
