"""The 2015 Inception graph run by TensorFlow itself: the second opinion on
:mod:`edt.metrics.inception`.
"""

from pathlib import Path

import numpy as np
import torch

from edt.metrics.inception_graph import FEATURES, SPATIAL_CHANNELS
from edt.metrics.inception_weights import load_weights
from edt.metrics.precision_recall import Mode
from edt.utils.errors import UserError


class TensorFlowInceptionFeatures:
    """What :class:`edt.metrics.inception.InceptionFeatures` computes, from the same file.

    Args:
        path: the .pb file; a safetensors file has no graph to run.
        device: where torch computes on the features; TensorFlow chooses its own device.
    """

    name, backend = "inception", "tensorflow"
    default_pr: Mode = "adm"

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        try:
            import tensorflow as tf
        except ImportError:
            raise UserError(
                "--backend tensorflow needs TensorFlow; pip install 'edt[tf]', or take torch"
            ) from None
        if path.suffix == ".safetensors":
            raise UserError(
                f"--backend tensorflow runs the graph itself; give the .pb file, not {path}"
            )
        self.device = torch.device(device)
        self.weights_sha256 = load_weights(
            path
        ).sha256  # says what is wrong with a file that is not the graph

        tf.config.experimental.enable_tensor_float_32_execution(False)
        graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
        with tf.Graph().as_default() as graph:
            self._images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
            pool, spatial, classifier = tf.import_graph_def(
                graph_def,
                input_map={"ExpandDims:0": self._images},
                return_elements=["pool_3:0", "mixed_6/conv:0", "softmax/weights:0"],
                name="",
            )
            self._outputs = [pool, spatial[..., :SPATIAL_CHANNELS]]
            self._features = tf.compat.v1.placeholder(tf.float32, [None, FEATURES])
            self._probabilities = tf.nn.softmax(
                self._features @ classifier
            )  # ADM leaves the bias out
        config = tf.compat.v1.ConfigProto(
            allow_soft_placement=True
        )  # DecodeJpeg runs on the CPU only
        config.gpu_options.allow_growth = True  # torch needs room on the same device
        self._session = tf.compat.v1.Session(graph=graph, config=config)

    def check(self, resolution: tuple[int, int]) -> None:
        pass  # the graph resizes images of any size

    def extract(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self._session.run(self._outputs, {self._images: images.astype(np.float32)})
        pool, spatial = (torch.from_numpy(output).flatten(1).to(self.device) for output in outputs)
        return pool, spatial

    def probabilities(self, features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._session.run(self._probabilities, {self._features: features}))
