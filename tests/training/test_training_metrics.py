"""The numbers that a run logs, against sums made by hand."""

import json
import math
from fractions import Fraction

import pytest
import torch
from accelerate import Accelerator
from tiny_training import tiny_batch, tiny_trainer

from edt.registry import create_model
from edt.training.config import TrainConfig
from edt.training.metrics import Meter, append_row, drop_rows_after, tracker_values
from edt.training.trainer import StepReport, Trainer
from edt.utils.errors import UserError

BATCH_SIZE = 4


def report(t, weight, losses, grad_norm, found_inf=False) -> StepReport:
    return StepReport(
        torch.tensor(t),
        torch.tensor(weight),
        torch.tensor(losses),
        torch.tensor(grad_norm),
        torch.tensor(found_inf),
    )


REPORTS = [
    report(
        [0, 249, 250, 999],
        [1.0, 2.0, 0.5, 4.0],
        [[1.0, 2.0], [3.0, 5.0], [7.0, 1.0], [0.5, 0.25]],
        3.0,
    ),
    # A skipped step: its numbers may be anything and must not show.
    report([500, 1, 2, 3], [9.0, 9.0, 9.0, 9.0], [[math.nan, 8.0]] * 4, math.inf, True),
    report(
        [749, 750, 499, 501],
        [1.0, 3.0, 2.0, 1.0],
        [[2.0, 2.0], [1.0, 4.0], [6.0, 3.0], [5.0, 5.0]],
        5.0,
    ),
]
APPLIED = [REPORTS[0], REPORTS[2]]


def weighted_mean(column: int) -> float:
    """Mean over the applied steps and their images of weight times loss."""
    terms = [
        weight * losses[column]
        for step in APPLIED
        for weight, losses in zip(step.weight.tolist(), step.losses.tolist(), strict=True)
    ]
    return sum(terms) / len(terms)


@pytest.fixture
def row() -> dict:
    trainer = tiny_trainer(global_batch_size=BATCH_SIZE)
    meter = Meter(trainer)
    for step in REPORTS:
        meter.add(step)
    trainer.step, trainer.skipped_steps = 30, torch.tensor(1)
    trainer.images_seen, trainer.epoch = 130, Fraction(5, 2)
    trainer.optimizer.param_groups[0]["lr"] = 0.125
    return meter.read()


def test_losses_are_weighted_means_over_the_steps_that_were_applied(row):
    assert row["loss_full"] == pytest.approx(weighted_mean(0))
    assert row["loss_masked"] == pytest.approx(weighted_mean(1))


def test_the_loss_is_the_sum_of_both_passes(row):
    assert row["loss"] == pytest.approx(weighted_mean(0) + weighted_mean(1))


def test_losses_by_quartile_of_the_timestep(row):
    sums, weights = [0.0] * 4, [0.0] * 4
    for step in APPLIED:
        for t, weight, losses in zip(*(x.tolist() for x in step[:3]), strict=True):
            quartile = 0 if t < 250 else 1 if t < 500 else 2 if t < 750 else 3
            sums[quartile] += weight * sum(losses)
            weights[quartile] += weight
    expected = [total / weight for total, weight in zip(sums, weights, strict=True)]
    assert len(set(expected)) == 4
    assert row["loss_by_timestep_quartile"] == pytest.approx(expected)


def test_counters(row):
    assert row["step"] == 30
    assert row["images_seen"] == 130
    assert row["epoch"] == 2.5
    assert row["skipped_steps"] == 1
    assert row["lr"] == 0.125
    assert row["grad_norm"] == pytest.approx((3.0 + 5.0) / 2)


def test_rates(row, monkeypatch):
    trainer = tiny_trainer(global_batch_size=BATCH_SIZE)
    clock = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(trainer)
    for step in REPORTS:
        meter.add(step)
    row = meter.read()
    assert row["images_per_sec"] == pytest.approx(3 * BATCH_SIZE / 2.0)
    expected = row["images_per_sec"] * meter.flops_per_image / 1e12
    assert row["model_tflops_per_sec"] == pytest.approx(expected)
    assert row["model_flops_utilization"] is None  # the peak of a CPU is not known
    assert row["memory_gib"] > 0


@pytest.mark.parametrize(("masking", "passes"), [("edt", 2), ("none", 1)])
def test_operations_of_a_training_step(masking, passes):
    """A forward pass is twice 2.667 G multiply-accumulates, a backward pass twice that."""
    config = TrainConfig(global_batch_size=BATCH_SIZE, masking=masking)
    trainer = Trainer(create_model("EDT-S/2"), config, Accelerator(cpu=True))
    assert Meter(trainer).flops_per_image == pytest.approx(passes * 3 * 2 * 2.667e9, rel=1e-3)


@pytest.mark.parametrize("masking", ["mdt", "none"])
def test_the_masked_pass_of_mdtv2_counts_as_it_is(masking):
    """Per block and token 12 D^2 multiply-accumulates, and 2 N D for attention among N tokens."""
    model = create_model("MDTv2-S/2")
    config = TrainConfig(global_batch_size=BATCH_SIZE, masking=masking)
    counted = Meter(Trainer(model, config, Accelerator(cpu=True))).flops_per_image
    full, dim, kept = 6.735e9, 384, 153  # at the mean ratio, 0.4
    block = {n: 12 * n * dim**2 + 2 * n**2 * dim for n in (kept, 256)}
    skips = 3 * 2 * dim**2 * (256 - kept)
    adaln = 6 * dim**2  # of the side block
    masked = full - 6 * (block[256] - block[kept]) - skips + block[256] + adaln
    expected = full + (masked if masking == "mdt" else 0)
    assert counted == pytest.approx(3 * 2 * expected, rel=1e-3)


def test_means_begin_again_after_a_line():
    trainer = tiny_trainer(global_batch_size=BATCH_SIZE)
    meter = Meter(trainer)
    meter.add(REPORTS[0])
    meter.read()
    meter.add(REPORTS[2])
    expected = (REPORTS[2].weight * REPORTS[2].losses[:, 0]).mean().item()
    assert meter.read()["loss_full"] == pytest.approx(expected)


def test_a_line_without_an_applied_step_has_no_loss(tmp_path):
    trainer = tiny_trainer(global_batch_size=BATCH_SIZE)
    meter = Meter(trainer)
    meter.add(REPORTS[1])
    append_row(tmp_path / "metrics.jsonl", meter.read())
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] is None
    assert row["loss_by_timestep_quartile"] == [None] * 4


def test_a_step_counts_its_images():
    trainer = tiny_trainer()
    for _ in range(2):
        trainer.train_step(tiny_batch(0))
    assert trainer.images_seen == 12
    assert trainer.state().images_seen == 12


def test_skipped_steps_and_their_images_are_known_once():
    trainer = tiny_trainer(global_batch_size=BATCH_SIZE)
    meter = Meter(trainer)
    one_image = [[1.0, 2.0], [1.0, math.inf], [3.0, 4.0], [math.nan, 1.0]]
    finite = [[1.0, 2.0]] * 4
    for losses, grad_norm, found_inf in (
        (finite, 1.0, False),
        (one_image, math.nan, True),
        (finite, 2.0, False),
        (finite, math.inf, True),
    ):
        trainer.step += 1
        meter.add(report([1, 2, 3, 4], [1.0] * 4, losses, grad_norm, found_inf))
    assert meter.skipped_steps() == {2: [1, 3], 4: []}
    assert meter.skipped_steps() == {}


def test_a_tracker_gets_every_number():
    row = {"step": 3, "images_seen": 12, "loss": 0.5, "model_flops_utilization": None}
    row["loss_by_timestep_quartile"] = [1.0, 2.0, math.nan, 4.0]
    values = tracker_values(row)
    assert values.pop("loss_by_timestep_quartile/3") is row["loss_by_timestep_quartile"][2]
    assert values == {
        "images_seen": 12,
        "loss": 0.5,
        "loss_by_timestep_quartile/1": 1.0,
        "loss_by_timestep_quartile/2": 2.0,
        "loss_by_timestep_quartile/4": 4.0,
    }


def test_rows_of_repeated_steps_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    drop_rows_after(file, 3)
    assert not file.exists()
    for step in (1, 2, 3, 4):
        append_row(file, {"step": step})
    with open(file, "a") as stream:
        stream.write('{"step": 5, "lo')  # cut by a kill
    drop_rows_after(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="absent/metrics.jsonl"):
        append_row(tmp_path / "absent" / "metrics.jsonl", {"step": 1})
