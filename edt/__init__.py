"""EDT, the Efficient Diffusion Transformer (Chen et al., NeurIPS 2024, arXiv 2410.23788).

The public entry, loaded when first used::

    model = edt.create_model("EDT-S/2")
    model, info = edt.load_model("results/000-EDT-S-2")
    batches = edt.generate(model, vae, SamplingConfig(), indices, batch_size)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edt.checkpoints.loading import load_model
    from edt.registry import create_model
    from edt.sampling.generate import generate

__version__ = "0.1.0"
__all__ = ["create_model", "generate", "load_model"]

# Loaded on first use: torch takes over a second to import, and `import edt` should not.
_MODULES = {
    "create_model": "edt.registry",
    "load_model": "edt.checkpoints.loading",
    "generate": "edt.sampling.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
