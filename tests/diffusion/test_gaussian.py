import golden_rule
import numpy as np
import pytest
import torch

from edt.diffusion import (
    DDIMSampler,
    DDPMSampler,
    LossSecondMomentSampler,
    create_diffusion,
    create_timestep_sampler,
)
from edt.models import EDT_models
from edt.utils.errors import UserError

GOLDEN = golden_rule.load("diffusion.npz")


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(
        actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )


def test_schedule_is_that_of_the_release():
    diffusion = create_diffusion()
    for name in (name.removeprefix("schedule.") for name in GOLDEN if name.startswith("schedule.")):
        table = diffusion.betas if name == "betas" else diffusion.tables[name]
        np.testing.assert_allclose(table, GOLDEN[f"schedule.{name}"], rtol=1e-12)


@pytest.mark.parametrize("spec", ["250", "100", "50", "10", "ddim50"])
def test_respacing_is_that_of_the_release(spec):
    diffusion = create_diffusion(spec)
    np.testing.assert_array_equal(diffusion.timestep_map, GOLDEN[f"respace.{spec}.timesteps"])
    np.testing.assert_allclose(diffusion.betas, GOLDEN[f"respace.{spec}.betas"], rtol=1e-10)


def test_other_respacings():
    assert create_diffusion("").num_timesteps == create_diffusion("1000").num_timesteps == 1000
    assert create_diffusion("1").timestep_map.tolist() == [0]
    assert create_diffusion(2).timestep_map.tolist() == [0, 999]
    sections = create_diffusion("10,15,25").timestep_map  # 1000 = 334 + 333 + 333
    assert (
        len(sections) == 50
        and sections[9] == 333
        and sections[10] == 334
        and sections[24] == 666
        and sections[-1] == 999
    )
    # A respaced process has the marginals of the full one.
    full, some = create_diffusion(), create_diffusion("37")
    np.testing.assert_allclose(
        some.tables["alphas_cumprod"], full.tables["alphas_cumprod"][some.timestep_map], rtol=1e-9
    )


@pytest.mark.parametrize("spec", ["0", "1001", "-3", "ddim7x", "ddim999", "ten", "10,", "500,600"])
def test_impossible_respacings_are_refused(spec):
    with pytest.raises(UserError):
        create_diffusion(spec)


def test_losses_are_those_of_the_release():
    x, noise, output = (
        golden_rule.normal(seed, 6, c, 32, 32) for seed, c in ((10, 4), (11, 4), (12, 8))
    )
    t, diffusion = torch.from_numpy(GOLDEN["losses.t"]), create_diffusion()
    assert 0 in t.tolist()  # the discretised likelihood
    x_t = diffusion.q_sample(x, t, noise)
    close(x_t, GOLDEN["q_sample"])
    for name, loss in diffusion.losses(output, x, x_t, t, noise)._asdict().items():
        close(loss, GOLDEN[f"losses.{name}"])
    for name, value in diffusion.p_mean_variance(output, x, t)._asdict().items():
        close(value[:, :1], GOLDEN[f"p_mean_variance.{name}"])


def test_the_bound_trains_the_variance_and_not_the_noise():
    output = golden_rule.normal(12, 3, 8, 4, 4).requires_grad_()
    x, noise = golden_rule.normal(0, 3, 4, 4, 4), golden_rule.normal(1, 3, 4, 4, 4)
    t, diffusion = torch.tensor([0, 5, 700]), create_diffusion()
    losses = diffusion.losses(output, x, diffusion.q_sample(x, t, noise), t, noise)
    losses.vb.sum().backward(retain_graph=True)
    assert not output.grad[:, :4].any()
    assert output.grad[:, 4:].all()
    output.grad = None
    losses.mse.sum().backward()
    assert output.grad[:, :4].all()
    assert not output.grad[:, 4:].any()


def test_gamma_limits_the_loss_weight():
    t = torch.arange(1000)
    snr = torch.from_numpy(create_diffusion().tables["alphas_cumprod"])
    snr = snr / (1 - snr)
    for gamma in (1.0, 5.0):
        weight = create_diffusion(min_snr_gamma=gamma).at("min_snr_weight", t, t)
        torch.testing.assert_close(weight, (snr.clamp(max=gamma) / snr).float())


def test_a_perfect_model_has_no_error_and_the_posterior_of_gaussian_data():
    """Data N(0, 1) stays N(0, 1), and the optimal noise prediction is sqrt(1 - alpha_bar) x."""
    sigma = torch.from_numpy(np.sqrt(1 - create_diffusion().tables["alphas_cumprod"])).float()

    def optimal(x, t):
        return torch.cat([sigma[t].view(-1, 1, 1, 1) * x, torch.zeros_like(x)], dim=1)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 64, 64, generator=generator)
    out = DDPMSampler("100").sample(
        optimal, x, noise_at=lambda i: torch.randn(x.shape, generator=generator)
    )
    assert out.std() == pytest.approx(1, abs=0.03) and out.mean() == pytest.approx(0, abs=0.03)
    out = DDIMSampler("1000").sample(optimal, x)  # the exact flow of this process is the identity
    torch.testing.assert_close(out, x, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("case", "spec", "sampler"),
    [("ddpm10", "10", DDPMSampler), ("ddim10", "ddim10", DDIMSampler)],
)
def test_loops_are_those_of_the_release(case, spec, sampler):
    model = golden_rule.fill(EDT_models["EDT-S/2"]()).eval()
    model.set_amm("auto")
    drawn = []

    def noise_at(i):
        drawn.append(i)
        return golden_rule.normal(1000 + i, 2, 4, 32, 32)

    z, y = golden_rule.normal(20, 2, 4, 32, 32), torch.tensor([5, 700])
    out = sampler(spec).sample(model, z, {"y": y}, noise_at=noise_at)
    close(out, GOLDEN[f"loop.{case}"])
    assert drawn == (list(range(1, 10)) if case == "ddpm10" else [])


def test_ddim_with_eta_one_is_ancestral_with_the_smaller_variance():
    x = golden_rule.normal(0, 2, 1, 4, 4)

    def model(x, t):  # v = -1: the posterior variance
        return torch.cat([0.3 * x, -torch.ones_like(x)], dim=1)

    def noise_at(i):
        return golden_rule.normal(i, 2, 1, 4, 4)

    ddim = DDIMSampler("20", eta=1.0).sample(model, x, noise_at=noise_at)
    ddpm = DDPMSampler("20").sample(model, x, noise_at=noise_at)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)


def test_guidance_is_asked_once_a_step_with_its_own_integer_timestep():
    asked, received = [], []

    def scale(timestep):
        asked.append(timestep)
        return 1.0 + timestep

    def model(x, t, cfg_scale):
        received.append((int(t[0]), cfg_scale))
        return torch.cat([x, x], dim=1)

    for sampler in (DDPMSampler("7"), DDIMSampler("7")):
        asked.clear()
        received.clear()
        sampler.sample(model, torch.zeros(1, 1, 2, 2), guidance_scale=scale)
        assert asked == sampler.timesteps
        assert all(type(timestep) is int for timestep in asked)
        assert received == [(timestep, 1.0 + timestep) for timestep in asked]


def test_timestep_sampler_is_that_of_the_release():
    sampler = LossSecondMomentSampler(20)
    for t, loss, weights in zip(
        GOLDEN["resample.t"], GOLDEN["resample.loss"], GOLDEN["resample.weights"], strict=True
    ):
        sampler.update(torch.from_numpy(t), torch.from_numpy(loss))
        np.testing.assert_allclose(
            sampler.probabilities().numpy(), weights / weights.sum(), rtol=1e-9
        )


def test_many_equal_timesteps_in_a_batch_leave_the_newest_losses():
    sampler, one_by_one = (
        LossSecondMomentSampler(4, history=3),
        LossSecondMomentSampler(4, history=3),
    )
    t = torch.tensor([1, 2, 1, 1, 1, 0, 1, 2, 3, 3, 3, 0, 0, 2])
    loss = torch.arange(1.0, 15.0)
    for _ in range(3):
        sampler.update(t, loss)
        for a, b in zip(t, loss, strict=True):
            one_by_one.update(a[None], b[None])
        torch.testing.assert_close(sampler.probabilities(), one_by_one.probabilities())
    assert sorted(sampler.losses[1].tolist()) == [4.0, 5.0, 7.0]
    assert sampler.probabilities().max() > 0.3


def test_importance_weights_keep_the_mean_unbiased():
    sampler, value = (
        LossSecondMomentSampler(50),
        torch.rand(50, generator=torch.Generator().manual_seed(1)),
    )
    for _ in range(10):
        sampler.update(torch.arange(50), torch.arange(50.0) + 1)
    t, weight = sampler.sample(200_000, torch.Generator().manual_seed(0))
    assert torch.bincount(t, minlength=50)[49] > 20 * torch.bincount(t, minlength=50)[0]
    assert (weight * value[t]).mean() == pytest.approx(value.mean().item(), rel=0.02)
    restored = create_timestep_sampler("loss-second-moment", 50)
    restored.load_state_dict(sampler.state_dict())
    assert torch.equal(
        restored.sample(100, torch.Generator().manual_seed(2))[0],
        sampler.sample(100, torch.Generator().manual_seed(2))[0],
    )


def test_uniform_sampler():
    sampler = create_timestep_sampler("uniform")
    t, weight = sampler.sample(100_000, torch.Generator().manual_seed(0))
    sampler.update(t, weight)
    assert (
        t.min() == 0
        and t.max() == 999
        and t.float().mean() == pytest.approx(499.5, abs=3)
        and (weight == 1).all()
    )
    with pytest.raises(UserError, match="gaussian"):
        create_timestep_sampler("gaussian")
