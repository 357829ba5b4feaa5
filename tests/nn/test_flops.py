import pytest
import torch

from edt.models import EDT_models
from edt.nn.flops import PEAK_TFLOPS_PER_SEC, forward_flops, peak_flops_per_sec

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "side", "giga_multiply_accumulates"),
    [("EDT-S/2", 32, 2.667), ("EDT-S/2", 64, 13.299)],
)
def test_flops_are_twice_the_papers_multiply_accumulates(name, side, giga_multiply_accumulates):
    with torch.device("meta"):
        model = EDT_models[name](input_size=side)
    expected = pytest.approx(2e9 * giga_multiply_accumulates, rel=2e-4)
    assert forward_flops(model) == expected


def test_counting_leaves_the_model_as_it_is():
    model = EDT_models["EDT-Tiny/2"](input_size=8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert forward_flops(model) > 0
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("device_name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
    ],
)
def test_peak_rates_follow_the_name_of_the_gpu(monkeypatch, device_name, key):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    tf32, bf16 = PEAK_TFLOPS_PER_SEC[key]
    assert peak_flops_per_sec(GPU, "tf32") == 1e12 * tf32
    assert peak_flops_per_sec(GPU, "bf16") == 1e12 * bf16


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_an_unknown_gpu_and_a_cpu_have_no_known_peak(monkeypatch, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2060")
    assert peak_flops_per_sec(GPU, precision) is None
    assert peak_flops_per_sec(torch.device("cpu"), precision) is None


def test_plain_float32_has_no_peak_in_the_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops_per_sec(GPU, "fp32") is None
