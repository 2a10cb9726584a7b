"""Processes that share the parts of a step on a CPU, each with one thread of arithmetic.

They wait for each other once a step instead of at every operation, and threads would also wait for the interpreter's
lock, which compiled layers hold. Weights and gradients lie in shared memory: what goes to and fro is the number of a
step and its losses.
"""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import Tensor

from infdit.config import InfDiTConfig
from infdit.model import InfDiT

from .data import Source
from .gradients import Gradients, Recipe


class Workers:
    """`count` processes that do what one `Gradients` does, bit for bit.

    The model's parameters are moved into memory that all share.
    """

    def __init__(
        self,
        model: InfDiT,
        recipe: Recipe,
        source: Source,
        slots: Tensor,
        count: int,
        *,
        compiled: bool,
    ) -> None:
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        weights = torch.zeros(sum(_room(parameter) for parameter in kept)).share_memory_()
        _lay_out(model, weights)
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.data.copy_(value)
        slots.share_memory_()
        if "forkserver" in mp.get_all_start_methods():
            context = mp.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # PyTorch is imported once for all
        else:
            context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        for first in range(count):
            ours, theirs = context.Pipe()
            parts = range(first, recipe.parts, count)
            job = (theirs, model.config, weights, recipe, source, slots, compiled, parts)
            context.Process(target=_work, args=job, daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def run(self, step: int) -> list[float]:
        """Fill all slots with the gradients of a step; the losses of its parts.

        Raises:
            ChildProcessError: a worker has ended.
        """
        losses: dict[int, float] = {}
        try:
            for pipe in self._pipes:
                pipe.send(step)
            for pipe in self._pipes:
                losses |= pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError("a worker has ended (memory?): --resume goes on from the last state") from error
        return [losses[part] for part in sorted(losses)]


def _room(parameter: Tensor) -> int:
    """Elements that a parameter takes: whole cache lines, as if alone, or kernels add in another order."""
    return -(-parameter.numel() // 16) * 16


def _lay_out(model: InfDiT, weights: Tensor) -> None:
    """Make the parameters views of `weights`, one after the other."""
    start = 0
    for parameter in model.parameters():
        parameter.data = weights[start : start + parameter.numel()].view_as(parameter)
        start += _room(parameter)


def _work(
    pipe: Connection,
    config: InfDiTConfig,
    weights: Tensor,
    recipe: Recipe,
    source: Source,
    slots: Tensor,
    compiled: bool,
    parts: range,
) -> None:
    """A worker's life: until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides what it means
    torch.set_num_threads(1)
    model = InfDiT(config)
    _lay_out(model, weights)
    gradients = Gradients(model, recipe, source, slots, compiled=compiled)
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        pipe.send(dict(zip(parts, gradients.run(step, parts), strict=True)))
