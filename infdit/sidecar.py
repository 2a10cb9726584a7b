"""Noise levels that were fitted to a model, in a small file beside it: X.safetensors → X.schedules.json."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .draft import draft, put, sweep
from .tensorfile import CheckpointError, why

log = logging.getLogger(__name__)
MOST = 64  # evaluations
Levels = tuple[float, ...]


@dataclass(frozen=True)
class Fit:
    """Where a fit stands; all that the next round depends on.

    Attributes:
        levels: falling, without the 0 at the end: as many as evaluations.
        distance: RMS from the reference; karras: that of the Karras schedule of as many evaluations.
        damping: of the next round; rounds: of the fit that are done.
    """

    levels: Levels
    distance: float
    karras: float
    damping: float = 0.01
    rounds: int = 0


def schedules_path(path: str | Path) -> Path:
    """Where the levels of a model are."""
    return Path(path).with_suffix(".schedules.json")


def read_fits(path: Path) -> dict[str, dict[int, Fit]]:
    """Fits by what they were made from, then by evaluations; none where there is no file.

    Raises:
        CheckpointError: a file that is not of `write_fits`.
    """
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        found = {made: [Fit(**fit | {"levels": checked_levels(fit["levels"])}) for fit in fits]
                 for made, fits in stated["fits"].items()}  # fmt: skip
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"holds no noise levels ({why(error)})", "delete it, or tune again") from error
    return {made: {len(fit.levels): fit for fit in fits} for made, fits in found.items()}


def write_fits(path: Path, model: str, fits: Mapping[str, Mapping[int, Fit]]) -> None:
    """Write fits to a model whose tensors have this SHA-256; the file appears whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    stated = {"model": model, "fits": {made: [asdict(fit) for fit in of.values()] for made, of in fits.items()}}
    try:
        sweep(path.parent)
        with draft(path) as part:
            part.write_text(json.dumps(stated, indent=1), encoding="utf-8")
            put(part, path)
    except OSError as error:
        remedy = "free some space, or give a model in a folder that can be written to"
        raise CheckpointError(path, f"cannot be written ({why(error)})", remedy) from error


def tuned_levels(path: str | Path, model: str | None) -> list[Levels]:
    """Levels of each number of evaluations that were fitted to the model of this path, the last ones made.

    model: SHA-256 of its tensors, if it states one; levels of another model are not taken.
    """
    beside = schedules_path(path)
    fits = read_fits(beside)
    if not fits:
        return []
    if model is not None and json.loads(beside.read_text(encoding="utf-8")).get("model") != model:
        log.warning("%s was fitted to another model and is ignored: tune again, or delete it", beside)
        return []
    return [fit.levels for fit in {count: fit for of in fits.values() for count, fit in of.items()}.values()]


def checked_levels(levels: Any) -> Levels:  # noqa: ANN401 - what a file says
    """The levels that a file states.

    Raises:
        ValueError, TypeError: they are not falling numbers above 0, 2 to MOST of them.
    """
    found = tuple(float(level) for level in levels)
    if not 2 <= len(found) <= MOST or not all(a > b > 0 for a, b in pairwise(found)) or not math.isfinite(found[0]):
        raise ValueError(f"noise levels must be 2 to {MOST} falling numbers above 0")
    return found
