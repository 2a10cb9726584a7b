"""Which device and dtype to use when nobody says, and what allocators do."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

SLAB_ALIGNMENT = 512  # bytes, at which pieces of a slab begin
# Turing without tensor cores, as its cards are called: float16 gives NaN there
_NO_FP16 = r"GTX 16\d0|\bT\d{3,4}\b|\bMX[45]50\b|CMP 30HX"
# how it is said that memory ran out, in lower case, and whose; the first that is found counts
_MEMORY_RAN_OUT = (
    ("can't allocate memory", "host"),  # PyTorch's allocator for the CPU
    ("not enough memory", "host"),  # the same on Windows
    ("cannot allocate memory", "host"),  # the system's own words, of a file that is mapped
    ("could not create a primitive", "host"),  # oneDNN, which makes its kernels when they are wanted
    ("bad_alloc", "host"),  # C++
    ("bad allocation", "host"),  # C++ on Windows
    ("host_allocation_failed", "host"),  # CUDNN_STATUS_INTERNAL_ERROR_…
    ("out_of_host_memory", "host"),  # XPU: UR_RESULT_ERROR_…, PI_ERROR_…
    ("out of memory", "device"),  # CUDA, HIP, MPS and XPU, as their allocators say it, and their drivers
    ("_alloc_failed", "device"),  # {CUBLAS,HIPBLAS,CUDNN,CUSOLVER}_STATUS_ALLOC_FAILED
    ("device_allocation_failed", "device"),  # CUDNN_STATUS_INTERNAL_ERROR_…
    ("statusallocfailed", "device"),  # MIOpen
    ("invalid buffer size", "device"),  # MPS
    ("out_of_device_memory", "device"),  # XPU: UR_RESULT_ERROR_…, ZE_RESULT_ERROR_…
    ("out_of_resources", "device"),  # XPU: UR_RESULT_ERROR_…, PI_ERROR_…
    ("mem_object_allocation_failure", "device"),  # XPU: PI_ERROR_…
    ("nvml_success == ", "device"),  # CUDA's allocator failing to ask the driver why there is none
    ("not enough gpu video memory", "device"),  # DirectML
)


def default_device() -> torch.device:
    """The accelerator if there is one (CUDA or ROCm, then XPU, then MPS), else the CPU."""
    for name in ("cuda", "xpu"):
        if getattr(torch, name).is_available():
            return torch.device(name)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_of(name: str | None) -> torch.device:
    """The device of this name, which must be here; None: the best there is.

    Raises:
        ValueError: not the name of a device, or of one that is not here.
    """
    if name is None:
        return default_device()
    device = known_device(name)
    try:
        torch.empty(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not here ({str(error).splitlines()[0]}): try cpu") from error
    return device


def devices_of(names: str | None) -> list[torch.device]:
    """The devices of these names, with commas between them.

    Raises:
        ValueError: see `device_of`.
    """
    return [device_of(name) for name in names.split(",")] if names else [device_of(None)]


def known_device(name: str) -> torch.device:
    """The device of this name, here or not.

    Raises:
        ValueError: not the name of a device.
    """
    name = name.strip()
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "xpu", "mps") or not (number == "" or (number.isdecimal() and len(number) < 3)):
        raise ValueError(f"device {name!r} must be cpu, cuda, cuda:1, xpu or mps")
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, else float16 where an accelerator is fast in it, else float32.

    Native means Ampere and later on NVIDIA, RDNA3 and CDNA on AMD, macOS 14, what XPU says, AMX or AVX512-BF16 on a
    CPU: elsewhere bf16 is emulated and slower. float16 reaches to 65504 only; a run that goes beyond it says so.
    """
    bf16, fp16 = _half_precision(device)
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def _half_precision(device: torch.device) -> tuple[bool, bool]:
    """Whether a device is at home in bfloat16, and in float16. What PyTorch does not say is answered with no."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return bool(re.match(r"gfx(1[1-9]|9(08|0a|[4-9]))", getattr(properties, "gcnArchName", ""))), True
        generation = properties.major, properties.minor
        return generation >= (8, 0), generation >= (7, 0) and not re.search(_NO_FP16, properties.name)
    if device.type == "mps":
        return getattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)(14, 0), True
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return getattr(torch.xpu, "is_bf16_supported", lambda: False)(), bool(getattr(properties, "has_fp16", False))
    # private, and absent from some versions: then the answer is the safe one
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if device.type == "cpu" else ()
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes), False


@cache
def one_memory(device: torch.device) -> bool:
    """Whether the device's memory is the host's: a CPU, an Apple chip, a GPU that is part of the processor."""
    if device.type == "cuda" and torch.cuda.is_available():
        return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    return device.type in ("cpu", "mps")


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two names mean one device: "cuda" is the current card."""
    return _numbered(a) == _numbered(b)


def _numbered(device: torch.device) -> tuple[str, int]:
    current = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0
    return device.type, current if device.index is None else device.index


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the host has no memory left; PyTorch has no one type for that."""
    return _whose_memory(error) is not None


def out_of_host_memory(error: BaseException) -> bool:
    """Whether it is the host that has none left."""
    return _whose_memory(error) == "host"


def _whose_memory(error: BaseException) -> str | None:
    """Whose memory an exception says to have run out, "device" or "host"; None if it says something else."""
    if isinstance(error, PinFailed) or not isinstance(error, RuntimeError | MemoryError):
        return None
    said = str(error).lower()
    by_type = {MemoryError: "host", torch.cuda.OutOfMemoryError: "device"}
    known = (whose for words, whose in _MEMORY_RAN_OUT if words in said)
    return next(known, None) or next((whose for kind, whose in by_type.items() if isinstance(error, kind)), None)


class WrongNumbers(ArithmeticError):  # noqa: N818 - as BudgetTooSmall
    """What was computed is not what the model says: there is no picture."""


class PinFailed(RuntimeError):  # noqa: N818 - as OutOfMemory
    """Memory of the host could not be pinned. There may be plenty of it and of the device's: drivers set limits."""


class DeviceFailed(RuntimeError):  # noqa: N818 - as OutOfMemory
    """One of several devices cannot go on, and it is not its memory that is full."""


@contextmanager
def pinning() -> Iterator[None]:
    """Where host memory is pinned; what goes wrong there says "out of memory" and does not mean the device.

    Raises:
        PinFailed: in place of any RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        failure = str(error).partition("\n")[0]
    else:
        return
    raise PinFailed(f"main memory could not be pinned ({failure}): use a MemoryPlan with pinned=False")


def empty_caches(device: torch.device) -> None:
    """Give back what a device's allocators keep for themselves, pinned memory of the host too."""
    gc.collect()
    getattr(getattr(torch, device.type, None), "empty_cache", lambda: None)()
    empty_pinned_cache(device)


def empty_pinned_cache(device: torch.device) -> None:
    """Give back pinned memory of the host that nobody uses: PyTorch would keep it for itself until the process ends."""
    if device.type == "cuda":
        getattr(torch._C, "_host_emptyCache", lambda: None)()  # private, and absent from some versions


def slab_bytes(piece: int) -> int:
    """The power of two that holds at least eight pieces: a slab of pinned memory."""
    return 2 ** math.ceil(math.log2(8 * max(piece, SLAB_ALIGNMENT)))
