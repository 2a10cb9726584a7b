"""What a plan holds, counted without holding it.

The whole of `upscale` runs on fake tensors, which have shapes and no memory, on a fake accelerator beside a fake host.
Of each evaluation layers are computed only where the peak can lie: of the first and of the last group of layers the
first two chunks, for the ring of keys and values is made whole by the first and what comes next is copied ahead, those
where most keys are turned into another frame, and the last two, when all hidden states are there. Of all other chunks
only the hidden states come and go, in the first two groups and in the last two.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from infdit import attention, fidelity, stages
from infdit.config import LR_FACTOR, InfDiTConfig
from infdit.denoiser import _Pictures
from infdit.grid import BlockGrid, Geometry
from infdit.memory import footprint
from infdit.memory.offload import Transfer, distribute_weights
from infdit.memory.plan import MemoryPlan, Place, Workload
from infdit.memory.planner import PlannedRun
from infdit.model import InfDiT, KeepNeighbours, Layer, MakeWindow
from infdit.run import Report, Run
from infdit.samplers import get_sampler, karras_sigmas
from infdit.uniba import Chunk, Workbench
from infdit.upscale import finish_result, upscale_batch

from .peak_meter import PeakMeter

ACCELERATOR = torch.device("lazy:0")  # one that PyTorch knows and that nobody has: only fake tensors can be on it
ACCELERATORS = [torch.device("lazy", number) for number in range(8)]
MID_WORK = 0.1  # how often an operation is not followed by the same thread's next
STEPS = 3  # after which a sampler holds all that it ever does; Euler's, of which each is the same, after two


class Turns:
    """Threads of several devices one at a time: a mode is of one thread and not safe, and a run is the same again.

    Stands in for `threading` and for queues where `stages` waits: who would wait lets others go on first. Who comes
    next is drawn by a seed, some threads more often than others.
    """

    def __init__(self, seed: int, *modes: AbstractContextManager) -> None:
        """modes: to be entered by each thread that starts."""
        self._random, self._change, self._modes = random.Random(seed), threading.Condition(), modes
        self._speeds: dict[threading.Thread, float] = {}
        self._enter(threading.current_thread())
        self._now = threading.current_thread()

    def give_way(self, chance: float = 1) -> None:
        """Let any thread go on, this one too, until it is the turn of this one; or by chance do nothing."""
        if len(self._speeds) > 1 and self._random.random() < chance:
            with self._change:
                self._next()
                self._wait()

    def told(self, thing: object) -> None:
        """For who watches the order: what this thread has done comes before what those do who hear of the thing."""

    def heard(self, thing: object) -> None:
        """See `told`."""

    def take(self) -> AbstractContextManager[object]:
        """Inside `with`, `stages` waits like this."""
        turns = self

        class Thread(threading.Thread):
            def start(self) -> None:
                turns._enter(self)
                turns.told(self)
                super().start()

            def run(self) -> None:
                with turns._change:
                    turns._wait()
                turns.heard(self)
                with ExitStack() as entered:
                    for mode in turns._modes:
                        entered.enter_context(mode)
                    super().run()
                turns.told(self)
                with turns._change:
                    del turns._speeds[self]
                    turns._next()

            def join(self, timeout: float | None = None) -> None:
                while self in turns._speeds:
                    turns.give_way()
                turns.heard(self)
                super().join(timeout)

        class Semaphore(threading.Semaphore):
            def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
                turns.give_way()
                acquired = super().acquire(blocking=False)
                if acquired:
                    turns.heard(self)
                return acquired

            def release(self, n: int = 1) -> None:
                turns.told(self)
                super().release(n)

        class Queue(queue.Queue):
            def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
                turns.told(self)
                super().put(item, block, timeout)

            def get(self, block: bool = True, timeout: float | None = None) -> object:
                turns.give_way()
                item = super().get(block=False)
                turns.heard(self)
                return item

        waits = SimpleNamespace(Thread=Thread, Semaphore=Semaphore, Event=threading.Event, Lock=threading.Lock)
        return mock.patch.multiple(stages, threading=waits, Queue=Queue)

    def _enter(self, thread: threading.Thread) -> None:
        self._speeds[thread] = 2 ** self._random.uniform(-3, 3)

    def _next(self) -> None:
        (self._now,) = self._random.choices(list(self._speeds), list(self._speeds.values()))
        self._change.notify_all()

    def _wait(self) -> None:
        self._change.wait_for(lambda: self._now is threading.current_thread())


class FakeAccelerator(TorchFunctionMode):
    """Attention as an accelerator's kernel computes it: no matrix of scores is ever held. Every number is 0.

    Before an operation another thread may have its turn.
    """

    turns: Turns | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - PyTorch's own signature
        if self.turns is not None:
            self.turns.give_way(MID_WORK)
        if func is F.scaled_dot_product_attention and args[0].device.type != "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        if func is Tensor.item:
            return 0.0
        if func is Tensor.is_pinned:  # which PyTorch 2.4 cannot say of fake tensors
            return False
        return func(*args, **(kwargs or {}))


class _Stream:
    """A stream or an event of nobody's: whoever waits for it need not."""

    def _nothing(self, *other: object) -> None:
        pass

    wait_stream = wait_event = record = synchronize = _nothing


@contextmanager
def _streams() -> Iterator[None]:
    """Copies beside the arithmetic, as on a card: what is under way takes room."""
    original, stream = Transfer.__init__, _Stream()

    def made(self: Transfer, device: torch.device, pinned: bool = True) -> None:
        original(self, device, pinned)
        if pinned and self._stream is None:
            self._stream = stream  # type: ignore[assignment]

    with (
        mock.patch.object(Transfer, "__init__", made),
        mock.patch.multiple(torch.cuda, Event=_Stream, stream=nullcontext, current_stream=lambda device: stream),
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
    ):
        yield


def counted_peak(workload: Workload, plan: MemoryPlan, whole: bool = False) -> dict[Place, int]:
    """Bytes that `upscale` holds at most, on the device and on the host; `Workload.footprint` predicts them.

    Args:
        workload: of any pictures.
        plan: its schedule.
        whole: compute every chunk; only slower.
    """
    return counted(workload, plan, whole).peak


@torch.no_grad()
def counted(workload: Workload, plan: MemoryPlan, whole: bool = False, seed: int = 0) -> PeakMeter:
    """The same with all that the meter saw; seed: of the order in which several devices come to their work."""
    fakes = ACCELERATORS[: len(workload.devices)]
    devices = [d if d.type == "cpu" else fake for d, fake in zip(workload.devices, fakes, strict=True)]
    device, target = devices[0], (workload.height, workload.width)
    planned = PlannedRun(replace(workload, device=device, beside=tuple(devices[1:])), plan, lambda device: 0)
    levels = [karras_sigmas(2 if workload.sampler == "euler" else STEPS, 0.1, 1.0)] * len(workload.passes)
    streams = _streams() if workload.device.type == "cuda" else nullcontext()
    fused = attention.fused(workload.device, workload.dtype, workload.config.head_dim)
    with ExitStack() as entered:
        for module in (attention, footprint):  # kernels as the device has them, not its stand-in
            entered.enter_context(mock.patch.object(module, "fused", lambda *which: fused))
        fake = entered.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        accelerator = entered.enter_context(FakeAccelerator())
        entered.enter_context(streams)
        model = distribute_weights(fake_model(workload.config, workload.dtype), plan, devices)
        if not whole:
            entered.enter_context(_thinned(model, workload, plan))
        image = torch.empty(workload.batch, *(-(-side // LR_FACTOR) for side in target), 3)
        meter = PeakMeter(model.parameters(), device, workload.unified_memory)
        accelerator.turns = turns = Turns(seed, fake, accelerator, meter)
        with meter, turns.take():
            run = Run(model, planned, lambda done: None, Report())
            noises = [map(torch.empty, [(1, 3, p.grid.height, p.grid.width)] * len(image)) for p in workload.passes]
            finish = partial(finish_result, float(workload.fitted), False)
            sampler = get_sampler(workload.sampler)
            with run.at_work():
                upscale_batch(run, image, None, sampler, levels, noises, lambda state: None, finish)
    return meter


def fake_model(config: InfDiTConfig, dtype: torch.dtype) -> InfDiT:
    """A network of fake tensors on the CPU."""
    with torch.device("meta"):
        model = InfDiT(config)
    state = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


class _ThinLayer(Layer):
    """A layer that computes some chunks, in a group between the first and the last none, and passes the others on."""

    between: bool

    def forward(
        self, h: Tensor, modulation: Tensor, turns: Tensor | None, keep_neighbours: KeepNeighbours,
        window: MakeWindow | None = None,
    ) -> Tensor:
        """As the layer it was, or tokens of the same shape."""
        if self.between or turns is None:
            return torch.empty_like(h)
        return super().forward(h, modulation, turns, keep_neighbours, window)


@contextmanager
def _thinned(model: InfDiT, workload: Workload, plan: MemoryPlan) -> Iterator[None]:
    """Leave out what cannot hold more than what is computed: most groups, and of most chunks all but hidden states.

    Of the strips in which a result is compared with the picture given, the first two and the last two.
    """
    for _, layers in plan.stages(workload.devices, workload.config.num_layers):
        for i in layers:
            layer, group, last = model.layers[i], (i - layers.start) // plan.group, (len(layers) - 1) // plan.group
            assert isinstance(layer, Layer)
            layer.__class__ = _ThinLayer
            layer.__dict__["between"] = group not in (0, last)
    wanted = cache(partial(_wanted, workload.config, plan))
    made, read, write, prepare = Chunk.__init__, _Pictures.read, _Pictures.write, _Pictures.prepare
    made_bench, compare = Workbench.__init__, fidelity._Downscale.__call__

    def compare_some(self: fidelity._Downscale, *of: Any) -> Tensor:  # noqa: ANN401 - the original's
        whole = self.strips, self._across
        self.strips, self._across = ([*pieces[:2], *pieces[2:][-2:]] for pieces in whole)
        result = compare(self, *of)
        self.strips, self._across = whole
        return result

    def some_groups(self: Workbench, *of: object) -> None:
        made_bench(self, *of)  # type: ignore[arg-type]
        self.groups = [*self.groups[:2], *self.groups[2:][-2:]]

    def thin(self: Chunk, geometry: Geometry, blocks: range, *of: object) -> None:
        if blocks in wanted(geometry.grid):
            made(self, geometry, blocks, *of)  # type: ignore[arg-type]
        else:
            self.blocks, self.turns = blocks, None  # type: ignore[assignment]

    def read_some(self: _Pictures, chunk: Chunk) -> tuple[Tensor, MakeWindow | None]:
        if chunk.turns is not None:
            return read(self, chunk)
        config, device = workload.config, self._to.device
        shape = len(self._x), len(chunk.blocks), config.block_tokens, config.hidden_size
        return torch.empty(shape, dtype=self._model.dtype, device=device), None

    def write_some(self: _Pictures, chunk: Chunk, h: Tensor) -> None:
        if chunk.turns is not None:
            write(self, chunk, h)

    def prepare_some(self: _Pictures, blocks: range) -> None:
        if blocks in wanted(self._grid):
            prepare(self, blocks)

    with (
        mock.patch.object(fidelity._Downscale, "__call__", compare_some),
        mock.patch.object(Workbench, "__init__", some_groups),
        mock.patch.object(Chunk, "__init__", thin),
        mock.patch.multiple(_Pictures, read=read_some, write=write_some, prepare=prepare_some),
    ):
        yield


def _wanted(config: InfDiTConfig, plan: MemoryPlan, grid: BlockGrid) -> set[range]:
    """The chunks of a grid where the peak can lie."""
    geometry, chunks = Geometry(grid, config.block_side, config.position_period), list(grid.chunks(plan.chunk))
    wanted = {*chunks[:2], *chunks[-2:]}

    def turned(blocks: range) -> int:
        return int(geometry.frame_shifts(np.arange(blocks.start, blocks.stop)).any(-1).sum())

    keys = [turned(blocks) for blocks in chunks]
    for order in (range(len(chunks)), range(len(chunks) - 1, -1, -1)):  # hidden states get more, in the last group less
        most = 0
        for i in order:
            if keys[i] > most:
                wanted.add(chunks[i])
                most = keys[i]
    return wanted
