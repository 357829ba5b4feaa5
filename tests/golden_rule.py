"""The rule that makes the weights and inputs of the golden values (tests/golden), so that none are
stored.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor filled from its own name."""
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


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model the golden weights; position tables keep their values."""
    state = model.state_dict()
    for name, value in state.items():
        if not name.endswith("pos_embed"):
            state[name] = torch.from_numpy(golden_weight(name, tuple(value.shape)))
    model.load_state_dict(state)
    return model


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Golden inputs: standard normal from a NumPy generator."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return dict(file)
