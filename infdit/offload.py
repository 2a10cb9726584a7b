"""What a plan keeps on the host, and how it comes to the device in time: weights by groups, hidden states by chunks.

The copies of the next group and of the next chunk are under way while this one is computed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .memory import MemoryPlan, WeightsKept
from .model import InfDiT
from .transfer import HostMemory, PendingCopy, Tier, Transfer

Call = Callable[..., Tensor]


class HiddenStates:
    """Tokens of all blocks between two groups of layers: kept on the device, or on the host and fetched ahead."""

    def __init__(self, transfer: Transfer, place: Tier) -> None:
        self._transfer, self._place = transfer, place
        self._host: HostMemory | None = None
        self._kept: dict[range, Tensor] = {}
        self._ahead: dict[range, PendingCopy] = {}

    def store(self, blocks: range, h: Tensor) -> None:
        """Keep the tokens (B, n, T, D) of a chunk until the next group."""
        if self._place == "device":
            self._kept[blocks] = h
            return
        if blocks not in self._kept:
            self._kept[blocks] = self._host_empty(h.shape, h.dtype)
        self._transfer.copy_to_host(h, self._kept[blocks])

    def load(self, blocks: range, following: range | None) -> Tensor:
        """The tokens of a chunk; those of the following one set off meanwhile."""
        if self._place == "device":
            return self._kept.pop(blocks)
        self._prefetch(blocks)
        (h,) = self._ahead.pop(blocks).wait()
        if following is not None:
            self._prefetch(following)
        return h

    def reserve(self, blocks: range, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take the room of a chunk that is not computed."""
        make = self._transfer.empty if self._place == "device" else self._host_empty
        self._kept[blocks] = make(shape, dtype)

    def forget(self, blocks: range, last: bool) -> None:
        """Do without a chunk that was to be taken; in the last group what is on the device makes room."""
        self._ahead.pop(blocks, None)
        if last and self._place == "device":
            del self._kept[blocks]

    def _host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._host = self._host or self._transfer.host(math.prod(shape) * dtype.itemsize)
        return self._host.empty(shape, dtype)

    def _prefetch(self, blocks: range) -> None:
        if blocks not in self._ahead:
            self._ahead[blocks] = self._transfer.copy_to_device([self._kept[blocks]])


def is_streamed(plan: MemoryPlan, name: str) -> bool:
    """Whether the parameter of this name stays on the host and is fetched when it is needed."""
    return plan.weights == "streamed" and name.startswith(("layers.", "modulations."))


def distribute_weights(model: InfDiT, plan: MemoryPlan, device: torch.device) -> InfDiT:
    """The model with its parameters where a plan wants them: all on the device, or layers and modulations on the host.

    Parameters that are there already are shared; if all are, this is the model itself.
    """
    if _placed.get(model) == (plan.weights, device):
        return model
    parameters = dict(model.named_parameters())
    host = Transfer(device).host(max(tensor.numel() * tensor.itemsize for tensor in parameters.values()))

    def wanted(name: str, tensor: Tensor) -> Tensor:
        if not is_streamed(plan, name):
            return tensor.to(device)
        if device.type == "cpu" or tensor.is_pinned():
            return tensor.to("cpu")
        return host.empty(tensor.shape, tensor.dtype).copy_(tensor)

    state = {name: wanted(name, parameter) for name, parameter in parameters.items()}
    if all(state[name] is parameter for name, parameter in parameters.items()):
        return model
    with torch.device("meta"):
        placed = InfDiT(model.config, model.defaults)
    placed.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    _placed[placed] = plan.weights, device
    return placed.requires_grad_(False).eval()


_placed: WeakKeyDictionary[InfDiT, tuple[WeightsKept, torch.device]] = WeakKeyDictionary()  # what was made above


def prefetched_groups(
    groups: Iterable[Sequence[nn.Module]], plan: MemoryPlan, transfer: Transfer
) -> Iterator[list[Call]]:
    """Modules by groups, ready to be called on the device: as they are, or with weights fetched one group ahead."""
    if plan.weights == "resident":
        yield from (list(group) for group in groups)
        return
    ahead: deque[list[tuple[nn.Module, PendingCopy]]] = deque()
    for group in groups:
        ahead.append([(module, transfer.copy_to_device(list(module.parameters()))) for module in group])
        if len(ahead) == 2:
            yield [partial(_call_with, module, copy.wait()) for module, copy in ahead.popleft()]
    yield [partial(_call_with, module, copy.wait()) for module, copy in ahead.popleft()]


def _call_with(module: nn.Module, parameters: list[Tensor], *inputs: object) -> Tensor:
    names = (name for name, _ in module.named_parameters())
    return functional_call(module, dict(zip(names, parameters, strict=True)), inputs)
