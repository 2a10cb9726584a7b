"""The order of what the host and the two streams of each accelerator do, checked without an accelerator.

The whole of `upscale` runs on fake tensors with stand-ins for streams and events. Of every operation is noted which
storages it reads and writes, and on which agent: a thread of the host, a stream that computes, a stream that copies.
Each agent has a vector clock (Fidge 1988, Mattern 1989), which only waiting and launching carry from one to another,
and between threads what is handed on. That PyTorch itself lets both streams wait for a copy from one accelerator to
another is left out where copies run beside the arithmetic. Whatever touches a storage must come after what was last
written there, whatever writes after what read there; and memory that is given back may not be in use on a stream that
its allocator was not told of.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import dry_run
from benchmarks.peak_meter import PeakMeter
from infdit import InfDiTConfig, MemoryPlan
from infdit.blocks import Canvas
from infdit.denoiser import Denoiser
from infdit.memory import offload
from infdit.memory.offload import Transfer
from infdit.memory.plan import Workload
from infdit.run import Run
from infdit.stages import Handover

HOST, COMPUTE, COPY = "host", "compute lazy:0", "copy lazy:0"
CONFIG = InfDiTConfig(num_layers=3, hidden_size=32, num_heads=2, block_size=16, vector_dim=0, position_period=8)
Clock = dict[str, int]


class StopError(Exception):
    """The user's wish."""


class RaceError(AssertionError):
    """Two agents touch a storage, and nothing says who comes first."""


class Agents:
    """Clocks of the host's threads and of all streams."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = defaultdict(lambda: defaultdict(int))
        self.things: WeakKeyDictionary[object, Clock] = WeakKeyDictionary()  # what was done before they were told of
        self.streams: dict[tuple[int, str], str] = {}  # of a thread and a device, unless it is the one that computes
        self.waits = Counter[str]()  # of the host for a device, by what for

    @property
    def host(self) -> str:
        """This thread."""
        thread = threading.current_thread()
        return HOST if thread is threading.main_thread() else f"{HOST} {thread.ident}"

    def current(self, device: torch.device) -> str:
        """The stream of a device on which this thread works."""
        return self.streams.get((threading.get_ident(), str(device)), f"compute {device}")

    def join(self, waiting: str, seen: Clock) -> None:
        """All that `seen` has seen comes before what `waiting` does next."""
        own = self.clocks[waiting]
        for agent, time in seen.items():
            own[agent] = max(own[agent], time)

    def tick(self, agent: str, launched: bool = True) -> int:
        """A new moment of an agent; what a stream does comes after what the host did before it asked for it."""
        if launched:
            self.join(agent, self.clocks[self.host])
        self.clocks[agent][agent] += 1
        return self.clocks[agent][agent]

    def after(self, agent: str, moment: tuple[str, int]) -> bool:
        """Whether what an agent does now is sure to come after a moment."""
        return self.clocks[agent][moment[0]] >= moment[1]

    def told(self, turns: dry_run.Turns, thing: object) -> None:
        self.things[thing] = dict(self.clocks[self.host])

    def heard(self, turns: dry_run.Turns, thing: object) -> None:
        self.join(self.host, self.things.get(thing, {}))


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, agents: Agents, name: str) -> None:
        self.agents, self.name, (what, self.device) = agents, name, name.split()
        self.copies = what == "copy"

    def wait_stream(self, other: Stream) -> None:
        self.agents.join(self.name, self.agents.clocks[other.name])

    def wait_event(self, event: Event) -> None:
        self.agents.join(self.name, event.seen)

    def synchronize(self) -> None:
        self.agents.join(self.agents.host, self.agents.clocks[self.name])


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self) -> None:
        self.seen: Clock = {}
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.seen = stream, dict(stream.agents.clocks[stream.name])

    def synchronize(self) -> None:
        assert self.stream is not None, "an event is recorded before anybody waits for it"
        self.stream.agents.waits["event"] += 1
        self.stream.agents.join(self.stream.agents.host, self.seen)


Moment = tuple[str, int]
Span = tuple[int, int]  # bytes of a storage, from and up to


class Storage:
    """What was done with one storage, and where in it."""

    def __init__(self, owner: str, made: Moment, size: int) -> None:
        self.owner = owner
        self.written: list[tuple[Span, Moment]] = [((0, size), made)]
        self.read: list[tuple[Span, Moment]] = []


def span(x: torch.Tensor) -> Span:
    """Where a tensor lies in its storage."""
    begin = x.storage_offset() * x.itemsize
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (begin, begin + (last + 1) * x.itemsize if x.numel() else begin)


def touching(noted: list[tuple[Span, Moment]], here: Span) -> Iterator[Moment]:
    """When bytes were touched that lie here."""
    return (moment for (begin, end), moment in noted if begin < here[1] and here[0] < end)


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
        if func is torch.ops.prim.device.default:  # most of all calls, and no data is touched
            return args[0].device
        if self.lost:
            raise RaceError(self.lost[0])
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        cards = {x.device: None for x in (*inputs, *results) if x.device.type != "cpu"}
        source = inputs[-1].device if len(cards) > 1 else next(iter(cards), None)
        agent = self.agents.current(source) if source else self.agents.host
        blocking = not self._asynchronous(args, kwargs)
        others = [self.agents.current(card) for card in cards if card != source] if blocking else []
        for other in others:
            self.agents.join(agent, self.agents.clocks[other])
        now = agent, self.agents.tick(agent, launched="empty" not in func.__name__)
        self.copies += agent.startswith("copy")
        for x in self._changed(func, args, kwargs):
            self._write(x, now)
        made = {id(x.untyped_storage()) for x in inputs}
        if not func.is_view:
            for x in inputs:
                self._read(x, now)
        for x in results:
            storage = x.untyped_storage()
            if id(storage) not in made and storage not in self.storages:
                self._new(storage, now, HOST if x.device.type == "cpu" else self.agents.current(x.device))
        for other in others:
            self.agents.join(other, self.agents.clocks[agent])
        copied = "copy" in func.__name__  # else a number on the host is read at once
        across = len({x.device.type for x in (*inputs, *results) if copied or x.dim()}) == 2
        if across and blocking:
            self.agents.waits["copy"] += 1
            self.agents.join(self.agents.host, self.agents.clocks[agent])
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

    def _new(self, storage: torch.UntypedStorage, now: Moment, owner: str) -> None:
        self.owners.add(owner)
        seen = self.storages[storage] = Storage(owner, now, storage.nbytes())
        weakref.finalize(storage, self._gone, seen).atexit = False

    def _read(self, x: torch.Tensor, now: Moment) -> None:
        seen, here = self._known(x.untyped_storage()), span(x)
        for earlier in touching(seen.written, here):
            if not self.agents.after(now[0], earlier):
                raise RaceError(f"read on {now[0]} of what {earlier[0]} may not have written yet")
        seen.read.append((here, now))

    def _write(self, x: torch.Tensor, now: Moment) -> None:
        seen, here = self._known(x.untyped_storage()), span(x)
        for earlier in touching(seen.written + seen.read, here):
            if not self.agents.after(now[0], earlier):
                raise RaceError(f"written on {now[0]} while {earlier[0]} may still use it")
        for noted in (seen.written, seen.read):  # what comes after this comes after those
            noted[:] = [(there, at) for there, at in noted if there[0] < here[0] or here[1] < there[1]]
        seen.written.append((here, now))

    def _gone(self, seen: Storage) -> None:
        """Memory goes back to its own stream, which may use it at once: what other streams do must be over by then."""
        for _, (agent, time) in seen.written + seen.read:
            if seen.owner not in (HOST, agent) and not self.agents.after(seen.owner, (agent, time)):
                self.lost.append(f"given back to {seen.owner} while {agent} may still use it")


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    """Accelerators with streams, where there is none."""
    found = Agents()

    @contextmanager
    def using(stream: Stream) -> Iterator[None]:
        found.streams[threading.get_ident(), stream.device] = stream.name
        try:
            yield
        finally:
            del found.streams[threading.get_ident(), stream.device]

    original = Transfer.__init__

    def made(self: Transfer, device: torch.device, pinned: bool = True) -> None:
        original(self, device, pinned)
        self._paced = device.type != "cpu"
        if pinned and self._paced:
            self._stream = Stream(found, f"copy {device}")  # type: ignore[assignment]

    monkeypatch.setattr(Transfer, "__init__", made)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(found, found.current(device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(dry_run.Turns, "told", lambda turns, thing: found.told(turns, thing))
    monkeypatch.setattr(dry_run.Turns, "heard", lambda turns, thing: found.heard(turns, thing))
    return found


ONE = Workload(CONFIG, 32, 48, dtype=torch.bfloat16, device=torch.device("cuda"), sampler="dpmpp_2m")


def watch(
    agents: Agents, monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan, workload: Workload = ONE, seed: int = 0
) -> Watch:
    """All operations of a run under a plan; one that is stopped ends sooner."""
    seen = Watch(agents)
    monkeypatch.setattr(dry_run, "PeakMeter", lambda *held: seen)
    monkeypatch.setattr(dry_run, "_streams", nullcontext)
    monkeypatch.setattr(dry_run, "STEPS", 2)  # the second has what the first left
    with suppress(StopError):
        dry_run.counted(workload, plan, whole=True, seed=seed)
    gc.collect()
    if seen.lost:
        raise RaceError(seen.lost[0])
    return seen


AWAY = MemoryPlan(1, 2, "streamed", "host", "host")
PLANS = [  # beside those of `test_the_host_waits_for_layers_pixels_and_the_sum_and_for_nothing_else`
    MemoryPlan(3, 3, "streamed"),
    MemoryPlan(2, 3, "resident", "host", "device"),
    *(
        pytest.param(MemoryPlan(2, 3, weights, hidden, images), marks=pytest.mark.slow)
        for weights in ("resident", "streamed")
        for hidden in ("device", "host")
        for images in ("device", "host")
    ),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.group}-{p.chunk}-{p.weights}-{p.hidden}-{p.images}")
def test_nothing_is_used_before_it_is_there_or_after_it_is_gone(
    plan: MemoryPlan, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_copies(plan, watch(agents, monkeypatch, plan))


def assert_copies(plan: MemoryPlan, seen: Watch) -> None:
    away = plan.weights == "streamed" or plan.images == "host" or (plan.hidden == "host" and plan.group < 3)
    assert (seen.copies > 0) == away
    assert COPY not in seen.owners, "all memory of the card is of one stream"


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


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_host_waits_on_every_kind_of_accelerator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three layers each is queued once the one before the last is done."""
    order: list[str] = []

    class Mark:
        number = 0

        def __init__(self) -> None:
            Mark.number += 1
            self.number = Mark.number

        def record(self, *stream: object) -> None:
            assert len(stream) == (kind != "mps")  # which has one queue
            order.append(f"queued {self.number}")

        def synchronize(self) -> None:
            order.append(f"done {self.number}")

    backend = getattr(torch, kind)
    monkeypatch.setattr(backend, "Event", Mark)
    if kind != "mps":
        monkeypatch.setattr(backend, "current_stream", lambda device: device)
    transfer = Transfer(torch.device(kind), pinned=False)
    for _ in range(3):
        transfer.throttle()
    assert order == ["queued 1", "done 1", "queued 2", "done 2", "queued 3"]


def test_a_host_that_does_not_wait_is_found(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    stopping(monkeypatch, 8)
    assert max(unfinished(agents, monkeypatch)) > 5


@pytest.mark.parametrize("what", ["wait_stream", "wait_event"])
def test_a_wait_that_is_left_out_is_found(what: str, agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, what, lambda self, other: None)
    with pytest.raises(RaceError, match=r"may not have written yet|while compute .* may still use it"):
        watch(agents, monkeypatch, AWAY)


def test_pixels_that_are_read_before_they_came_are_found(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    with pytest.raises(RaceError, match=r"read on host of what copy .* may not have written yet"):
        watch(agents, monkeypatch, AWAY)


def test_the_card_has_work_while_pictures_on_the_host_are_cut_and_pasted(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first chunk of an evaluation, and for the last."""
    queued: dict[str, list[int]] = {"send": [], "paste": []}

    def noting(of: type, name: str) -> None:
        original = getattr(of, name)

        def note(*given: object) -> object:
            queued[name].append(agents.clocks[COMPUTE][COMPUTE] - agents.clocks[HOST][COMPUTE])
            return original(*given)

        monkeypatch.setattr(of, name, note)

    noting(Transfer, "send")
    noting(Canvas, "paste")
    watch(agents, monkeypatch, MemoryPlan(3, 2, images="host"))
    chunks = 3
    for name, idle in (("send", 0), ("paste", chunks - 1)):
        moments = queued[name]
        assert len(moments) % chunks == 0
        assert all(moment > 0 for i, moment in enumerate(moments) if i % chunks != idle), name


@pytest.mark.parametrize(
    ("plan", "pixels"),
    [(MemoryPlan(3, 2), 0), (MemoryPlan(3, 2, images="host"), 3), (AWAY, 3)],
    ids=["in place", "pictures on the host", "away"],
)
def test_the_host_waits_for_layers_pixels_and_the_sum_and_for_nothing_else(
    plan: MemoryPlan, pixels: int, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an evaluation for each layer of a chunk and for what leaves the card; after it for one number at most."""
    within, evaluate = list[Counter[str]](), Denoiser.__call__

    def noting(self: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        agents.waits.clear()
        result = evaluate(self, x, sigma)
        within.append(agents.waits.copy())
        agents.waits.clear()
        return result

    def item(x: torch.Tensor) -> float:
        agents.waits["number"] += x.device.type != "cpu"
        return 0.0

    monkeypatch.setattr(Denoiser, "__call__", noting)
    monkeypatch.setattr(torch.Tensor, "item", item)
    between = list[Counter[str]]()
    original = Run.denoiser

    def denoiser(self: Run, *given: object) -> Callable[..., torch.Tensor]:
        denoise = original(self, *given)

        def told(*at: torch.Tensor) -> torch.Tensor:
            result = denoise(*at)
            between.append(+agents.waits)
            return result

        return told

    monkeypatch.setattr(Run, "denoiser", denoiser)
    assert_copies(plan, watch(agents, monkeypatch, plan))
    layers = 3 * 3  # of three chunks
    assert within[1] == {"event": layers + pixels}
    assert within[0] == {"event": layers - 1 + pixels, "copy": 1}, "levels are brought there once"
    assert between == [{} if pixels else {"number": 1}] * 2


def stopping(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """A stop at this move of the bar while layers are computed. The moves."""
    moves: list[int] = []
    original = Run.advance

    def advance(run: Run, done: int) -> None:
        moves.extend([done] if 0 < done < 9 else [])
        if len(moves) > stop:
            raise StopError
        original(run, done)

    monkeypatch.setattr(Run, "advance", advance)
    return moves


@pytest.mark.parametrize("stop", [0, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 18, 2))])
def test_after_a_stop_nothing_is_given_back_while_it_is_copied(
    stop: int, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = stopping(monkeypatch, stop)
    seen = watch(agents, monkeypatch, AWAY)
    assert len(moves) == stop + 1, "it was stopped"
    assert not seen.lost
    assert not any(storage.owner == COPY for storage in seen.storages.values())


@pytest.mark.parametrize("stop", [0, 7, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 18, 2))])
def test_after_a_stop_nothing_is_held_by_whoever_holds_its_traceback(
    stop: int, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(monkeypatch, stop)
    made: list[tuple[PeakMeter, dict]] = []

    def meter_of(*held: Any) -> PeakMeter:
        meter = PeakMeter(*held)
        made.append((meter, dict(meter.live)))
        return meter

    monkeypatch.setattr(dry_run, "PeakMeter", meter_of)
    monkeypatch.setattr(dry_run, "_streams", nullcontext)
    with pytest.raises(StopError) as kept:
        dry_run.counted(ONE, AWAY, whole=True)
    gc.collect()
    ((meter, weights),) = made
    assert min(meter.peak["device"], meter.peak["host"]) > 100_000
    assert {place: held - weights[place] for place, held in meter.live.items()} == dict.fromkeys(weights, 0)
    assert kept.tb is not None


def test_memory_that_is_given_back_while_it_is_copied_is_found(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfer, "settle", lambda self: setattr(self, "_leaving", None))
    stopping(monkeypatch, 4)  # amid the second group, the next chunk is on its way
    with pytest.raises(RaceError, match=r"given back to compute .* while copy .* may still use it"):
        watch(agents, monkeypatch, AWAY)


@pytest.mark.parametrize("fails", [1, 19, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 60, 3))])
def test_a_pin_that_fails_at_any_call(fails: int, agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights and states, of numbers and pictures on their way to the card, of room for those that come back.

    No copy runs beside the arithmetic from then on, and the order is right all the same.
    """
    original, begun, calls = offload.pinning, list[Run](), list[int]()
    copies = 0  # on the stream for copies, so far
    monkeypatch.setattr(Run, "begin", lambda run, *doing, begin=Run.begin: (begun.append(run), begin(run, *doing)))

    @contextmanager
    def pinning() -> Iterator[None]:
        calls.extend([fails] if begun else [])  # of weights before that, see tests/test_run.py
        with original():
            if len(calls) == fails:
                nonlocal copies
                copies = agents.clocks[COPY][COPY]
                raise RuntimeError("CUDA error: out of memory")
            yield

    monkeypatch.setattr(offload, "pinning", pinning)
    assert watch(agents, monkeypatch, AWAY).copies == copies
    assert len(calls) == fails, "pinning is not tried again in this run"


# several devices

CARDS = [torch.device("cuda", number) for number in range(4)]
SEVERAL = [
    MemoryPlan(4, 2, images="host", layers=(2, 2)),
    MemoryPlan(1, 2, layers=(0, 2, 2)),
    MemoryPlan(1, 3, "streamed", "host", "host", layers=(2, 2)),
    MemoryPlan(4, 2, images="host", layers=(2, 2), pinned=False),
    MemoryPlan(4, 1, images="host", layers=(1, 1, 1, 1)),
    MemoryPlan(2, 2, "streamed", "host", layers=(1, 1, 0, 2)),
]


def shared(plan: MemoryPlan, cards: Sequence[torch.device] = CARDS) -> Workload:
    """What several devices do under a plan."""
    first, *beside = cards[: len(plan.layers)]
    config = replace(CONFIG, num_layers=4)
    return replace(ONE, config=config, device=first, beside=tuple(beside), sampler="euler")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize(
    "plan",
    [*SEVERAL[1:3], *(pytest.param(plan, marks=pytest.mark.slow) for plan in (SEVERAL[0], *SEVERAL[3:]))],
    ids=lambda p: f"{p.group}-{p.chunk}-{p.weights}-{p.hidden}-{p.images}-{p.pinned}-{p.layers}",
)
def test_nothing_is_used_too_early_or_too_late_on_several_devices(
    plan: MemoryPlan, seed: int, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(agents, monkeypatch, plan, shared(plan), seed)
    assert (seen.copies > 0) == plan.pinned
    assert not any(owner.startswith("copy") for owner in seen.owners)


def test_tokens_set_off_while_the_next_device_is_at_work(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    moments: dict[str, list[int]] = {"hand_on": [], "take": []}

    def noting(kind: type, name: str, agent: str) -> None:
        original = getattr(kind, name)

        def noted(*given: object) -> object:
            result = original(*given)
            moments[name].append(agents.clocks[agent]["compute lazy:1"])
            return result

        monkeypatch.setattr(kind, name, noted)

    noting(Transfer, "hand_on", COPY)
    noting(Handover, "take", "compute lazy:1")
    for seed in (1, 0, 2, 3, 4, 5):  # in some order of the devices, as a rule the first: nothing makes them wait
        watch(agents, monkeypatch, SEVERAL[0], shared(SEVERAL[0]), seed=seed)
        ahead = any(began < taken for began, taken in zip(moments["hand_on"], moments["take"], strict=True))
        if ahead:
            break
    assert ahead, "tokens only ever leave when the next device has nothing to do"


Waiting = Callable[[Stream, Stream], bool]  # who waits, and for whose work
LEFT_OUT: dict[str, tuple[Waiting, str]] = {
    "for tokens to be computed": (lambda own, other: own.copies and own.device == other.device, "read on copy"),
    "for memory of the next device": (lambda own, other: own.device != other.device, "written on copy .* while"),
    "for tokens to come": (lambda own, other: other.copies and own.device != other.device, "of what copy .* may not"),
    "for tokens to leave": (lambda own, other: other.copies and own.device == other.device, "back to compute .* while"),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_wait_between_devices_that_is_left_out_is_found(
    what: str, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out, found = LEFT_OUT[what]
    stream, event = Stream.wait_stream, Stream.wait_event
    monkeypatch.setattr(Stream, "wait_stream", lambda own, other: left_out(own, other) or stream(own, other))
    monkeypatch.setattr(Stream, "wait_event", lambda own, it: left_out(own, it.stream) or event(own, it))
    plan = MemoryPlan(4, 2, layers=(2, 2))
    with pytest.raises(RaceError, match=found):
        watch(agents, monkeypatch, plan, shared(plan))


def test_a_landing_that_is_used_again_too_early_is_found(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infdit.uniba.LANDINGS", 2)
    plan = MemoryPlan(4, 1, layers=(1, 1, 2))
    with pytest.raises(RaceError, match="written on copy lazy:0 while copy lazy:1 may still use it"):
        for seed in (1, 0, 2, 3, 4, 5):  # in some order of the devices, and that is the first as a rule
            watch(agents, monkeypatch, plan, shared(plan), seed=seed)


@pytest.mark.parametrize("handed", [True, False])
def test_threads_of_a_cpu_touch_nothing_at_the_same_time(
    handed: bool, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are handed on as they are; without what a queue says of their order, that is found."""
    plan = MemoryPlan(1, 2, layers=(1, 2, 1))
    monkeypatch.setattr(Agents, "heard", Agents.heard if handed else lambda self, turns, thing: None)
    with nullcontext() if handed else pytest.raises(RaceError, match="on host"):
        watch(agents, monkeypatch, plan, shared(plan, [torch.device("cpu")] * 3))


@pytest.mark.parametrize("stop", [2, 13])
def test_a_stop_gives_nothing_back_that_is_on_its_way_to_another_device(
    stop: int, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = stopping(monkeypatch, stop)
    seen = watch(agents, monkeypatch, SEVERAL[0], shared(SEVERAL[0]), seed=stop)
    assert len(moves) == stop + 1, "it was stopped"
    assert not seen.lost
