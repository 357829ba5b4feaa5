import golden_rule
import numpy as np
import pytest

from edt.diffusion import linear_betas, respaced_timesteps
from edt.utils.errors import UserError

GOLDEN = golden_rule.load("diffusion.npz")


def test_betas_are_those_of_the_release():
    np.testing.assert_allclose(linear_betas(), GOLDEN["schedule.betas"], rtol=1e-12)


@pytest.mark.parametrize("spec", ["250", "100", "50", "10", "ddim50"])
def test_respaced_timesteps_are_those_of_the_release(spec):
    np.testing.assert_array_equal(respaced_timesteps(spec), GOLDEN[f"respace.{spec}.timesteps"])


@pytest.mark.parametrize("spec", ["", None, "1000", " 1000 ", 1000, "ddim1000"])
def test_all_timesteps_are_kept(spec):
    assert respaced_timesteps(spec) == list(range(1000))


def test_few_timesteps():
    assert respaced_timesteps("1") == [0]
    assert respaced_timesteps(2) == [0, 999]


def test_sections_have_their_own_spacing():
    timesteps = respaced_timesteps("10,15,25")  # sections of 334, 333 and 333 timesteps
    first, second, third = timesteps[:10], timesteps[10:25], timesteps[25:]
    assert (first[0], first[-1]) == (0, 333)
    assert (second[0], second[-1]) == (334, 666)
    assert (third[0], third[-1], len(third)) == (667, 999, 25)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0", "cannot take 0 sampling steps from 1000 timesteps"),
        ("1001", "cannot take 1001 sampling steps"),
        ("-3", "cannot take -3 sampling steps"),
        ("500,600", "cannot take 600 sampling steps from 500 timesteps"),
        ("ddim999", "no integer stride"),
        ("ddim0", "no integer stride"),
        ("ddim7x", "cannot read sampling steps 'ddim7x'"),
        ("ten", "cannot read sampling steps 'ten'"),
        ("10,", "cannot read sampling steps '10,'"),
    ],
)
def test_impossible_respacings_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        respaced_timesteps(spec)
