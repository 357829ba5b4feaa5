import dataclasses

import pytest
import torch
from tiny_training import tiny_baseline, tiny_trainer

from edt.registry import create_model
from edt.training.step_inputs import StepInputs, draw_posterior_noise


def test_independent_passes_draw_their_own_noise_and_label_dropout():
    inputs = tiny_trainer(global_batch_size=200).draw_inputs()
    full, masked = inputs.passes
    assert not torch.equal(full.noise, masked.noise)
    assert not torch.equal(full.drop, masked.drop)


def test_shared_passes_share_noise_and_label_dropout():
    full, masked = tiny_trainer(noise="shared").draw_inputs().passes
    assert torch.equal(full.noise, masked.noise)
    assert torch.equal(full.drop, masked.drop)
    independent = tiny_trainer().draw_inputs().passes[0]
    assert torch.equal(full.noise, independent.noise)  # from the same stream


def test_only_the_second_pass_has_masks():
    for noise in ("independent", "shared"):
        full, masked = tiny_trainer(noise=noise).draw_inputs().passes
        assert full.masks is None
        assert masked.masks.down0.shape == (6, 64)
        assert masked.masks.down1.shape == (6, 16)
        assert masked.masks.mid is None
    assert len(tiny_trainer(masking="none").draw_inputs().passes) == 1


def test_edt_xl_has_a_mask_inside_stage_1():
    trainer = tiny_trainer()
    config = create_model("EDT-XL/2", device="meta").config
    trainer.model.config = dataclasses.replace(config, input_size=16, in_channels=3)
    assert trainer.draw_inputs().passes[1].masks.mid.shape == (6, 64)


def test_mdtv2_draws_a_ratio_for_each_step_and_tokens_for_each_image():
    trainer = tiny_trainer(model=tiny_baseline("MDTv2"), masking="mdt", global_batch_size=3)
    counts = []
    for step in range(200):
        trainer.step = step
        full, masked = trainer.draw_inputs().passes
        assert full.masks is None
        kept = masked.masks.kept
        assert kept.shape[0] == 3
        counts.append(kept.shape[1])
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(trainer.draw_inputs().passes[1].masks.kept, kept)
    assert torch.equal(masked.select(slice(1, 2)).masks.kept, kept[1:2])
    # Of 64 tokens, 30 to 50 % are hidden.
    assert (min(counts), max(counts)) == (32, 44)
    assert sum(counts) / len(counts) == pytest.approx(64 * 0.6, abs=1)


def test_labels_are_dropped_at_the_configured_rate():
    for rate in (0.1, 0.4):
        trainer = tiny_trainer(global_batch_size=6000, label_dropout=rate)
        drop = trainer.draw_inputs().passes[0].drop
        assert drop.float().mean() == pytest.approx(rate, abs=0.02)


def test_inputs_follow_seed_and_step():
    def values(inputs: StepInputs) -> torch.Tensor:
        full, masked = inputs.passes
        tensors = [inputs.t, full.noise, full.drop, masked.noise, masked.drop, *masked.masks[:2]]
        return torch.cat([tensor.flatten().float() for tensor in tensors])

    trainer = tiny_trainer()
    first = values(trainer.draw_inputs())
    assert torch.equal(values(trainer.draw_inputs()), first)
    assert not torch.equal(values(tiny_trainer(seed=1).draw_inputs()), first)
    trainer.step = 1
    assert not torch.equal(values(trainer.draw_inputs()), first)


def test_a_process_selects_its_rows_of_every_tensor():
    inputs = tiny_trainer().draw_inputs()
    rows = slice(2, 5)
    selected = inputs.select(rows)
    assert torch.equal(selected.t, inputs.t[rows])
    assert torch.equal(selected.weight, inputs.weight[rows])
    for selected_pass, complete in zip(selected.passes, inputs.passes, strict=True):
        assert torch.equal(selected_pass.noise, complete.noise[rows])
        assert torch.equal(selected_pass.drop, complete.drop[rows])
    masks = inputs.passes[1].masks
    assert torch.equal(selected.passes[1].masks.down0, masks.down0[rows])
    assert torch.equal(selected.passes[1].masks.down1, masks.down1[rows])


def test_posterior_noise_is_for_the_global_batch():
    trainer = tiny_trainer()
    noise = draw_posterior_noise(trainer.config, 0, trainer.model.config, trainer.device)
    assert noise.shape == (6, 3, 16, 16)
    assert not torch.equal(noise, trainer.draw_inputs().passes[0].noise)
