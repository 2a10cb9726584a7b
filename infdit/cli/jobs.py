"""What `upscale` is to make: which picture becomes which file, what is made already, and what receipts say."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..draft import draft, put, sweep
from ..picture import PictureError, check_png, read_note, target_explained
from ..receipt import Receipt, ReceiptError, parse_receipt
from ..resume import difference
from ..tensorfile import printable

WriteReceipts = Callable[[list[dict[str, Any]]], None]
_MOST_TEXT = 2**24  # bytes of a receipt


class LeftOut(ValueError):  # noqa: N818 - no error of anybody's
    """A picture that is not made, and why."""


def jobs_of(sources: list[Path], options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(source, target) pairs, refused as a whole before anything is done if one of them would destroy a file.

    Into a folder, a target that is there already is left for `check_existing`.
    """
    output = Path(options.output)
    folder = output.is_dir() or options.output.endswith(("/", os.sep))
    several = len(sources) > 1 or options.inputs[0].is_dir() or folder
    if several:
        if output.exists() and not output.is_dir():
            raise PictureError(f"{output} is a file: for several pictures give a folder")
        jobs = [(source, output / _below(source, options) / f"{source.stem}.png") for source in sources]
    else:
        jobs = [(sources[0], output)]
    taken: dict[str, Path] = {}
    for source, target in jobs:
        # no two names that some disks take for one
        other = taken.setdefault(str(target.resolve()).casefold(), source)
        if other is not source:
            raise PictureError(f"{other} and {source} would both become {target}: rename one or run them apart")
        if target.exists() and any(target.samefile(original) for original in sources):
            raise PictureError(f"{target} is an input and is never overwritten: choose another OUT")
        if target.exists() and not options.force and not several:
            raise PictureError(f"{target} exists: choose another OUT, or replace it with --force")
    return jobs


def _below(source: Path, options: argparse.Namespace) -> Path:
    """The folder of a picture within the folder given."""
    given = (folder for folder in options.inputs if options.recursive and folder in source.parents)
    return source.parent.relative_to(next(given, source.parent))


def check_existing(target: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether a target is there and was made by the same model from the same picture with the same settings.

    made_from: "model" and "picture", their digests, "bits" of a channel, and settings, see `resume.settings_of`.

    Raises:
        LeftOut: a target that was not.
    """
    if not target.exists():
        return False
    try:
        receipt = parse_receipt(read_note(target))
        bits = check_png(target)
        stated = {"model": receipt.sha256, "picture": receipt.picture, "bits": bits, **receipt.settings}
        reason = difference(stated, made_from)
    except ReceiptError:
        reason = "it says nothing of how it was made"
    except (OSError, ValueError) as error:
        reason = f"it is damaged: {error}"
    if reason:
        raise LeftOut(f"{target} exists and is not what would be made now ({reason}): --force replaces it")
    return True


def read_receipt(path: Path) -> Receipt:
    """The receipt that a JSON file or a PNG holds.

    Raises:
        ReceiptError: none that can be used.
    """
    try:
        if not path.is_file():
            raise ReceiptError("there is no such file")
        with path.open("rb") as file:
            content = file.read(_MOST_TEXT)
        return parse_receipt(read_note(path) if content[:4] == b"\x89PNG" else content.decode("utf-8", "replace"))
    except (OSError, ReceiptError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ReceiptError(printable(f"{path}: {reason}")) from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def receipts_at(path: Path | None, sources: list[Path], force: bool) -> Iterator[WriteReceipts]:
    """A function that writes receipts into a file, whole or not at all, found to be possible before the work.

    Raises:
        PictureError: a file that may or can not be written.
    """
    if path is None:
        yield lambda receipts: None
        return
    if path.suffix != ".json" or path.is_dir():
        raise PictureError(f"{path}: a receipt is written as .json: let its name end so")
    if path.exists() and (not force or any(path.samefile(source) for source in sources)):
        raise PictureError(f"{path} exists: choose another name for the receipt, or replace it with --force")

    def write(receipts: list[dict[str, Any]]) -> None:
        with target_explained(path):
            part.write_text(json.dumps(receipts if len(receipts) > 1 else receipts[0], indent=1), "utf-8")
            put(part, path)

    with ExitStack() as held:
        sweep(path.parent)
        with target_explained(path):
            part = held.enter_context(draft(path))
        yield write
