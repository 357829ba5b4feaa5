"""Flags and configurations agree: a field without a flag, or a flag without a use, is an error."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest

from edt.amm import AMMForm
from edt.checkpoints.loading import WeightsKind
from edt.cli import draw, evaluate, extract, sample, train
from edt.cli.arguments import nonempty, nonempty_path
from edt.data.extraction import ExtractionConfig
from edt.nn.attention import AttentionBackend
from edt.nn.compilation import CompileMode
from edt.sampling.config import SamplingConfig
from edt.training.config import LoopConfig, TrainConfig, default_init_lr
from edt.training.metrics import Tracker

SPEED_INPUTS = {"compile", "attention"}  # how the network computes, not what
IMAGE_INPUTS = {
    *{"ckpt", "weights", "vae"},  # what is loaded
    *{"model", "image_size", "num_classes"},  # what the user expects of it
    *{"amm", "amm_blocks", "amm_form", "amm_radius"},  # set on the model, not in the configuration
    *{"output_dir", "per_proc_batch_size"},  # where the images go, and how many are made at once
    *SPEED_INPUTS,
}


class Script(NamedTuple):
    """The flags of a script."""

    parser: Callable[[], argparse.ArgumentParser]
    configs: tuple[type, ...]
    inputs: set[str]
    """Flags that are no field."""
    required: tuple[str, ...] = ()
    """Arguments that have no default."""
    without_flag: frozenset[str] = frozenset()
    """Fields that the script decides itself."""
    own_defaults: tuple[tuple[str, object], ...] = ()
    """Flags whose default is not that of the field."""


SCRIPTS = {
    "train": Script(
        train.parser,
        (TrainConfig, LoopConfig),
        {
            "feature_path",
            *{"model", "num_classes"},  # what is trained
            *{"image_size", "vae"},  # what the user expects of the features
            *{"results_dir", "run_dir", "keep_last", "keep_every"},  # the folder of the run
            *{"resume", "resume_step", "allow_config_change", "init_from"},  # where training starts
            "epochs",  # becomes max_steps
            "tracker",
            *{"micro_batch_size", "separate_passes"},  # memory; the update is the same
            *SPEED_INPUTS,
        },
        # By model and by --epochs.
        own_defaults=(("init_lr", None), ("max_steps", None)),
    ),
    "extract": Script(
        extract.parser,
        (ExtractionConfig,),
        {
            *{"data_path", "vae", "features_path"},
            *{"batch_size", "num_workers"},  # how fast; the features are the same
        },
        required=("--data-path", "images"),
    ),
    "sample": Script(
        sample.parser,
        (SamplingConfig,),
        {*IMAGE_INPUTS, "num_images", "png"},
        required=("--ckpt", "run"),
    ),
    "draw": Script(
        draw.parser,
        (SamplingConfig,),
        {*IMAGE_INPUTS, "classes", "num_variations"},
        required=("--ckpt", "run"),
        without_flag=frozenset({"labels"}),  # --classes gives the labels
        own_defaults=(("cfg_scale", 4.0), ("seed", 1)),  # the release's
    ),
}
BY_NAME = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def flags(script: Script) -> dict[str, argparse.Action]:
    """The flags of a script by the name of their argument."""
    # A parser has no public list of its flags. Its namespace cannot replace one: set_defaults puts
    # names there that have no flag.
    return {action.dest: action for action in script.parser()._actions if action.dest != "help"}


def fields(script: Script) -> dict[str, dataclasses.Field]:
    return {field.name: field for config in script.configs for field in dataclasses.fields(config)}


@BY_NAME
def test_every_field_has_a_flag(script):
    assert fields(script).keys() - flags(script).keys() == script.without_flag


@BY_NAME
def test_every_flag_is_a_field_or_an_input(script):
    assert flags(script).keys() - fields(script).keys() == script.inputs


@BY_NAME
def test_defaults_of_flags_are_those_of_the_fields(script):
    arguments = vars(script.parser().parse_args(script.required))
    expected = {name: field.default for name, field in fields(script).items()}
    for name, default in script.own_defaults:
        assert default != expected[name], f"{name} is no exception"
        expected[name] = default
    defaults = {name: arguments[name] for name in flags(script) if name in expected}
    for name in script.without_flag:
        del expected[name]
    assert defaults == expected


PARSERS = {name: script.parser for name, script in SCRIPTS.items()} | {
    "score": evaluate.score_parser,
    "make-ref": evaluate.make_ref_parser,
    "convert-inception": evaluate.convert_parser,
}
PATHS = {
    "train": {"feature_path", "results_dir", "run_dir", "resume", "init_from"},
    "extract": {"data_path", "features_path"},
    "sample": {"ckpt", "output_dir"},
    "draw": {"ckpt", "output_dir"},
    "score": {"reference", "samples", "json", "cache_dir", "inception"},
    "make-ref": {"images", "out", "inception"},
    "convert-inception": {"graph", "out"},
}


@pytest.mark.parametrize("create_parser", PARSERS.values(), ids=PARSERS)
def test_help_shows_every_default(create_parser):
    parser = create_parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        is_optional = action.option_strings and not action.required
        if is_optional and not {"--help", "--no-amm"} & {*action.option_strings}:
            text = formatter._expand_help(action) if action.help else ""
            assert "default" in text, action.option_strings
            assert "None" not in text, action.option_strings
            if "(default: " in text and action.default is not None:
                default = "off" if action.default is False else action.default
                assert text.endswith(f"(default: {default})")
            elif action.default is not None:  # written by hand
                assert str(action.default) in text.rpartition("default")[2], action.option_strings


@pytest.mark.parametrize("name", PARSERS)
def test_an_empty_path_is_refused(name, capsys):
    parser = PARSERS[name]()
    paths = {action.dest for action in parser._actions if action.type is nonempty_path}
    assert paths == PATHS[name]
    positionals = {action.dest: "file" for action in parser._actions if not action.option_strings}
    required = {
        action.dest: [action.option_strings[0], "file"]
        for action in parser._actions
        if action.option_strings and action.required
    }
    for action in parser._actions:
        if action.type not in (nonempty, nonempty_path):
            continue
        for text in ("", " "):
            words, options = {**positionals}, {**required}
            if action.option_strings:
                options[action.dest] = [action.option_strings[0], text]
            else:
                words[action.dest] = text
            with pytest.raises(SystemExit) as error:
                parser.parse_args([*words.values(), *itertools.chain(*options.values())])
            assert error.value.code == 2
            assert "it is empty; is a variable of the shell not set?" in capsys.readouterr().err


def test_help_gives_the_learning_rate_of_the_release():
    (action,) = (action for action in train.parser()._actions if action.dest == "init_lr")
    assert "default: 1e-3; 5e-4 for EDT-XL" in action.help
    assert default_init_lr("EDT-S/2") == 1e-3
    assert default_init_lr("EDT-XL/2") == 5e-4


def test_help_says_when_amm_is_on(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # no line is wrapped
    assert "default: off, unless an option below is given" in sample.parser().format_help()
    assert "default: both, that is with AMM and without" in draw.parser().format_help()


@BY_NAME
def test_choices_of_flags_are_those_of_the_fields(script):
    types: dict[str, Any] = {
        "compile": CompileMode,
        "attention": AttentionBackend,
        "weights": WeightsKind,
        "amm_form": AMMForm,
        "tracker": Tracker,
    }
    for config in script.configs:
        types |= get_type_hints(config)
    for name, flag in flags(script).items():
        is_choice = get_origin(types.get(name)) is Literal
        expected = get_args(types[name]) if is_choice else ()
        assert tuple(flag.choices or ()) == expected, name


@pytest.mark.parametrize(
    ("script", "spelling", "name", "text", "value"),
    [
        ("train", "--clip", "max_grad_norm", "0.5", 0.5),
        ("train", "--mini-batch-size", "micro_batch_size", "3", 3),
        ("train", "--max-bad-steps", "max_skipped_steps", "7", 7),
        ("train", "--checkpoint-path", "resume", "run", Path("run")),
        ("train", "--feature-path", "feature_path", "folder", Path("folder")),
        ("train", "--features-path", "feature_path", "folder", Path("folder")),
        ("train", "--schedule_sampler", "schedule_sampler", "uniform", "uniform"),
        ("train", "--results-dir", "results_dir", "folder", Path("folder")),
        ("train", "--global-seed", "seed", "7", 7),
        ("extract", "--feature-path", "features_path", "folder", Path("folder")),
        ("extract", "--features-path", "features_path", "folder", Path("folder")),
        ("extract", "--global-seed", "seed", "7", 7),
        ("sample", "--results-dir", "output_dir", "folder", Path("folder")),
        ("sample", "--global-seed", "seed", "7", 7),
        ("draw", "--results-dir", "output_dir", "folder", Path("folder")),
        ("draw", "--class-labels", "classes", "7", ["7"]),
        ("draw", "--global-seed", "seed", "7", 7),
    ],
)
def test_old_spellings_are_read(script, spelling, name, text, value):
    parser, required = SCRIPTS[script].parser(), SCRIPTS[script].required
    arguments = vars(parser.parse_args([*required, spelling, text]))
    defaults = vars(parser.parse_args(required))
    assert defaults[name] != value
    assert arguments == {**defaults, name: value}


@pytest.mark.parametrize("script", ["sample", "draw"])
@pytest.mark.parametrize(("text", "steps"), [(" 2", "2"), ("10, 15 ,25 ", "10,15,25")])
def test_steps_are_read_without_spaces(script, text, steps):
    arguments = [*SCRIPTS[script].required, "--num-sampling-steps", text]
    assert SCRIPTS[script].parser().parse_args(arguments).num_sampling_steps == steps
