"""The diffusion process: tables, losses, samplers, guidance and timestep samplers.

Nothing here imports a network: functions take the network, or its output, as an argument.
"""

from edt.diffusion.gaussian import GaussianDiffusion, create_diffusion
from edt.diffusion.guidance import GuidanceSchedule
from edt.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler
from edt.diffusion.schedule import linear_betas, respaced_timesteps
from edt.diffusion.solvers import SOLVERS, FewStepSampler, Solver, create_sampler
from edt.diffusion.timesteps import (
    TIMESTEP_SAMPLERS,
    LossSecondMomentSampler,
    TimestepSampler,
    UniformSampler,
    create_timestep_sampler,
)

__all__ = [
    "SOLVERS",
    "TIMESTEP_SAMPLERS",
    "DDIMSampler",
    "DDPMSampler",
    "FewStepSampler",
    "GaussianDiffusion",
    "GuidanceSchedule",
    "LossSecondMomentSampler",
    "Sampler",
    "Solver",
    "TimestepSampler",
    "UniformSampler",
    "create_diffusion",
    "create_sampler",
    "create_timestep_sampler",
    "linear_betas",
    "respaced_timesteps",
]
