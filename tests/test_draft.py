"""A process that is killed while it writes: nothing of its own is left once the next one has written there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import fork

import infdit
from infdit.draft import draft, sweep
from infdit.picture import Picture, write_picture
from infdit.resume import SavedRun
from infdit.sidecar import write_fits
from training.export import restate


def save_state(folder: Path) -> None:
    infdit.upscale(
        infdit.load_model("mini", torch.float32, "cpu"), torch.zeros(1, 2, 2, 3), scale=1, resume=SavedRun(folder / "s")
    )


WRITERS: dict[str, Callable[[Path], object]] = {
    "convert": lambda folder: infdit.convert("mini", folder / "m.safetensors"),
    "tune": lambda folder: write_fits(folder / "m.schedules.json", "", {}),
    "export of a training": lambda folder: restate(Path("mini"), folder / "m.safetensors", infdit.SamplingDefaults()),
    "picture": lambda folder: write_picture(folder / "p.png", Picture(torch.zeros(2, 2, 3), None, False)),
    "state of a run": save_state,
}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", WRITERS)
def test_what_a_killed_writer_leaves_the_next_one_removes(tmp_path: Path, name: str) -> None:
    def killed() -> None:
        """When all is written, and not yet in its place."""
        setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        WRITERS[name](tmp_path)

    process = fork(killed)
    process.join()
    assert process.exitcode == -9
    left = set(tmp_path.iterdir())
    assert {path.suffix for path in left} == {".part"}
    WRITERS[name](tmp_path)
    (written,) = set(tmp_path.iterdir()) - left
    assert set(tmp_path.iterdir()) == {written}
    assert written.stat().st_size > 0


def test_what_a_living_writer_holds_stays(tmp_path: Path) -> None:
    """And so does what is nobody's draft."""
    (tmp_path / ".mine.part").mkdir()
    with draft(tmp_path / "a.txt") as part:
        part.write_text("a")
        sweep(tmp_path)
        part.replace(tmp_path / "a.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".mine.part"}
