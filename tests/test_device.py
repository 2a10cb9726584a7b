"""Which device is which, what it computes in, and how it says that it is full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from infdit.device import default_device, default_dtype, empty_caches, out_of_host_memory, out_of_memory, same_device

FULL_DEVICE = {
    "cuda": "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB",
    "cuda's driver": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "hip": "HIP out of memory. Tried to allocate 2.00 GiB",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "hipblas": "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "cudnn 8": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cudnn 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "miopen": "MIOpen Error: miopenStatusAllocFailed",
    "nvml": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830',
    "mps": "MPS backend out of memory (MPS allocated: 17.96 GB, other allocations: 1.94 MB, max allowed: 18.13 GB)",
    "metal": "Invalid buffer size: 16.00 GiB",
    "xpu": "XPU out of memory. Tried to allocate 512.00 MiB",
    "level zero": "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "level zero's resources": "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5",
    "directml": "Could not allocate tensor with 33554432 bytes. There is not enough GPU video memory available!",
}
FULL_HOST = {
    "linux": "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 9 bytes. Error code 12 (Cannot allocate memory)",
    "windows": "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 9 bytes.",
    "mapped": "unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)",
    "onednn": "could not create a primitive",
    "c++": "std::bad_alloc",
    "c++ on windows": "bad allocation",
    "cudnn 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "level zero": "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
}
NOT_FULL = (
    "mat1 and mat2 shapes cannot be multiplied (9x9 and 8x8)",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "",
)


@pytest.mark.parametrize("said", FULL_DEVICE.values(), ids=list(FULL_DEVICE))
def test_a_full_device_in_all_its_words(said: str) -> None:
    assert (out_of_memory(RuntimeError(said)), out_of_host_memory(RuntimeError(said))) == (True, False)


@pytest.mark.parametrize("said", FULL_HOST.values(), ids=list(FULL_HOST))
def test_a_full_host_in_all_its_words(said: str) -> None:
    assert (out_of_memory(RuntimeError(said)), out_of_host_memory(RuntimeError(said))) == (True, True)


@pytest.mark.parametrize("said", NOT_FULL)
def test_what_is_not_a_lack_of_memory(said: str) -> None:
    assert not out_of_memory(RuntimeError(said))


def test_types_that_say_it_without_words() -> None:
    assert not out_of_host_memory(torch.cuda.OutOfMemoryError(""))
    assert out_of_memory(torch.cuda.OutOfMemoryError(""))
    assert out_of_host_memory(MemoryError())
    assert not out_of_memory(ValueError("CUDA out of memory"))


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", "cpu"])
def test_caches_of_every_backend_are_emptied(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    for name in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "empty_cache", lambda name=name: emptied.append(name))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append("pinned"), raising=False)
    empty_caches(torch.device(kind))
    assert emptied == {"cuda": ["cuda", "pinned"], "cpu": []}.get(kind, [kind])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("cpu", "cpu", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cuda", "cuda:2", True),
        ("cuda", "cuda:0", False),
        ("cpu", "cuda", False),
        ("mps", "mps:0", True),
    ],
)
def test_same_device(a: str, b: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose current card is the third."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert same_device(torch.device(a), torch.device(b)) is same
    assert same_device(torch.device(b), torch.device(a)) is same


CARDS = [
    ({"major": 9, "minor": 0, "name": "NVIDIA H100"}, None, torch.bfloat16),
    ({"major": 8, "minor": 6, "name": "NVIDIA GeForce RTX 3060"}, None, torch.bfloat16),
    ({"major": 7, "minor": 5, "name": "NVIDIA GeForce RTX 2070"}, None, torch.float16),
    ({"major": 7, "minor": 5, "name": "Tesla T4"}, None, torch.float16),
    ({"major": 7, "minor": 0, "name": "Tesla V100-SXM2-16GB"}, None, torch.float16),
    ({"major": 7, "minor": 5, "name": "NVIDIA GeForce GTX 1660 SUPER"}, None, torch.float32),
    ({"major": 7, "minor": 5, "name": "NVIDIA T1000 8GB"}, None, torch.float32),
    ({"major": 6, "minor": 1, "name": "NVIDIA GeForce GTX 1080"}, None, torch.float32),
    ({"major": 11, "minor": 0, "gcnArchName": "gfx1100", "name": "AMD Radeon RX 7900 XTX"}, "6.2", torch.bfloat16),
    ({"major": 12, "minor": 0, "gcnArchName": "gfx1201", "name": "AMD Radeon RX 9070"}, "6.4", torch.bfloat16),
    ({"major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-", "name": "MI300X"}, "6.2", torch.bfloat16),
    ({"major": 10, "minor": 3, "gcnArchName": "gfx1030", "name": "AMD Radeon RX 6800"}, "6.2", torch.float16),
    ({"major": 9, "minor": 0, "gcnArchName": "gfx906:sramecc+", "name": "AMD Radeon VII"}, "6.2", torch.float16),
]


@pytest.mark.parametrize(("properties", "hip", "expected"), CARDS, ids=[card[0]["name"] for card in CARDS])
def test_what_a_card_computes_in(
    properties: dict, hip: str | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    assert default_dtype(torch.device("cuda")) == expected


@pytest.mark.parametrize(("new", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_what_an_apple_chip_and_an_intel_card_compute_in(
    new: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: new, raising=False)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: new, raising=False)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp16=True))
    assert default_dtype(torch.device("mps")) == default_dtype(torch.device("xpu")) == expected
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp16=False))
    assert default_dtype(torch.device("xpu")) == (torch.bfloat16 if new else torch.float32)


def test_what_nobody_knows_computes_in_float32() -> None:
    assert default_dtype(torch.device("lazy")) == torch.float32


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "cpu"])
def test_the_device_that_is_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda name=name: name == kind)
    assert default_device() == torch.device(kind)
