"""Tensors out of a PyTorch pickle without running it.

A pickle is a program. Here it may name only what rebuilds tensors; every other global becomes an inert stand-in that
is never imported, so that optimizer states, counters and random generators are walked over without effect.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor


def unpickle_tensors(program: bytes, storage: Callable[[str], Tensor]) -> object:
    """What a data.pkl describes, with everything but containers, text, numbers and tensors made inert.

    Args:
        program: the pickle.
        storage: gives the bytes (uint8) of a storage by its key.

    Raises:
        pickle.UnpicklingError, or what else a senseless program makes Python's own operations raise.
    """
    return _TensorUnpickler(program, storage).load()


class _Inert:
    """Takes the place of anything a checkpoint names that is not needed to rebuild tensors."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    add = append


@dataclass(frozen=True)
class _Storage:
    data: Tensor  # uint8, flat
    dtype: torch.dtype


_MAX_DIMS, _MAX_ARGUMENTS = 8, 64
# never written by PyTorch, and each a way to run others' code or to waste time and memory
_REFUSED = (
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.INT, pickle.LONG, pickle.FLOAT, pickle.STRING, pickle.UNICODE),
)

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    """torch._utils._rebuild_tensor_v2 with every argument checked against the storage's length."""
    match storage, offset, size, stride:
        case _Storage(data, dtype), int(), tuple(), tuple() if _naturals(offset, *size[:_MAX_DIMS], *stride):
            elements = data.view(dtype)
        case _:  # not shown: the text of a hostile object can be endless
            raise pickle.UnpicklingError("a tensor that is not made of a storage, an offset, a size and a stride")
    if max(len(size), len(stride)) > _MAX_DIMS:
        raise pickle.UnpicklingError(f"a tensor of more than {_MAX_DIMS} dimensions")
    last = int(offset) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(elements) or (0 not in size and last >= len(elements)):
        raise pickle.UnpicklingError(f"a tensor that reaches beyond its storage of {len(elements)} elements")
    return elements.as_strided(size, stride, offset)


def _size(items: object) -> object:
    if not isinstance(items, tuple):
        raise pickle.UnpicklingError("a torch.Size of something else than a tuple")
    return items


def _naturals(*values: object) -> bool:
    return all(isinstance(value, int) and 0 <= value < 2**63 for value in values)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _empty_dict(*items: object) -> dict[str, object]:
    if items:
        raise pickle.UnpicklingError("an OrderedDict that is not filled item by item")
    return {}


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _empty_dict,
}


class _TensorUnpickler(pickle._Unpickler):
    """Unpickles by allow-list: `find_class` never imports, `persistent_load` maps a storage of the zip.

    This is Python's own unpickler in Python: the one in C lets a program exhaust the stack or the memory (by hashing
    nested tuples, by a memo index of 2^32) before anybody can object. Attributes are never set on anything.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        opcode: handler
        for opcode, handler in pickle._Unpickler.dispatch.items()
        if bytes([opcode]) not in _REFUSED
    }

    stack: list[Any]
    if TYPE_CHECKING:

        def pop_mark(self) -> list[Any]: ...

    def __init__(self, program: bytes, storage: Callable[[str], Tensor]) -> None:
        super().__init__(io.BytesIO(program))
        self._storage = storage

    def find_class(self, module: str, name: str) -> object:
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _ALLOWED.get((module, name), _Inert)

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, *_):
                return _Storage(self._storage(key), dtype)
        raise pickle.UnpicklingError("a reference that is no storage")

    def _set_items(self, items: list[object]) -> None:
        keys, values = items[::2], items[1::2]
        target = self.stack[-1]
        if isinstance(target, dict):
            # others have no part in a state dict, and hashing them could take for ever
            target.update((key, value) for key, value in zip(keys, values, strict=True) if isinstance(key, str))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def load_build(self) -> None:
        self.stack.pop()

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS or not callable(function):
            raise pickle.UnpicklingError("a call that is none")
        self.stack.append(function(*arguments))

    def load_newobj(self) -> None:
        del self.stack[-2:]
        self.stack.append(_Inert())

    def load_newobj_ex(self) -> None:
        del self.stack[-3:]
        self.stack.append(_Inert())

    def load_additems(self) -> None:
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.stack.append(_Inert())

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }
