"""The weights of the 2015 Inception network: find, download, check, convert."""

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
BATCH_NORM_TENSORS = ("beta", "gamma", "moving_mean", "moving_variance")
# The network's own resize and scaling, which edt.metrics.inception repeats.
INPUT_CONSTANTS: dict[str, float | list[int]] = {
    "ResizeBilinear/size": [299, 299],
    "Sub/y": 128,
    "Mul/y": 1 / 128,
}


@dataclass(frozen=True)
class InceptionWeights:
    """Weights by their name in the graph, float32."""

    # Every unit U has `U/conv2d_params` (height, width, in, out) and
    # `U/batchnorm/{beta,gamma,moving_mean,moving_variance}` (out,).
    # The classifier is `softmax/weights` (2048, 1008).
    tensors: dict[str, np.ndarray]
    sha256: str  # hash of the .pb file that the weights come from


def find_weights(path: Path | None = None) -> Path:
    """The file of the weights.

    Args:
        path: the file. Default: ``classify_image_graph_def.pb`` in the working directory, where
            ADM's evaluator puts it, or else in the cache folder ``~/.cache/edt``. If neither has
            it, it is downloaded to the cache folder.

    Raises:
        UserError: there is no file at ``path``, or the download failed.
    """
    if path is not None:
        if not path.is_file():
            raise UserError(f"no Inception weights at {path}; download {URL}")
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edt" / FILE_NAME
    for candidate in (Path(FILE_NAME), cache):
        if candidate.is_file():
            return candidate
    _download(cache)
    return cache


def _download(target: Path) -> None:
    """Download the published file. It appears at ``target`` only if its checksum is right."""
    remedy = f"put the file from {URL} at ./{FILE_NAME} or name it with --inception"
    logger.info("downloading %s (96 MB) to %s", URL, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        try:
            with urllib.request.urlopen(URL, timeout=20) as response, open(temporary, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
        except OSError as error:
            raise UserError(
                f"no Inception weights, and the download failed ({error}); {remedy}"
            ) from None
        if file_sha256(temporary) != SHA256:
            raise UserError(f"the downloaded Inception weights have a wrong checksum; {remedy}")


def load_weights(path: Path) -> InceptionWeights:
    """Load weights, and check that they fit the network.

    Args:
        path: ``classify_image_graph_def.pb``, or a safetensors file of :func:`save_weights`.

    Raises:
        UserError: the file is damaged, or belongs to another network.
    """
    if path.suffix == ".safetensors":
        tensors, sha256 = _read_safetensors(path)
    else:
        graph = read_graph(path)
        _check_graph(path, graph)
        tensors, sha256 = _read_constants(path, graph), file_sha256(path)
    for name, shape in _expected_shapes().items():
        if name not in tensors:
            raise _not_inception(path, f"{name} is missing")
        if tensors[name].shape != shape:
            raise _not_inception(path, f"{name} has shape {tensors[name].shape}, expected {shape}")
    if sha256 != SHA256:
        logger.warning(
            "warning: %s is not the published Inception network; "
            "do not compare its scores with published ones",
            path,
        )
    return InceptionWeights(tensors, sha256)


def save_weights(weights: InceptionWeights, path: Path) -> None:
    """Write the weights as safetensors, with the hash of the file that they come from."""
    with atomic_write(path) as temporary:
        safetensors.numpy.save_file(
            weights.tensors, temporary, metadata={"source_sha256": weights.sha256}
        )


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Tensors and the hash of the .pb file that they come from."""
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, (file.metadata() or {}).get("source_sha256", "")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); convert {FILE_NAME} again") from None


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its name."""
    shapes: dict[str, tuple[int, ...]] = {"softmax/weights": (FEATURES, CLASSES)}
    for unit in UNITS:
        shapes[f"{unit.name}/conv2d_params"] = (*unit.kernel, unit.channels_in, unit.channels_out)
        for name in BATCH_NORM_TENSORS:
            shapes[f"{unit.name}/batchnorm/{name}"] = (unit.channels_out,)
    return shapes


def _read_constants(path: Path, graph: dict[str, GraphNode]) -> dict[str, np.ndarray]:
    tensors = {name: _constant(path, graph, name) for name in _expected_shapes()}
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
        pass  # the node is missing or damaged: the message below holds for both
    raise _not_inception(path, f"there is no usable constant {name}")


def _check_graph(path: Path, graph: dict[str, GraphNode]) -> None:
    """Refuse a graph that computes something else, which would give a plausible, wrong FID."""
    for name, expected in INPUT_CONSTANTS.items():
        constant = _constant(path, graph, name)
        if not np.array_equal(constant, np.asarray(expected)):
            raise _not_inception(path, f"{name} is {constant.tolist()}, expected {expected}")
    for name, expected_op in _expected_operations().items():
        op = graph[name].op if name in graph else "missing"
        if op != expected_op:
            raise _not_inception(path, f"{name} is {op}, expected {expected_op}")
    for unit in UNITS:
        epsilon = graph[f"{unit.name}/batchnorm"].number("variance_epsilon")
        if abs(epsilon - BATCH_NORM_EPSILON) > 1e-8:  # float32 stores 0.001 with an error of 5e-11
            raise _not_inception(
                path, f"{unit.name}/batchnorm has epsilon {epsilon}, expected {BATCH_NORM_EPSILON}"
            )


def _expected_operations() -> dict[str, str]:
    """Operation of every node that decides what the graph computes, by the node's name."""
    operations = {
        "ResizeBilinear": "ResizeBilinear",
        "pool_3": "AvgPool",
        "softmax/logits/MatMul": "MatMul",
    }
    for node in GRAPH:
        match node:
            case Unit(name):
                operations[name] = "Relu"
                operations[f"{name}/batchnorm"] = "BatchNormWithGlobalNormalization"
            case Pool(name, _, op):
                operations[name] = op
            case Join(name):
                operations[name] = "Concat"
    return operations


def _not_inception(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not the 2015 Inception network: {reason}; download {URL}")
