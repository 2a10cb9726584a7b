"""The kernel of Triton: computed by Triton's interpreter on the CPU, compiled for cards that are not here, left out."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dense import rotate
from torch import nn

from infdit import InfDiTConfig, fuse
from infdit.denoiser import Conditioning, Denoiser
from infdit.memory.plan import MemoryPlan
from infdit.rotary import rotary_turns

CPU = torch.device("cpu")
OLD = "an older Triton's interpreter and compiler are asked otherwise; with it a run tries the kernel, or does without"
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    monkeypatch.setenv("INFDIT_TRITON", "1")
    fuse._kernel.cache_clear()
    yield
    fuse._kernel.cache_clear()


def test_it_computes_the_same() -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    pytest.importorskip("triton", minversion="3.3", reason=OLD)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, "-c", "import test_fuse; test_fuse.formulas(); test_fuse.a_picture()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("Triton has no kernel")) == (0, 0), done.stderr


def formulas() -> None:
    from infdit.kernel import norm_and_turn

    generator = torch.Generator().manual_seed(0)
    for heads, width, dtype, near in ((2, 8, torch.float32, 2e-5), (3, 20, torch.float16, 2e-2)):
        qk = (torch.randn(2, 2, 4, 2 * heads, width, generator=generator) * 3 + 1).to(dtype)
        norm = nn.LayerNorm(width, eps=1e-6).requires_grad_(False).to(dtype)
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(width, generator=generator))
        rows, columns = (torch.randint(0, 40, (2, 2), generator=generator).float() for _ in range(2))
        found = norm_and_turn(qk, norm, rotary_turns(rows, columns, width, torch.float32))
        wide = qk.double()
        normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        normed = normed * norm.weight.double() + norm.bias.double()
        for part, own in zip(found, normed.split(heads, -2), strict=True):
            assert part.dtype == dtype
            for block in range(2):
                expected = rotate(own[:, block], rows[block].repeat_interleave(2), columns[block].repeat(2))
                torch.testing.assert_close(part[:, block].double(), expected, atol=near, rtol=0)


def a_picture() -> None:
    from benchmarks.speed import random_model

    model = random_model(InfDiTConfig(2, 24, 3, block_size=8, vector_dim=0, position_period=2), torch.float32)
    generator = torch.Generator().manual_seed(1)
    lr, up, x = (torch.randn(1, 3, side, side, generator=generator) for side in (4, 16, 16))
    denoise = Denoiser(model, Conditioning(lr, up), MemoryPlan(1, 2))
    found = denoise(x, 2.0)
    del os.environ["INFDIT_TRITON"]
    expected = denoise(x, 2.0)
    assert fuse._kernel.cache_info().hits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", ["cuda 75 32", "cuda 90 32", "hip gfx942 64"])
def test_it_compiles_for_cards(target: str) -> None:
    """At the published width: all that can be tried of a card without one."""
    triton = pytest.importorskip("triton", minversion="3.3", reason=OLD)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from infdit.kernel import _kernel

    kind, number, warp = target.split()
    dtype = "fp16" if number == "75" else "bf16"
    fixed = {"heads": 16, "width": 80, "ROWS": 16, "PAIRS": 64}
    given = dict.fromkeys(("qk", "weight", "bias", "q", "k"), f"*{dtype}") | {"turns": "*fp32"}
    given |= {"period": "i32", "eps": "fp32"} | dict.fromkeys(fixed, "constexpr")
    constants = {(_kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=_kernel, signature={name: given[name] for name in _kernel.arg_names}, constexprs=constants)
    made = triton.compile(source, target=GPUTarget(kind, int(number) if number.isdigit() else number, int(warp)))
    assert made.metadata.shared <= 2**15  # bytes, which every card has


def test_without_it_a_run_does_without(caplog: pytest.LogCaptureFixture) -> None:
    """Triton compiles nothing for a CPU."""
    with caplog.at_level(logging.WARNING):
        assert [fuse._kernel(CPU, torch.float32) for _ in range(2)] == [None, None]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("INFDIT_TRITON is set, and Triton has no kernel for cpu (")
    assert told.endswith("): the run does without")
