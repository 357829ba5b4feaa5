"""What is compiled. That compiled steps are the same is tested in tests/training."""

import pytest

from edt.models import EDT, EDT_models
from edt.nn.compilation import compile_network


@pytest.fixture
def tiny() -> EDT:
    return EDT_models["EDT-Tiny/2"](input_size=8)


def compiled_names(model: EDT) -> list[str]:
    """The modules that compile when they are first called."""
    return [name for name, module in model.named_modules() if module._compiled_call_impl]


def test_off_compiles_nothing(tiny):
    compile_network(tiny, "off")
    assert compiled_names(tiny) == []


def test_block_compiles_every_block_by_itself(tiny):
    compile_network(tiny, "block")
    assert compiled_names(tiny) == [f"blocks.{i}" for i in range(7)]


def test_full_compiles_the_network_in_one_graph(tiny):
    compile_network(tiny, "full")
    assert compiled_names(tiny) == [""]


@pytest.mark.parametrize("mode", ["block", "full"])
def test_names_of_parameters_stay_the_same(tiny, mode):
    names = list(tiny.state_dict())
    compile_network(tiny, mode)
    assert list(tiny.state_dict()) == names
