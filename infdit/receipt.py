"""The receipt of a picture: what made it, and what that took, as JSON. From it the same pixels can be made again.

A receipt comes with a picture from anywhere, so nothing in it is trusted: it names no path, and every value is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .memory.plan import MemoryPlan
from .samplers import SAMPLER_INFO

if TYPE_CHECKING:
    from .run import Report

FORMAT = 1
MOST_STEPS = 10_000
_SETTINGS = ("size", "sampler", "sigmas", "seed", "noise", "dtype", "clip", "fidelity", "colour_match")
_PLAN = ("group", "chunk", "weights", "hidden", "images", "sweep", "pinned")  # what tells one plan from another


class ReceiptError(ValueError):
    """A receipt that cannot be used: what is wrong and the way out, in one sentence."""


@dataclass(frozen=True)
class Receipt:
    """What a receipt says that a run can be made from.

    Attributes:
        model, sha256: name and digest of the model; picture: digest of the file that was upscaled, or "".
        settings: see `resume.settings_of`; plan: how it was cut.
        text: (positive, negative, strength) of CLIP's guidance; device: what computed it, like "cuda".
        bits: of a channel of the file that was written, if one was.
        batch: how many pictures were made in one run, of whose noise the first had the beginning.
    """

    model: str
    sha256: str
    picture: str
    settings: dict[str, Any]
    plan: MemoryPlan
    text: tuple[str, str, float]
    device: str
    bits: int | None = None
    batch: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.settings["size"][0], self.settings["size"][1]

    @property
    def levels(self) -> list[list[float]]:
        """Noise levels of each pass; one list where all have the same."""
        sigmas = self.settings["sigmas"]
        return sigmas if isinstance(sigmas[0], list) else [sigmas]


def receipt_of(report: Report, seconds: float, **about: object) -> dict[str, Any]:
    """The receipt of a run.

    Args:
        report: of the run that has ended; seconds: that it took.
        about: what the library is not told: model (name, sha256), picture (sha256), device, text, bits, batch.
    """
    plan = asdict(report.plan) if report.plan else {}
    receipt = {
        "receipt": FORMAT,
        "version": version(),
        **about,
        "settings": report.settings,
        "plan": {name: plan.get(name) for name in (*_PLAN, *(["layers"] if plan.get("layers") else []))},
        "evaluations": report.evaluations,
        "seconds": round(seconds, 3),
        "bytes": {
            "foretold": plan.get("peak_bytes"),
            "foretold_host": plan.get("host_bytes"),
            "foretold_disk": plan.get("disk_bytes"),
            "measured": report.peak_bytes,
            "reserved": report.reserved_bytes,
        },
        "faithful": [{"dB": _rounded(x.consistency), "deltaE2000": _rounded(x.colour)} for x in report.faithful],
        "seams": [dict(zip(("patch", "block"), map(_rounded, x), strict=True)) for x in report.seams],
        "replanned": report.replanned,
        "resumed": report.resumed,
    }
    return receipt | {"sha256": _digest(receipt)}


def _rounded(score: float) -> float | None:
    return round(score, 3) if math.isfinite(score) else None


def _digest(receipt: Mapping[str, Any]) -> str:
    body = {name: value for name, value in receipt.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_receipt(text: str) -> Receipt:
    """The receipt that a text is.

    Raises:
        ReceiptError: no receipt, one of another format, or one with values that none could have.
    """
    try:
        stated = json.loads(text)
        if isinstance(stated, list):
            raise ReceiptError("it has the receipts of several runs: give the one of a single run")
        if stated["receipt"] != FORMAT:
            raise ReceiptError(f"it has format {str(stated['receipt'])[:20]}, and {FORMAT} is read: use that version")
        if stated["sha256"] != _digest(stated):
            raise ReceiptError("it was changed since it was written")
        settings = {name: stated["settings"][name] for name in _SETTINGS}
        _check(settings)
        plan = MemoryPlan(**{name: stated["plan"][name] for name in _PLAN})
        words = stated.get("text") or {}
        text_ = words.get("positive", ""), words.get("negative", ""), words.get("strength", 0.0)
        model, picture, device = stated["model"], stated.get("picture") or {}, stated["device"]
        digests, bits = (model["sha256"], picture.get("sha256", "")), stated.get("bits")
        found = Receipt(model["name"], *digests, settings, plan, text_, device, bits, stated.get("batch", 1))
        strings = (found.model, found.sha256, found.picture, found.device, *text_[:2])
        if not all(isinstance(part, str) for part in strings) or not _finite(text_[2]):
            raise ReceiptError("it is damaged")
        if bits not in (None, 8, 16, 32) or type(plan.pinned) is not bool:
            raise ReceiptError("it is damaged")
        if not all(type(n) is int for n in (plan.group, plan.chunk, found.batch)):
            raise ReceiptError("it is damaged")
    except ReceiptError:
        raise
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ReceiptError("there is no receipt in it, or a damaged one") from error
    return found


def _check(settings: Mapping[str, Any]) -> None:
    size, sigmas, seed, sampler = (settings[name] for name in ("size", "sigmas", "seed", "sampler"))
    lists = isinstance(sigmas, list) and len(sigmas) > 0
    levels = sigmas if lists and all(isinstance(one, list) for one in sigmas) else [sigmas]  # one a pass
    good = {
        "size": isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**31 for n in size),
        "sigmas": lists and all(map(_falling, levels)),
        "seed": seed is None or (type(seed) is int and 0 <= seed < 2**64),
        "dtype": settings["dtype"] in ("float64", "float32", "bfloat16", "float16"),
        "clip": isinstance(settings["clip"], str | None),
        "fidelity": _finite(settings["fidelity"]) and 0 <= settings["fidelity"] <= 1,
        "colour_match": type(settings["colour_match"]) is bool,
    }
    wrong = [name for name, fits in good.items() if not fits]
    if wrong:
        raise ReceiptError(f"its {wrong[0]} is damaged")
    if sampler not in SAMPLER_INFO or settings["noise"] == "given":
        raise ReceiptError("its sampler or noise came from another program: only that program can do it again")


def _falling(levels: list[float]) -> bool:
    falling = all(map(_finite, levels)) and all(a > b for a, b in pairwise(levels))
    return falling and 0 < len(levels) <= MOST_STEPS + 1 and levels[-1] >= 0


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]


def version() -> str:
    """Of this library: as the files beside it say, or the package."""
    with suppress(OSError):
        project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        if 'name = "inf-dit"' in project:
            found = re.search(r'^version = "([^"]+)"', project, re.MULTILINE)
            return found[1] if found else "unknown"
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("inf-dit")
    return "unknown"
