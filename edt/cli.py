"""What the command-line scripts share."""

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator

from edt.errors import UserError


def exit_on_user_error(main: Callable) -> Callable:
    """Turn a :class:`UserError` raised by ``main`` into one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None

    return run


def true_or_false(text: str) -> bool:
    """Argument type for ``--flag True|False``, any case."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}") from None


def make_accelerator(bf16: bool = False) -> Accelerator:
    """The process's device and its place among the others: under ``python``, ``torchrun`` or ``accelerate launch``,
    on GPUs if there are any, else on the CPU with gloo."""
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
