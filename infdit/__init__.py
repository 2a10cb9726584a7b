"""Inf-DiT: upscale pictures to any resolution with a diffusion transformer whose memory is a dial."""

from . import samplers
from .checkpoint import convert, load_model
from .config import InfDiTConfig, SamplingDefaults
from .denoiser import Conditioning, Denoiser
from .memory.plan import MemoryPlan
from .memory.planner import BudgetTooSmall, OutOfMemory, plan_memory
from .run import Report
from .tensorfile import CheckpointError
from .upscale import upscale

__all__ = [
    "BudgetTooSmall",
    "CheckpointError",
    "Conditioning",
    "Denoiser",
    "InfDiTConfig",
    "MemoryPlan",
    "OutOfMemory",
    "Report",
    "SamplingDefaults",
    "convert",
    "load_model",
    "plan_memory",
    "samplers",
    "upscale",
]
