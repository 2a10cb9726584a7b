"""Several processes on one picture: the pixels of one, and when one is gone all end, say so and can go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import MakeModel
from PIL import Image
from safetensors.torch import save_file

from infdit import InfDiTConfig
from infdit.__main__ import main
from infdit.memory.plan import Workload
from infdit.memory.planner import Offer, offers, shared_plan
from infdit.picture import read_note

GIB, ROOT = 2**30, Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a PyTorch without torch.distributed")
OPTIONS = ["--steps", "12", "--sampler", "dpmpp_2m", "--dtype", "fp32", "--device", "cpu"]


def start(
    size: int, *arguments: str | Path, before: str = "", more: Mapping[int, Sequence[str]] | None = None
) -> list[subprocess.Popen[str]]:
    """So many processes of one command, as torchrun starts them, but nobody watches them.

    before: code that the first runs; more: options of some of them.
    """
    first = ["-c", before + "import sys; from infdit.__main__ import shell; shell()"]
    return [
        one([*arguments, *(more or {}).get(rank, ())], {**os.environ, **own}, ["-m", "infdit"] if rank else first)
        for rank, own in enumerate(meeting(size))
    ]


def meeting(size: int) -> list[dict[str, str]]:
    """What tells so many processes of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank)} for rank in range(size)]


def one(
    arguments: Sequence[str | Path], environment: dict[str, str], how: Sequence[str] = ("-m", "infdit")
) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, *how, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=pipe)


def ends(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit status and what was said last, of each; within so many seconds."""
    until = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(0.1, until - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for line in text.splitlines() if line.startswith("infdit: ")] for text in said]
    return [(process.returncode, (own or [""])[-1]) for process, own in zip(processes, lines, strict=True)]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A picture that becomes 24 blocks."""
    path = tmp_path / "in.png"
    Image.effect_noise((48, 32), 90).convert("RGB").save(path)
    return path


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_processes_make_the_picture_of_one(tmp_path: Path, source: Path, noisy_file: Path) -> None:
    target, said = tmp_path / "out.png", tmp_path / "out.json"
    given = ["upscale", source, "-o", target, "--receipt", said, "--model", noisy_file, *OPTIONS, "--steps", "4"]
    both = [forks.infdit(*given, first=partial(os.environ.update, own)) for own in meeting(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    plan = json.loads(said.read_text())["plan"]
    assert len(plan["layers"]) == 2, "both had some"
    assert min(plan["layers"]) > 0
    alone = tmp_path / "alone.png"
    options = ["--from-receipt", str(said), "--model", str(noisy_file), "--device", "cpu"]
    assert main(["upscale", str(source), "-o", str(alone), *options]) == 0
    assert np.array_equal(pixels(target), pixels(alone))


def wait_for_a_state(states: Path, processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 60
    while not list(states.glob("*.state")) and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize(
    ("size", "rank", "how"),
    [
        *((size, rank, "KILL") for size in (2, 3) for rank in range(size)),
        *((3, 1, "STOP"), (3, 0, "STOP"), (2, 0, "STOP"), (3, 2, "TERM")),
    ],
)
def test_one_that_is_gone_ends_all_and_they_can_go_on(
    size: int, rank: int, how: str, tmp_path: Path, source: Path, noisy_file: Path
) -> None:
    """Killed, hanging, or stopped by somebody: within 30 seconds, with a sentence, and the state is kept."""
    states, target = tmp_path / "states", tmp_path / "out.png"
    long = [*OPTIONS, "--steps", "40"]  # or it may end before it is killed
    given = ["upscale", source, "-o", target, "--model", noisy_file, *long, "--resume", states]
    processes = start(size, *given)
    wait_for_a_state(states, processes)
    processes[rank].send_signal(signal.Signals[f"SIG{how}"])
    began = time.monotonic()
    left = [process for process in processes if how == "TERM" or process is not processes[rank]]
    for status, said in ends(left, 30):
        assert status in (2, 130)
        assert how == "TERM" or "hears no more of another" in said
    processes[rank].kill()
    assert time.monotonic() - began < 30
    assert list(states.glob("*.state"))
    assert not target.exists()
    again = start(size, *given)
    assert [status for status, _ in ends(again, 120)] == [0] * size
    whole = tmp_path / "whole.png"
    assert [status for status, _ in ends(start(size, *given[:3], whole, *given[4:-2]), 120)] == [0] * size
    assert np.array_equal(pixels(target), pixels(whole))
    assert list(states.iterdir()) == []


@pytest.mark.slow
def test_one_without_room_is_left_out(tmp_path: Path, source: Path, make_model: MakeModel) -> None:
    """Of a folder, whose second picture is planned anew; and the model listens to CLIP.

    It is so wide that a busy network is worth its while.
    """
    _, weights = make_model(dtype=torch.float32, layers=4, hidden=256, heads=2, block=16, vector_dim=8)
    model = tmp_path / "listens.safetensors"
    save_file({name: w.clone() for name, w in weights.items()}, model, {"config": json.dumps({"position_period": 64})})
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        shutil.copy(source, tmp_path / "in" / f"{name}.png")
    given = ["upscale", tmp_path / "in", "--model", model, *OPTIONS, "--receipt"]
    processes = start(3, *given, tmp_path / "3.json", "-o", f"{tmp_path}/three/", more={1: ["--budget", "1"]})
    assert [status for status, _ in ends(processes, 120)] == [0, 0, 0]
    for receipt in json.loads((tmp_path / "3.json").read_text()):
        assert receipt["plan"]["layers"][1] == 0
        assert min(receipt["plan"]["layers"][::2]) > 0
    assert main([*map(str, given), str(tmp_path / "1.json"), "-o", f"{tmp_path}/one/"]) == 0
    for name in ("a.png", "b.png"):
        assert np.abs(pixels(tmp_path / "three" / name) - pixels(tmp_path / "one" / name)).max() <= 1


FULL = """
from infdit.model import Layer
forward, calls = Layer.forward, []
def full(*inputs):
    calls.append(1)
    if len(calls) == 7:
        raise MemoryError("out of memory")
    return forward(*inputs)
Layer.forward = full
"""


@pytest.mark.slow
def test_memory_that_runs_out_on_the_first_ends_all(tmp_path: Path, source: Path, noisy_file: Path) -> None:
    """Of a folder too: the others are in the middle of what it cannot go on with."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        shutil.copy(source, tmp_path / "in" / f"{name}.png")
    given = ["upscale", tmp_path / "in", "-o", f"{tmp_path}/out/", "--model", noisy_file, *OPTIONS]
    (status, said), (other, nothing) = ends(start(2, *given, before=FULL), 60)
    assert status == 2
    assert "out of memory" in said
    assert (other, nothing) == (0, ""), "it was let go"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_torchrun(size: int, tmp_path: Path, noisy_file: Path) -> None:
    """A folder, through the launcher itself: the pixels of one process."""
    given, made = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for number in range(2):
        Image.effect_noise((32 + 8 * number, 48), 90).convert("RGB").save(given / f"{number}.png")
    (given / "broken.png").write_bytes(b"no picture")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m"]
    command = ["infdit", "upscale", given, "-o", f"{made}/", "--model", noisy_file, *OPTIONS]
    done = subprocess.run(
        [*launch, *map(str, command)], cwd=ROOT, text=True, capture_output=True, timeout=240, check=False
    )
    assert "2 made, 0 there already, 0 left out, 1 failed" in done.stdout
    assert done.stderr.count("broken.png: ") == 1, "one process reads"
    assert {path.name for path in made.iterdir()} == {"0.png", "1.png"}
    for name in ("0.png", "1.png"):
        layers = json.loads(read_note(made / name))["plan"]["layers"]
        assert len(layers) == size and min(layers) > 0
        alone = tmp_path / name
        again = ["--from-receipt", made / name, "--model", noisy_file, "--device", "cpu"]
        assert main([*map(str, ["upscale", given / name, "-o", alone, *again])]) == 0
        assert np.array_equal(pixels(made / name), pixels(alone))


@pytest.mark.slow
def test_another_model_is_refused(tmp_path: Path, source: Path, noisy_file: Path) -> None:
    given = ["upscale", source, "-o", tmp_path / "out.png", *OPTIONS]
    with_two = start(2, *given, "--model", noisy_file)
    with_two[1].kill()
    other = one(given, {**_environment(with_two[0]), "RANK": "1"})
    (_, first), (status, second) = ends([with_two[0], other], 90)
    assert status == 2
    assert "another file than that of process 0" in second
    assert "hears no more of another" in first


def _environment(process: subprocess.Popen[str]) -> dict[str, str]:
    """What a process was started with."""
    pairs = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_layers_go_to_processes_as_they_are_fast_and_have_room() -> None:
    workload = Workload(InfDiTConfig(), 4096, 4096, device=torch.device("cuda"))
    here = offers(workload, workload.device, 24 * GIB)
    assert [offer.layers for offer in here] == sorted((offer.layers for offer in here), reverse=True)
    twice = [Offer(offer.seconds / 2, offer.layers) for offer in here]
    few = [replace_layers(offer, 5) for offer in here]
    plan = shared_plan(workload, lambda device: 24 * GIB, 64 * GIB, elsewhere=[twice, few])
    assert plan is not None
    assert sum(plan.layers) == 28
    assert plan.layers[1] == pytest.approx(2 * plan.layers[0], abs=2)
    assert plan.layers[2] == 5


def replace_layers(offer: Offer, layers: int) -> Offer:
    return offer._replace(layers=layers)


def test_the_first_process_has_a_layer_however_slow_it_is() -> None:
    workload = replace(Workload(InfDiTConfig(), 4096, 4096), device=torch.device("cuda"))
    fast = [Offer(offer.seconds / 1000, offer.layers) for offer in offers(workload, workload.device, 24 * GIB)]
    plan = shared_plan(workload, lambda device: 24 * GIB, 64 * GIB, elsewhere=[fast])
    assert plan is not None
    assert plan.layers == (1, 27)


def test_where_others_have_no_room_nothing_is_shared() -> None:
    workload = Workload(InfDiTConfig(), 4096, 4096, device=torch.device("cuda"))
    full = [Offer(offer.seconds, 0) for offer in offers(workload, workload.device, 24 * GIB)]
    assert shared_plan(workload, lambda device: 24 * GIB, 64 * GIB, elsewhere=[full, full]) is None
