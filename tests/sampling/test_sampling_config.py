import pytest
import torch

from edt.sampling.config import SamplingConfig
from edt.utils.errors import UserError


def test_uniform_labels_depend_on_the_index():
    indices = torch.arange(1000)
    labels = SamplingConfig(labels="uniform").labels_of(indices, 10)
    assert set(labels.tolist()) == set(range(10))
    assert len(set(torch.bincount(labels).tolist())) > 1
    assert torch.equal(SamplingConfig().labels_of(indices[500:], 10), labels[500:])


def test_labels_in_turn():
    indices = torch.arange(1000)
    balanced = SamplingConfig(labels="balanced").labels_of(indices, 10)
    assert balanced.bincount().tolist() == [100] * 10
    assert SamplingConfig(labels="7,2").labels_of(indices[:4], 10).tolist() == [7, 2, 7, 2]


def test_a_model_without_classes_has_the_label_0():
    assert SamplingConfig().labels_of(torch.arange(5), 0).tolist() == [0] * 5


def test_the_null_class_is_a_label_policy():
    config = SamplingConfig(labels="null")
    assert config.labels_of(torch.arange(3), 10).tolist() == [10, 10, 10]
    assert config.labels_of(torch.arange(3), 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_sampling_steps": "4", "cfg_scale": 4.0, "cfg_interval": (998, 998)},
            "--cfg-interval 998 998 has no effect: it holds none of the 4 timesteps that the "
            "sampler visits; nearest: 666 and 999",
        ),
        (
            {
                "num_sampling_steps": "20",
                "solver": "unipc",
                "cfg_scale": 4.0,
                "cfg_interval": (0, 9),
            },
            "holds none of the 20 timesteps that the sampler visits; nearest: 50",
        ),
        ({"cfg_interval": (0, 999)}, "--cfg-interval has no effect: --cfg-scale is 1"),
        ({"labels": "null", "cfg_scale": 1.5}, "--cfg-scale 1.5 has no effect"),
        ({"num_sampling_steps": "4", "cfg_scale": 4.0, "cfg_interval": (666, 666)}, None),
        ({"cfg_scale": 4.0}, None),
        ({"labels": "null"}, None),
    ],
)
def test_guidance_without_effect_is_warned_of(fields, message, caplog):
    SamplingConfig(**fields)
    assert (message in caplog.text) if message else (caplog.text == "")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("10", "class 10 is outside .* 0 to 9"),
        ("-1", "class -1 is outside"),
        ("9" * 30, "cannot read labels '999"),
        ("cat", "cannot read labels 'cat'"),
        ("1,,2", "cannot read labels '1,,2'; give uniform, balanced, null or"),
    ],
)
def test_impossible_labels_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(labels=labels).labels_of(torch.arange(4), 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cfg_scale": 0.5}, "--cfg-scale must be 1"),
        ({"cfg_scale": float("nan")}, "--cfg-scale must be 1"),
        ({"cfg_interval": (700, 300)}, "--cfg-interval 700 300"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"cfg_channels": "4"}, "unknown cfg_channels '4'"),
        ({"num_sampling_steps": "0"}, "cannot take 0 sampling steps"),
        ({"num_sampling_steps": "ddim50", "solver": "unipc"}, "plain number"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**fields)


def test_guided_channels():
    assert SamplingConfig(cfg_channels="3").guided_channels(4) is None  # the network's default
    assert SamplingConfig(cfg_channels="all").guided_channels(4) == 4
