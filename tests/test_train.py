import dataclasses
import shutil

import golden_rule
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from edt.checkpoints.folder import build
from edt.masking import TokenMasks
from edt.training.loop import Meter
from edt.training.step_inputs import PassDraws, StepDraws
from edt.training.trainer import TrainConfig, Trainer

GOLDEN = golden_rule.load("train_s.npz")


def tiny_trainer(
    micro_batch_size: int | None = None,
    separate_passes: bool = False,
    compile: str = "off",
    **config,
) -> Trainer:
    torch.manual_seed(0)
    model = golden_rule.fill(build("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=5))
    config = TrainConfig(**{"global_batch_size": 6, "ema_decay": 0.9, "lr_steps": 40, **config})
    return Trainer(model, config, Accelerator(cpu=True), micro_batch_size, separate_passes, compile)


def batch(step: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return golden_rule.normal(100 + step, size, 3, 16, 16), torch.arange(size) % 5


def same_gradients(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, one), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm(), name


def golden_draws(step: int) -> StepDraws:
    def tensor(name):
        return torch.from_numpy(GOLDEN[f"s{step}.{name}"])

    masks = TokenMasks(tensor("keep_down0"), tensor("keep_down1"))
    full, masked = (
        PassDraws(tensor(f"{one}.noise"), tensor(f"{one}.drop")) for one in ("full", "mask")
    )
    return StepDraws(tensor("t"), tensor("w"), (full, masked._replace(masks=masks)))


def test_four_training_steps_are_those_of_the_release():
    trainer = Trainer(
        golden_rule.fill(build("EDT-S/2")),
        TrainConfig(global_batch_size=4, lr_steps=400, ema_decay=0.99),
        Accelerator(cpu=True),
    )
    for step in range(1, 5):
        draws = golden_draws(step)
        x, y = (torch.from_numpy(GOLDEN[f"s{step}.{name}"]) for name in ("x0", "y"))
        losses = (trainer.update(x, y, draws).losses * draws.weight[:, None]).mean(dim=0)
        np.testing.assert_allclose(losses.double().numpy(), GOLDEN["losses"][step - 1], rtol=1e-5)
    for name, network in (("model", trainer.model), ("ema", trainer.ema)):
        errors = []
        for key, value in network.named_parameters():
            entries = value.detach().flatten()[np.linspace(0, value.numel() - 1, 8).astype(int)]
            errors.append(np.abs(entries.numpy() - GOLDEN[f"final.{name}.{key}"]))
        assert (np.concatenate(errors) <= 1e-5).mean() >= 0.99, name


def test_two_runs_are_equal_and_another_seed_is_not():
    def weights(seed):
        trainer = tiny_trainer(seed=seed)
        for step in range(3):
            trainer.update(*batch(step), trainer.draw())
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_make_the_same_update(micro_batch_size):
    whole, parts = tiny_trainer(), tiny_trainer(micro_batch_size)
    losses = [trainer.update(*batch(0), trainer.draw()).losses for trainer in (whole, parts)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    same_gradients(whole.model, parts.model)


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize(
    "options", [{}, {"separate_passes": True}, {"separate_passes": True, "micro_batch_size": 4}]
)
@pytest.mark.parametrize("mid", [None, 0])
def test_passes_together_or_apart_have_the_gradients_of_two_independent_ones(noise, options, mid):
    trainer = tiny_trainer(**options, noise=noise)
    reference = golden_rule.fill(build("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=5))
    for model in (trainer.model, reference):  # the mask inside stage 1 that EDT-XL has
        model.config = dataclasses.replace(model.config, mid_mask_block=mid)
    (x, y), draws = batch(0), trainer.draw()
    losses = []
    for one in draws.passes:
        labels = torch.where(one.drop, 5, y)
        terms = trainer.diffusion.training_losses(
            reference, x, draws.t, one.noise, {"y": labels, "masks": one.masks}
        )
        losses.append(terms["loss"])
    sum((draws.weight * loss).mean() for loss in losses).backward()
    report = trainer.update(x, y, draws)
    torch.testing.assert_close(report.losses, torch.stack(losses, dim=1), rtol=1e-5, atol=1e-6)
    same_gradients(reference, trainer.model)


def test_every_trainable_parameter_gets_a_gradient_in_a_step():
    trainer = tiny_trainer()
    trainer.update(*batch(0), trainer.draw())
    assert [
        name for name, p in trainer.model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_draws():
    independent, shared, plain = (
        tiny_trainer(**config).draw() for config in ({}, {"noise": "shared"}, {"masking": "none"})
    )
    full, masked = independent.passes
    assert full.masks is None and masked.masks is not None and masked.masks.mid is None
    assert not torch.equal(full.noise, masked.noise)
    assert (
        torch.equal(shared.passes[0].noise, shared.passes[1].noise)
        and shared.passes[0].masks is None
    )
    assert torch.equal(shared.passes[0].drop, shared.passes[1].drop)
    assert torch.equal(shared.passes[0].noise, full.noise)  # the same stream
    assert len(plain.passes) == 1
    drops = torch.cat(
        [tiny_trainer(global_batch_size=2000, seed=seed).draw().passes[0].drop for seed in range(3)]
    )
    assert drops.float().mean() == pytest.approx(0.1, abs=0.02)
    trainer = tiny_trainer()
    trainer.model.config = dataclasses.replace(
        build("EDT-XL/2", "meta").config, input_size=16, in_channels=3
    )
    assert trainer.draw().passes[1].masks.mid.shape == (6, 64)


def test_state_survives_a_round_trip():
    for optimizer in ("adan", "adan-pytorch"):
        trainer, other = tiny_trainer(optimizer=optimizer), tiny_trainer(optimizer=optimizer)
        for step in range(2):
            trainer.update(*batch(step), trainer.draw())
        tensors, documents = trainer.state()
        tensors = {
            kind: {name: value.clone() for name, value in named.items()}
            for kind, named in tensors.items()
        }
        other.load_state(tensors, documents["state"])
        for one in (trainer, other):
            for step in range(2, 4):
                one.update(*batch(step), one.draw())
        final, resumed = trainer.state()[0], other.state()[0]
        assert {kind: set(named) for kind, named in final.items()} == {
            kind: set(named) for kind, named in resumed.items()
        }
        for kind, named in final.items():
            for name, value in named.items():
                assert torch.equal(value, resumed[kind][name]), (optimizer, kind, name)


def test_bfloat16_step_is_near_float32_and_keeps_float32_state():
    exact = tiny_trainer(precision="fp32")
    losses = [exact.update(*batch(0), exact.draw()).losses]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model = golden_rule.fill(build("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=5))
    rounded = Trainer(model, exact.config, Accelerator(cpu=True, mixed_precision="bf16"))
    losses.append(rounded.update(*batch(0), rounded.draw()).losses)
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.05)
    assert {
        value.dtype
        for kind, named in rounded.state()[0].items()
        if kind != "sampler"
        for value in named.values()
    } == {torch.float32}


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{name}": value.clone()
        for kind, named in trainer.state()[0].items()
        for name, value in named.items()
    }


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_no_trace(where):
    trainer = tiny_trainer()
    trainer.update(*batch(0), trainer.draw())
    before, (x, y) = everything(trainer), batch(1)
    if where == "loss":
        x[3, 0, 2, 2] = float("nan")
    else:
        handle = trainer.model.blocks[2].mlp.fc1.weight.register_hook(
            lambda gradient: gradient * float("inf")
        )
    report = trainer.update(x, y, trainer.draw())
    assert not report.applied and trainer.step == 2 and trainer.bad_steps == 1
    after = everything(trainer)
    assert before.keys() == after.keys() and all(
        torch.equal(value, after[name]) for name, value in before.items()
    )
    if where == "gradient":
        handle.remove()
    report = trainer.update(*batch(2), trainer.draw())
    assert report.applied and trainer.bad_steps == 1 and report.grad_norm.isfinite()


class NoAnswers(TorchDispatchMode):
    """Fails where a value of a tensor, or a shape that depends on it, is asked for: on a GPU the
    host would wait there.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.overloadpacket.__name__ not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
        ), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_never_asks_the_device(noise, clip):
    trainer = tiny_trainer(noise=noise, clip=clip)
    meter, (x, y) = Meter(trainer), batch(0)
    with NoAnswers():
        for _ in range(2):
            draws = trainer.draw()
            meter.add(trainer.update(trainer.latents(x), y, draws), draws)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(trainer.bad_steps)
    assert meter.read(1)["loss"] > 0 and trainer.bad_in_a_row == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits_for_it():
    model = golden_rule.fill(build("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=5))
    trainer = Trainer(
        model,
        TrainConfig(global_batch_size=6, precision="bf16"),
        Accelerator(mixed_precision="bf16"),
    )
    x, y = (tensor.cuda() for tensor in batch(0))
    trainer.update(x, y, trainer.draw())  # the first makes the tables and the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.update(x, y, trainer.draw())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.bad_steps == 0


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize("compile", ["block", "full"])
def test_compiled_steps_are_the_same(compile):
    plain, compiled = tiny_trainer(noise="shared"), tiny_trainer(noise="shared", compile=compile)
    for step in range(2):
        losses = [
            trainer.update(*batch(step), trainer.draw()).losses for trainer in (plain, compiled)
        ]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        if step == 0:  # from the same weights; Adan's first step makes more of their rounding
            same_gradients(plain.model, compiled.model)
    assert plain.state()[0]["model"].keys() == compiled.state()[0]["model"].keys()


def test_clipping():
    free, clipped = tiny_trainer(), tiny_trainer(clip=0.01)
    norms = [trainer.update(*batch(0), trainer.draw()).grad_norm for trainer in (free, clipped)]
    assert norms[0] == norms[1] > 0.01
    total = torch.nn.utils.get_total_norm([p.grad for p in clipped.model.parameters()])
    assert total == pytest.approx(0.01, rel=1e-3)


def test_fresh_features_are_sampled_anew_each_step():
    trainer = tiny_trainer()
    moments = torch.cat(
        [golden_rule.normal(0, 6, 3, 16, 16), torch.full((6, 3, 16, 16), 0.5)], dim=1
    )
    first = trainer.latents(moments)
    assert torch.equal(trainer.latents(moments), first)
    assert (first - moments[:, :3]).std() == pytest.approx(0.5, rel=0.05)
    trainer.step = 1
    assert not torch.equal(trainer.latents(moments), first)
    assert torch.equal(trainer.latents(moments[:, :3]), moments[:, :3])  # stored draws pass through
