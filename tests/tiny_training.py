"""A tiny trainer and its batches, for tests of the training step."""

from typing import Any

import golden_rule
import torch
from accelerate import Accelerator

from edt.data.features import Batch
from edt.models import EDT
from edt.nn.transformer import DiffusionTransformer
from edt.registry import create_model
from edt.training.config import TrainConfig
from edt.training.trainer import Trainer

NUM_CLASSES = 5


def tiny_model() -> EDT:
    """EDT-Tiny for 16 x 16 pixels, with the golden weights: nothing in it is zero."""
    model = create_model("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=NUM_CLASSES)
    return golden_rule.fill(model)


def tiny_baseline(family: str) -> DiffusionTransformer:
    """A DiT or an MDTv2 as small as EDT-Tiny, with the golden weights."""
    layout = {"depth": 3, "hidden_size": 48, "num_heads": 2}
    shape = {"input_size": 16, "in_channels": 3, "num_classes": NUM_CLASSES}
    if family == "MDTv2":
        layout["decode_layer"] = 1
    return golden_rule.fill(create_model(f"{family}-S/2", **layout, **shape))


def tiny_trainer(
    micro_batch_size: int | None = None,
    separate_passes: bool = False,
    compile: str = "off",
    model: DiffusionTransformer | None = None,
    **config: Any,
) -> Trainer:
    """A trainer of the tiny model for batches of 6; ``config`` are fields of TrainConfig."""
    fields = {"global_batch_size": 6, "ema_decay": 0.9, "lr_steps": 40, **config}
    accelerator = Accelerator(cpu=True)
    model = model or tiny_model()
    return Trainer(
        model, TrainConfig(**fields), accelerator, micro_batch_size, separate_passes, compile
    )


def tiny_batch(step: int, size: int = 6) -> Batch:
    """A batch of noise; another one for each step."""
    return Batch(golden_rule.normal(100 + step, size, 3, 16, 16), torch.arange(size) % NUM_CLASSES)


def state_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the state, as "file/name"."""
    return {
        f"{file}/{name}": value.clone()
        for file, tensors in trainer.state().tensors.items()
        for name, value in tensors.items()
    }
