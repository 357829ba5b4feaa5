"""The 2015 Inception network in torch.

Resize, padding and pooling are those of the TensorFlow graph.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt.metrics.features import Backend, FeatureName
from edt.metrics.float32 import full_float32
from edt.metrics.inception_graph import (
    BATCH_NORM_EPSILON,
    GRAPH,
    INPUT,
    OUTPUT,
    SPATIAL,
    SPATIAL_CHANNELS,
    UNITS,
    Node,
    Pool,
    Unit,
)
from edt.metrics.inception_weights import InceptionWeights
from edt.metrics.precision_recall import PrecisionRecallMode

SIDE = 299  # pixels of the network's input
BATCH_NORM_STATE = {  # torch's name -> the graph's
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


class InceptionFeatures:
    """Pool features (n, 2048), spatial features (n, 2023) and class probabilities (n, 1008).

    All three are read at the nodes where ADM reads them.

    Args:
        weights: those of :func:`edt.metrics.inception_weights.load_weights`.
        device: torch device of the network.
    """

    name: FeatureName = "inception"
    backend: Backend = "torch"
    weights_sha256: str | None
    default_pr: PrecisionRecallMode = "adm"

    def __init__(self, weights: InceptionWeights, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.weights_sha256 = weights.sha256
        network = InceptionNetwork(weights).to(self.device)
        # The images arrive with their channels last. Weights of the same layout spare conversions.
        self._network = network.to(memory_format=torch.channels_last)
        self._classifier = torch.tensor(weights.tensors["softmax/weights"], device=self.device)

    def check(self, resolution: tuple[int, int]) -> None:
        pass  # the network resizes images of any size

    def extract(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        with full_float32():
            return self._network(torch.tensor(images, device=self.device).float())

    def probabilities(self, features: np.ndarray | Tensor) -> Tensor:
        """Softmax without the classifier's bias, which ADM leaves out."""
        with full_float32():
            return (torch.as_tensor(features, device=self.device) @ self._classifier).softmax(1)


class InceptionNetwork(nn.Module):
    """The graph of :mod:`edt.metrics.inception_graph`, for inference only."""

    def __init__(self, weights: InceptionWeights):
        super().__init__()
        self.units = nn.ModuleDict({unit.name: _unit(unit, weights.tensors) for unit in UNITS})
        self.eval().requires_grad_(False)
        self._last_use = {source: node.name for node in GRAPH for source in _sources(node)}

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of ``pixels`` (n, H, W, 3) in 0..255.

        Returns:
            Pool features (n, 2048) and spatial features (n, 2023). The spatial features are 7
            channels of 17 x 17 pixels in the order row, column, channel.
        """
        values = {INPUT: ((resize(pixels) - 128) / 128).permute(0, 3, 1, 2)}
        for node in GRAPH:
            sources = _sources(node)
            values[node.name] = self._compute(node, [values[source] for source in sources])
            if node.name == SPATIAL:
                spatial = values[SPATIAL][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            for source in set(sources):
                if self._last_use[source] == node.name:
                    del values[source]  # all activations of 64 images would take 3.6 GB
        return values[OUTPUT].mean((2, 3)), spatial

    def _compute(self, node: Node, inputs: list[Tensor]) -> Tensor:
        if isinstance(node, Unit):
            return self.units[node.name](inputs[0])
        if isinstance(node, Pool):
            padding = 1 if node.padding == "SAME" else 0
            if node.op == "MaxPool":
                return F.max_pool2d(inputs[0], 3, node.stride, padding)
            return F.avg_pool2d(inputs[0], 3, node.stride, padding, count_include_pad=False)
        return torch.cat(inputs, 1)


def _sources(node: Node) -> tuple[str, ...]:
    return (node.source,) if isinstance(node, Unit | Pool) else node.sources


def _unit(unit: Unit, tensors: dict[str, np.ndarray]) -> nn.Sequential:
    """Convolution, batch norm and ReLU with the weights of one unit."""
    height, width = unit.kernel
    # In this graph SAME occurs at stride 1 only, where TensorFlow pads both sides equally.
    padding = (height // 2, width // 2) if unit.padding == "SAME" else 0
    # On the meta device no initial weights are drawn. Drawing them would advance the random
    # generator of a training that evaluates now and then.
    with torch.device("meta"):
        convolution = nn.Conv2d(
            unit.channels_in, unit.channels_out, unit.kernel, unit.stride, padding, bias=False
        )
        batch_norm = nn.BatchNorm2d(unit.channels_out, eps=BATCH_NORM_EPSILON)
    kernel = torch.tensor(tensors[f"{unit.name}/conv2d_params"])  # height, width, in, out
    convolution.load_state_dict({"weight": kernel.permute(3, 2, 0, 1)}, assign=True)
    state = {"num_batches_tracked": torch.tensor(0)}
    for torch_name, graph_name in BATCH_NORM_STATE.items():
        state[torch_name] = torch.tensor(tensors[f"{unit.name}/batchnorm/{graph_name}"])
    batch_norm.load_state_dict(state, assign=True)
    return nn.Sequential(convolution, batch_norm, nn.ReLU(inplace=True))


def resize(pixels: Tensor) -> Tensor:
    """TensorFlow 1's bilinear resize of (n, H, W, c) to 299 x 299, bit for bit.

    It neither shifts by half a pixel nor smooths before it makes an image smaller.
    """
    for dim in (2, 1):  # TensorFlow interpolates along the width first
        size = pixels.shape[dim]
        # TensorFlow computes the positions in float32 too. Float64 would change the spatial
        # features by 1e-5.
        scale = torch.tensor(size, dtype=torch.float32) / SIDE
        position = torch.arange(SIDE, dtype=torch.float32) * scale
        low = position.long()
        high = (low + 1).clamp(max=size - 1)
        weight = (position - low).view(-1, *[1] * (3 - dim)).to(pixels.device)
        low_values = pixels.index_select(dim, low.to(pixels.device))
        high_values = pixels.index_select(dim, high.to(pixels.device))
        pixels = low_values + (high_values - low_values).mul_(weight)
    return pixels
