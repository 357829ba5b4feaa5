"""Compiling a network with torch.compile."""

from typing import Literal

import torch

from edt.nn.transformer import DiffusionTransformer
from edt.utils.choices import check_choice

CompileMode = Literal["off", "block", "full"]
COMPILE_MODES: dict[CompileMode, str] = {
    "off": "nothing",
    "block": "each transformer block: most of the gain after a short wait",
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
    # A block sees three grids, with and without gradients and AMM, and the smaller last batch of a
    # run. Each combination is one graph. Beyond the default limit of 8, fullgraph=True raises.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # the hooks of DistributedDataParallel cut the graph
    modules = [model] if mode == "full" else model.compilable_modules()
    for module in modules:
        module.compile(fullgraph=True, dynamic=False)
