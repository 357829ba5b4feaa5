"""Argument types and groups that several scripts share."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edt.amm import AMM_FORMS
from edt.checkpoints.loading import WeightsKind
from edt.diffusion import SOLVERS
from edt.nn.attention import ATTENTION_BACKENDS
from edt.nn.compilation import COMPILE_MODES
from edt.nn.precision import PRECISIONS
from edt.registry import MODELS
from edt.sampling.config import GUIDANCE_CHANNELS, SamplingConfig
from edt.utils.choices import choices

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


# ---------------------------------------------------------------------------------------------
# Argument types


def true_or_false(text: str) -> bool:
    """Argument type for ``--flag True|False``, in any case."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def nonempty(text: str) -> str:
    """Argument type: any text but "", which is what a shell makes of a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return text


def nonempty_path(text: str) -> Path:
    """Argument type of every path. Without the check, "" would be the current folder."""
    return Path(nonempty(text))


def without_spaces(text: str) -> str:
    """Argument type: a list without spaces around its parts, since it becomes a part of a name."""
    return ",".join(map(str.strip, text.split(",")))


class Number:
    """Argument type: a finite number in a range.

    Args:
        kind: int or float.
        least: smallest value.
        above: the value must be larger than this.
        most: largest value.
    """

    def __init__(
        self,
        kind: type[int] | type[float] = int,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
    ) -> None:
        self.kind, self.least, self.above, self.most = kind, least, above, most
        self.__name__ = kind.__name__  # argparse puts it into "invalid int value"

    def __call__(self, text: str) -> int | float:
        value = self.kind(text)
        in_range = self.least <= value <= self.most and value > self.above
        if in_range and math.isfinite(value):
            return value
        bounds = {"at least": self.least, "above": self.above, "at most": self.most}
        terms = ["finite"] if self.kind is float else []
        terms += [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]
        raise argparse.ArgumentTypeError(f"{text} is not {' and '.join(terms)}")


COUNT = Number(least=1)
COUNT_OR_ZERO = Number(least=0)


# ---------------------------------------------------------------------------------------------
# Help


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends the help of every optional flag with its default.

    A help text that says "default" itself stays as it is, e.g. where the default is computed.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_on = isinstance(action, argparse._StoreTrueAction)
        if "default" in text or action.required or (action.nargs == 0 and not is_on):
            return text
        if not action.option_strings:
            return text
        return f"{text} (default: {'off' if is_on else '%(default)s'})"


# ---------------------------------------------------------------------------------------------
# Configurations


def describe(values: Mapping[Any, str]) -> str:
    """The help text of a choice: "value: what it means; ..."."""
    # argparse formats help texts with %, so a literal % is doubled.
    return "; ".join(f"{name}: {text}" for name, text in values.items()).replace("%", "%%")


def set_defaults_from(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Give the flags of configuration dataclasses the defaults of their fields."""
    for config in configs:
        for field in dataclasses.fields(config):
            parser.set_defaults(**{field.name: field.default})


def from_arguments(config: type, args: argparse.Namespace) -> Any:
    """A configuration dataclass from the arguments that are named as its fields."""
    names = [field.name for field in dataclasses.fields(config) if hasattr(args, field.name)]
    return config(**{name: getattr(args, name) for name in names})


# ---------------------------------------------------------------------------------------------
# Groups of flags


def add_speed_arguments(parser: Parser) -> None:
    """Add the flags that change the speed. They change results by rounding errors only."""
    parser.add_argument("--precision", choices=PRECISIONS, help=describe(PRECISIONS))
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES,
        default="off",
        help=f"what torch.compile compiles. {describe(COMPILE_MODES)}",
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTION_BACKENDS,
        default="auto",
        help=describe(ATTENTION_BACKENDS),
    )


def add_sampling_arguments(
    parser: argparse.ArgumentParser,
    amm_type: Callable[[str], Any],
    amm_values: str,
    amm_default: str,
) -> None:
    """Add the flags of both image generators; the defaults are those of SamplingConfig.

    Args:
        parser: the script's.
        amm_type: argument type of --amm.
        amm_values: its values, for --help.
        amm_default: what happens without --amm, for --help.
    """
    p = parser
    _add_checkpoint_arguments(p)
    p.add_argument("--cfg-scale", type=float, help="scale of guidance; 1: no guidance")
    p.add_argument(
        "--cfg-channels",
        choices=GUIDANCE_CHANNELS,
        help=f"noise channels that are guided. {describe(GUIDANCE_CHANNELS)}",
    )
    p.add_argument(
        "--cfg-interval",
        type=int,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide only at timesteps LO to HI of the 1000-step process; 0 is clean, 999 noise; "
        "default: at all",
    )
    p.add_argument(
        "--num-sampling-steps",
        type=without_spaces,
        metavar="STEPS",
        help="250; with ddpm and ddim also ddim50, or sections like 10,15,25",
    )
    p.add_argument(
        "--solver", choices=SOLVERS, help="ddpm is the release's; dpm++ and unipc need few steps"
    )
    add_speed_arguments(p)
    set_defaults_from(p, SamplingConfig)
    _add_amm_arguments(p, amm_type, amm_values, amm_default)


def _add_checkpoint_arguments(p: argparse.ArgumentParser) -> None:
    """Add what is loaded, and what the user expects of it."""
    p.add_argument(
        "--ckpt",
        type=nonempty_path,
        required=True,
        metavar="PATH",
        help="run folder, checkpoint folder, .safetensors file, or a .pt file of the release",
    )
    p.add_argument(
        "--weights",
        choices=choices(WeightsKind),
        default="ema",
        help="which weights of the checkpoint to load",
    )
    p.add_argument(
        "--model",
        type=nonempty,
        metavar="NAME",
        help=f"fail if not this model: {', '.join(MODELS)}; default: any",
    )
    p.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="fail if the model's differs; default: the model's",
    )
    p.add_argument(
        "--num-classes",
        type=int,
        help="fail if the model has another number; default: the model's",
    )
    p.add_argument(
        "--vae",
        type=nonempty,
        help="ema, mse, a folder, a hub id, or pixels; default: the VAE that the checkpoint was "
        "trained with, else ema",
    )


def _add_amm_arguments(
    parser: argparse.ArgumentParser,
    amm_type: Callable[[str], Any],
    amm_values: str,
    amm_default: str,
) -> None:
    g = parser.add_argument_group("Attention Modulation Matrix")
    g.add_argument(
        "--amm",
        nargs="?",
        const=True,
        type=amm_type,
        metavar=amm_values,
        help=f"switch AMM on; default: {amm_default}",
    )
    g.add_argument(
        "--no-amm",
        dest="amm",
        action="store_false",
        help="switch AMM off; the options below are then ignored",
    )
    g.add_argument(
        "--amm-blocks",
        type=nonempty,
        metavar="BLOCKS",
        help="blocks to modulate, 0-based, e.g. 7,10; default: by model, resolution and guidance "
        "scale",
    )
    g.add_argument(
        "--amm-form",
        choices=AMM_FORMS,
        help="function of the distance d of two tokens; P is 4 times the largest d. "
        f"{describe(AMM_FORMS)}; default: by resolution",
    )
    g.add_argument(
        "--amm-radius",
        type=float,
        metavar="TOKENS",
        help="the matrix is 0 beyond this distance; default: the paper's sqrt((G-1)^2+4) for G x G "
        "tokens",
    )
