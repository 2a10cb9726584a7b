"""What a run has done before it was stopped: kept in ComfyUI's output folder until the same run is queued again.

Each run has a folder of its own in there, named after all that changes a pixel: no two are ever in each other's way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ..infdit.memory.plan import Workload
from ..infdit.model import InfDiT
from ..infdit.resume import SavedRun, model_digest, settings_of
from ..infdit.samplers import get_sampler
from ..infdit.tensorfile import tensor_digest, why

FOLDER = "inf-dit-unfinished"  # help pages name it; not in temp, which ComfyUI empties when it starts


@contextmanager
def kept_states(
    model: InfDiT, workload: Workload, image: Tensor, sigmas: Tensor, vectors: Tensor | None, notes: list[str],
    **given: Any,  # noqa: ANN401 - the rest of what `settings_of` asks for
) -> Iterator[SavedRun | None]:
    """Where a run keeps its states. They are removed when it has ended well, and stay when an error comes out of it.

    notes: gets a sentence where nothing can be kept; then None is given.
    """
    if (len(sigmas) - 1) * workload.batch * len(workload.passes) < 2:
        notes.append("resume: nothing is kept, for this run is of one step at most")
        yield None
        return
    said = None if vectors is None else [vectors]
    run = settings_of(workload, model.defaults, get_sampler(workload.sampler), [sigmas], vectors=said, **given)
    run |= {"model": model_digest(model), "device": workload.device_kinds, "pictures": tensor_digest({"": image})}
    name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(folder_paths.get_output_directory()) / FOLDER / name
    saved = SavedRun(folder / "picture")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        saved = None
        notes.append(f"{folder}: the state cannot be written ({why(error)}); the run goes on")
    try:
        yield saved
        if saved is not None:
            saved.remove()
    finally:
        with suppress(OSError):  # where states are kept
            folder.rmdir()
            folder.parent.rmdir()
