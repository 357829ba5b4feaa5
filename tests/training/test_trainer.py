import dataclasses
import shutil

import golden_rule
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_training import (
    NUM_CLASSES,
    state_tensors,
    tiny_baseline,
    tiny_batch,
    tiny_model,
    tiny_trainer,
)
from torch.utils._python_dispatch import TorchDispatchMode

from edt.data.features import Batch
from edt.masking import TokenMasks
from edt.registry import create_model
from edt.training.accelerator import create_accelerator
from edt.training.config import TrainConfig
from edt.training.metrics import Meter
from edt.training.step_inputs import PassInputs, StepInputs
from edt.training.trainer import Trainer
from edt.utils.errors import UserError

GOLDEN = golden_rule.load("train_s.npz")


def assert_same_gradients(expected: torch.nn.Module, model: torch.nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        difference = parameter.grad - parameters[name].grad
        assert difference.norm() <= 1e-5 * parameter.grad.norm(), name


def assert_step_equals_single_passes(
    trainer: Trainer, reference: torch.nn.Module, batch: Batch, inputs: StepInputs
) -> None:
    """Compare a step with one call of a reference per pass: the losses and the gradients."""
    losses = []
    for pass_inputs in inputs.passes:
        labels = torch.where(pass_inputs.drop, NUM_CLASSES, batch.labels)
        x_t = trainer.diffusion.q_sample(batch.stored, inputs.t, pass_inputs.noise)
        output = reference(x_t, inputs.t, labels, pass_inputs.masks)
        terms = trainer.diffusion.losses(output, batch.stored, x_t, inputs.t, pass_inputs.noise)
        losses.append(terms.loss)
    sum((inputs.weight * loss).mean() for loss in losses).backward()
    report = trainer.train_step(batch, inputs)
    torch.testing.assert_close(report.losses, torch.stack(losses, dim=1), rtol=1e-5, atol=1e-6)
    assert_same_gradients(reference, trainer.model)


def golden_step(step: int) -> tuple[Batch, StepInputs]:
    """The batch and the inputs of a step of the release, counted from 1."""

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(GOLDEN[f"s{step}.{name}"])

    masks = TokenMasks(tensor("keep_down0"), tensor("keep_down1"))
    full = PassInputs(tensor("full.noise"), tensor("full.drop"))
    masked = PassInputs(tensor("mask.noise"), tensor("mask.drop"), masks)
    inputs = StepInputs(tensor("t"), tensor("w"), (full, masked))
    return Batch(tensor("x0"), tensor("y")), inputs


# ---------------------------------------------------------------------------------------------
# Losses and gradients


def test_four_training_steps_are_those_of_the_release():
    config = TrainConfig(global_batch_size=4, lr_steps=400, ema_decay=0.99)
    model = golden_rule.fill(create_model("EDT-S/2"))
    trainer = Trainer(model, config, Accelerator(cpu=True))
    for step in range(1, 5):
        batch, inputs = golden_step(step)
        report = trainer.train_step(batch, inputs)
        losses = (report.losses * inputs.weight[:, None]).mean(dim=0)
        np.testing.assert_allclose(losses.double().numpy(), GOLDEN["losses"][step - 1], rtol=1e-5)
    for name, network in (("model", trainer.model), ("ema", trainer.ema)):
        errors = []
        for key, value in network.named_parameters():
            entries = value.detach().flatten()[np.linspace(0, value.numel() - 1, 8).astype(int)]
            errors.append(np.abs(entries.numpy() - GOLDEN[f"final.{name}.{key}"]))
        assert (np.concatenate(errors) <= 1e-5).mean() >= 0.99, name


def test_two_runs_are_equal_and_another_seed_is_not():
    def weights(seed: int) -> torch.Tensor:
        trainer = tiny_trainer(seed=seed)
        for step in range(3):
            trainer.train_step(tiny_batch(step))
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_step_draws_its_own_inputs():
    """Without ``inputs`` a step takes those of ``draw_inputs``, for its own step number."""
    drawing, given = tiny_trainer(), tiny_trainer()
    for step in range(2):
        report = drawing.train_step(tiny_batch(step))
        expected = given.train_step(tiny_batch(step), given.draw_inputs())
        assert torch.equal(report.losses, expected.losses)
        assert torch.equal(report.t, expected.t)
        assert torch.equal(report.weight, expected.weight)


def test_a_report_shows_the_timesteps_and_weights_of_the_step():
    trainer = tiny_trainer()
    inputs = trainer.draw_inputs()._replace(weight=torch.linspace(0.5, 2, 6))
    report = trainer.train_step(tiny_batch(0), inputs)
    assert torch.equal(report.t, inputs.t)
    assert torch.equal(report.weight, inputs.weight)
    gradients = [p.grad for p in trainer.model.parameters()]
    torch.testing.assert_close(report.grad_norm, torch.nn.utils.get_total_norm(gradients))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_make_the_same_update(micro_batch_size):
    complete, split = tiny_trainer(), tiny_trainer(micro_batch_size)
    losses = [trainer.train_step(tiny_batch(0)).losses for trainer in (complete, split)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert_same_gradients(complete.model, split.model)


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize(
    "options", [{}, {"separate_passes": True}, {"separate_passes": True, "micro_batch_size": 4}]
)
@pytest.mark.parametrize("mid_mask_block", [None, 0])
def test_passes_together_or_apart_have_the_gradients_of_two_independent_ones(
    noise, options, mid_mask_block
):
    trainer, reference = tiny_trainer(**options, noise=noise), tiny_model()
    for model in (trainer.model, reference):  # EDT-XL has a mask inside stage 1
        model.config = dataclasses.replace(model.config, mid_mask_block=mid_mask_block)
    batch, inputs = tiny_batch(0), trainer.draw_inputs()
    assert_step_equals_single_passes(trainer, reference, batch, inputs)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_the_passes_of_mdtv2_go_through_one_after_the_other(noise, micro_batch_size):
    reference = tiny_baseline("MDTv2").train()
    trainer = tiny_trainer(
        micro_batch_size, model=tiny_baseline("MDTv2"), masking="mdt", noise=noise
    )
    batch, inputs = tiny_batch(0), trainer.draw_inputs()
    assert inputs.passes[0].masks is None
    assert_step_equals_single_passes(trainer, reference, batch, inputs)


@pytest.mark.parametrize(
    ("family", "masking", "untrained"),
    [
        ("DiT", "none", {"pos_embed"}),
        ("MDTv2", "none", {"sideblocks", "mask_token"}),
        ("MDTv2", "mdt", set()),
    ],
)
def test_only_what_a_pass_uses_is_trained(family, masking, untrained):
    trainer = tiny_trainer(model=tiny_baseline(family), masking=masking)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for step in range(2):
        trainer.train_step(tiny_batch(step))
    averages = dict(trainer.ema.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        is_trained = name.split(".")[0] not in untrained
        assert (parameter.grad is not None) == is_trained, name
        assert torch.equal(parameter, before[name]) != is_trained, name
        assert torch.equal(averages[name], before[name]) != is_trained, name
        assert (f"{name}/exp_avg" in trainer.state().tensors["optimizer"]) == is_trained


def test_a_masking_that_the_family_has_not_is_refused():
    for family, masking, known in (
        ("DiT", "edt", "none"),
        ("MDTv2", "edt", "mdt or none"),
        ("EDT", "mdt", "edt or none"),
    ):
        model = tiny_model() if family == "EDT" else tiny_baseline(family)
        with pytest.raises(UserError, match=f"{family} has no masking '{masking}'.* {known}$"):
            tiny_trainer(model=model, masking=masking)
    with pytest.raises(UserError, match="--compile full .* use --compile block"):
        tiny_trainer(model=tiny_baseline("MDTv2"), masking="mdt", compile="full")


def test_every_trainable_parameter_gets_a_gradient_in_a_step():
    trainer = tiny_trainer()
    trainer.train_step(tiny_batch(0))
    parameters = trainer.model.named_parameters()
    assert [name for name, p in parameters if p.grad is None or not p.grad.any()] == []


def test_clipping():
    free, clipped = tiny_trainer(), tiny_trainer(max_grad_norm=0.01)
    norms = [trainer.train_step(tiny_batch(0)).grad_norm for trainer in (free, clipped)]
    assert norms[0] == norms[1]  # the report shows the norm before clipping
    assert norms[0] > 0.01
    total = torch.nn.utils.get_total_norm([p.grad for p in clipped.model.parameters()])
    assert total == pytest.approx(0.01, rel=1e-3)


def test_moments_are_sampled_afresh_in_each_step():
    trainer = tiny_trainer()
    mean, deviation = golden_rule.normal(0, 6, 3, 16, 16), torch.full((6, 3, 16, 16), 0.5)
    moments = torch.cat([mean, deviation], dim=1)
    latents = trainer.clean_latents(moments)
    assert torch.equal(trainer.clean_latents(moments), latents)
    assert (latents - mean).std() == pytest.approx(0.5, rel=0.05)
    trainer.step = 1
    assert not torch.equal(trainer.clean_latents(moments), latents)
    assert torch.equal(trainer.clean_latents(mean), mean)  # stored latents pass through


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize("compile", ["block", "full"])
def test_compiled_steps_are_the_same(compile):
    plain, compiled = tiny_trainer(noise="shared"), tiny_trainer(noise="shared", compile=compile)
    for step in range(2):
        losses = [trainer.train_step(tiny_batch(step)).losses for trainer in (plain, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        if step == 0:  # from the same weights; Adan's first step enlarges their rounding errors
            assert_same_gradients(plain.model, compiled.model)
    assert plain.state().tensors["model"].keys() == compiled.state().tensors["model"].keys()


# ---------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("optimizer", ["adan", "adan-pytorch"])
@pytest.mark.parametrize(
    ("family", "masking"), [("EDT", "edt"), ("DiT", "none"), ("MDTv2", "mdt"), ("MDTv2", "none")]
)
def test_state_survives_a_round_trip(optimizer, family, masking):
    models = [tiny_model() if family == "EDT" else tiny_baseline(family) for _ in range(2)]
    trainer, restored = (
        tiny_trainer(model=model, optimizer=optimizer, masking=masking) for model in models
    )
    for step in range(2):
        trainer.train_step(tiny_batch(step))
    state = trainer.state()
    copies = {
        file: {name: value.clone() for name, value in tensors.items()}
        for file, tensors in state.tensors.items()
    }
    restored.load_state(dataclasses.replace(state, tensors=copies))
    assert restored.step == 2
    for step in range(2, 4):
        trainer.train_step(tiny_batch(step))
        restored.train_step(tiny_batch(step))
    expected, tensors = state_tensors(trainer), state_tensors(restored)
    assert expected.keys() == tensors.keys()
    differing = [name for name, value in expected.items() if not torch.equal(value, tensors[name])]
    assert differing == []
    assert restored.state().optimizer == trainer.state().optimizer


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(place):
    trainer = tiny_trainer()
    trainer.train_step(tiny_batch(0))
    before, batch = state_tensors(trainer), tiny_batch(1)
    weight = trainer.model.blocks[2].mlp.fc1.weight
    handle = None
    if place == "loss":
        batch.stored[3, 0, 2, 2] = float("nan")
    else:
        handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    report = trainer.train_step(batch)
    assert report.found_inf
    assert (trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row) == (2, 1, 1)
    after = state_tensors(trainer)
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    if handle is not None:
        handle.remove()
    report = trainer.train_step(tiny_batch(2))
    assert not report.found_inf
    assert report.grad_norm.isfinite()
    assert (trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row) == (3, 1, 0)
    assert trainer.state().skipped_steps == 1


# ---------------------------------------------------------------------------------------------
# Precision


def test_bfloat16_step_is_near_float32_and_keeps_float32_state():
    exact, rounded = tiny_trainer(precision="fp32"), tiny_trainer(precision="bf16")
    losses = [trainer.train_step(tiny_batch(0)).losses for trainer in (exact, rounded)]
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.05)
    files = dict(rounded.state().tensors)
    del files["sampler"]  # float64
    dtypes = {value.dtype for tensors in files.values() for value in tensors.values()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_configuration_decides_the_precision(precision, dtype):
    """A plain accelerator is enough: the trainer enters autocast itself."""
    trainer = tiny_trainer(precision=precision)
    dtypes = []
    trainer.model.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, arguments, output: dtypes.append(output.dtype)
    )
    trainer.train_step(tiny_batch(0))
    assert set(dtypes) == {dtype}


def test_an_accelerator_of_another_precision_is_refused():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for precision in ("fp32", "tf32"):
        with pytest.raises(UserError, match=f"computes in bf16.* in {precision}"):
            Trainer(tiny_model(), TrainConfig(precision=precision), accelerator)
    Trainer(tiny_model(), TrainConfig(precision="bf16"), accelerator)


@pytest.mark.parametrize(
    "variables",
    [
        {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4"},
        {"MIXED_PRECISION": "fp16", "GRADIENT_ACCUMULATION_STEPS": "auto"},
        {"DYNAMO_BACKEND": "EAGER", "GRADIENT_CLIPPING": "0.001"},
    ],
    ids=str,
)
def test_variables_of_the_launcher_change_no_number(variables, monkeypatch):
    def losses_and_gradients() -> list[torch.Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = TrainConfig(global_batch_size=6, precision="fp32")
        trainer = Trainer(tiny_model(), config, create_accelerator(), micro_batch_size=4)
        assert trainer.network is trainer.model  # neither compiled nor wrapped
        losses = trainer.train_step(tiny_batch(0)).losses
        return [losses, *(p.grad for p in trainer.model.parameters())]

    expected = losses_and_gradients()
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for tensor, expected_tensor in zip(losses_and_gradients(), expected, strict=True):
        assert torch.equal(tensor, expected_tensor)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("USE_FSDP", "true", "asks for FSDP"),
        ("USE_DEEPSPEED", "True", "asks for DeepSpeed"),
        ("USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("USE_PARALLELISM_CONFIG", "true", "asks for tensor or context parallelism"),
        ("MIXED_PRECISION", "fp8", "asks for fp8"),
        ("FP8_BACKEND", "TE", "asks for fp8"),
    ],
)
def test_a_launcher_that_asks_for_another_way_of_training_is_refused(
    name, value, message, monkeypatch
):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=message):
        create_accelerator()


# ---------------------------------------------------------------------------------------------
# No waiting for the device


class ForbidHostReads(TorchDispatchMode):
    """Fails where the host asks for a tensor's value, or for a shape that depends on one.

    On a GPU the host would wait there.
    """

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.overloadpacket.__name__ not in self.forbidden, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_a_step_never_asks_the_device(noise, max_grad_norm):
    trainer = tiny_trainer(noise=noise, max_grad_norm=max_grad_norm)
    meter = Meter(trainer)
    with ForbidHostReads():
        for step in range(2):
            meter.add(trainer.train_step(tiny_batch(step)))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(trainer.skipped_steps)
    assert meter.read()["loss"] > 0
    assert trainer.skipped_in_a_row == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits_for_it():
    config = TrainConfig(global_batch_size=6, precision="bf16")
    trainer = Trainer(tiny_model(), config, Accelerator())
    batch = Batch(*(tensor.cuda() for tensor in tiny_batch(0)))
    trainer.train_step(batch)  # the first step makes the tables and the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.skipped_steps == 0
