"""What docs/scaling.md foretells of several devices, held to the simulation and to the planner's closed form."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import infdit
from benchmarks import scaling
from benchmarks.__main__ import main
from infdit import InfDiTConfig
from infdit.memory.cost import in_turn
from infdit.memory.plan import MemoryPlan, Workload

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_table_is_what_its_command_prints_and_what_it_says_makes_sense() -> None:
    """Four equal devices are at work nine tenths of the time: chunks that fill and empty the line of them are in it.

    Each device that is added takes time away.
    """
    rows = list(scaling.report())
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8")
    shares = [int(row.split("|")[-3].strip(" %")) for row in rows[2:] if row.split("|")[2].strip() == "4"]
    assert len(shares) == len(scaling.SIDES)
    assert min(shares) >= 90
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]
    for size in dict.fromkeys(cell[0] for cell in cells):
        times = [seconds(cell[5]) for cell in cells if cell[0] == size]
        assert times == sorted(times, reverse=True)


def test_events_by_hand() -> None:
    assert scaling.makespan([2], 5, 1) == 10
    assert scaling.makespan([1, 1], 3, 0) == 4
    assert scaling.makespan([1, 3], 3, 0.5) == 1 + 0.5 + 9  # the second never waits again
    assert scaling.makespan([3, 1], 3, 0.5) == 9 + 0.5 + 1


@pytest.mark.parametrize("size", [4096, 16384])
def test_what_overlapped_evaluations_would_save_is_what_one_long_row_of_chunks_does(size: int) -> None:
    """Of 39 evaluations a chunk of the next follows the last of the one before; the pause comes once a run."""
    first, *beside = (torch.device("cuda", number) for number in range(4))
    workload = Workload(InfDiTConfig(), size, size, device=first, beside=tuple(beside))
    plan = MemoryPlan(28, 64, images="host", layers=(7, 7, 7, 7))
    chunks, stages = -(-workload.grid.blocks // 64), scaling.alone(workload, plan)
    row = scaling.makespan([stage / chunks for stage in stages], 39 * chunks, 0) / 39
    assert scaling.without_pauses(workload, plan) == pytest.approx(row, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_the_planner_foretells_what_the_events_take(seed: int) -> None:
    """Of equal stages, which a split aims at; on the way a chunk is for a hundredth of a stage."""
    rng = random.Random(seed)
    count, chunks, seconds = rng.randint(1, 8), rng.randint(16, 400), rng.uniform(0.1, 9)
    side = InfDiTConfig().block_size
    workload = replace(Workload(InfDiTConfig(), side, side * chunks), device=torch.device("cuda"))
    foretold = in_turn([seconds] * count, workload, MemoryPlan(28, 1))
    events = scaling.makespan([seconds / chunks] * count, chunks, 0.01 * seconds / chunks)
    assert foretold == pytest.approx(events, rel=0.02)


def test_two_stages_are_timed_against_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stages", "--size", "64x96"]) == 0
    assert re.fullmatch(
        r"64×96, chunks: 1 of 64 blocks: [\d.]+ s on one thread, [\d.]+ s as two stages on two, [\d.]+ times as fast "
        r"\(1\.00 by the formula\)\n",
        capsys.readouterr().out,
    )


@pytest.mark.slow
@pytest.mark.skipif(psutil.getloadavg()[0] > 0.5 or psutil.cpu_count() < 2, reason="two cores are not idle")
def test_two_stages_on_two_cores_are_at_least_1_6_times_as_fast() -> None:
    (line,) = scaling.measured(infdit.load_model("mini", dtype=torch.float32, device="cpu"), (1024, 1024))
    assert float(re.search(r"([\d.]+) times as fast", line)[1]) >= 1.6, line


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+) (\w+)", text).groups()
    return float(number) * {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]
