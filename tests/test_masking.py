import pytest
import torch

from edt.masking import EDT_RATIOS, MID_RATIO, TokenMasks, draw_masks


def draw(seed: int) -> TokenMasks:
    return draw_masks(64, 16, torch.Generator().manual_seed(seed), EDT_RATIOS, MID_RATIO)


@pytest.fixture(scope="module")
def draws() -> list[TokenMasks]:
    """The masks of 200 steps, for 64 images of 16 x 16 tokens."""
    return [draw(seed) for seed in range(200)]


@pytest.mark.parametrize(
    ("name", "ratio", "tokens"),
    [("down0", EDT_RATIOS[0], 256), ("down1", EDT_RATIOS[1], 64), ("mid", MID_RATIO, 256)],
)
def test_drawn_masks_have_the_papers_ratios(draws, name, ratio, tokens):
    masks = torch.stack([getattr(drawn, name) for drawn in draws])  # (200, 64, tokens)
    assert masks.shape == (200, 64, tokens)
    assert masks.dtype == torch.bool
    shares = 1 - masks.float().mean(dim=(1, 2))  # hidden, per step
    low, high = ratio
    assert shares.min() == pytest.approx(low, abs=0.02)
    assert shares.max() == pytest.approx(high, abs=0.02)
    assert shares.mean() == pytest.approx((low + high) / 2, abs=0.01)


def test_images_and_tokens_are_masked_independently(draws):
    hidden = 1 - draws[0].down0.float()
    probability = hidden.mean().item()
    # Standard deviations of binomial counts, with room for the largest of so many.
    expected_std = (probability * (1 - probability) / 256) ** 0.5
    assert hidden.mean(dim=1).std() == pytest.approx(expected_std, rel=0.3)
    expected_std = (probability * (1 - probability) / 64) ** 0.5
    assert hidden.mean(dim=0).std() == pytest.approx(expected_std, rel=0.3)


def test_masks_follow_the_generator(draws):
    for again, first, other in zip(draw(3), draws[3], draws[4], strict=True):
        assert torch.equal(again, first)
        assert not torch.equal(again, other)


def test_without_a_ratio_there_is_no_mask_inside_stage_1():
    masks = draw_masks(1, 8, torch.Generator())
    assert masks.mid is None
    assert masks.down0.shape == (1, 64)
    assert masks.down1.shape == (1, 16)


@pytest.fixture
def masks() -> TokenMasks:
    return draw_masks(4, 8, torch.Generator().manual_seed(0))


def test_selected_masks_are_those_of_the_images(masks):
    selected = masks.select(slice(1, 3))
    assert torch.equal(selected.down0, masks.down0[1:3])
    assert torch.equal(selected.down1, masks.down1[1:3])
    assert selected.mid is None


def test_the_full_pass_comes_first_and_keeps_everything(masks):
    both = masks.prepend_full_pass()
    for mask, masked_pass in zip(both[:2], masks[:2], strict=True):
        assert mask[:4].all()
        assert torch.equal(mask[4:], masked_pass)
    assert both.mid is None


def test_rows_are_repeated_to_as_many_as_the_masks_have(masks):
    x = torch.arange(4.0).view(4, 1)
    c = -x
    for copies in (1, 2):
        rows = masks if copies == 1 else masks.prepend_full_pass()
        repeated_x, repeated_c = rows.repeat_rows(x, c)
        assert repeated_x.flatten().tolist() == [0, 1, 2, 3] * copies
        assert torch.equal(repeated_c, -repeated_x)
    assert TokenMasks(None, None).repeat_rows(x)[0] is x
