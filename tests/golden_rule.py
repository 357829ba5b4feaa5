"""The rule that makes the weights and inputs of the golden values in tests/golden.

The rule needs no stored tensors: a weight is drawn from its own name, and an input from a seed.
"""

import zlib
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"

Network = TypeVar("Network", bound=torch.nn.Module)


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden value of a weight, drawn from its name."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(
        shape, dtype=np.float32
    )
    if "rel_pos_bias" in name:
        std = 0.3
    elif "embedding_table" in name:
        std = 0.5
    elif len(shape) >= 2:
        std = 0.6 / np.sqrt(np.prod(shape[1:]))
    else:
        std = 0.1
    return values * np.float32(std)


def fill(model: Network) -> Network:
    """Give a model the golden weights; position and index tables keep their values."""
    state = model.state_dict()
    for name, value in state.items():
        if not name.endswith(("pos_embed", "relative_position_index")):
            state[name] = torch.from_numpy(golden_weight(name, tuple(value.shape)))
    model.load_state_dict(state)
    return model


def normal(seed: int, *shape: int) -> torch.Tensor:
    """A golden input: standard normal from a NumPy generator."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file."""
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return dict(file)


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Compare with golden values: to 1e-5 of each value, or of the largest one."""
    atol = 1e-5 * np.abs(expected).max()
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=atol)
