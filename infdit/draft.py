"""Files that appear whole or not at all: made in a hidden folder beside their place, then put there.

The folder is locked as long as the process lives, which tells it from what a killed one has left. It is a folder
because libraries that are given a name write under another one beside it first (safetensors does).
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which deletes no file that somebody holds open
    fcntl = None

_LOCK = ".lock"


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A place for a file of the same name, on the same disk: whoever has written it there calls `put`.

    Raises:
        OSError: in the folder nothing can be written.
    """
    folder, file = _locked(path)
    try:
        with file:
            yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path) -> tuple[Path, IO[bytes]]:
    """A folder beside a path, and the lock in it; another one where a `sweep` came before the lock."""
    while True:
        folder = path.with_name(f".{secrets.token_hex(8)}.part")
        folder.mkdir()
        try:
            file = (folder / _LOCK).open("xb")
        except (FileExistsError, FileNotFoundError):
            continue
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return folder, file
        file.close()


def put(part: Path, path: Path) -> None:
    """Put what is written at `part` in the place of `path`, on the disk first: no power cut leaves half of it."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    with suppress(OSError):  # where folders can be opened for that
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: Path) -> None:
    """Remove the drafts that a killed process has left: those that nobody holds locked or, on Windows, open."""
    for left in folder.glob(f".{'[0-9a-f]' * 16}.part"):
        with suppress(OSError):
            with (left / _LOCK).open("ab") as file:  # made if it was killed before it had one
                if not _lock(file):
                    continue
            (left / _LOCK).unlink()
            shutil.rmtree(left)


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False: somebody else has."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # or there are no locks on that disk
        return False
