"""The order of what an accelerator's two streams and the host do, checked without an accelerator.

The whole of `upscale` runs on fake tensors with stand-ins for streams and events. Of every operation is noted which
storages it reads and writes, and on which of three agents: the host, the stream that computes, the stream that copies.
Each agent has a vector clock (Fidge 1988, Mattern 1989), which only waiting and launching carry from one to another.
Whatever touches a storage must come after what was last written there, whatever writes after what read there; and
memory that is given back may not be in use on a stream that its allocator was not told of.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import dry_run
from infdit import InfDiTConfig, MemoryPlan
from infdit.memory.offload import Transfer
from infdit.memory.plan import Workload
from infdit.run import Run

HOST, COMPUTE, COPY = "host", "compute", "copy"
CONFIG = InfDiTConfig(num_layers=3, hidden_size=32, num_heads=2, block_size=16, vector_dim=0, position_period=8)
Clock = dict[str, int]


class StopError(Exception):
    """The user's wish."""


class RaceError(AssertionError):
    """Two agents touch a storage, and nothing says who comes first."""


class Agents:
    """Clocks of the host and of both streams."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {name: defaultdict(int) for name in (HOST, COMPUTE, COPY)}
        self.current = COMPUTE

    def join(self, waiting: str, seen: Clock) -> None:
        """All that `seen` has seen comes before what `waiting` does next."""
        own = self.clocks[waiting]
        for agent, time in seen.items():
            own[agent] = max(own[agent], time)

    def tick(self, agent: str) -> int:
        """A new moment of an agent; what a stream does comes after what the host did before it asked for it."""
        self.join(agent, self.clocks[HOST])
        self.clocks[agent][agent] += 1
        return self.clocks[agent][agent]

    def after(self, agent: str, moment: tuple[str, int]) -> bool:
        """Whether what an agent does now is sure to come after a moment."""
        return self.clocks[agent][moment[0]] >= moment[1]


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, agents: Agents, name: str) -> None:
        self.agents, self.name = agents, name

    def wait_stream(self, other: Stream) -> None:
        self.agents.join(self.name, self.agents.clocks[other.name])

    def wait_event(self, event: Event) -> None:
        self.agents.join(self.name, event.seen)

    def synchronize(self) -> None:
        self.agents.join(HOST, self.agents.clocks[self.name])


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self) -> None:
        self.seen: Clock = {}
        self.agents: Agents | None = None

    def record(self, stream: Stream) -> None:
        self.agents, self.seen = stream.agents, dict(stream.agents.clocks[stream.name])

    def synchronize(self) -> None:
        assert self.agents is not None, "an event is recorded before anybody waits for it"
        self.agents.join(HOST, self.seen)


class Storage:
    """What was done with one storage."""

    def __init__(self, owner: str, written: tuple[str, int]) -> None:
        self.owner, self.written = owner, written
        self.read: list[tuple[str, int]] = []


class Watch(TorchDispatchMode):
    """Notes reads and writes. In the place of PeakMeter, whose arguments it takes."""

    def __init__(self, agents: Agents) -> None:
        super().__init__()
        self.agents = agents
        self.storages = WeakIdKeyDictionary()
        self.owners: set[str] = set()
        self.lost: list[str] = []  # what was wrong when memory was given back, where nothing can be raised
        self.copies = 0  # on the stream for copies
        self.peak: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for the device: no data is touched
            return func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        on_host = all(x.device.type == "cpu" for x in (*inputs, *results))
        agent = HOST if on_host else self.agents.current
        now = agent, self.agents.tick(agent)
        self.copies += agent == COPY
        for x in self._changed(func, args, kwargs):
            self._write(x.untyped_storage(), now)
        made = {id(x.untyped_storage()) for x in inputs}
        if not func.is_view:
            for x in inputs:
                self._read(x.untyped_storage(), now)
        for x in results:
            storage = x.untyped_storage()
            if id(storage) not in made and storage not in self.storages:
                self._new(storage, now, HOST if x.device.type == "cpu" else agent)
        across = len({x.device.type for x in (*inputs, *results) if x.dim()}) == 2
        if across and not self._asynchronous(args, kwargs):
            self.agents.join(HOST, self.agents.clocks[agent])
        return result

    @staticmethod
    def _changed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                yield from (x for x in tree_leaves(given) if isinstance(x, torch.Tensor))

    @staticmethod
    def _asynchronous(args: tuple, kwargs: dict[str, Any]) -> bool:
        return bool(kwargs.get("non_blocking")) or (len(args) > 2 and args[2] is True)

    def _known(self, storage: torch.UntypedStorage) -> Storage:
        if storage not in self.storages:
            self._new(storage, (HOST, 0), HOST)  # made before
        return self.storages[storage]

    def _new(self, storage: torch.UntypedStorage, now: tuple[str, int], owner: str) -> None:
        self.owners.add(owner)
        seen = self.storages[storage] = Storage(owner, now)
        weakref.finalize(storage, self._gone, seen).atexit = False

    def _read(self, storage: torch.UntypedStorage, now: tuple[str, int]) -> None:
        seen = self._known(storage)
        if not self.agents.after(now[0], seen.written):
            raise RaceError(f"read on {now[0]} of what {seen.written[0]} may not have written yet")
        seen.read.append(now)

    def _write(self, storage: torch.UntypedStorage, now: tuple[str, int]) -> None:
        seen = self._known(storage)
        for earlier in (seen.written, *seen.read):
            if not self.agents.after(now[0], earlier):
                raise RaceError(f"written on {now[0]} while {earlier[0]} may still use it")
        seen.written, seen.read = now, []

    def _gone(self, seen: Storage) -> None:
        """Memory goes back to its own stream, which may use it at once: what other streams do must be over by then."""
        for agent, time in (seen.written, *seen.read):
            if seen.owner not in (HOST, agent) and not self.agents.after(seen.owner, (agent, time)):
                self.lost.append(f"given back to {seen.owner} while {agent} may still use it")


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    """An accelerator with streams, where there is none."""
    found = Agents()
    streams = {name: Stream(found, name) for name in (COMPUTE, COPY)}

    @contextmanager
    def using(stream: Stream) -> Iterator[None]:
        before, found.current = found.current, stream.name
        try:
            yield
        finally:
            found.current = before

    original = Transfer.__init__

    def made(self: Transfer, device: torch.device, pinned: bool = True) -> None:
        original(self, device, pinned)
        self._paced = True
        if pinned:
            self._stream = streams[COPY]  # type: ignore[assignment]

    monkeypatch.setattr(Transfer, "__init__", made)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[found.current])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    return found


def watch(agents: Agents, monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan) -> Watch:
    """All operations of a run under a plan; one that is stopped ends sooner."""
    seen = Watch(agents)
    monkeypatch.setattr(dry_run, "PeakMeter", lambda *held: seen)
    monkeypatch.setattr(dry_run, "_streams", nullcontext)
    workload = Workload(CONFIG, 48, 64, dtype=torch.bfloat16, device=torch.device("cuda"), sampler="dpmpp_2m")
    with suppress(StopError):
        dry_run.counted(workload, plan, whole=True)
    gc.collect()
    if seen.lost:
        raise RaceError(seen.lost[0])
    return seen


AWAY = MemoryPlan(1, 2, "streamed", "host", "host")
PLANS = [
    AWAY,
    MemoryPlan(3, 5, "streamed"),
    *(
        MemoryPlan(2, 3, weights, hidden, images)
        for weights in ("resident", "streamed")
        for hidden in ("device", "host")
        for images in ("device", "host")
    ),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.group}-{p.chunk}-{p.weights}-{p.hidden}-{p.images}")
def test_nothing_is_used_before_it_is_there_or_after_it_is_gone(
    plan: MemoryPlan, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(agents, monkeypatch, plan)
    away = plan.weights == "streamed" or plan.images == "host" or (plan.hidden == "host" and plan.group < 3)
    assert (seen.copies > 0) == away


def unfinished(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers of a chunk the card may still have to do, each time the bar moves and a stop is obeyed."""
    ends: list[int] = []
    found: list[int] = []
    original = Transfer.throttle

    def throttle(self: Transfer) -> None:
        ends.append(agents.clocks[COMPUTE][COMPUTE])
        original(self)
        found.append(sum(end > agents.clocks[HOST][COMPUTE] for end in ends))

    monkeypatch.setattr(Transfer, "throttle", throttle)
    watch(agents, monkeypatch, MemoryPlan(3, 2))
    return found


def test_the_host_is_one_layer_ahead_at_most(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a stop waits for two layers of a chunk: 8 TFLOP at the published size with the largest chunk planned."""
    assert max(unfinished(agents, monkeypatch)) <= 1


def test_a_host_that_does_not_wait_is_found(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    assert max(unfinished(agents, monkeypatch)) > 5


@pytest.mark.parametrize("what", ["wait_stream", "wait_event"])
def test_a_wait_that_is_left_out_is_found(what: str, agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, what, lambda self, other: None)
    with pytest.raises(RaceError, match=r"may not have written yet|while compute may still use it"):
        watch(agents, monkeypatch, AWAY)


def test_all_memory_of_the_card_is_of_one_stream(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(agents, monkeypatch, AWAY)
    assert COPY not in seen.owners


def stopping(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """A stop at this move of the bar while layers are computed. The moves."""
    moves: list[int] = []
    original = Run.advance

    def advance(run: Run, done: int) -> None:
        moves.extend([done] if done in (1, 2) else [])
        if len(moves) > stop:
            raise StopError
        original(run, done)

    monkeypatch.setattr(Run, "advance", advance)
    return moves


@pytest.mark.parametrize("stop", range(0, 54, 6))
def test_after_a_stop_nothing_is_given_back_while_it_is_copied(
    stop: int, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = stopping(monkeypatch, stop)
    seen = watch(agents, monkeypatch, AWAY)
    assert len(moves) == stop + 1, "it was stopped"
    assert not seen.lost
    assert not any(storage.owner == COPY for storage in seen.storages.values())


def test_memory_that_is_given_back_while_it_is_copied_is_found(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfer, "settle", lambda self: setattr(self, "_leaving", None))
    stopping(monkeypatch, 8)  # amid the second group, the next chunk is on its way
    with pytest.raises(RaceError, match="given back to compute while copy may still use it"):
        watch(agents, monkeypatch, AWAY)


def failing_pin(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Of the calls that pin a tensor, the one of this number fails as CUDA says it. The calls."""
    calls: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls) + 1)
        if len(calls) == number:
            raise RuntimeError("CUDA error: out of memory")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return calls


def test_after_a_pin_that_fails_no_copy_runs_beside_the_arithmetic(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early, late or amid the first evaluation, and the order is right all the same."""
    calls = failing_pin(monkeypatch, 0)
    undisturbed = watch(agents, monkeypatch, AWAY).copies
    each = len(calls) // 3  # evaluations
    assert each > 10
    for number in (1, each // 2, each):
        calls = failing_pin(monkeypatch, number)
        assert watch(agents, monkeypatch, AWAY).copies < undisturbed * 0.4
        assert len(calls) == number, "pinning is not tried again in this run"
