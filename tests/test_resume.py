"""A run that ends by force goes on where it was, in the same bits; a state that is not its own is told and not used."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from filebytes import damaged
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infdit
from benchmarks.peak_meter import PeakMeter
from infdit.__main__ import main
from infdit.model import InfDiT
from infdit.picture import read_note
from infdit.resume import SavedRun
from infdit.samplers import SamplerInfo, get_sampler

STEPS = 3


@pytest.fixture
def mini(noisy_mini: InfDiT) -> InfDiT:
    return noisy_mini


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand((2, 6, 8, 3), generator=torch.Generator().manual_seed(0))


class Stop(BaseException):
    """The end of a process, as far as one can be had within one."""


def run(model: InfDiT, image: torch.Tensor, folder: Path, stop: int = -1, **given: object) -> tuple:
    """(the result or None, steps computed as (picture, step), what the report says); stop: calls until it ends."""
    seen: list[tuple[int, int]] = []

    def step(state: dict) -> None:
        if len(seen) == stop:
            raise Stop
        seen.append((state["picture"], state["i"]))

    report, given = infdit.Report(), {"sampler": "euler", "steps": STEPS} | given
    try:
        result = infdit.upscale(
            model, image, callback=step, resume=SavedRun(folder / "run"), report=report, **given
        )
    except Stop:
        result = None
    return result, seen, report.resumed


def test_a_state_is_on_the_disk_before_it_takes_the_place_of_the_last(
    mini: InfDiT, pictures: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace = Path.replace
    monkeypatch.setattr("os.fsync", lambda file: done.append("synced"))
    monkeypatch.setattr(Path, "replace", lambda *paths: (done.append("replaced"), replace(*paths))[1])
    run(mini, pictures[:1], tmp_path)
    assert done == ["synced", "replaced", "synced"] * STEPS  # the file, its name, and its folder


def test_a_state_is_written_while_the_next_step_is_computed(
    mini: InfDiT, pictures: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, beside = threading.Event(), list[bool]()

    def slowly(*given: object) -> None:
        moved.clear()
        beside.append(moved.wait(5 if len(beside) < STEPS - 1 else 0))  # after the last nothing moves
        save_file(*given)

    monkeypatch.setattr("infdit.resume.save_file", slowly)
    run(mini, pictures[:1], tmp_path, progress=lambda *_: moved.set())
    assert beside[:-1] == [True] * (STEPS - 1)


@pytest.mark.parametrize("sampler", list(infdit.samplers.SAMPLERS))
def test_goes_on_in_the_same_bits(mini: InfDiT, pictures: torch.Tensor, tmp_path: Path, sampler: str) -> None:
    expected = infdit.upscale(mini, pictures, sampler=sampler, steps=STEPS)
    all_steps = [(picture, step) for picture in range(2) for step in range(STEPS)]
    for stop in range(1, 2 * STEPS):
        folder, moved = tmp_path / str(stop), []
        folder.mkdir()
        run(mini, pictures, folder, stop, sampler=sampler)
        progress = lambda done, total, _, moved=moved: moved.append((done, total))  # noqa: E731
        result, seen, said = run(mini, pictures, folder, sampler=sampler, progress=progress)
        assert torch.equal(result, expected)
        assert seen == all_steps[stop:]  # the step that was not whole is done again, no other
        assert len(said) == 1 + (stop > STEPS)
        assert moved[-1][0] == moved[-1][1]
        assert [done for done, _ in moved] == sorted(done for done, _ in moved)


def test_a_run_that_ended_is_there_until_it_is_removed(mini: InfDiT, pictures: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "run.notes.state").write_text("somebody's")
    first, _, _ = run(mini, pictures, tmp_path)
    again, seen, _ = run(mini, pictures, tmp_path)
    assert torch.equal(first, again)
    assert seen == []
    SavedRun(tmp_path / "run").remove()
    assert [path.name for path in tmp_path.iterdir()] == ["run.notes.state"]


def test_a_sampler_of_somebody_elses_goes_on_between_pictures(
    mini: InfDiT, pictures: torch.Tensor, tmp_path: Path
) -> None:
    method = SamplerInfo(infdit.samplers.sample_dpmpp_2m, 1, 7, 4)
    run(mini, pictures, tmp_path, STEPS + 2, sampler=method)
    result, seen, _ = run(mini, pictures, tmp_path, sampler=method)
    assert torch.equal(result, infdit.upscale(mini, pictures, sampler="dpmpp_2m", steps=STEPS))
    assert seen == [(1, step) for step in range(STEPS)]


OTHERS = {
    "seed": ({"seed": 7}, "its seed is 0, not 7"),
    "sampler": ({"sampler": "heun"}, "its sampler is euler, not heun"),
    "size": ({"size": (20, 30)}, "it has another size"),
    "noise levels": ({"denoise": 0.5}, "it has another sigmas"),
    "picture": ({"image": torch.zeros(2, 6, 8, 3)}, "it has another picture"),
}


@pytest.mark.parametrize(("given", "said"), OTHERS.values(), ids=list(OTHERS))
def test_another_runs_state_is_told_and_not_used(
    mini: InfDiT, pictures: torch.Tensor, tmp_path: Path, given: dict, said: str
) -> None:
    run(mini, pictures, tmp_path, 2)
    given = {"image": pictures, "sampler": "euler", "steps": STEPS} | given
    image = given.pop("image")
    result, seen, told = run(mini, image, tmp_path, **given)
    assert torch.equal(result, infdit.upscale(mini, image, **given))
    assert len(seen) == 2 * STEPS
    assert len(told) == 1
    assert f"is of another run: {said}; this run starts afresh" in told[0]


def test_another_models_state_is_told_and_not_used(pictures: torch.Tensor, tmp_path: Path, noisy_file: Path) -> None:
    model = infdit.load_model(noisy_file, dtype=torch.float32, device="cpu")
    run(model, pictures, tmp_path, 2)
    weights = load_file(noisy_file)
    weights[next(iter(weights))].mul_(2)
    save_file(weights, noisy_file.with_name("other.safetensors"))
    other = infdit.load_model(noisy_file.with_name("other.safetensors"), dtype=torch.float32, device="cpu")
    other.defaults = model.defaults
    _, seen, told = run(other, pictures, tmp_path)
    assert len(seen) == 2 * STEPS
    assert "it has another model" in told[0]


def sample(folder: Path) -> tuple[torch.Tensor, list[float], list[str]]:
    """(a result, the noise levels computed, what is said) of a network that takes no time."""
    saved, seen, notes, x = SavedRun(folder / "run"), [], [], torch.linspace(-1, 1, 48).view(1, 3, 4, 4)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(float(sigma))
        return x.tanh()

    saved.begin({"seed": 1}, notes)
    sigmas, picture = torch.tensor([3.0, 2, 1, 0]), torch.zeros(1, 2, 2, 3)
    ignored = lambda state: None  # noqa: E731
    y = saved.sample(0, None, picture, ignored, get_sampler("dpmpp_2m"), denoise, [x], sigmas, ignored)
    return y, seen, notes


def test_damaged_states_are_refused_in_words(tmp_path: Path) -> None:
    expected, _, _ = sample(tmp_path)
    (file,) = tmp_path.glob("*.state")
    whole, refused, rng = file.read_bytes(), 0, random.Random(0)
    for _ in range(200):
        file.write_bytes(damaged(whole, rng))
        result, seen, told = sample(tmp_path)
        assert torch.equal(result, expected)
        if seen:
            refused += 1
            assert len(seen) == 3
            assert len(told) == 1
            assert told[0].startswith(f"{file}: the state ")
            assert told[0].endswith("; this run starts afresh")
            assert told[0].isprintable()
    assert refused > 195  # a few change nothing that is said


def test_a_made_up_state_is_refused(mini: InfDiT, pictures: torch.Tensor, tmp_path: Path) -> None:
    """Even by somebody who knows how one is stamped."""
    import hashlib
    import json

    from infdit.tensorfile import tensor_digest

    image = pictures[:1]
    expected, _, _ = run(mini, image, tmp_path, steps=2)
    (file,) = tmp_path.glob("*.state")
    good = infdit.tensorfile.read_tensors(file)
    header, x = json.loads(good.metadata["state"]), good.tensors["0"].clone()
    for changes, tensors in [
        ({}, {"0": x[..., :-1].contiguous()}),
        ({}, {"0": x.half()}),
        ({}, {"0": x, "1": x.clone()}),
        ({}, {"x": x}),
        ({}, {}),
        *(({"step": step}, {"0": x}) for step in (-1, 0, 3, 10**30, 1.5, True, "1", None, [1])),
        ({"run": None}, {"0": x}),
        ({"run": [1]}, {"0": x}),
        ({"format": 2}, {"0": x}),
    ]:
        stated = json.dumps(header | changes)
        stamp = hashlib.sha256(f"{stated}\0{tensor_digest(tensors)}".encode()).hexdigest()
        save_file(tensors, file, {"state": stated, "sha256": stamp})
        result, seen, told = run(mini, image, tmp_path, steps=2)
        assert torch.equal(result, expected)
        assert (len(seen), len(told)) == (2, 1), changes
    file.unlink()
    file.mkdir()
    result, _, told = run(mini, image, tmp_path, steps=2)
    assert torch.equal(result, expected)
    assert "starts afresh" in told[0]
    assert "cannot be written" in told[1]


def test_a_folder_that_goes_ends_no_run(mini: InfDiT, pictures: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    saved = SavedRun(tmp_path / "gone" / "run")
    report = infdit.Report()
    shutil.rmtree(tmp_path / "gone")
    result = infdit.upscale(mini, pictures, sampler="euler", steps=STEPS, resume=saved, report=report)
    assert torch.equal(result, infdit.upscale(mini, pictures, sampler="euler", steps=STEPS))
    assert len(report.resumed) == 1
    assert "cannot be written" in report.resumed[0]
    saved.remove()  # nothing


def test_no_pace_is_told_of_steps_that_were_done_before(mini: InfDiT, pictures: torch.Tensor, tmp_path: Path) -> None:
    """Whoever tells the time left from what is done, while it is sampled, would promise far too little."""
    run(mini, pictures[:1], tmp_path, 4, steps=5)
    report, seen = infdit.Report(), [(0, "")]
    infdit.upscale(
        mini, pictures[:1], sampler="euler", steps=5, resume=SavedRun(tmp_path / "run"), report=report,
        progress=lambda done, total, _: seen.append((done, report.doing)),
    )  # fmt: skip
    moved = [after - before for (before, _), (after, doing) in pairwise(seen) if doing == "sampling"]
    assert sum(moved) == mini.config.num_layers  # of one step, of one block


@pytest.mark.parametrize("sampler", list(infdit.samplers.SAMPLERS))
def test_takes_no_memory(mini: InfDiT, pictures: torch.Tensor, tmp_path: Path, sampler: str) -> None:
    """Beside a card there is a copy on the host while it is written; where there is one memory there is none."""
    peaks = []
    for saved in (None, SavedRun(tmp_path / "run")):
        with PeakMeter() as meter:
            plan = infdit.MemoryPlan(group=1, chunk=1)
            infdit.upscale(mini, pictures, sampler=sampler, steps=STEPS, plan=plan, resume=saved)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]


# ---- by force


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize(("targets", "kills"), [(1, 1), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    tmp_path: Path, noisy_file: Path, targets: int, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their commands: the pixels of a run that nobody killed, and nothing left over."""
    source, states, rng = tmp_path / "in.png", tmp_path / "states", random.Random(kills)
    Image.effect_noise((32, 24), 90).convert("RGB").save(source)
    options = ["--model", noisy_file, "--steps", "10", "--sampler", "dpmpp_2m", "--dtype", "fp32", "--device", "cpu"]
    command = ["upscale", source, *options, "-o"]
    began = time.monotonic()
    assert main([*map(str, command), str(tmp_path / "whole.png")]) == 0
    whole = time.monotonic() - began
    for number in range(targets):
        target = tmp_path / f"{number}.png"
        resumed = [*command, target, "--force", "--resume", states]
        done = 0
        for _ in range(kills):
            running = forks.infdit(*resumed)
            time.sleep(rng.uniform(0, whole))
            running.kill()
            running.join()
            for state in states.glob("*.state"):
                with safe_open(state, "pt") as file:
                    done = json.loads(file.metadata()["state"])["step"]
                assert load_file(state)  # what has its name is whole
        assert main([*map(str, resumed)]) == 0
        assert "afresh" not in capsys.readouterr().err
        notes = json.loads(read_note(target))["resumed"]
        assert notes == ([f"picture 1 goes on after step {done} of 10"] if done else [])
        assert np.array_equal(pixels(target), pixels(tmp_path / "whole.png"))
        assert list(states.iterdir()) == []
