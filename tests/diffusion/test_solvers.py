"""Solvers and guidance against closed forms: for Gaussian data the best noise prediction and the
exact flow are known.
"""

import math

import golden_rule
import numpy as np
import pytest
import torch

from edt.diffusion import create_diffusion, create_sampler
from edt.models import EDT, EDT_models
from edt.registry import create_model
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import sample_latents
from edt.utils.errors import UserError
from edt.utils.randomness import normal

ALPHA_BAR = create_diffusion().tables["alphas_cumprod"]
FEW_STEP_SOLVERS = ("dpm++", "unipc")
STD = 0.5  # of the data


def best_noise(x: torch.Tensor, timestep: int, mean: torch.Tensor | float) -> torch.Tensor:
    """The best prediction of the noise in x for data N(mean, STD^2)."""
    alpha_bar = ALPHA_BAR[timestep]
    return (
        (x - math.sqrt(alpha_bar) * mean)
        * math.sqrt(1 - alpha_bar)
        / (alpha_bar * STD**2 + 1 - alpha_bar)
    )


def flow(x: torch.Tensor, start: int, end: int | None, mean: torch.Tensor | float) -> torch.Tensor:
    """Where the probability-flow ODE of data N(mean, STD^2) carries x from one timestep to another,
    or to clean data.
    """
    a, b = ALPHA_BAR[start], 1.0 if end is None else ALPHA_BAR[end]
    deviation = (x - math.sqrt(a) * mean) / math.sqrt(a * STD**2 + 1 - a)
    return math.sqrt(b) * mean + math.sqrt(b * STD**2 + 1 - b) * deviation


class GaussianEDT(EDT):
    """An EDT whose data of class y is N(MEANS[y], STD^2), learned perfectly. Notes the rows of each
    forward.
    """

    MEANS = torch.tensor([0.7, -0.4, 0.1])  # the last without a class

    def forward(self, x, t, y=None, masks=None):
        self.rows.append(len(x))
        self.seen.append(int(t[0]))
        mean = self.MEANS[y].view(-1, 1, 1, 1)
        return torch.cat([best_noise(x, int(t[0]), mean), -torch.ones_like(x)], dim=1)


@pytest.fixture
def gaussian():
    model = GaussianEDT(EDT_models["EDT-Tiny/2"](input_size=16, num_classes=2).config).eval()
    model.rows, model.seen = [], []
    return model


def draw(model, indices=(0, 1, 2), label=1, **config) -> tuple[torch.Tensor, torch.Tensor]:
    """(first noise, latents) of some images of one class."""
    config, indices = SamplingConfig(**config), torch.tensor(indices)
    latents = sample_latents(model, config, indices, torch.full((len(indices),), label))
    return normal(config.seed, "noise", 0, indices, tuple(latents.shape[1:]), "cpu"), latents


def solve(solver: str, steps: int, x: torch.Tensor, mean: float) -> tuple[torch.Tensor, int]:
    """(clean x, first timestep) for data N(mean, STD^2)."""

    def model(x, t):
        return torch.cat([best_noise(x, int(t[0]), mean), x], dim=1)

    sampler = create_sampler(solver, steps)
    return sampler.sample(model, x), sampler.timesteps[0]


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2), ("unipc", 2)])
def test_error_falls_at_the_order_of_the_solver(solver, order):
    x, counts, errors = torch.linspace(-2, 2, 41).view(1, 1, 1, -1), (10, 20, 40, 80, 160), []
    for steps in counts:
        out, start = solve(solver, steps, x, 0.7)
        errors.append((out - flow(x, start, None, 0.7)).abs().max().item())
    slope = -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.4), errors
    assert errors[-1] < (0.04 if order == 1 else 0.002)


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
@pytest.mark.parametrize("steps", [1, 5, 61, 250, 999])
def test_few_step_solvers_visit_even_timesteps_from_999_down(solver, steps, gaussian):
    expected = [round(999 * k / steps) for k in range(steps, 0, -1)]
    assert create_sampler(solver, steps).timesteps == expected
    assert len(set(expected)) == steps
    draw(gaussian, solver=solver, num_sampling_steps=str(steps))
    assert gaussian.seen == expected  # the model sees t of the 1000-step process


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
def test_one_step_returns_the_predicted_clean_latent(solver):
    x = torch.linspace(-2, 2, 41).view(1, 1, 1, -1)
    alpha_bar = ALPHA_BAR[999]
    predicted = (x - math.sqrt(1 - alpha_bar) * best_noise(x, 999, 0.7)) / math.sqrt(alpha_bar)
    torch.testing.assert_close(solve(solver, 1, x, 0.7)[0], predicted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", FEW_STEP_SOLVERS)
@pytest.mark.parametrize(
    "steps", ["10,15,25", "ddim50", "", "0", "-1", "1000", "1001", "2.5", "ten"]
)
def test_impossible_steps_are_refused(solver, steps):
    with pytest.raises(UserError, match="few-step solvers take"):
        SamplingConfig(solver=solver, num_sampling_steps=steps)


@pytest.mark.parametrize(
    ("solver", "steps"), [("ddim", "1000"), ("dpm++", "250"), ("unipc", "250")]
)
@pytest.mark.parametrize(("channels", "guided"), [("3", 3), ("all", 4)])
def test_guided_flow_is_that_of_the_shifted_data(gaussian, solver, steps, channels, guided):
    """Noise predictions are linear in the mean, so guidance samples N(m_u + s (m_c - m_u),
    STD^2).
    """
    x, out = draw(
        gaussian, solver=solver, num_sampling_steps=steps, cfg_scale=3.0, cfg_channels=channels
    )
    shifted = 0.1 + 3 * (-0.4 - 0.1)
    means = torch.tensor([shifted if channel < guided else -0.4 for channel in range(4)]).view(
        4, 1, 1
    )
    torch.testing.assert_close(out, flow(x, 999, None, means), rtol=0, atol=0.01)


def test_guided_ancestral_samples_are_those_of_the_shifted_data(gaussian):
    _, out = draw(gaussian, range(40), num_sampling_steps="250", cfg_scale=2.0)
    by_channel = out.transpose(0, 1).flatten(1)  # 10,240 numbers a channel
    assert by_channel.mean(1).tolist() == pytest.approx([-0.9, -0.9, -0.9, -0.4], abs=0.03)
    assert by_channel.std(1).tolist() == pytest.approx([STD] * 4, abs=0.03)


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_guidance_acts_inside_its_interval_only(gaussian, solver):
    x, out = draw(
        gaussian,
        solver=solver,
        num_sampling_steps="500",
        cfg_scale=3.0,
        cfg_channels="all",
        cfg_interval=(200, 600),
    )
    shifted = 0.1 + 3 * (-0.4 - 0.1)
    expected = flow(flow(flow(x, 999, 600, -0.4), 600, 200, shifted), 200, None, -0.4)
    torch.testing.assert_close(out, expected, rtol=0, atol=0.03)
    assert [rows == 6 for rows in gaussian.rows] == [
        200 <= t <= 600 for t in gaussian.seen
    ] and len(gaussian.rows) == 500


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "unipc"])
def test_scale_one_is_the_conditional_model_at_the_cost_of_one_forward(solver):
    model = golden_rule.fill(create_model("EDT-Tiny/2", input_size=8, num_classes=5)).eval()
    rows = []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    _, plain = draw(model, solver=solver, num_sampling_steps="4")
    assert rows == [3] * 4
    model.forward_with_cfg = lambda x, t, y, cfg_scale, channels: model(x, t, y)
    assert torch.equal(plain, draw(model, solver=solver, num_sampling_steps="4")[1])
    del model.forward_with_cfg
    rows.clear()
    outside = draw(
        model, solver=solver, num_sampling_steps="4", cfg_scale=4.0, cfg_interval=(998, 998)
    )[1]
    assert rows == [3] * 4 and torch.equal(outside, plain)


@pytest.mark.parametrize("interval", [(600, 200), (-1, 5), (0, 1000)])
def test_impossible_guidance_is_refused(interval):
    with pytest.raises(UserError, match="--cfg-interval"):
        SamplingConfig(cfg_interval=interval)
    with pytest.raises(UserError, match="cfg_channels"):
        SamplingConfig(cfg_channels="2")
