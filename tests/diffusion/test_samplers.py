import golden_rule
import numpy as np
import pytest
import torch

from edt.diffusion import DDIMSampler, DDPMSampler, create_diffusion, create_sampler
from edt.models import EDT_models

GOLDEN = golden_rule.load("diffusion.npz")
SAMPLERS = [("ddpm", "10"), ("ddim", "ddim10"), ("dpm++", "7"), ("unipc", "7")]


class NoiseRecorder:
    """Golden noise of each loop step, and the steps that asked for it."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.steps: list[int] = []

    def __call__(self, step: int) -> torch.Tensor:
        self.steps.append(step)
        return golden_rule.normal(1000 + step, *self.shape)


@pytest.mark.parametrize(
    ("case", "sampler", "noise_steps"),
    [("ddpm10", DDPMSampler("10"), list(range(1, 10))), ("ddim10", DDIMSampler("ddim10"), [])],
)
def test_loops_are_those_of_the_release(case, sampler, noise_steps):
    model = golden_rule.fill(EDT_models["EDT-S/2"]()).eval()
    model.set_amm("auto")
    noise = NoiseRecorder(2, 4, 32, 32)
    x, y = golden_rule.normal(20, 2, 4, 32, 32), torch.tensor([5, 700])
    latents = sampler.sample(model, x, {"y": y}, noise_at=noise)
    golden_rule.assert_close(latents, GOLDEN[f"loop.{case}"])
    assert noise.steps == noise_steps


class StandardNormalModel:
    """The best prediction for data N(0, 1), which stays N(0, 1) at every timestep."""

    def __init__(self) -> None:
        sigma = np.sqrt(1 - create_diffusion().tables["alphas_cumprod"])
        self.sigma = torch.from_numpy(sigma).float()

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.sigma[t].view(-1, 1, 1, 1) * x, torch.zeros_like(x)], dim=1)


def test_ancestral_samples_have_the_distribution_of_the_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 64, 64, generator=generator)
    samples = DDPMSampler("100").sample(
        StandardNormalModel(), x, noise_at=lambda step: torch.randn(x.shape, generator=generator)
    )
    assert samples.std() == pytest.approx(1, abs=0.03)
    assert samples.mean() == pytest.approx(0, abs=0.03)


def test_ddim_follows_the_flow_which_leaves_normal_data_where_it_is():
    x = golden_rule.normal(0, 4, 1, 64, 64)
    samples = DDIMSampler("1000").sample(StandardNormalModel(), x)
    torch.testing.assert_close(samples, x, atol=0.02, rtol=0)


def test_ddim_with_eta_one_is_ancestral_with_the_smaller_variance():
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.3 * x, -torch.ones_like(x)], dim=1)  # v = -1: the smaller variance

    x = golden_rule.normal(0, 2, 1, 4, 4)
    noises = NoiseRecorder(2, 1, 4, 4), NoiseRecorder(2, 1, 4, 4)
    ddim = DDIMSampler("20", eta=1.0).sample(model, x, noise_at=noises[0])
    ddpm = DDPMSampler("20").sample(model, x, noise_at=noises[1])
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)
    assert noises[0].steps == noises[1].steps == list(range(1, 20))


def test_without_a_source_of_noise_the_global_generator_is_used():
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 2, 4, 4)

    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(DDPMSampler("3").sample(model, torch.zeros(1, 1, 4, 4)))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


class GuidanceRecorder:
    """A guidance scale that differs at every timestep, and the timesteps that asked for it."""

    def __init__(self) -> None:
        self.timesteps: list[int] = []

    def __call__(self, timestep: int) -> float:
        self.timesteps.append(timestep)
        return 1 + timestep / 1000


@pytest.mark.parametrize(("solver", "steps"), SAMPLERS)
def test_guidance_is_asked_once_per_step_with_the_steps_own_timestep(solver, steps):
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, cfg_scale: float) -> torch.Tensor:
        calls.append((t.tolist(), cfg_scale))
        return torch.zeros(len(x), 2, 4, 4)

    sampler, guidance = create_sampler(solver, steps), GuidanceRecorder()
    sampler.sample(model, torch.zeros(3, 1, 4, 4), guidance_scale=guidance)
    assert guidance.timesteps == sampler.timesteps
    # A tensor or a NumPy number would pass for an int in the comparison above.
    assert {type(timestep) for timestep in guidance.timesteps} == {int}
    assert calls == [([timestep] * 3, 1 + timestep / 1000) for timestep in sampler.timesteps]


@pytest.mark.parametrize(("solver", "steps"), SAMPLERS)
def test_without_guidance_the_model_gets_no_scale(solver, steps):
    received = []

    def model(x: torch.Tensor, t: torch.Tensor, **kwargs: object) -> torch.Tensor:
        received.append(kwargs)
        return torch.zeros(len(x), 2, 4, 4)

    arguments = {"y": "labels"}
    create_sampler(solver, steps).sample(model, torch.zeros(1, 1, 4, 4), arguments)
    assert received == [arguments] * len(received)
    assert arguments == {"y": "labels"}  # the caller's dictionary is left as it is


@pytest.mark.parametrize(("solver", "steps"), SAMPLERS)
def test_timesteps_fall_from_999_to_the_cleanest(solver, steps):
    timesteps = create_sampler(solver, steps).timesteps
    assert timesteps == sorted(set(timesteps), reverse=True)
    # ddim10 takes every hundredth timestep from 0 on, so its noisiest is 900.
    assert timesteps[0] == (900 if steps == "ddim10" else 999)


@pytest.mark.parametrize(("solver", "steps"), SAMPLERS)
def test_a_second_run_of_a_sampler_has_no_memory_of_the_first(solver, steps):
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.3 * x.sin(), -torch.ones_like(x)], dim=1)

    sampler, noise = create_sampler(solver, steps), NoiseRecorder(2, 1, 4, 4)
    x = golden_rule.normal(0, 2, 1, 4, 4)
    first = sampler.sample(model, x, noise_at=noise)
    sampler.sample(model, -x, noise_at=noise)
    assert torch.equal(sampler.sample(model, x, noise_at=noise), first)
