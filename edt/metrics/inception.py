"""The 2015 Inception network in torch, with the resize, padding and pooling of the TensorFlow
graph.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from edt.metrics.precision_recall import Mode

SIDE = 299  # pixels that the network sees


class InceptionFeatures:
    """Pool features (n, 2048), spatial features (n, 2023) and class probabilities (n, 1008), as ADM
    reads them.
    """

    name, backend = "inception", "torch"
    default_pr: Mode = "adm"

    def __init__(self, weights: InceptionWeights, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.weights_sha256 = weights.sha256
        self._network = InceptionNetwork(weights).to(self.device, memory_format=torch.channels_last)
        self._classifier = torch.tensor(weights.tensors["softmax/weights"], device=self.device)

    def check(self, resolution: tuple[int, int]) -> None:
        pass  # the network resizes images of any size

    def extract(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        with full_float32():
            return self._network(torch.tensor(images, device=self.device).float())

    def probabilities(self, features: np.ndarray | Tensor) -> Tensor:
        """Softmax without the classifier's bias, as ADM leaves it out."""
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
        """Pool features (n, 2048) and spatial features (n, 2023) of pixels (n, H, W, 3) in 0..255.

        The spatial features are 7 channels of 17 x 17 pixels in the order row, column, channel.
        """
        values = {INPUT: ((resize(pixels) - 128) / 128).permute(0, 3, 1, 2)}
        for node in GRAPH:
            sources = _sources(node)
            values[node.name] = self._compute(node, [values[source] for source in sources])
            if node.name == SPATIAL:
                spatial = values[SPATIAL][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            for source in set(sources):
                if self._last_use[source] == node.name:
                    del values[source]  # or a batch of 64 would hold 3.6 GB of activations
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
    padding = (height // 2, width // 2) if unit.padding == "SAME" else 0
    with torch.device(
        "meta"
    ):  # no initial weights: drawing them would move the generator of a training around us
        convolution = nn.Conv2d(
            unit.channels_in, unit.channels_out, unit.kernel, unit.stride, padding, bias=False
        )
        batch_norm = nn.BatchNorm2d(unit.channels_out, eps=BATCH_NORM_EPSILON)

    def tensor(name: str) -> Tensor:
        return torch.tensor(tensors[f"{unit.name}/{name}"])

    names = {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    state = {key: tensor(f"batchnorm/{name}") for key, name in names.items()}
    batch_norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)}, assign=True)
    convolution.load_state_dict(
        {"weight": tensor("conv2d_params").permute(3, 2, 0, 1)}, assign=True
    )
    return nn.Sequential(convolution, batch_norm, nn.ReLU(inplace=True))


def resize(pixels: Tensor) -> Tensor:
    """TensorFlow 1's bilinear resize of (n, H, W, c) to 299 x 299, bit for bit: no half-pixel
    shift, no smoothing.
    """
    for dim in (2, 1):
        size = pixels.shape[dim]
        # The positions, too, are float32 in TensorFlow; float64 would move the spatial features by
        # 1e-5.
        position = torch.arange(SIDE, dtype=torch.float32) * (
            torch.tensor(size, dtype=torch.float32) / SIDE
        )
        low = position.long()
        high = (low + 1).clamp(max=size - 1)
        weight = (position - low).view(-1, *[1] * (3 - dim)).to(pixels.device)
        left, right = (pixels.index_select(dim, index.to(pixels.device)) for index in (low, high))
        pixels = left + (right - left).mul_(weight)
    return pixels
