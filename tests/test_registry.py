import dataclasses
import json

import pytest
import torch

from edt.baselines.dit import DiT, DiT_models
from edt.baselines.mdtv2 import MDTv2, MDTv2_models
from edt.models import EDT, EDT_models
from edt.registry import (
    FAMILIES,
    MODELS,
    config_from_state_dict,
    create_from_config,
    create_model,
    read_config,
)
from edt.utils.errors import UserError


def test_every_model_of_every_family_has_a_name():
    assert set(MODELS) == {*EDT_models, *DiT_models, *MDTv2_models}
    assert {name.partition("-")[0] for name in MODELS} == set(FAMILIES)


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


SMALL = {
    "EDT": ("EDT-Tiny/2", EDT, {}),
    "DiT": ("DiT-S/4", DiT, {"depth": 2}),
    "MDTv2": ("MDTv2-S/2", MDTv2, {"depth": 3, "decode_layer": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_survives_its_json_and_its_state_dict(family):
    name, network, layout = SMALL[family]
    model = create_model(name, input_size=16, num_classes=5, **layout)
    assert isinstance(model, network)
    document = json.loads(json.dumps(dataclasses.asdict(model.config)))
    assert document["family"] == model.config.family == family
    assert read_config(document) == model.config
    assert config_from_state_dict(model.state_dict()) == model.config
    again = create_from_config(model.config)
    assert isinstance(again, network)
    again.load_state_dict(model.state_dict())


def test_a_document_without_a_family_is_of_edt():
    config = create_model("EDT-Tiny/2", input_size=16, device="meta").config
    document = dataclasses.asdict(config)
    del document["family"]
    assert read_config(document) == config
    with pytest.raises(UserError, match="unknown model family 'SiT'"):
        read_config({"family": "SiT"})
    with pytest.raises(UserError, match="unknown model configuration tie"):
        read_config({"family": "DiT", "tie": True})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensor_that_a_checkpoint_lacks_is_named(family):
    """One missing tensor does not make it a model of another family."""
    name, _, layout = SMALL[family]
    state = create_model(name, input_size=16, device="meta", **layout).state_dict()
    del state["pos_embed"]
    with pytest.raises(UserError, match=f"{family}: .*pos_embed"):
        config_from_state_dict(state)


def test_tensors_of_no_family_are_refused():
    with pytest.raises(UserError, match="the checkpoint is not an EDT, MDTv2, DiT"):
        config_from_state_dict({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 4)})
