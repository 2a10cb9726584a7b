"""Pictures that are larger than memory: tensors of the CPU whose storage is a file that nobody else sees.

The file is mapped: the system keeps of it in memory what there is room for. Pictures that are made of such a tensor lie
beside it: `like` and `each` look where that is. Room on the disk is set aside at once, for a mapped file that the disk
has no room for does not fail, but ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

PIECE = 2**20  # elements that are worked on at a time
_MARGIN = 2**28  # bytes, left to others
_BEGINNING, _ENDING = ".infdit-", ".part"  # of names of files


class NoRoom(ValueError):  # noqa: N818 - as BudgetTooSmall
    """A disk that is too small for a picture."""


def free_in(folder: str | Path) -> int:
    """Bytes that pictures may take there; 0 for a folder that cannot be looked at."""
    with contextlib.suppress(OSError):
        return max(0, shutil.disk_usage(folder).free - _MARGIN)
    return 0


def empty_in(folder: str | Path | None, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of any values in a new file of this folder, gone with the tensor or the process; None: in memory.

    Raises:
        NoRoom: the disk is full, or nothing can be written there.
    """
    if folder is None:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    numel = math.prod(shape)
    try:
        _remove_left(folder)
        handle, name = tempfile.mkstemp(_ENDING, _BEGINNING, folder)
        try:
            try:
                _reserve(handle, numel * dtype.itemsize)
            finally:
                os.close(handle)
            tensor = torch.from_file(name, shared=True, size=numel, dtype=dtype).view(tuple(shape))
        finally:
            with contextlib.suppress(OSError):  # Windows deletes nothing that is mapped: a later call does
                Path(name).unlink()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise NoRoom(
            f"{folder}: a picture of {numel * dtype.itemsize / 2**30:.3g} GiB cannot be laid there ({reason}); make "
            "room, or set TMPDIR to a folder on another disk"
        ) from error
    return tensor


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, max(1, size))
        return
    zeros = bytes(2**24)
    while size > 0:
        written = os.write(handle, zeros[:size])
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size -= written


def _remove_left(folder: str | Path) -> None:
    """Remove what Windows would not while it was mapped; elsewhere there is nothing."""
    for left in Path(folder).glob(f"{_BEGINNING}*{_ENDING}") if os.name == "nt" else ():
        with contextlib.suppress(OSError):
            left.unlink()


def folder_of(tensor: Tensor) -> str | None:
    """Where the file of a tensor is or was; None for one in memory."""
    name = tensor.untyped_storage().filename if tensor.device.type == "cpu" else None
    return str(Path(name).parent) if name else None


def like(tensor: Tensor) -> Tensor:
    """A tensor of any values and the same shape, on the same disk, device or memory."""
    folder = folder_of(tensor)
    return torch.empty_like(tensor) if folder is None else empty_in(folder, tensor.shape, tensor.dtype)


def each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What a function of single elements makes of tensors of one shape (…, h, w), some rows at a time."""
    first = tensors[0]
    if first.numel() <= PIECE and folder_of(first) is None:
        return function(*tensors)
    result, rows = like(first), max(1, PIECE * first.shape[-2] // first.numel())
    for parts in zip(*(tensor.split(rows, -2) for tensor in (result, *tensors)), strict=True):
        parts[0].copy_(function(*parts[1:]))
    return result
