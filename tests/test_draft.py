"""A process that is killed while it writes: nothing of its own is left once the next one has written there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import fork
from shell import make_picture, run

import infdit
from infdit import draft as draft_module
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
def test_what_a_killed_writer_leaves_the_next_one_removes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what that writes is on the disk before it takes its place."""
    def killed() -> None:
        """When all is written, and not yet in its place."""
        setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        WRITERS[name](tmp_path)

    process = fork(killed)
    process.join()
    assert process.exitcode == -9
    left = set(tmp_path.iterdir())
    assert {path.suffix for path in left} == {".part"}
    done = watched(monkeypatch)
    WRITERS[name](tmp_path)
    (written,) = set(tmp_path.iterdir()) - left
    assert set(tmp_path.iterdir()) == {written}
    assert written.stat().st_size > 0
    # the file, its name, and its folder; before that, what was left is removed
    assert done[done.index("synced") :] == ["synced", f"{written.suffix} replaced", "synced"]


def test_what_was_killed_before_it_had_a_lock_is_removed_too(tmp_path: Path) -> None:
    """And whoever has not got so far yet takes another folder."""
    (tmp_path / f".{'0' * 16}.part").mkdir()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="Windows deletes nothing that is open")
@pytest.mark.parametrize("moment", ["no lock", "not locked"])
def test_a_sweep_between_folder_and_lock(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name = (Path, "mkdir") if moment == "no lock" else (draft_module, "_lock")
    original, calls = getattr(place, name), []

    def swept(*given: object) -> object:
        first = not calls
        calls.append(given)
        if first and moment == "not locked":
            sweep(tmp_path)
        done = original(*given)
        if first and moment == "no lock":
            sweep(tmp_path)
        return done

    monkeypatch.setattr(place, name, swept)
    with draft(tmp_path / "a") as part:
        part.write_bytes(b"x")
        sweep(tmp_path)
        assert part.read_bytes() == b"x"
    assert len(calls) > 1
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_on_the_disk_before_its_states_and_receipts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No power cut can take both."""
    source, states, receipt = make_picture(tmp_path / "in.png", (8, 6)), tmp_path / "states", tmp_path / "out.json"
    done = watched(monkeypatch)
    assert run("upscale", source, "-o", tmp_path / "out.png", "--resume", states, "--receipt", receipt) == 0
    done = done[done.index(".png replaced") - 1 :]
    assert done == ["synced", ".png replaced", "synced", ".state removed", "synced", ".json replaced", "synced"]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the disk from here on."""
    done: list[str] = []
    replace, unlink = Path.replace, Path.unlink

    def replaced(part: Path, path: Path) -> Path:
        done.append(f"{path.suffix} replaced")
        return replace(part, path)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        done.append(f"{path.suffix} removed")
        unlink(path, missing_ok)

    monkeypatch.setattr("os.fsync", lambda file: done.append("synced"))
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    return done


def test_what_a_living_writer_holds_stays(tmp_path: Path) -> None:
    """And so does what is nobody's draft."""
    (tmp_path / ".mine.part").mkdir()
    with draft(tmp_path / "a.txt") as part:
        part.write_text("a")
        sweep(tmp_path)
        part.replace(tmp_path / "a.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".mine.part"}
