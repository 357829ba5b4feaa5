import math

import golden_rule
import numpy as np
import pytest
import torch
from scipy.stats import norm

from edt.diffusion import create_diffusion
from edt.diffusion.gaussian import discretized_gaussian_log_likelihood

GOLDEN = golden_rule.load("diffusion.npz")
TABLES = [name.removeprefix("schedule.") for name in GOLDEN if name.startswith("schedule.")]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The golden clean latents, noise, network output and timesteps."""
    x_start = golden_rule.normal(10, 6, 4, 32, 32)
    noise = golden_rule.normal(11, 6, 4, 32, 32)
    output = golden_rule.normal(12, 6, 8, 32, 32)
    return x_start, noise, output, torch.from_numpy(GOLDEN["losses.t"])


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_release(name):
    diffusion = create_diffusion()
    table = diffusion.betas if name == "betas" else diffusion.tables[name]
    np.testing.assert_allclose(table, GOLDEN[f"schedule.{name}"], rtol=1e-12)


@pytest.mark.parametrize("spec", ["250", "100", "50", "10", "ddim50"])
def test_respaced_betas_are_those_of_the_release(spec):
    diffusion = create_diffusion(spec)
    np.testing.assert_array_equal(diffusion.timestep_map, GOLDEN[f"respace.{spec}.timesteps"])
    np.testing.assert_allclose(diffusion.betas, GOLDEN[f"respace.{spec}.betas"], rtol=1e-10)


def test_a_respaced_process_has_the_marginals_of_the_full_one():
    full, respaced = create_diffusion(), create_diffusion("37")
    assert respaced.num_timesteps == 37
    expected = full.tables["alphas_cumprod"][respaced.timestep_map]
    np.testing.assert_allclose(respaced.tables["alphas_cumprod"], expected, rtol=1e-9)


def test_a_network_sees_timesteps_of_the_full_process():
    timesteps = create_diffusion("3").full_timesteps(torch.tensor([2, 0, 1]))
    assert timesteps.tolist() == [999, 0, 500]
    assert timesteps.dtype == torch.int64


def test_every_table_of_a_process_of_one_step_is_finite():
    """Its posterior variance is 0, and there is no next entry whose logarithm could stand in."""
    tables = create_diffusion("1").tables
    assert [name for name, table in tables.items() if not np.isfinite(table).all()] == []


def test_noised_latents_are_those_of_the_release(batch):
    x_start, noise, _, t = batch
    golden_rule.assert_close(create_diffusion().q_sample(x_start, t, noise), GOLDEN["q_sample"])


@pytest.mark.parametrize("name", ["loss", "mse", "vb"])
def test_losses_are_those_of_the_release(batch, name):
    x_start, noise, output, t = batch
    assert 0 in t.tolist()  # the discretised likelihood
    diffusion = create_diffusion()
    x_t = diffusion.q_sample(x_start, t, noise)
    losses = diffusion.losses(output, x_start, x_t, t, noise)
    golden_rule.assert_close(getattr(losses, name), GOLDEN[f"losses.{name}"])


@pytest.mark.parametrize("name", ["mean", "variance", "log_variance", "pred_xstart"])
def test_posteriors_are_those_of_the_release(batch, name):
    x_t, _, output, t = batch
    posterior = create_diffusion().p_mean_variance(output, x_t, t)
    golden_rule.assert_close(getattr(posterior, name)[:, :1], GOLDEN[f"p_mean_variance.{name}"])


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_the_noise_error_is_weighted_by_min_snr(gamma):
    """Noise predicted off by 1 everywhere has the error 1, and so its weight as the loss."""
    t = torch.arange(0, 1000, 111)
    x = torch.zeros(len(t), 1, 2, 2)
    output = torch.cat([torch.ones_like(x), torch.zeros_like(x)], dim=1)
    diffusion = create_diffusion(min_snr_gamma=gamma)
    alpha_bar = torch.from_numpy(diffusion.tables["alphas_cumprod"])[t]
    snr = alpha_bar / (1 - alpha_bar)
    expected = snr.clamp(max=gamma) / snr
    losses = diffusion.losses(output, x, x, t, noise=torch.zeros_like(x))
    torch.testing.assert_close(losses.mse, expected.float())


def test_the_bound_trains_the_variance_and_not_the_noise():
    output = golden_rule.normal(12, 3, 8, 4, 4).requires_grad_()
    x_start, noise = golden_rule.normal(0, 3, 4, 4, 4), golden_rule.normal(1, 3, 4, 4, 4)
    t = torch.tensor([0, 5, 700])
    diffusion = create_diffusion()
    losses = diffusion.losses(output, x_start, diffusion.q_sample(x_start, t, noise), t, noise)
    (vb_gradient,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    assert not vb_gradient[:, :4].any()
    assert vb_gradient[:, 4:].all()
    (mse_gradient,) = torch.autograd.grad(losses.mse.sum(), output)
    assert mse_gradient[:, :4].all()
    assert not mse_gradient[:, 4:].any()


def test_bins_of_the_discretised_likelihood_are_those_of_a_gaussian():
    """The tanh approximation of the normal distribution is off by less than 3e-4."""
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    mean, std = 0.1, 0.4
    log_scale = torch.full_like(x, math.log(std))
    actual = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), log_scale).exp()
    upper = norm.cdf(x.numpy() + 1 / 255, mean, std)
    lower = norm.cdf(x.numpy() - 1 / 255, mean, std)
    upper[-1], lower[0] = 1, 0  # the outermost bins reach to infinity
    np.testing.assert_allclose(actual.numpy(), upper - lower, atol=3e-4)
