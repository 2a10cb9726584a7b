"""Peaks counted, not guessed: bytes of live tensors, each storage once, device and host told apart."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .transfer import Tier, current_tier


class PeakMeter(TorchDispatchMode):
    """Inside `with PeakMeter() as meter:` every tensor that is made is counted until its storage is freed.

    Beside an accelerator a tensor on the CPU is on the host. Where the device is the CPU, what is made under
    `tier("host")` is, and what is computed from that. It works the same on fake tensors, which take no memory.

    Args:
        held: tensors that exist already and count, such as weights, by tier; others that do are left out.
        device: that computes.

    Attributes:
        live, peak: bytes now and at most so far, by tier.
    """

    def __init__(
        self, held: Mapping[Tier, Iterable[Tensor]] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self._one_memory = torch.device(device).type == "cpu"
        self.live: dict[Tier, int] = {"device": 0, "host": 0}
        self.peak: dict[Tier, int] = {"device": 0, "host": 0}
        self._tiers = WeakIdKeyDictionary()
        self._watches: dict[int, tuple[weakref.ref, Tier, int]] = {}  # they go with the meter: weights outlive it
        for tier, tensors in (held or {}).items():
            for tensor in tensors:
                self._count(tensor, tier)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - PyTorch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        follows = self._tier_of(tree_leaves((args, kwargs)))
        here = (current_tier() or follows) if self._one_memory else "host"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf, "device" if leaf.device.type != "cpu" else here)
        return result

    def _tier_of(self, inputs: list[Any]) -> Tier:
        """Where a result on the CPU is: with its inputs, scalars apart."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        for x in tensors:
            self._tiers.setdefault(x.untyped_storage(), None)  # made before: neither it nor its views are ours to count
        known = [self._tiers[x.untyped_storage()] for x in tensors if x.dim()]
        return "host" if "host" in known else "device"

    def _count(self, tensor: Tensor, tier: Tier) -> None:
        storage = tensor.untyped_storage()
        if storage in self._tiers:
            return
        size = storage.nbytes()
        self._tiers[storage] = tier
        self.live[tier] += size
        self.peak[tier] = max(self.peak[tier], self.live[tier])
        watch = weakref.ref(storage, self._free)
        self._watches[id(watch)] = watch, tier, size

    def _free(self, watch: weakref.ref) -> None:
        _, tier, size = self._watches.pop(id(watch))
        self.live[tier] -= size
