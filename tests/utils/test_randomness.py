import torch
from scipy.stats import chisquare, kstest

from edt.utils.randomness import ImageNoise, generator, integers, normal


def test_a_generator_is_a_function_of_seed_stream_and_step():
    def draw(*key):
        return torch.rand(8, generator=generator(*key))

    assert torch.equal(draw(1, "noise", 5), draw(1, "noise", 5))
    for other in ((2, "noise", 5), (1, "drop", 5), (1, "noise", 6), (1, "noise/5", 5)):
        assert not torch.equal(draw(1, "noise", 5), draw(*other))


def test_noise_of_an_image_depends_on_its_index_only():
    indices = torch.arange(100)
    noise = normal(3, "noise", 7, indices, (4, 8, 8), "cpu")
    assert torch.equal(normal(3, "noise", 7, indices[[41, 7]], (4, 8, 8), "cpu"), noise[[41, 7]])
    assert not torch.equal(normal(3, "noise", 8, indices, (4, 8, 8), "cpu"), noise)
    assert not torch.equal(normal(4, "noise", 7, indices, (4, 8, 8), "cpu"), noise)
    assert normal(0, "a", 0, indices, (3, 1), "cpu").shape == (100, 3, 1)  # an odd number


def test_image_noise_is_the_noise_of_a_stream_at_each_step():
    indices = torch.tensor([4, 9])
    noise = ImageNoise(3, indices, (2, 5), torch.device("cpu"))
    assert torch.equal(noise(7), normal(3, "noise", 7, indices, (2, 5), "cpu"))
    assert not torch.equal(noise(0), noise(1))


def test_noise_is_normal_and_uncorrelated():
    noise = normal(0, "noise", 0, torch.arange(400), (1024,), "cpu")
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert kstest(noise[:, 0].numpy(), "norm").pvalue > 0.01
    assert kstest(noise[0].numpy(), "norm").pvalue > 0.01
    for correlation in (torch.corrcoef(noise), torch.corrcoef(noise[:, ::4].T)):
        off = correlation - torch.eye(len(correlation))
        bound = 6 / (1024 if len(off) == 400 else 400) ** 0.5
        assert off.abs().max() < bound
    after = normal(0, "noise", 1, torch.arange(400), (1024,), "cpu")
    assert (
        abs(torch.corrcoef(torch.stack([noise.flatten(), after.flatten()]))[0, 1])
        < 6 / noise.numel() ** 0.5
    )


def test_integers_are_uniform():
    drawn = integers(0, "labels", 0, torch.arange(50_000), 1000)
    assert drawn.min() == 0 and drawn.max() == 999
    assert chisquare(torch.bincount(drawn, minlength=1000).numpy()).pvalue > 0.01
    assert torch.equal(integers(0, "labels", 0, torch.tensor([49_999]), 1000), drawn[-1:])
