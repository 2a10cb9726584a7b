"""Named tensors out of files that are not trusted: .safetensors, and PyTorch's zip without running its pickle.

A .pt is a zip of one pickle and one raw member per storage. Storages are mapped from the file, not read: memory grows
only by what is used. `torch.load` is not asked, with whatever unpickler: it runs TorchScript and checks no CRC, and a
small file can end the process in Python's own unpickler (by hashing nested tuples, by a memo of 2^32 places).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_MAX_PICKLE_BYTES = 4 * 2**20  # a program, not data: the published model's is under 1 MB
_OLD_MAGIC = b"\x80\x02\x8a\n"  # a pickle that begins with a long number; \x80 alone also begins a .safetensors
_ZIP_MAGIC = b"PK\x03\x04"
_ORIGINAL = "give the file that the authors published"
# whatever a damaged zip or a senseless pickle can raise
_DAMAGE = (zipfile.BadZipFile, struct.error, ArithmeticError, EOFError, LookupError, MemoryError)
_DAMAGE += (OSError, RuntimeError, TypeError, ValueError)


class CheckpointError(Exception):
    """A file that cannot be used: which one, what is wrong with it, what to do.

    Args:
        path: the file.
        problem: what is wrong, as the end of a sentence that begins with the file.
        remedy: what the person can do about it.
    """

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        super().__init__(printable(f"{path}: {problem}; {remedy}."))
        self.path, self.problem, self.remedy = Path(path), problem, remedy


def printable(text: str) -> str:
    """What a file says, safe to show: what would move or recolour a terminal's text is written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def why(error: Exception) -> str:
    """An error's own reason, without the path, which whoever catches it has named."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.partition(" at path ")[0]


def check_file(path: Path) -> None:
    """Whether it may be opened.

    Raises:
        CheckpointError: a folder; what a reader would wait for without end, as a named pipe.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(path, "is a folder" if path.is_dir() else "is a pipe or a device", "give a file")


@dataclass(frozen=True)
class MappedFile:
    """A file that tensors are read from when they are needed, as it was when they were made."""

    path: Path
    stamp: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> MappedFile:
        """The file as it is now."""
        return cls(path, _stamp(path))

    def check(self) -> None:
        """Whether it still is as it was; one that has gone or made way for another is, to whoever has mapped it.

        Raises:
            CheckpointError: it was written to: pages that were not read yet are no longer what they were, or not there.
        """
        with suppress(FileNotFoundError):
            now = _stamp(self.path)
            if now != self.stamp and now[:2] == self.stamp[:2]:
                raise CheckpointError(
                    self.path, "was written to while a model read from it", "load it again, and replace it by renaming"
                )


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Which file, and as of when: device, number, size, nanoseconds."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def some(names: list[str], limit: int = 3) -> str:
    """The first of many names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:120] for name in names[:limit]) + more


@dataclass(frozen=True)
class TensorFile:
    """Tensors of one file by name (CPU, memory-mapped where the file allows) and its text metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(path: str | Path) -> TensorFile:
    """Read the named tensors of a .safetensors or a zip-format PyTorch file.

    The format is told by content, not by name. In a PyTorch file the state dict is the top-level dict, or its
    entry "module" (DeepSpeed) or "state_dict" (Lightning).

    Raises:
        CheckpointError: no such file, not one of the two formats, damaged, or hostile.
    """
    path = Path(path)
    try:
        check_file(path)
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        problem = f"cannot be opened ({why(error)})"
        raise CheckpointError(path, problem, "check the path and its permissions") from error
    if magic == _ZIP_MAGIC:
        return TensorFile(_read_pytorch(path), {})
    if magic == _OLD_MAGIC:
        raise CheckpointError(
            path,
            "is a PyTorch file in the format from before version 1.6, which cannot be read without running its code",
            "load and save it again with a newer PyTorch, or get the original .pt or a .safetensors",
        )
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        problem = f"is not a complete .safetensors or .pt file ({why(error)})"
        raise CheckpointError(path, problem, "download or convert it again") from error


def tensor_digest(tensors: Mapping[str, Tensor], each: Callable[[], None] = lambda: None) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes in the order of names: whatever the order in a file.

    each: called after each tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        each()
    return digest.hexdigest()


# ---- PyTorch's zip


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        top = _unpickle(_members(path))
    except _DAMAGE as error:
        problem = f"is damaged or no PyTorch checkpoint ({str(error)[:200] or type(error).__name__})"
        raise CheckpointError(path, problem, "download it again") from error
    inner = [top.get("module"), top.get("state_dict")] if isinstance(top, dict) else []
    state = next((entry for entry in inner if isinstance(entry, dict)), top)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(path, "holds no state dict", _ORIGINAL)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(path, f"entry {name[:80]!r} is no named tensor", _ORIGINAL)
    return state


def _members(path: Path) -> dict[str, memoryview]:
    """The members by their names in the zip's one folder, mapped from the file, each of the right CRC-32."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries, content = archive.infolist(), memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("members that share their bytes or are compressed, which PyTorch never does")
    members: dict[str, memoryview] = {}
    for entry in entries:
        name_bytes, extra_bytes = struct.unpack_from("<26xHH", content, entry.header_offset)
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        member = members[entry.filename.partition("/")[2]] = content[start : start + entry.file_size]
        if len(member) != entry.file_size or zlib.crc32(member) != entry.CRC:
            raise ValueError(f"{entry.filename} does not match its checksum")
    if not 0 < len(members.get("data.pkl", b"")) <= _MAX_PICKLE_BYTES:
        raise ValueError("a zip without the data.pkl of a checkpoint")
    if members.get("byteorder", b"little") != b"little":
        raise ValueError("tensors stored in big-endian order")
    return members


# ---- its pickle


def _storage(reference: object, members: Mapping[str, memoryview]) -> Tensor:
    match reference:
        case ("storage", torch.dtype() as dtype, str() as key, *_) if len(key) < 20:  # a few digits
            content = members[f"data/{key}"]
            return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype, device="cpu")
    raise ValueError("a reference that is no storage")


def _rebuild_tensor(arguments: object) -> Tensor:
    """torch._utils._rebuild_tensor_v2 with every argument checked."""
    match arguments:
        case (Tensor() as storage, start, tuple() as size, tuple() as stride, _, _) if max(len(size), len(stride)) <= 8:
            numbers = all(isinstance(number, int) and 0 <= number < 2**63 for number in (start, *size, *stride))
            if numbers and math.prod(size) <= storage.numel():
                return storage.as_strided(size, stride, start)  # which refuses to reach beyond the storage
    raise ValueError("a tensor that does not lie in its storage")


# all that a pickle can name: dtypes, and functions of the tuple of their arguments
_GLOBALS: dict[str, object] = {
    **{"torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16},
    **{"torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32},
    **{"torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8},
    **{"torch BoolStorage": torch.bool, "torch.storage UntypedStorage": torch.uint8},
    **{"torch ComplexFloatStorage": torch.complex64, "torch ComplexDoubleStorage": torch.complex128},
    **{"torch._utils _rebuild_tensor_v2": _rebuild_tensor, "torch._utils _rebuild_parameter": itemgetter(0)},
    **{"torch Size": itemgetter(0), "collections OrderedDict": lambda arguments: None if arguments else {}},
}
# how many objects an opcode takes off the stack, where it does not take all down to a mark
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2}
_TAKES |= {"BINPERSID": 1, "BUILD": 1, "APPEND": 1, "SETITEM": 2}


def _unpickle(members: Mapping[str, memoryview]) -> object:
    """What data.pkl describes in text, numbers, tuples, tensors, and dicts of these by text; all else becomes None.

    Nothing is imported, no attribute is set, nothing but text is hashed, and opcodes that `torch.save` has no use for
    are refused, as they are by torch.load(weights_only=True).
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(bytes(members["data.pkl"])):
        to_mark = pickletools.stackslice in opcode.stack_before
        start = marks.pop() if to_mark else len(stack) - _TAKES.get(opcode.name, 0)
        taken = stack[start:]
        del stack[start:]
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "EMPTY_TUPLE":
                stack.append(tuple(taken))
            case "GLOBAL":
                stack.append(_GLOBALS.get(str(argument)))
            case "BINPERSID":
                stack.append(_storage(taken[0], members))
            case "REDUCE" | "NEWOBJ":
                function, arguments = taken
                stack.append(function(arguments) if callable(function) else None)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS" if isinstance(stack[-1], dict):
                pairs = zip(taken[::2], taken[1::2], strict=True)
                stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))
            case "SETITEM" | "SETITEMS" | "APPEND" | "APPENDS" | "BUILD" | "PROTO" | "STOP":
                pass
            case name if opcode.stack_before or not opcode.stack_after:
                raise ValueError(f"a pickle with {name}, which torch.save writes only when told to")
            case _:  # a text or a number; None for a truth value or an empty list
                stack.append(argument)
    return stack[-1]
