"""Every choice is defined once, as a Literal, and refused where it is misspelt."""

import dataclasses
import importlib
import pkgutil
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import edt
from edt.amm import AMM_FORMS, AMMForm
from edt.diffusion import SOLVERS, TIMESTEP_SAMPLERS, Solver
from edt.diffusion.timesteps import TimestepSamplerName
from edt.masking import MASKINGS, Masking
from edt.nn.attention import ATTENTION_BACKENDS, AttentionBackend
from edt.nn.compilation import COMPILE_MODES, CompileMode
from edt.nn.precision import PRECISIONS, Precision
from edt.sampling.config import GUIDANCE_CHANNELS, GuidanceChannels
from edt.training.config import PASS_NOISES, PassNoise
from edt.training.optim import OPTIMIZERS, OptimizerName
from edt.utils.choices import check_choice, check_json_fields, choices
from edt.utils.errors import UserError

TABLES = [
    (AMM_FORMS, AMMForm),
    (ATTENTION_BACKENDS, AttentionBackend),
    (COMPILE_MODES, CompileMode),
    (GUIDANCE_CHANNELS, GuidanceChannels),
    (MASKINGS, Masking),
    (OPTIMIZERS, OptimizerName),
    (PASS_NOISES, PassNoise),
    (PRECISIONS, Precision),
    (SOLVERS, Solver),
    (TIMESTEP_SAMPLERS, TimestepSamplerName),
]


def literal_fields() -> list[tuple[type, str, Any]]:
    """(dataclass, field, Literal) of every configuration dataclass of the package."""
    found = []
    for module_info in pkgutil.walk_packages(edt.__path__, "edt."):
        if "triton" in module_info.name or "tensorflow" in module_info.name:
            continue
        module = importlib.import_module(module_info.name)
        for value in vars(module).values():
            is_here = getattr(value, "__module__", None) == module_info.name
            if is_here and isinstance(value, type) and value.__name__.endswith("Config"):
                hints = get_type_hints(value)
                found += [
                    (value, field.name, hints[field.name])
                    for field in dataclasses.fields(value)
                    if get_origin(hints[field.name]) is Literal
                ]
    return found


LITERAL_FIELDS = literal_fields()


def test_the_configurations_have_choices():
    names = {config.__name__ for config, _, _ in LITERAL_FIELDS}
    assert names == {"ExtractionConfig", "SamplingConfig", "TrainConfig"}


@pytest.mark.parametrize(
    ("config", "name", "literal"), LITERAL_FIELDS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_misspelt_choice_is_refused_where_it_is_defined(config, name, literal):
    with pytest.raises(UserError) as error:
        config(**{name: "mispelt"})
    assert "'mispelt'" in str(error.value)
    for value in get_args(literal):
        assert value in str(error.value)


@pytest.mark.parametrize(("table", "literal"), TABLES, ids=lambda value: str(value)[:40])
def test_descriptions_have_the_values_of_the_literal(table, literal):
    assert tuple(table) == choices(literal)


def test_a_choice_is_checked():
    check_choice("colour", "red", Literal["red", "blue"])
    with pytest.raises(UserError, match="unknown colour 'green'; choose one of red, blue"):
        check_choice("colour", "green", Literal["red", "blue"])


def test_values_of_json_are_compared_with_annotations():
    @dataclasses.dataclass
    class Config:
        size: int | None
        scale: float
        names: list[str]
        kind: Literal["a", "b"]
        is_fast: bool

    right = {"size": 1, "scale": 2, "names": ["x"], "kind": "a", "is_fast": True, "other": ""}
    for change in ({}, {"size": None}, {"scale": 0.5}, {"names": []}):
        check_json_fields(Config, {**right, **change})
    for name, value in (
        ("size", "1"),
        ("size", 1.5),
        ("size", True),
        ("scale", None),
        ("names", "x"),
        ("names", [1]),
        ("kind", "c"),
        ("is_fast", 1),
    ):
        with pytest.raises(UserError, match=f"its {name} is {re.escape(repr(value))}, of a wrong"):
            check_json_fields(Config, {**right, name: value})
    with pytest.raises(UserError, match="holds None in place of an object"):
        check_json_fields(Config, None)
