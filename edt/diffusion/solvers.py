"""The table of samplers by name, and the few-step solvers of diffusers.

DPM-Solver++ (Lu et al., 2022) and UniPC (Zhao et al., 2023) solve the probability-flow ODE. Both
are deterministic multistep methods of order 2 in the predicted clean latent. A step calls the model
once.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from edt.diffusion.samplers import DDIMSampler, DDPMSampler, NoiseAt, Sampler
from edt.utils.choices import unknown_choice
from edt.utils.errors import UserError

MAX_FEW_STEPS = 999  # with more, the spacing of FewStepSampler visits a timestep twice


class FewStepSampler(Sampler):
    """A solver of diffusers over some of the 1000 timesteps.

    The timesteps have diffusers' spacing "linspace", which it uses for DiT: evenly spaced in t, as
    DPM-Solver's authors advise for latents, from 999 down to 999 / steps. The last step ends at
    noise level 0, so it returns the predicted clean latent. Other spacings do not fit: "trailing"
    visits a timestep -1 for 62 of the possible numbers of steps, and spacings even in log-SNR fall
    between the discrete timesteps that the model knows.

    Args:
        scheduler_name: name of a scheduler class of diffusers.
        steps: 1 to 999, a plain number.

    Raises:
        UserError: ``steps`` is not a plain number from 1 to 999.
    """

    def __init__(self, scheduler_name: str, steps: str | int) -> None:
        self._scheduler_name, self._steps = scheduler_name, _plain_number(steps)
        self.reset()
        self.timesteps = self._scheduler.timesteps.tolist()

    def reset(self) -> None:
        import diffusers  # slow to import

        # A fresh scheduler for every run: it keeps the history of the run.
        self._scheduler: Any = getattr(diffusers, self._scheduler_name)(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            solver_order=2,
            timestep_spacing="linspace",
            final_sigmas_type="zero",
        )
        self._scheduler.set_timesteps(self._steps)
        self._scheduler.set_begin_index(0)  # otherwise step() looks t up in its timesteps

    def update(
        self, output: torch.Tensor, x: torch.Tensor, i: int, noise_at: NoiseAt | None
    ) -> torch.Tensor:
        # The ODE does not use the learned variance. eps becomes float32 because the scheduler casts
        # the next x to the dtype of eps, and x must stay float32.
        eps = output.chunk(2, dim=1)[0].float()
        return self._scheduler.step(eps, self.timesteps[i - 1], x).prev_sample


def _plain_number(steps: str | int) -> int:
    """The number of steps as an int. Few-step solvers accept no respacing such as "ddim50"."""
    try:
        count = int(steps)
    except ValueError:
        raise UserError(
            f"the few-step solvers take a plain number of sampling steps such as 20, not {steps!r}"
        ) from None
    if not 1 <= count <= MAX_FEW_STEPS:
        raise UserError(
            f"the few-step solvers take 1 to {MAX_FEW_STEPS} sampling steps, not {count}"
        )
    return count


Solver = Literal["ddpm", "ddim", "dpm++", "unipc"]

# A new solver is one entry here, and its name in the Literal above.
SOLVERS: dict[Solver, Callable[[str | int], Sampler]] = {
    "ddpm": DDPMSampler,
    "ddim": DDIMSampler,
    "dpm++": functools.partial(FewStepSampler, "DPMSolverMultistepScheduler"),
    "unipc": functools.partial(FewStepSampler, "UniPCMultistepScheduler"),
}


def create_sampler(solver: Solver, steps: str | int) -> Sampler:
    """Create a sampler by name.

    Args:
        solver: a key of :data:`SOLVERS`.
        steps: "250"; for ddpm and ddim also "ddim50" and "10,15,25".

    Raises:
        UserError: unknown solver, or it cannot take these steps.
    """
    if solver not in SOLVERS:
        raise unknown_choice("solver", solver, Solver)
    return SOLVERS[solver](steps)
