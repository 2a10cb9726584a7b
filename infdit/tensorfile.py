"""Named tensors out of files that are not trusted: .safetensors, and PyTorch's zip without running its pickle.

A .pt is a zip of one pickle (see `unpickle`) and one raw member per storage. Storages are mapped from the file, not
read: memory grows only by what is used.
"""

from __future__ import annotations

import hashlib
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .unpickle import unpickle_tensors

_MAX_PICKLE_BYTES = 64 * 2**20  # a program, not data: the published model's is under 1 MB
_ALIGNMENT = 8  # bytes, of the widest dtype; PyTorch aligns members to 64
_OLD_MAGIC = b"\x80\x02\x8a\n"  # a pickle that begins with a long number; \x80 alone also begins a .safetensors
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, length of name, length of extra field


class CheckpointError(Exception):
    """A file that cannot be used: which one, what is wrong with it, what to do.

    Args:
        path: the file.
        problem: what is wrong, as the end of a sentence that begins with the file.
        remedy: what the person can do about it.
    """

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}.")
        self.path, self.problem, self.remedy = Path(path), problem, remedy


# whatever a damaged zip or a senseless pickle program can raise on its way through the standard library
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be opened ({error.strerror or error})", "check the path and its permissions"
        ) from error
    if magic == _ZIP_MAGIC:
        return TensorFile(_read_pytorch(path), {})
    if magic == _OLD_MAGIC:
        raise CheckpointError(
            path,
            "is a PyTorch file in the format from before version 1.6, which cannot be read without running its code",
            "load and save it again with a newer PyTorch, or get the original .pt or a .safetensors",
        )
    return _read_safetensors(path)


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


# ---- .safetensors


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            path, f"is not a complete .safetensors or .pt file ({error})", "download or convert it again"
        ) from error


# ---- PyTorch's zip


class _ZipStorages:
    """The raw members data/KEY of one PyTorch zip: mapped from the file, checked against their CRC-32."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        self._archive, self._prefix = archive, prefix
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._mapped: dict[str, Tensor] = {}

    def map(self, key: str) -> Tensor:
        """The bytes of a storage, uint8."""
        if key not in self._mapped:
            content, start = self._content(f"data/{key}")
            data = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            self._mapped[key] = data if start % _ALIGNMENT == 0 else data.clone()
        return self._mapped[key]

    def read(self, name: str) -> bytes:
        """The bytes of a small member."""
        return bytes(self._content(name, _MAX_PICKLE_BYTES)[0])

    def _content(self, name: str, limit: int | None = None) -> tuple[memoryview, int]:
        member = self._archive.getinfo(self._prefix + name)
        if limit is not None and member.file_size > limit:
            raise zipfile.BadZipFile(f"{member.filename} is over {limit} bytes")
        if member.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{member.filename} is compressed, which PyTorch never does")
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(self._bytes, member.header_offset)
        start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        content = memoryview(self._bytes)[start : start + member.file_size]
        if magic != _ZIP_MAGIC or len(content) != member.file_size or zlib.crc32(content) != member.CRC:
            raise zipfile.BadZipFile(f"{member.filename} does not match its checksum")
        return content, start


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            top = _unpickle(path, archive)
    except _DAMAGE as error:
        raise CheckpointError(
            path, f"is damaged or no PyTorch checkpoint ({error or type(error).__name__})", "download it again"
        ) from error
    state = top
    for entry in ("module", "state_dict"):
        if isinstance(top, dict) and isinstance(top.get(entry), dict):
            state = top[entry]
            break
    if not isinstance(state, dict) or not state:
        raise CheckpointError(path, "holds no state dict", "give the file that the authors published")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                path, f"entry {str(name)[:80]!r} is no named tensor", "give the file that the authors published"
            )
    return dict(state)


def _unpickle(path: Path, archive: zipfile.ZipFile) -> object:
    programs = [m for m in archive.infolist() if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    if len(programs) != 1:
        raise zipfile.BadZipFile("a zip without the data.pkl of a checkpoint")
    if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
        raise zipfile.BadZipFile("members that share their bytes or are compressed, which PyTorch never does")
    prefix = programs[0].filename.removesuffix("data.pkl")
    storages = _ZipStorages(path, archive, prefix)
    if f"{prefix}byteorder" in archive.namelist() and storages.read("byteorder") != b"little":
        raise zipfile.BadZipFile("tensors stored in big-endian order")
    return unpickle_tensors(storages.read("data.pkl"), storages.map)
