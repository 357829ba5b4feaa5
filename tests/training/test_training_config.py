import dataclasses

import pytest

from edt.training.config import LoopConfig, TrainConfig, default_init_lr
from edt.utils.errors import UserError


@pytest.mark.parametrize(
    ("model", "init_lr"),
    [
        ("EDT-S/2", 1e-3),
        ("EDT-B/2", 1e-3),
        ("EDT-Tiny/2", 1e-3),
        ("EDT-XL/2", 5e-4),
        ("EDT-XL/2-paper", 5e-4),
        ("EDT-XL/2_noAMM", 5e-4),
    ],
)
def test_the_initial_learning_rate_is_the_releases(model, init_lr):
    assert default_init_lr(model) == init_lr


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_batch_size": 0},
        {"init_lr": 0.0},
        {"init_lr": float("nan")},
        {"lr_steps": 0},
        {"min_snr_gamma": -1.0},
        {"ema_decay": 1.5},
        {"label_dropout": -0.1},
        {"max_grad_norm": 0.0},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        TrainConfig(**wrong)


@pytest.mark.parametrize("name", ["max_steps", "log_every", "ckpt_every", "max_skipped_steps"])
def test_counts_of_the_loop_are_at_least_one(name):
    with pytest.raises(UserError, match=name):
        LoopConfig(**{name: 0})


def test_a_configuration_of_version_0_1_is_read():
    values = dataclasses.asdict(TrainConfig(max_grad_norm=0.5, init_lr=3e-3))
    values["clip"] = values.pop("max_grad_norm")
    for name in ("final_lr", "min_snr_gamma"):
        del values[name]
    assert TrainConfig.from_dict(values) == TrainConfig(max_grad_norm=0.5, init_lr=3e-3)
    with pytest.raises(UserError, match="unknown training configuration colour"):
        TrainConfig.from_dict({"colour": 1})
