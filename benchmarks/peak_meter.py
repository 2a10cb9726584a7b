"""Peaks counted, not guessed: bytes of live tensors, each storage once, on the device and on the host."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from infdit.disk import folder_of
from infdit.memory.plan import Place


class PeakMeter(TorchDispatchMode):
    """Inside `with PeakMeter() as meter:` every tensor that is made is counted until its storage is freed.

    It works the same on fake tensors, which take no memory.

    Args:
        held: tensors that exist already and count, such as weights; others that do are left out.
        device, one_memory: what computes, and whether its memory is the host's, as a CPU's is: then all counts there.

    Attributes:
        live, peak: bytes now and at most so far, by tier.
        on, most: the same by device.
        events: by device, a number and the bytes of each storage that was made there, the number and −1 when it went.
    """

    def __init__(
        self, held: Iterable[Tensor] = (), device: torch.device | str = "cpu", one_memory: bool = False
    ) -> None:
        super().__init__()
        self._unified_memory = one_memory or torch.device(device).type == "cpu"
        self.live: dict[Place, int] = {"device": 0, "host": 0, "disk": 0}
        self.peak: dict[Place, int] = {"device": 0, "host": 0, "disk": 0}
        self.on: dict[str, int] = defaultdict(int)
        self.most: dict[str, int] = defaultdict(int)
        self.events: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._seen = WeakIdKeyDictionary()
        self._watches: dict[int, tuple[weakref.ref, Place, str, int]] = {}  # they go with the meter: weights outlive it
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - PyTorch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is torch.ops.prim.device.default:  # most of all calls of a run on fake tensors
            return args[0].device
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # made before: neither it nor its views are ours to count
                self._seen.setdefault(leaf.untyped_storage(), True)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        tier: Place = "device" if self._unified_memory or tensor.device.type != "cpu" else "host"
        tier = "disk" if folder_of(tensor) else tier
        size, place = storage.nbytes(), str(tensor.device)
        self._seen[storage] = True
        self.on[place] += size
        self.most[place] = max(self.most[place], self.on[place])
        self.live[tier] += size
        self.peak[tier] = max(self.peak[tier], self.live[tier])
        watch = weakref.ref(storage, self._free)
        self.events[place].append((id(watch), size))
        self._watches[id(watch)] = watch, tier, place, size

    def _free(self, watch: weakref.ref) -> None:
        _, tier, place, size = self._watches.pop(id(watch))
        self.on[place] -= size
        self.live[tier] -= size
        self.events[place].append((id(watch), -1))
