"""Few-step solvers of the probability-flow ODE, from diffusers: DPM-Solver++ (Lu et al., 2022) and
UniPC (Zhao et al., 2023).

Both are deterministic multistep methods of order 2 in the predicted clean latent, one model call a
step."""

import torch
from tqdm.auto import tqdm

from edt.diffusion.gaussian import Model
from edt.utils.errors import UserError

FEW_STEP_SOLVERS = ("dpm++", "unipc")
MAX_STEPS = 999  # beyond it the spacing below would visit a timestep twice


def parse_steps(solver: str, steps: str | int) -> int:
    """The number of steps of a few-step solver.

    Raises:
        UserError: it is not a plain number (the spellings of a respaced process mean nothing here),
            or out of range.
    """
    try:
        count = int(steps)
    except ValueError:
        raise UserError(
            f"--solver {solver} takes a plain number of sampling steps such as 20, not {steps!r}"
        ) from None
    if not 1 <= count <= MAX_STEPS:
        raise UserError(f"--solver {solver} takes 1 to {MAX_STEPS} sampling steps, not {count}")
    return count


class FewStepSolver:
    """A solver over ``steps`` of the 1000 timesteps.

    The timesteps are diffusers' "linspace", what DiT is sampled with there: evenly spaced in t,
    which DPM-Solver's authors advise for latents, from 999 down to 999 / steps; the last step goes
    to noise 0 and so returns the predicted clean latent. "trailing" visits a timestep -1 for 62 of
    the possible numbers of steps, and spacings even in log-SNR fall between the discrete timesteps
    the model knows.

    Args:
        solver: one of :data:`FEW_STEP_SOLVERS`.
        steps: 1 to 999.

    Attributes:
        timesteps: those of the 1000-step process that the model sees, in the order visited.
    """

    def __init__(self, solver: str, steps: str | int):
        self._solver, self._steps = solver, parse_steps(solver, steps)
        self.timesteps: list[int] = self._scheduler().timesteps.tolist()

    def _scheduler(self):
        """A fresh scheduler: it keeps the history of one run."""
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler  # slow to import

        classes = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
        scheduler = classes[self._solver](
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            solver_order=2,
            timestep_spacing="linspace",
            final_sigmas_type="zero",
        )
        scheduler.set_timesteps(self._steps)
        scheduler.set_begin_index(0)  # spares it a search among the timesteps
        return scheduler

    @torch.no_grad()
    def sample_loop(
        self,
        model: Model,
        x: torch.Tensor,
        model_kwargs: dict | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """From noise x (B, C, ...) to a clean latent; arguments as
        ``GaussianDiffusion.ddim_sample_loop``.
        """
        scheduler = self._scheduler()
        for step in tqdm(self.timesteps, desc="denoising", leave=False, disable=not progress):
            t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
            # The learned variance is of no use to an ODE. The scheduler returns the type it is
            # given: float32.
            eps = model(x, t, **(model_kwargs or {})).chunk(2, dim=1)[0].float()
            x = scheduler.step(eps, step, x).prev_sample
        return x
