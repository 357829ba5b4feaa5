import dataclasses
import json

import pytest
import torch

from edt.models import EDT, EDT_models
from edt.registry import (
    MODELS,
    config_from_state_dict,
    create_from_config,
    create_model,
    read_config,
)
from edt.utils.errors import UserError


def test_every_model_of_the_family_has_a_name():
    assert set(EDT_models) <= set(MODELS)


def test_a_model_is_created_by_name_with_fields_of_its_configuration():
    model = create_model(
        "EDT-Tiny/2", input_size=16, in_channels=3, num_classes=5, image_size=16, tie=False
    )
    assert isinstance(model, EDT)
    config = model.config
    assert (config.input_size, config.in_channels, config.num_classes) == (16, 3, 5)
    assert config.image_size == 16
    assert config.num_heads == (2, 3, 4)
    assert not config.tie


def device_of(model: torch.nn.Module) -> str:
    (device,) = {parameter.device.type for parameter in model.parameters()}
    return device


def test_a_model_is_created_where_it_is_asked_for():
    assert device_of(create_model("EDT-XL/2", device="meta")) == "meta"
    assert device_of(create_model("EDT-Tiny/2", input_size=8)) == "cpu"
    with torch.device("meta"):
        assert device_of(create_model("EDT-Tiny/2", input_size=8)) == "meta"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="unknown model 'EDT-M/2'; choose one of EDT-S/2, "
    ) as error:
        create_model("EDT-M/2")
    for name in MODELS:
        assert name in str(error.value)


def test_a_configuration_survives_its_json_and_its_state_dict():
    model = create_model("EDT-Tiny/2", input_size=16, num_classes=5)
    document = json.loads(json.dumps(dataclasses.asdict(model.config)))
    assert read_config(document) == model.config
    assert config_from_state_dict(model.state_dict()) == model.config
    create_from_config(model.config).load_state_dict(model.state_dict())
