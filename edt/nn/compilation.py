"""Compiling a network with torch.compile."""

from typing import Literal

import torch

from edt.nn.transformer import DiffusionTransformer
from edt.utils.choices import check_choice

CompileMode = Literal["off", "block", "full"]
COMPILE_MODES: dict[CompileMode, str] = {
    "off": "nothing",
    "block": "each transformer block (most of the gain, short compile time)",
    "full": "the whole network, in one graph",
}


def compile_network(model: DiffusionTransformer, mode: CompileMode) -> None:
    """Compile a network in place; parameter names and the way to call it stay the same.

    Shapes are fixed: each new input shape compiles another graph.

    Raises:
        UserError: unknown mode.
    """
    check_choice("compile mode", mode, CompileMode)
    if mode == "off":
        return
    # All blocks share the code of Block.forward, and torch limits the graphs per code object to 8.
    # They need more: one for each stage's shape, with and without gradients and AMM, and for the
    # smaller last batch. Beyond the limit, fullgraph=True raises.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # True splits graphs at DDP's gradient buckets
    modules = [model] if mode == "full" else model.compilable_modules()
    for module in modules:
        module.compile(fullgraph=True, dynamic=False)
