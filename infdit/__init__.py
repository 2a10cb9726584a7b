"""Inf-DiT: upscale pictures to any resolution with a diffusion transformer whose memory is a dial."""

# ruff: noqa: F401 - the interface
from . import receipt, samplers
from .checkpoint import convert, load_model
from .config import InfDiTConfig, SamplingDefaults
from .denoiser import Conditioning, Denoiser
from .device import WrongNumbers
from .memory.plan import MemoryPlan
from .memory.planner import BudgetTooSmall, OutOfMemory, plan_memory
from .resume import SavedRun
from .run import Report
from .tensorfile import CheckpointError
from .upscale import upscale
