import copy
import io

import golden_rule
import numpy as np
import pytest
import torch

from edt.data.vae import PixelVAE, to_uint8
from edt.diffusion import create_sampler
from edt.nn.precision import round_weights
from edt.registry import create_model
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import generate, image_bar
from edt.utils.errors import UserError
from edt.utils.randomness import ImageNoise


def create_tiny_model():
    return create_model("EDT-Tiny/2", input_size=8, in_channels=3, num_classes=5)


@pytest.fixture(scope="module")
def model():
    return golden_rule.fill(create_tiny_model()).eval()


def draw(
    model, config: SamplingConfig, indices: list[int], batch_size: int
) -> dict[int, tuple[torch.Tensor, int]]:
    """Image and label of each index."""
    batches = generate(model, PixelVAE(), config, torch.tensor(indices), batch_size)
    return {
        int(index): (image, int(label))
        for batch in batches
        for index, image, label in zip(*batch, strict=True)
    }


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_an_image_depends_on_its_index_only(model, solver):
    config = SamplingConfig(seed=3, num_sampling_steps="5", solver=solver, cfg_scale=1.5)
    together = draw(model, config, [0, 1, 2, 3, 4, 5, 6], 4)
    apart = draw(model, config, [6, 2, 5], 2)
    for index, (image, label) in apart.items():
        assert label == together[index][1]
        difference = (image.int() - together[index][0].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


def test_another_seed_draws_another_image(model):
    images = []
    for seed in (3, 4):
        config = SamplingConfig(seed=seed, num_sampling_steps="5", cfg_scale=1.5)
        images.append(draw(model, config, [0], 1)[0][0])
    assert not torch.equal(*images)


def test_given_labels_replace_those_of_the_configuration(model):
    indices, labels = torch.arange(3), torch.tensor([4, 1, 1])
    config = SamplingConfig(num_sampling_steps="2", labels="0")
    by_argument = list(generate(model, PixelVAE(), config, indices, 2, labels=labels))
    assert torch.equal(torch.cat([batch.labels for batch in by_argument]), labels)
    config = SamplingConfig(num_sampling_steps="2", labels="4,1,1")
    by_config = list(generate(model, PixelVAE(), config, indices, 2))
    for batch, expected in zip(by_argument, by_config, strict=True):
        assert torch.equal(batch.images, expected.images)
    with pytest.raises(UserError, match="class 5 is outside"):
        next(generate(model, PixelVAE(), config, indices, 2, labels=torch.tensor([0, 5, 0])))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5, 0]), "class 5 is outside the model's classes, 0 to 4"),
        (torch.tensor([0, -1, 0]), "class -1 is outside"),
        ([0, 1, 7], "class 7 is outside"),
        (torch.tensor([1]), "1 labels do not fit 3 images"),
        (torch.tensor([0, 1, 2, 3]), "4 labels do not fit 3 images"),
        (torch.tensor([[0], [1], [2]]), r"of shape \(3, 1\); give an integer per image"),
        (torch.tensor(2), r"of shape \(\); give an integer per image"),
        (torch.tensor([0.0, 1.0, 1.7]), "labels are torch.float32"),
        (torch.tensor([True, False, True]), "labels are torch.bool"),
        (["a", "b", "c"], "the labels are no numbers; give an integer per image"),
        ((0, 1, None), "the labels are no numbers"),
        (np.array(["a", "b", "c"]), "the labels are no numbers"),
        ([0, [1], 2], "the labels are no numbers"),
        ([0, 1, 2**70], "the labels are no numbers"),
        (torch.tensor([0, 1, 2j]), "labels are torch.complex64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message, model):
    config = SamplingConfig(num_sampling_steps="2")
    with pytest.raises(UserError, match=message):
        next(generate(model, PixelVAE(), config, torch.arange(3), 2, labels=labels))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (["a"], "the indices are no numbers; give an integer per image"),
        ([0.5], "indices are torch.float32"),
        (3, r"indices are torch.int64 of shape \(\)"),
        (None, "the indices are no numbers"),
    ],
)
def test_indices_that_are_no_integers_are_refused(indices, message, model):
    config = SamplingConfig(num_sampling_steps="2")
    with pytest.raises(UserError, match=message):
        next(generate(model, PixelVAE(), config, indices, 2))


def test_indices_can_be_a_list(model):
    config = SamplingConfig(num_sampling_steps="2")
    (batch,) = generate(model, PixelVAE(), config, [4, 1], 2)
    (expected,) = generate(model, PixelVAE(), config, torch.tensor([4, 1]), 2)
    assert batch.indices.tolist() == [4, 1]
    assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize("labels", [[4, 1, 1], np.array([4, 1, 1], np.uint8)])
def test_labels_can_be_a_list_or_an_array(labels, model):
    config = SamplingConfig(num_sampling_steps="2")
    (batch,) = generate(model, PixelVAE(), config, torch.arange(3), 3, labels=labels)
    assert batch.labels.tolist() == [4, 1, 1]


def test_null_labels_draw_what_the_model_draws_without_labels(model):
    config = SamplingConfig(num_sampling_steps="3", labels="null")
    drawn = draw(model, config, [0, 1, 2], 3)
    noise = ImageNoise(config.seed, torch.arange(3), (3, 8, 8), torch.device("cpu"))
    latents = create_sampler("ddpm", "3").sample(model, noise(0), noise_at=noise)
    expected = to_uint8(PixelVAE().decode(latents))
    assert torch.equal(torch.stack([image for image, _ in drawn.values()]), expected)
    assert [label for _, label in drawn.values()] == [5, 5, 5]


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_the_bar_moves_at_every_step(solver, model):
    config = SamplingConfig(num_sampling_steps="4", solver=solver)
    counts = []
    with image_bar(12, initial=8, file=io.StringIO()) as bar:
        handle = model.register_forward_pre_hook(lambda module, inputs: counts.append(bar.n))
        list(generate(model, PixelVAE(), config, torch.arange(4), 2, progress=bar))
        handle.remove()
        assert counts == [8, 8.5, 9, 9.5, 10, 10.5, 11, 11.5]
        assert bar.n == 12


def test_images_that_are_not_finite_are_named():
    broken = create_tiny_model().eval()
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[2] = float("nan")
    config = SamplingConfig(num_sampling_steps="2", labels="balanced")
    with pytest.raises(UserError, match=r"images \[12\] are not finite"):
        draw(broken, config, [10, 12, 13], 3)
    config = SamplingConfig(num_sampling_steps="1", labels="2")
    with pytest.raises(UserError, match=r"images \[0, 1, .*, 7\] and 12 more are not finite"):
        draw(broken, config, list(range(20)), 20)


def test_rounded_weights_draw_the_same_images(model):
    config = SamplingConfig(num_sampling_steps="3", cfg_scale=2.0, precision="bf16")
    rounded = copy.deepcopy(model)
    round_weights(rounded)
    expected, drawn = (draw(network, config, [0, 1, 2], 3) for network in (model, rounded))
    for index in range(3):
        assert torch.equal(drawn[index][0], expected[index][0])
    dtypes = {name: parameter.dtype for name, parameter in rounded.named_parameters()}
    assert dtypes["blocks.0.mlp.fc1.weight"] == torch.bfloat16
    assert dtypes["final_layer.linear.weight"] == torch.float32
