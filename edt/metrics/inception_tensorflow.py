"""The 2015 Inception graph run by TensorFlow, to check :mod:`edt.metrics.inception`."""

from pathlib import Path

import numpy as np
import torch

from edt.metrics.features import Backend, FeatureName
from edt.metrics.inception_graph import FEATURES, SPATIAL_CHANNELS
from edt.metrics.inception_weights import load_weights
from edt.metrics.precision_recall import PrecisionRecallMode
from edt.utils.errors import UserError


class TensorFlowInceptionFeatures:
    """The features of :class:`edt.metrics.inception.InceptionFeatures`, computed by TensorFlow.

    Args:
        path: the .pb file. A safetensors file has no graph to run.
        device: torch device on which the features are compared. TensorFlow chooses its own.

    Raises:
        UserError: TensorFlow is not installed, or the file is not the Inception graph.
    """

    name: FeatureName = "inception"
    backend: Backend = "tensorflow"
    weights_sha256: str | None
    default_pr: PrecisionRecallMode = "adm"

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        try:
            import tensorflow as tf  # optional, and its import takes seconds
        except ImportError:
            raise UserError(
                "--backend tensorflow needs TensorFlow; pip install 'edt[tf]', or use torch"
            ) from None
        if path.suffix == ".safetensors":
            raise UserError(f"--backend tensorflow runs the .pb file; give it instead of {path}")
        self.device = torch.device(device)
        # Loading says in one line why a file is not the graph. TensorFlow would print a traceback.
        self.weights_sha256 = load_weights(path).sha256

        tf.config.experimental.enable_tensor_float_32_execution(False)
        graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
        with tf.Graph().as_default() as graph:
            # Replacing the JPEG decoder's output by a placeholder lets the batch have any size.
            self._images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
            pool, spatial, classifier = tf.import_graph_def(
                graph_def,
                input_map={"ExpandDims:0": self._images},
                return_elements=["pool_3:0", "mixed_6/conv:0", "softmax/weights:0"],
                name="",
            )
            self._outputs = [pool, spatial[..., :SPATIAL_CHANNELS]]
            self._features = tf.compat.v1.placeholder(tf.float32, [None, FEATURES])
            logits = self._features @ classifier  # without the bias, which ADM leaves out
            self._probabilities = tf.nn.softmax(logits)
        # The graph's DecodeJpeg exists on the CPU only, so placement on a GPU must be soft.
        config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        config.gpu_options.allow_growth = True  # torch needs memory on the same device
        self._session = tf.compat.v1.Session(graph=graph, config=config)

    def check(self, resolution: tuple[int, int]) -> None:
        pass  # the graph resizes images of any size

    def extract(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self._session.run(self._outputs, {self._images: images.astype(np.float32)})
        pool, spatial = (torch.from_numpy(output).flatten(1).to(self.device) for output in outputs)
        return pool, spatial

    def probabilities(self, features: np.ndarray) -> torch.Tensor:
        """Softmax without the classifier's bias, which ADM leaves out."""
        return torch.from_numpy(self._session.run(self._probabilities, {self._features: features}))
