"""The diffusion process: tables, training losses, sampling loops and timestep samplers. Knows no
model.
"""

from edt.diffusion.gaussian import GaussianDiffusion
from edt.diffusion.schedule import linear_betas, respaced_timesteps
from edt.diffusion.solvers import FEW_STEP_SOLVERS, FewStepSolver, parse_steps
from edt.diffusion.timesteps import LossSecondMomentSampler, UniformSampler, create_timestep_sampler

__all__ = [
    "FEW_STEP_SOLVERS",
    "FewStepSolver",
    "GaussianDiffusion",
    "LossSecondMomentSampler",
    "UniformSampler",
    "create_diffusion",
    "create_timestep_sampler",
    "linear_betas",
    "parse_steps",
    "respaced_timesteps",
]


def create_diffusion(timestep_respacing: str | int = "") -> GaussianDiffusion:
    """The process every EDT model is trained with: 1000 linear betas, noise prediction, learned
    range variance.

    Args:
        timestep_respacing: "" for all 1000 steps (training), "250", "ddim50" or "10,15,25";
            see :func:`edt.diffusion.schedule.respaced_timesteps`.
    """
    return GaussianDiffusion(linear_betas(), respaced_timesteps(timestep_respacing))
