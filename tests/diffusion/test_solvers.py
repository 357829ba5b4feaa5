"""The few-step solvers against closed forms."""

import math

import numpy as np
import pytest
import torch
from gaussian_data import ALPHA_BAR, GaussianEDT, best_noise, flow, sample_class_1

from edt.diffusion import SOLVERS, Solver, create_sampler
from edt.models import EDT_models
from edt.utils.choices import choices
from edt.utils.errors import UserError

FEW_STEP_SOLVERS = ("dpm++", "unipc")


def solve(solver: Solver, steps: int, x: torch.Tensor, mean: float) -> torch.Tensor:
    """Clean x for data N(mean, STD^2)."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([best_noise(x, int(t[0]), mean), x], dim=1)

    return create_sampler(solver, steps).sample(model, x)


@pytest.mark.parametrize(
    ("solver", "order", "largest_error"),
    [("ddim", 1, 0.04), ("dpm++", 2, 0.002), ("unipc", 2, 0.002)],
)
def test_error_falls_at_the_order_of_the_solver(solver, order, largest_error):
    x, counts = torch.linspace(-2, 2, 41).view(1, 1, 1, -1), (10, 20, 40, 80, 160)
    errors = []
    for steps in counts:
        exact = flow(x, create_sampler(solver, steps).timesteps[0], None, 0.7)
        errors.append((solve(solver, steps, x, 0.7) - exact).abs().max().item())
    slope = -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.4), errors
    assert errors[-1] < largest_error


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
@pytest.mark.parametrize("steps", [1, 5, 61, 250, 999])
def test_few_step_solvers_visit_even_timesteps_from_999_down(solver, steps):
    expected = [round(999 * k / steps) for k in range(steps, 0, -1)]
    assert create_sampler(solver, steps).timesteps == expected
    assert len(set(expected)) == steps
    model = GaussianEDT(EDT_models["EDT-Tiny/2"](input_size=16, num_classes=2).config)
    sample_class_1(model, solver=solver, num_sampling_steps=str(steps))
    assert model.timesteps == expected


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
def test_one_step_returns_the_predicted_clean_latent(solver):
    x = torch.linspace(-2, 2, 41).view(1, 1, 1, -1)
    alpha_bar = ALPHA_BAR[999]
    predicted = (x - math.sqrt(1 - alpha_bar) * best_noise(x, 999, 0.7)) / math.sqrt(alpha_bar)
    torch.testing.assert_close(solve(solver, 1, x, 0.7), predicted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        *((steps, "take a plain number") for steps in ("10,15,25", "ddim50", "", "2.5", "ten")),
        *((steps, f"not {steps}$") for steps in ("0", "-1", "1000", "1001")),
    ],
)
def test_impossible_steps_are_refused(solver, steps, message):
    with pytest.raises(UserError, match=f"few-step solvers .*{message}"):
        create_sampler(solver, steps)


def test_the_table_holds_every_solver():
    assert tuple(SOLVERS) == choices(Solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_calls_the_model_once_per_step(solver):
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(int(t[0]))
        return torch.zeros(len(x), 2, 4, 4)

    sampler = create_sampler(solver, "6")
    sampler.sample(model, torch.zeros(1, 1, 4, 4))
    assert calls == sampler.timesteps
    assert len(calls) == 6
