"""Compiling the network with torch.compile."""

import torch

from edt.models import EDT

COMPILE = {
    "off": "nothing",
    "block": "each transformer block: most of the gain after a short wait",
    "full": "the whole network, in one graph",
}


def compile_network(model: EDT, what: str) -> None:
    """Compile in place; names of parameters and the way to call the model stay. Shapes are fixed:
    each new one compiles.

    Args:
        what: a key of :data:`COMPILE`.
    """
    if what == "off":
        return
    # A block sees three grids, with and without gradients and AMM, and the last, smaller batch of a
    # run: more than the 8 graphs after which torch quietly stops compiling.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # DDP's hooks would cut the graph
    if what == "block":
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    elif what == "full":
        model.compile(fullgraph=True, dynamic=False)
