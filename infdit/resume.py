"""The state of a run on disk, from which the same run goes on when it was ended by force.

What a sampler knows before the first evaluation of a step is x and, for some, the last answers. So a state is kept
while that evaluation is computed, and holds these alone. To go on, the sampler is handed the rest of the noise levels,
beginning so many steps earlier as it looks back: of these steps the answers are known, and what it makes of them is
replaced by x. Samplers stay pure functions that know nothing of it, and a run goes on in the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .config import SamplingDefaults
from .draft import draft, put, sweep
from .memory.plan import Workload
from .model import InfDiT
from .samplers import SAMPLER_INFO, Callback, Denoise, SamplerInfo, State
from .tensorfile import CheckpointError, printable, read_tensors, tensor_digest, why

log = logging.getLogger(__name__)
FORMAT = 1
# whatever a state can raise that somebody made up
_SENSELESS = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


class SavedRun:
    """Where a run keeps its state: a file for each picture, written whole or not at all, on a thread.

    Args:
        path: the files are called this, a number and `.state`; the folder must be there. Who has saved the result calls
            `remove`.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._broken = Path(path), False
        self._settings: dict[str, object] = {}
        self._notes: list[str] = []

    def begin(self, settings: Mapping[str, object], notes: list[str]) -> None:
        """Say what is run, all that changes a pixel beside the picture; notes: gets a sentence of each state found."""
        self._settings, self._notes = dict(settings), notes
        sweep(self._path.parent)

    def remove(self) -> None:
        """Remove the states: the result is safe."""
        for file in self._path.parent.glob("*.state"):  # nothing, and no error, of a folder that has gone
            if re.fullmatch(rf"{re.escape(self._path.name)}\.\d+(\.\d+)?\.state", file.name):
                with suppress(OSError):
                    file.unlink()

    def sample(
        self, number: int, pass_number: int | None, picture: Tensor, skip: Callable[[int], None], sampler: SamplerInfo,
        denoise: Denoise, start: list[Tensor], sigmas: Tensor, callback: Callback,
    ) -> Tensor:
        """What `sampler` makes of x, going on from the state of the same run, if there is one.

        Args:
            number: of the picture in the run; pass_number: of its pass, from 1, if there are several; picture: as it
                was given to that.
            skip: is told how many steps are done already.
            sampler, denoise, sigmas, callback: see `samplers`.
            start: x alone, which is taken out of the list.
        """
        of_pass, called = ("", "") if pass_number is None else (f".{pass_number}", f" in pass {pass_number}")
        file, steps = self._path.with_name(f"{self._path.name}.{number}{of_pass}.state"), len(sigmas) - 1
        run = self._settings | {"picture": tensor_digest({"": picture}), "start": tensor_digest({"": start[0]})}
        step, saved = self._load(file, run, start[0], sampler, steps)
        if step:
            skip(step)
            self._note(f"picture {number + 1} goes on after step {step} of {steps}{called}", logging.INFO)
            start[0].copy_(saved[0])
        if step == steps:
            return start.pop()
        first = step - len(saved[1:])

        def told(state: State) -> None:
            if first + state["i"] >= step:
                callback({**state, "i": first + state["i"]})

        with self._writer(file, run) as write:
            remembered = _Remembered(denoise, sampler, first, step, saved, write)
            del saved
            y = sampler.sample(remembered, start.pop(), sigmas[first:], told)
            write(steps, [y])
        return y

    def _load(
        self, file: Path, run: Mapping[str, object], like: Tensor, sampler: SamplerInfo, steps: int
    ) -> tuple[int, list[Tensor]]:
        """(steps done, x and the last answers); nothing of a state that is not this run's."""
        if not os.path.lexists(file):
            return 0, []
        try:
            return _read(file, run, like, sampler, steps)
        except CheckpointError as error:
            reason = error.problem
        except _SENSELESS as error:
            reason = str(error) if type(error) is ValueError else "is not one of this run"
        self._note(printable(f"{file}: the state {reason}; this run starts afresh"), logging.WARNING)
        return 0, []

    def _note(self, text: str, level: int) -> None:
        self._notes.append(text)
        log.log(level, "%s", text)

    @contextmanager
    def _writer(self, file: Path, run: Mapping[str, object]) -> Iterator[Callable[[int, list[Tensor]], None]]:
        """write(step, tensors), which waits for the state before to be written and not for this one."""
        last: list[Future[None]] = []
        with ThreadPoolExecutor(1) as thread:

            def write(step: int, tensors: list[Tensor]) -> None:
                for written in last:
                    written.result()
                there = {str(i): tensor.detach().cpu().contiguous() for i, tensor in enumerate(tensors)}
                last[:] = [thread.submit(self._write, file, run, step, there)]

            yield write

    def _write(self, file: Path, run: Mapping[str, object], step: int, tensors: dict[str, Tensor]) -> None:
        """Write a state; a disk that is full ends no run."""
        try:
            header = json.dumps({"format": FORMAT, "step": step, "run": run})
            metadata = {"state": header, "sha256": _stamp(header, tensors)}
            with draft(file) as part:
                save_file(tensors, str(part), metadata)
                put(part, file)
        except (MemoryError, OSError, RuntimeError, SafetensorError) as error:
            if not self._broken:
                self._note(f"{file}: the state cannot be written ({why(error)}); the run goes on", logging.WARNING)
            self._broken = True


def settings_of(
    workload: Workload, defaults: SamplingDefaults, sampler: SamplerInfo, levels: Sequence[Tensor], seed: int | None,
    vectors: Sequence[Tensor] | None, fidelity: float = 0.0, colour_match: bool = False,
) -> dict[str, Any]:
    """All that changes a pixel beside model, picture and device, of JSON's types; seed None: the noise was given.

    levels: of each pass, of which the first are stated alone where all have the same.
    A seed that no noise is drawn from changes nothing, and is None too.
    """
    own = (name for name, info in SAMPLER_INFO.items() if info is sampler)
    noise = "given" if seed is None else defaults.start_noise
    stated = [sigmas.tolist() for sigmas in levels]
    return {
        "size": [workload.height, workload.width],
        "sampler": next(own, getattr(sampler.sample, "__qualname__", "unnamed")),
        "sigmas": stated if stated.count(stated[0]) < len(stated) else stated[0],
        "seed": seed if noise else None,
        "noise": noise,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "fidelity": float(fidelity),
        "colour_match": bool(colour_match),
        "clip": None if vectors is None else tensor_digest({str(i): vector for i, vector in enumerate(vectors)}),
    }


def model_digest(model: InfDiT) -> str:
    """SHA-256 that a model's file states, or of the parameters as they are computed with."""
    return model.digest or tensor_digest(model.state_dict())


class _Remembered:
    """denoise(x, σ) that keeps x before each step and answers of steps that are done from what was kept.

    Args:
        first: number of the step that the sampler begins with; step: of the first that is computed.
        saved: x of `step`, and the answers of the steps before it from `first` on.
        keep: keep(step, [x and the last answers]).
    """

    def __init__(
        self, denoise: Denoise, sampler: SamplerInfo, first: int, step: int, saved: list[Tensor],
        keep: Callable[[int, list[Tensor]], None],
    ) -> None:
        self._denoise, self._sampler, self._keep = denoise, sampler, keep
        self._first, self._step, self._calls = first, step, 0
        self._x, self._answers = saved[:1], saved[1:]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; σ)."""
        step, more = divmod(self._calls, self._sampler.evaluations)
        step += self._first
        self._calls += 1
        if step < self._step:
            return self._answers[step - self._first].to(x.device)
        if not more and step == self._step and self._x:
            x.copy_(self._x.pop())
        elif not more and step > self._step and self._sampler.history is not None:
            self._keep(step, [x, *self._answers])
        answer = self._denoise(x, sigma)
        if self._sampler.history:
            self._answers = [*self._answers, answer][-self._sampler.history :]
        return answer


def _read(
    file: Path, run: Mapping[str, object], like: Tensor, sampler: SamplerInfo, steps: int
) -> tuple[int, list[Tensor]]:
    found = read_tensors(file)
    header = found.metadata.get("state", "")
    if found.metadata.get("sha256") != _stamp(header, found.tensors):
        raise ValueError("is damaged")
    stated = json.loads(header)
    if stated["format"] != FORMAT:
        raise ValueError(f"has format {stated['format']}, and {FORMAT} is read")
    if stated["run"] != json.loads(json.dumps(run)):
        raise ValueError(f"is of another run: {difference(stated['run'], run)}")
    step, tensors = stated["step"], [found.tensors[str(i)] for i in range(len(found.tensors))]
    looks_back = 0 if step == steps else min(step, sampler.history or 0)
    fit = all((t.shape, t.dtype) == (like.shape, like.dtype) for t in tensors)
    if type(step) is not int or not 0 < step <= steps or len(tensors) != 1 + looks_back or not fit:
        raise ValueError("is not one of this run")
    return step, tensors


def difference(stated: Mapping[str, object], run: Mapping[str, object]) -> str:
    """The first thing in which two runs differ, for people; "" if there is none."""
    for name, value in json.loads(json.dumps(run)).items():
        other = stated.get(name)
        if other != value:
            short = all(isinstance(v, int | float) or (isinstance(v, str) and len(v) < 20) for v in (value, other))
            return f"its {name} is {other}, not {value}" if short else f"it has another {name}"
    return ""


def _stamp(header: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{header}\0{tensor_digest(tensors)}".encode()).hexdigest()
