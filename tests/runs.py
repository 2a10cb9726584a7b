"""Models and runs at random, and what is said of the memory that they hold."""

from __future__ import annotations

import random

import pytest
import torch

import infdit
from infdit import InfDiTConfig, MemoryPlan
from infdit.memory.footprint import Footprint
from infdit.memory.plan import SEGMENTS, Workload
from infdit.memory.planner import BudgetTooSmall, fastest_plan
from infdit.model import InfDiT

SLACK = 16 * 2**20 + SEGMENTS
MUCH = 2**50


def random_model(config: InfDiTConfig, dtype: torch.dtype) -> InfDiT:
    with torch.device("meta"):
        model = InfDiT(config).to(dtype)
    model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def random_case(rng: random.Random) -> tuple[InfDiTConfig, int, int, MemoryPlan, torch.dtype, str, int]:
    heads = rng.choice([1, 2, 4])
    config = InfDiTConfig(
        num_layers=rng.randint(1, 5),
        hidden_size=heads * rng.choice([8, 16, 32]),
        num_heads=heads,
        block_size=rng.choice([16, 32]),
        vector_dim=rng.choice([0, 8]),
        position_period=rng.choice([16, 32, 1024]),
    )
    plan = MemoryPlan(
        rng.randint(1, 6),
        rng.choice([1, 2, 3, 8, 64, 999]),
        rng.choice(["resident", "streamed"]),
        rng.choice(["device", "host"]),
        rng.choice(["device", "host"]),
        rng.choice(["auto", "rows", "columns"]),
    )
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    h, w = rng.randint(8, 200), rng.randint(8, 200)
    return config, h, w, plan, dtype, rng.choice(list(infdit.samplers.SAMPLERS)), rng.choice([1, 1, 2])


def assert_within(counted: dict[str, int], held: Footprint, unified: bool = False, saved: int = 0) -> None:
    """unified: the device is a CPU, where one memory holds both; saved: bytes on the host of states, if it kept any."""
    predicted = {"device": held.device, "host": held.host}
    if unified:
        predicted = {"device": held.device + held.host, "host": 0}
    for tier, most in predicted.items():
        assert counted[tier] <= most
        assert most <= 1.25 * counted[tier] + SLACK + (saved if tier == "host" else 0)


def shares(rng: random.Random, depth: int, count: int) -> tuple[int, ...]:
    """So many layers over so many devices; some may have none."""
    ends = sorted(rng.randint(0, depth) for _ in range(count - 1))
    return tuple(b - a for a, b in zip([0, *ends], [*ends, depth], strict=True))


def cards(count: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in range(count))


def least_of(workload: Workload) -> int:
    with pytest.raises(BudgetTooSmall) as refusal:
        fastest_plan(workload, 1, MUCH)
    return refusal.value.least
