import golden_rule
import numpy as np
import pytest
import torch

from edt.training.ema import update_ema
from edt.training.optim import create_optimizer, learning_rate
from edt.utils.errors import UserError

GOLDEN = golden_rule.load("adan.npz")


def trajectory(name: str, weight_decay: float):
    """(step, parameters) of the golden run, 60 steps."""
    params = [torch.nn.Parameter(torch.from_numpy(GOLDEN[f"init{i}"].copy())) for i in range(3)]
    optimizer, rng = create_optimizer(name, params, 1e-3, weight_decay), np.random.default_rng(4)
    for step in range(1, 61):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, 1e-3, 5e-5, 400)
        for p in params:
            p.grad = torch.from_numpy(0.1 * rng.standard_normal(tuple(p.shape), dtype=np.float32))
        averages = [p.detach().clone() for p in params]
        optimizer.step(found_inf=torch.tensor(False), ema_params=averages, ema_decay=0.9)
        yield step, [p.detach().clone() for p in params]


def difference(key: str, step: int, params: list) -> float:
    return max(
        np.abs(p.numpy() - GOLDEN[f"{key}.step{step}.{i}"]).max() for i, p in enumerate(params)
    )


@pytest.mark.parametrize(("key", "weight_decay"), [("wd0", 0.0), ("wd2e-2", 0.02)])
def test_adan_is_the_official_one(key, weight_decay):
    met = {
        step: difference(key, step, params)
        for step, params in trajectory("adan", weight_decay)
        if step in (1, 2, 10, 60)
    }
    assert len(met) == 4 and max(met.values()) <= 1e-6


def test_a_skipped_step_leaves_no_trace_even_the_first():
    gradients = [
        torch.full((3,), float("nan")),
        torch.tensor([1.0, -2.0, 0.5]),
        torch.full((3,), float("inf")),
        torch.tensor([0.3, 0.1, -1.0]),
    ]

    def run(gradients):
        p, average = torch.nn.Parameter(torch.ones(3)), torch.zeros(3)
        optimizer = create_optimizer("adan", [p], 1e-2)
        for gradient in gradients:
            p.grad = gradient
            found_inf = ~gradient.isfinite().all()
            optimizer.step(found_inf=found_inf, ema_params=[average], ema_decay=0.9)
        return [p.detach(), average, *optimizer.state[p].values()], optimizer.param_groups[0][
            "step"
        ]

    (all_tensors, steps), (finite_tensors, finite_steps) = (
        run(gradients),
        run([gradients[1], gradients[3]]),
    )
    assert steps == finite_steps == 2
    for tensor, expected in zip(all_tensors, finite_tensors, strict=True):
        assert torch.equal(tensor, expected)
    assert not torch.equal(all_tensors[0], torch.ones(3))
    assert all_tensors[1].any()


def test_adan_averages_what_update_ema_would():
    p = torch.nn.Parameter(torch.randn(5))
    expected = torch.zeros(5)
    average, optimizer = torch.zeros(5), create_optimizer("adan", [p], 1e-2)
    for _ in range(3):
        p.grad = torch.randn(5)
        optimizer.step(ema_params=[average], ema_decay=0.9)
        update_ema([expected], [p], 0.9)
    torch.testing.assert_close(average, expected)


def test_adan_pytorch_differs_by_what_its_help_says(caplog):
    steps = dict(trajectory("adan-pytorch", 0.0))
    assert "0.0066" in caplog.text and "0.012" in caplog.text
    assert all(torch.equal(p, torch.from_numpy(GOLDEN[f"init{i}"])) for i, p in enumerate(steps[1]))
    assert difference("wd0", 60, steps[60]) == pytest.approx(0.0066, abs=5e-5)
    moved = max(np.abs(GOLDEN[f"wd0.step60.{i}"] - GOLDEN[f"init{i}"]).max() for i in range(3))
    assert moved == pytest.approx(0.012, abs=5e-4)


def test_learning_rate():
    assert learning_rate(0, 1e-3, 5e-5, 400_000) == 1e-3
    assert learning_rate(200_000, 1e-3, 5e-5, 400_000) == pytest.approx((1e-3 + 5e-5) / 2)
    assert learning_rate(400_000, 1e-3, 5e-5, 400_000) == pytest.approx(5e-5)
    assert learning_rate(900_000, 1e-3, 5e-5, 400_000) == pytest.approx(5e-5)
    assert learning_rate(7, 1e-5, 5e-5, 10) == 1e-5  # below the final rate: constant


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="adamw"):
        create_optimizer("adamw", [torch.nn.Parameter(torch.zeros(1))], 1e-3)


def test_ema():
    average, parameter = torch.ones(2), torch.nn.Parameter(torch.full((2,), 3.0))
    update_ema([average], [parameter], 0.9)
    assert average.tolist() == pytest.approx([1.2, 1.2])
