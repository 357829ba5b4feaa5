import golden_rule
import pytest
import torch
from gaussian_data import CLASS_MEANS, STD, GaussianEDT, flow, guided_mean, sample_class_1

from edt.diffusion import SOLVERS, GuidanceSchedule
from edt.models import EDT_models
from edt.registry import create_model
from edt.utils.errors import UserError


@pytest.fixture
def gaussian() -> GaussianEDT:
    return GaussianEDT(EDT_models["EDT-Tiny/2"](input_size=16, num_classes=2).config).eval()


def test_the_scale_is_constant_inside_its_interval_which_holds_both_ends():
    everywhere, inside = GuidanceSchedule(3.0), GuidanceSchedule(3.0, (200, 600))
    timesteps = (0, 199, 200, 400, 600, 601, 999)
    assert [everywhere(timestep) for timestep in timesteps] == [3.0] * 7
    assert [inside(timestep) for timestep in timesteps] == [1, 1, 3, 3, 3, 1, 1]
    assert GuidanceSchedule(3.0, (7, 7))(7) == 3.0


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(UserError, match="--cfg-scale"):
        GuidanceSchedule(scale)


@pytest.mark.parametrize("interval", [(600, 200), (-1, 5), (0, 1000)])
def test_impossible_intervals_are_refused(interval):
    with pytest.raises(UserError, match="--cfg-interval"):
        GuidanceSchedule(2.0, interval)


@pytest.mark.parametrize(
    ("solver", "steps"), [("ddim", "1000"), ("dpm++", "250"), ("unipc", "250")]
)
@pytest.mark.parametrize(("channels", "guided_channels"), [("3", 3), ("all", 4)])
def test_guided_flow_is_that_of_the_shifted_data(
    gaussian, solver, steps, channels, guided_channels
):
    config = {"solver": solver, "num_sampling_steps": steps, "cfg_channels": channels}
    noise, latents = sample_class_1(gaussian, cfg_scale=3.0, **config)
    means = torch.full((4, 1, 1), CLASS_MEANS[1])
    means[:guided_channels] = guided_mean(3.0)
    torch.testing.assert_close(latents, flow(noise, 999, None, means), rtol=0, atol=0.01)


def test_guided_ancestral_samples_are_those_of_the_shifted_data(gaussian):
    _, latents = sample_class_1(gaussian, 40, num_sampling_steps="250", cfg_scale=2.0)
    by_channel = latents.transpose(0, 1).flatten(1)  # 10,240 numbers a channel
    means = [guided_mean(2.0)] * 3 + [CLASS_MEANS[1]]
    assert by_channel.mean(1).tolist() == pytest.approx(means, abs=0.03)
    assert by_channel.std(1).tolist() == pytest.approx([STD] * 4, abs=0.03)


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_guidance_acts_inside_its_interval_only(gaussian, solver):
    noise, latents = sample_class_1(
        gaussian,
        solver=solver,
        num_sampling_steps="500",
        cfg_scale=3.0,
        cfg_channels="all",
        cfg_interval=(200, 600),
    )
    at_600 = flow(noise, 999, 600, CLASS_MEANS[1])
    at_200 = flow(at_600, 600, 200, guided_mean(3.0))
    expected = flow(at_200, 200, None, CLASS_MEANS[1])
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.03)
    # Only a guided step puts each image through the network twice.
    sizes = [6 if 200 <= timestep <= 600 else 3 for timestep in gaussian.timesteps]
    assert gaussian.batch_sizes == sizes
    assert len(sizes) == 500


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_one_is_the_conditional_model_at_the_cost_of_one_forward(solver, monkeypatch):
    model = golden_rule.fill(create_model("EDT-Tiny/2", input_size=8, num_classes=5)).eval()
    config = {"solver": solver, "num_sampling_steps": "4"}
    batch_sizes = []
    model.register_forward_pre_hook(lambda module, inputs: batch_sizes.append(len(inputs[0])))
    _, latents = sample_class_1(model, **config)
    assert batch_sizes == [3] * 4

    batch_sizes.clear()
    _, never_inside = sample_class_1(model, **config, cfg_scale=4.0, cfg_interval=(998, 998))
    assert batch_sizes == [3] * 4
    assert torch.equal(never_inside, latents)

    monkeypatch.setattr(
        model, "forward_with_cfg", lambda x, t, y, cfg_scale, channels: model(x, t, y)
    )
    _, conditional = sample_class_1(model, **config)
    assert torch.equal(conditional, latents)
