"""The distributions of the initial weights. A model can train from wrong ones, only worse."""

import math

import pytest
import torch
from torch import nn

from edt.models import EDT, EDT_models

TOLERANCE = 0.05  # relative, of a standard deviation over thousands of entries


@pytest.fixture(scope="module")
def model() -> EDT:
    torch.manual_seed(0)
    return EDT_models["EDT-Tiny/2"](num_classes=200)


def zeroed(model: EDT) -> list[nn.Linear]:
    """The linear layers that begin at zero."""
    layers = [block.adaLN_modulation[1] for block in model.blocks]
    return [*layers, model.final_layer.adaLN_modulation[1], model.final_layer.linear]


def timestep_layers(model: EDT) -> list[nn.Linear]:
    return [model.t_embedder.mlp[0], model.t_embedder.mlp[2]]


def xavier_weights(model: EDT) -> dict[str, torch.Tensor]:
    """Matrices (out, in) that are Xavier uniform, by name; the patch convolution is one."""
    others = {id(layer) for layer in zeroed(model) + timestep_layers(model)}
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in others
    }
    return {**weights, "x_embedder.proj": model.x_embedder.proj.weight.flatten(1)}


def assert_std(tensor: torch.Tensor, expected: float, name: str) -> None:
    assert tensor.std().item() == pytest.approx(expected, rel=TOLERANCE), name


def test_linear_layers_are_xavier_uniform(model):
    weights = xavier_weights(model)
    assert len(weights) > 30
    for name, weight in weights.items():
        fan_out, fan_in = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound * (1 + 1e-6), name  # a normal distribution passes it
        assert weight.abs().max() >= 0.98 * bound, name
        assert_std(weight, bound / math.sqrt(3), name)


def test_embeddings_are_normal(model):
    table = model.y_embedder.embedding_table.weight
    assert_std(table, 0.02, "label table")
    assert table.abs().max() > 3 * 0.02  # a uniform distribution of this deviation ends at 1.73
    for layer in timestep_layers(model):
        assert_std(layer.weight, 0.02, "timestep MLP")
        assert layer.weight.abs().max() > 3 * 0.02


def test_position_biases_are_truncated_normal(model):
    for i, attention in enumerate(model.attention_blocks()):
        table = attention.rel_pos_bias.relative_position_bias_table
        if table.numel() > 1000:
            assert_std(table, 0.02, f"block {i}")
        assert table.std() > 0.015, i
        assert table.abs().max() < 2, i


def test_biases_are_zero(model):
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not name.startswith("t_embedder"):
            assert not parameter.any(), name


def test_blocks_and_output_begin_at_zero_and_fusing_layers_do_not(model):
    for layer in zeroed(model):
        assert not layer.weight.any()
        assert not layer.bias.any()
    for module in (*model.down_blocks, *model.concat_blocks):
        assert module.adaLN_modulation[1].weight.any()
