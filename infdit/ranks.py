"""Several processes on one picture, on one machine or on many: each has some of the layers, as in `stages`.

`torchrun … -m infdit upscale …` starts the same command in each. The first, of rank 0, reads, samples, writes and
reports; the others compute for it. Tokens of a chunk go from each to the next over torch.distributed, and from the last
back to the first, which makes pixels of them. What is to be done is told through the key-value store, as JSON. All
listen for signs of life of all, so that one that is gone ends whoever needs it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import cycle
from queue import Empty, Queue
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from .config import LR_FACTOR
from .denoiser import Conditioning, Denoiser
from .device import DeviceFailed, PinFailed, WrongNumbers, one_memory
from .memory.plan import CPU, MemoryPlan, Workload
from .memory.planner import Offer, PlannedRun, fastest_plan, free_bytes, offers, shared_plan
from .model import InfDiT
from .resume import model_digest
from .selfcheck import check_device
from .stages import COURIER, TICK, Progress

BEAT = 2.0  # seconds between two signs of life
SILENCE = 15.0  # seconds without one after which a process is taken for dead
FOREVER = timedelta(days=365)  # of what waits for others: `_judge` ends it
MESSAGE = 2**22  # bytes of what is sent around to know how fast that is
LOST = 2  # exit status, as the shell has it where nothing was made
LoadModel = Callable[[torch.dtype], InfDiT]


class _Ended(Exception):  # noqa: N818 - no error of anybody's
    """The first process has all that it wanted."""


class Peers:
    """The processes that share a run, as one of them sees them.

    Attributes:
        rank: of this one; size: how many there are.
    """

    def __init__(self) -> None:
        """Meet the others, by the environment that torchrun makes.

        Raises:
            DeviceFailed: they do not come.
        """
        try:
            store, self.rank, self.size = next(iter(rendezvous("env://")))
            # through main memory: where nccl receives, all else that the device is to do waits for it
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=FOREVER)
        except (RuntimeError, ValueError) as error:
            raise DeviceFailed(
                f"the processes that torchrun starts did not meet ({_line(error)}): check addresses and that nothing "
                "blocks their ports"
            ) from error
        store.set_timeout(timedelta(seconds=SILENCE))
        self._store, self._orders, self._looked, self._sending = store, 0, 0.0, False
        self._incoming, self._outgoing = _Courier(self._receive), _Courier(self._send)
        self._over, self._gone, self._waits = threading.Event(), False, False
        self._heard = [time.monotonic()] * self.size  # when each gave a sign of life
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name="infdit listens", daemon=True).start()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Let the others go, whatever they are doing."""
        self._over.set()
        if isinstance(error, dist.DistError | PinFailed):
            raise DeviceFailed(self._lost if isinstance(error, dist.DistError) else self._failed(error)) from error
        with suppress(RuntimeError):  # who keeps the store may be gone
            if self.rank:
                self._store.add("gone", 1)
                return
            self._store.set("end", "")
            until = time.monotonic() + (0 if isinstance(error, DeviceFailed) else SILENCE)
            while self._store.add("gone", 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(TICK)  # who keeps the store goes last

    # what the first process says

    def plan(self, workload: Workload, digest: str, budget: int | None) -> PlannedRun:
        """A run over all processes, or alone where that is as fast.

        workload: of this process; digest: of its model; budget: see `fastest_plan`, of this process.
        """
        pace = self._pace()
        asked = {name: getattr(workload, name) for name in ("height", "width", "source")}
        self._tell(asked | {"digest": digest, "dtype": _name(workload.dtype)})
        answers = [self._await(f"offer {self._orders} {rank}") for rank in range(1, self.size)]
        elsewhere = [[Offer(*offer) for offer in answer] for answer in answers]
        plan = shared_plan(workload, partial(_room, budget=budget), elsewhere=elsewhere, link=pace)
        if plan is None:
            return PlannedRun(workload, fastest_plan(workload, budget), free_bytes)
        return PlannedRun(workload, plan, free_bytes, self)

    def _pace(self) -> float:
        """Seconds that a byte takes from one process to the next, by a message around all of them."""
        self._tell({"message": MESSAGE})
        self._line_up(range(self.size))
        began = time.monotonic()
        self.expect([(MESSAGE,)], torch.uint8, CPU, ())
        self.give(torch.zeros(MESSAGE, dtype=torch.uint8, device="cpu"), lambda done: None)
        self.take(lambda done: None)
        return (time.monotonic() - began) / self.size / MESSAGE

    def begin(self, plan: MemoryPlan, shape: Sequence[int], vector: Tensor | None, levels: Sequence[float]) -> None:
        """Say what evaluations are of from now on: pictures (B, 3, h, w), their CLIP vectors, noise levels foreseen."""
        given = None if vector is None else vector.tolist()
        self._tell({"plan": asdict(plan), "shape": [*shape], "vector": given, "levels": [*levels]})
        self._line_up(_at_work(plan))

    def evaluate(self, sigma: Tensor, level: float | None) -> None:
        """Begin an evaluation; arguments as those of `Denoiser.pass_on`."""
        self._tell({"sigma": sigma.tolist(), "sigma_dtype": _name(sigma.dtype), "level": level})

    # what the others do

    @torch.no_grad()
    def serve(self, load: LoadModel, device: torch.device, budget: int | None) -> None:
        """Compute for the first process until it has done.

        load: gives the model in a dtype; device: what computes; budget: bytes that it may hold there.

        Raises:
            DeviceFailed: anything went wrong here, or a process is gone.
        """
        model, denoiser = None, None
        try:
            while True:
                order = self._await(f"order {self._orders + 1}")
                self._orders += 1
                if "message" in order:
                    self._line_up(range(self.size))
                    self.expect([(order["message"],)], torch.uint8, CPU, ())
                    self.give(self.take(lambda done: None), lambda done: None)
                elif "digest" in order:
                    denoiser = None  # what it holds is free for the next
                    dtype = getattr(torch, order["dtype"])
                    model = model if model is not None and model.dtype == dtype else load(dtype)
                    self._offer(model, device, budget, order)
                elif "plan" in order:
                    assert model is not None, "a model is named first"
                    denoiser = None
                    denoiser = self._denoiser(model, device, order)
                elif denoiser is not None:
                    sigma = torch.tensor(order["sigma"], dtype=getattr(torch, order["sigma_dtype"]), device="cpu")
                    denoiser.pass_on(sigma, order["level"])
        except _Ended:
            return
        except dist.DistError as error:
            raise DeviceFailed(self._lost) from error
        except (RuntimeError, MemoryError, ValueError, WrongNumbers) as error:
            if isinstance(error, DeviceFailed):
                raise
            raise DeviceFailed(self._failed(error)) from error

    def _offer(self, model: InfDiT, device: torch.device, budget: int | None, order: dict[str, Any]) -> None:
        """Answer what this process can do of a run."""
        if model_digest(model) != order["digest"]:
            raise ValueError("its --model is another file than that of process 0: give all the same")
        size, source = (order["height"], order["width"]), tuple(order["source"])
        workload = Workload(model.config, *size, dtype=model.dtype, device=device, source=source)
        workload = replace(workload, scales=model.defaults.scales)
        check_device(workload)
        offered = offers(workload, device, _room(device, budget))
        self._store.set(f"offer {self._orders} {self.rank}", json.dumps(offered))

    def _denoiser(self, model: InfDiT, device: torch.device, order: dict[str, Any]) -> Denoiser | None:
        """What computes this process's share of evaluations; None if it has none."""
        plan = MemoryPlan(**order["plan"] | {"layers": tuple(order["plan"]["layers"])})
        if self.rank not in _at_work(plan):
            return None
        self._line_up(_at_work(plan))
        batch, channels, height, width = order["shape"]
        nothing, vector = torch.zeros((), dtype=torch.float32, device="cpu"), order["vector"]
        conditioning = Conditioning(
            nothing.expand(batch, channels, height // LR_FACTOR, width // LR_FACTOR),
            nothing.expand(batch, channels, height, width),
            vector and torch.tensor(vector, dtype=torch.float32, device="cpu"),
        )
        options: dict[str, Any] = {"levels": order["levels"], "device": device, "elsewhere": self}
        return Denoiser(model, conditioning, plan, progress=lambda done: self._look(), **options)

    # what is said

    def _tell(self, order: dict[str, Any]) -> None:
        self._orders += 1
        with self._waiting():
            self._store.set(f"order {self._orders}", json.dumps(order))

    def _await(self, key: str) -> Any:  # noqa: ANN401 - any JSON
        """What another process says under a name."""
        with self._waiting():
            while not self._store.check([key]):
                self._look()
                time.sleep(TICK / 10)
            return json.loads(self._store.get(key))

    def _look(self) -> None:
        """Whether another process is gone or, from time to time, whether the first has ended."""
        if self._gone:
            raise DeviceFailed(self._lost)
        now = time.monotonic()
        if now - self._looked > 10 * TICK:
            self._looked = now
            if self.rank and self._store.check(["end"]):
                raise _Ended

    # tokens

    def _line_up(self, ranks: Sequence[int]) -> None:
        """Know between which processes this one stands when tokens go from each of these to the next."""
        here = ranks.index(self.rank)
        self._from, self._to = ranks[here - 1], ranks[(here + 1) % len(ranks)]

    def expect(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, landings: Sequence[Tensor]
    ) -> None:
        """Begin to receive tokens of these shapes, one after the other; landings: see `Workbench`."""
        self._device, self._landings = device, cycle(landings)
        for shape in shapes:
            self._incoming.ask((shape, dtype, self._from))

    def take(self, look: Progress) -> Tensor:
        """The tokens that come next; look: see `Handover`."""
        h = self._result(self._incoming, look)
        landing = next(self._landings, None)
        return h.to(self._device) if landing is None else landing[: h.numel()].view(h.shape).copy_(h)

    def give(self, h: Tensor, look: Progress) -> None:
        """Send tokens on as soon as those before have gone; look: see `Handover`."""
        if self._sending:
            self._result(self._outgoing, look)
        self._sending = True
        self._outgoing.ask((h, self._to))

    def _result(self, courier: _Courier, look: Progress) -> Any:  # noqa: ANN401 - the errand's
        """What an errand brings, or DeviceFailed."""
        with self._waiting():
            while (found := courier.result()) is None:
                self._look()
                look(0)
        if isinstance(found[0], Exception):
            raise DeviceFailed(self._lost) from found[0]
        return found[0]

    @staticmethod
    def _send(what: tuple[Tensor, int]) -> None:
        dist.send(what[0].cpu().contiguous(), what[1])

    @staticmethod
    def _receive(what: tuple[tuple[int, ...], torch.dtype, int]) -> Tensor:
        h = torch.empty(what[0], dtype=what[1], device="cpu")
        dist.recv(h, what[2])
        return h

    # who is alive

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """While another process is needed to go on."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _beat(self) -> None:
        """Give signs of life, and note when each of the others gave one. The store itself may never answer."""
        beats = [-1] * self.size
        with suppress(RuntimeError):
            while not self._over.wait(BEAT):
                for rank in range(self.size):
                    found = self._store.add(f"alive {rank}", int(rank == self.rank))
                    if found != beats[rank]:
                        beats[rank], self._heard[rank] = found, time.monotonic()

    def _judge(self) -> None:
        """Know when another is gone. If this process then waits, and cannot be woken, it is ended."""
        while not self._over.wait(BEAT):
            silence = time.monotonic() - min(self._heard)
            self._gone = silence > SILENCE
            if self._waits and silence > SILENCE + 2 * BEAT:
                sys.stderr.write(f"infdit: {self._lost}\n")
                sys.stderr.flush()
                os._exit(LOST)

    @property
    def _lost(self) -> str:
        return (
            f"process {self.rank} (of {self.size}, from 0) hears no more of another, which may say why: start all "
            "again, and with --resume DIR they go on from the last step"
        )

    def _failed(self, error: BaseException) -> str:
        return f"process {self.rank} (of {self.size}, from 0) failed: {_line(error)}"


class _Courier:
    """Does one errand after another on a thread, which ends with the process; a result waits until it is taken."""

    def __init__(self, errand: Callable[[Any], Any]) -> None:
        self._errand = errand
        self._asked, self._done = Queue[Any](), Queue[tuple[Any]](1)
        threading.Thread(target=self._work, name=COURIER, daemon=True).start()

    def ask(self, what: object) -> None:
        """Have an errand done."""
        self._asked.put(what)

    def result(self) -> tuple[Any] | None:
        """Of the errand that was asked for first, or the error that ended all; None if there is none yet."""
        try:
            return self._done.get(timeout=TICK)
        except Empty:
            return None

    def _work(self) -> None:
        try:
            while True:
                self._done.put((self._errand(self._asked.get()),))
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            while True:
                self._done.put((error,))


def _at_work(plan: MemoryPlan) -> list[int]:
    """Who has layers."""
    return [rank for rank, layers in enumerate(plan.layers) if layers]


def _room(device: torch.device, budget: int | None) -> int:
    """Bytes that a process may hold on a device: of one memory that processes have in common its share."""
    others = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if one_memory(device) else 1
    return free_bytes(device) // others if budget is None else budget


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
