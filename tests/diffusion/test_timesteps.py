import golden_rule
import numpy as np
import pytest
import torch

from edt.diffusion import LossSecondMomentSampler, create_timestep_sampler

GOLDEN = golden_rule.load("diffusion.npz")


def test_probabilities_are_those_of_the_release():
    sampler = LossSecondMomentSampler(20)
    batches = [GOLDEN[f"resample.{name}"] for name in ("t", "loss", "weights")]
    for t, loss, weights in zip(*batches, strict=True):
        sampler.update(torch.from_numpy(t), torch.from_numpy(loss))
        probabilities = sampler.probabilities().numpy()
        np.testing.assert_allclose(probabilities, weights / weights.sum(), rtol=1e-9)


def test_many_equal_timesteps_in_a_batch_leave_the_newest_losses():
    batched = LossSecondMomentSampler(4, history=3)
    one_by_one = LossSecondMomentSampler(4, history=3)
    t = torch.tensor([1, 2, 1, 1, 1, 0, 1, 2, 3, 3, 3, 0, 0, 2])
    loss = torch.arange(1.0, 15.0)
    for _ in range(3):
        batched.update(t, loss)
        for i in range(len(t)):
            one_by_one.update(t[i : i + 1], loss[i : i + 1])
        torch.testing.assert_close(batched.probabilities(), one_by_one.probabilities())
    assert sorted(batched.losses[1].tolist()) == [4.0, 5.0, 7.0]
    assert batched.probabilities().max() > 0.3


def test_a_skipped_step_leaves_the_history_as_it_is():
    sampler = LossSecondMomentSampler(4, history=2)
    t = torch.tensor([0, 1, 2, 3, 0, 0])
    for value in (1.0, 2.0):
        sampler.update(t, torch.full((6,), value), found_inf=torch.tensor(False))
    before = {name: value.clone() for name, value in sampler.state_dict().items()}
    assert before["counts"].tolist() == [6, 2, 2, 2]
    sampler.update(t, torch.full((6,), float("nan")), found_inf=torch.tensor(True))
    for name in before:
        assert torch.equal(sampler.state_dict()[name], before[name]), name


@pytest.fixture
def warm_sampler() -> LossSecondMomentSampler:
    """50 timesteps, whose losses are 1 to 50."""
    sampler = LossSecondMomentSampler(50)
    for _ in range(10):
        sampler.update(torch.arange(50), torch.arange(50.0) + 1)
    return sampler


def test_timesteps_are_uniform_until_every_history_is_full():
    sampler = LossSecondMomentSampler(50)
    for _ in range(10):
        assert sampler.probabilities().tolist() == [1 / 50] * 50
        sampler.update(torch.arange(50), torch.arange(50.0) + 1)
    assert sampler.probabilities().max() > 1.5 / 50


def test_importance_weights_keep_the_mean_unbiased(warm_sampler):
    value = torch.rand(50, generator=torch.Generator().manual_seed(1))
    t, weight = warm_sampler.sample(200_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=50)
    assert counts[49] > 20 * counts[0]
    assert (weight * value[t]).mean() == pytest.approx(value.mean().item(), rel=0.02)


def test_a_restored_sampler_draws_the_same(warm_sampler):
    restored = create_timestep_sampler("loss-second-moment", 50)
    restored.load_state_dict(warm_sampler.state_dict())
    draws = [
        sampler.sample(100, torch.Generator().manual_seed(2))
        for sampler in (warm_sampler, restored)
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


def test_the_uniform_sampler_has_no_history():
    sampler = create_timestep_sampler("uniform")
    t, weight = sampler.sample(100_000, torch.Generator().manual_seed(0))
    assert t.min() == 0
    assert t.max() == 999
    assert t.float().mean() == pytest.approx(499.5, abs=3)
    assert (weight == 1).all()
    sampler.update(t, weight)
    assert not sampler.state_dict()
    assert torch.equal(sampler.sample(100_000, torch.Generator().manual_seed(0))[0], t)
