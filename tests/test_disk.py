"""Pictures that memory does not hold: planned, on disk, the same bits, and nothing left there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shell import make_picture, pixels_of, run

import infdit
from infdit import InfDiTConfig, MemoryPlan
from infdit.disk import NoRoom, each, empty_in, folder_of, like
from infdit.memory import planner
from infdit.memory.plan import Workload
from infdit.memory.planner import BudgetTooSmall, PlannedRun, fastest_plan
from infdit.resume import SavedRun

GIB, MUCH, CPU = 2**30, 2**60, torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_a_tensor_on_disk_leaves_nothing_there(tmp_path: Path) -> None:
    x = empty_in(tmp_path, (1, 3, 40, 50))
    beside = like(x[..., :7])
    assert folder_of(x) == folder_of(beside) == str(tmp_path)
    assert folder_of(torch.empty(3)) is None and folder_of(empty_in(None, (3,))) is None
    x.copy_(torch.arange(6000.0).reshape(x.shape))
    assert x.double().sum() == 6000 * 5999 / 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_by_rows_as_at_once(on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infdit.disk.PIECE", 1000)
    a, b = (empty_in(tmp_path if on_disk else None, (2, 3, 31, 17)).normal_() for _ in range(2))
    made = each(lambda a, b: (a - b) / 3 + a, a, b)
    assert torch.equal(made, (a - b) / 3 + a)
    assert (folder_of(made) is not None) == on_disk


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(NoRoom, match=r"No space left on device.*TMPDIR"):
        empty_in(tmp_path, (1, 3, 400, 400))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoRoom, match="No such file"):
        empty_in(tmp_path / "gone", (3,))


def workload(side: int, folder: str | None = ".", device: str = "cpu") -> Workload:
    return Workload(InfDiTConfig(3, 64, 2, 4, 64, 0), side, side, 1, torch.float32, torch.device(device), folder=folder)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_disk_is_taken_where_memory_does_not_hold_the_pictures(device: str) -> None:
    work = workload(8192, device=device)
    roomy = fastest_plan(work, 64 * GIB, 64 * GIB, MUCH)
    assert roomy.images != "disk" and roomy.disk_bytes == 0
    tight = fastest_plan(work, 2 * GIB, 2 * GIB, MUCH)
    assert tight.images == "disk" and (tight.peak_bytes or 0) + (tight.host_bytes or 0) <= 4 * GIB
    assert tight.disk_bytes == work.footprint(tight).disk >= 5 * 3 * 4 * 8192**2  # up, x and its like, the result
    with pytest.raises(BudgetTooSmall, match=r"takes .* of the disk of \., where 1 GiB are free"):
        fastest_plan(work, 2 * GIB, 2 * GIB, GIB)
    with pytest.raises(BudgetTooSmall):
        fastest_plan(workload(8192, None, device), 2 * GIB, 2 * GIB, MUCH)


def test_a_disk_that_pictures_lie_on_already_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload(8192, device="cuda")
    plan = fastest_plan(work, 2 * GIB, 2 * GIB, MUCH)
    monkeypatch.setattr(planner, "free_in", lambda folder: 0)
    monkeypatch.setattr(planner, "free_bytes", lambda device: 2 * GIB)
    smaller = PlannedRun(work, plan, lambda device: GIB).smaller().plan
    assert smaller.images == "disk" and (smaller.peak_bytes or 0) < (plan.peak_bytes or 0)


def test_a_table_of_32768_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "32768x32768", "--model", "mini", "--device", "cpu", "--budget", "8GiB") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("8 GiB"))
    assert "pictures on the disk" in row


def test_a_run_on_disk_is_the_same_and_goes_on(tmp_path: Path, noisy_mini: infdit.model.InfDiT) -> None:
    """In two passes, with alpha, noise, states and fidelity."""
    image = torch.rand(1, 12, 9, 4, generator=torch.Generator().manual_seed(0))
    options = {"scale": 6.0, "steps": 2, "sampler": "dpmpp_2m", "fidelity": 1.0, "seed": 3}
    plan = MemoryPlan(1, 2)
    expected = infdit.upscale(noisy_mini, image, plan=plan, **options)
    for resume in (None, SavedRun(tmp_path / "a"), SavedRun(tmp_path / "a")):
        on_disk = replace(plan, images="disk")
        seen = infdit.upscale(noisy_mini, image, plan=on_disk, folder=tmp_path, resume=resume, **options)
        assert torch.equal(seen, expected)
        assert folder_of(seen) == str(tmp_path)


def test_through_the_shell_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_picture(tmp_path / "in.png", (64, 48))
    assert run("upscale", source, "-o", tmp_path / "a.png") == 0
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run("upscale", source, "-o", tmp_path / "b.png", "--budget", least(tmp_path)) == 0
    a, b = (np.frombuffer(pixels_of(tmp_path / name), np.uint8).astype(int) for name in ("a.png", "b.png"))
    assert abs(a - b).max() <= 1, "other products of bfloat16, which some processors round otherwise"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "in.png"]


def least(folder: Path) -> int:
    """Of the run above, the least memory with pictures on disk; it is less than without."""
    model = infdit.load_model("mini", device="cpu")
    work = Workload(model.config, 192, 256, 1, model.dtype, CPU, model.defaults.sampler, "resident", (48, 64, 3))
    found = []
    for one in (work, replace(work, folder=str(folder))):
        with pytest.raises(BudgetTooSmall) as refusal:
            fastest_plan(one, 1)
        found.append(refusal.value.least)
    assert found[1] < found[0]
    return found[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
def test_in_a_process_with_a_limit(tmp_path: Path) -> None:
    """2048² in 200 MiB of the process's own memory beside what PyTorch takes to be there.

    On some processors that is kernels too, of some megabytes, which oneDNN makes when they are wanted.
    """
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(tmp_path / "in.png")
    command = "import re, resource, sys; from infdit.__main__ import main; import infdit.cli.upscale\n"
    command += "there = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    command += "resource.setrlimit(resource.RLIMIT_DATA, ((there << 10) + (200 << 20),) * 2)\n"
    command += "sys.exit(main(sys.argv[1:]))"
    arguments = "upscale", tmp_path / "in.png", "-o", tmp_path / "out.png", "--budget", "110MiB"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
    assert Image.open(tmp_path / "out.png").size == (2048, 2048)
