"""The launcher's variables: what is used of them, and what is said of the others."""

import pytest

from edt.utils.distributed import ignored_launcher_settings

TRAIN = {"precision": "tf32", "compile": "off", "micro_batch_size": None, "max_grad_norm": None}
SAMPLE = {"precision": "bf16", "compile": "full"}


@pytest.mark.parametrize(
    ("name", "value", "flags", "expected"),
    [
        ("MIXED_PRECISION", "bf16", TRAIN, "--precision decides, and it is tf32"),
        ("MIXED_PRECISION", "fp16", SAMPLE, "--precision decides, and it is bf16"),
        ("DYNAMO_BACKEND", "INDUCTOR", TRAIN, "--compile decides, and it is off"),
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "4",
            TRAIN,
            "--micro-batch-size decides, and it is not given",
        ),
        ("GRADIENT_CLIPPING", "1.0", TRAIN, "--max-grad-norm decides, and it is not given"),
    ],
)
def test_a_setting_of_the_launcher_that_has_no_effect_is_named(
    name, value, flags, expected, monkeypatch
):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    (sentence,) = ignored_launcher_settings(flags)
    assert sentence.startswith(f"ACCELERATE_{name}={value.lower()}, ")
    assert sentence.endswith(f"has no effect: {expected}")


@pytest.mark.parametrize(
    ("name", "value", "flags"),
    [
        ("MIXED_PRECISION", "no", SAMPLE),  # accelerate launch without options says so, too
        ("MIXED_PRECISION", "bf16", SAMPLE),
        ("DYNAMO_BACKEND", "NO", SAMPLE),
        ("GRADIENT_ACCUMULATION_STEPS", "1", TRAIN),
        ("GRADIENT_ACCUMULATION_STEPS", "4", SAMPLE),  # sampling has no gradients
    ],
)
def test_a_launcher_that_agrees_is_not_contradicted(name, value, flags, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert ignored_launcher_settings(flags) == []
