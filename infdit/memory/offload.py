"""What a plan keeps on the host, and how it comes to the device in time: weights by groups, hidden states by chunks.

The copies of the next group and of the next chunk are under way while this one is computed. On CUDA weights and hidden
states on the host are pinned, what is cut from pictures goes through pinned memory, and their copies run on a stream of
their own. All memory of the device is of the stream that computes, in whose order it is given
back and used again; copies wait for it, and it for them, before either touches what the other has. Elsewhere, and where
a plan does without pinned memory, a copy is a plain copy, for which all wait; on a CPU device and host are one memory,
and every plan stays legal.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..device import SLAB_ALIGNMENT, pinning, slab_bytes

if TYPE_CHECKING:
    from ..model import InfDiT
    from .plan import MemoryPlan, Tier, WeightsKept

MOST_BYTES = 2**32  # of an array: beyond, MPS has been wrong
_PACED = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}  # who runs ahead of the host, and can be waited for
Call = Callable[..., Tensor]


class Offloader:
    """A plan at work: layers that can be called, hidden states between groups of them, numbers on the device.

    Attributes:
        plan: says what is where.
        transfer: copies between host and device.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device, workspace: int = 0) -> None:
        """workspace: bytes that a chunk of blocks takes while it is computed."""
        self.plan, self.transfer, self._workspace = plan, Transfer(device, plan.pinned), workspace

    def room(self, batch: int) -> Tensor | None:
        """A chunk's workspace as one piece, from which an accelerator's allocator then cuts what comes and goes.

        Of pieces taken as they come each fits only its like, and a card would have to have a third more.
        """
        if self.transfer.device.type == "cpu":
            return None
        return torch.empty(batch * self._workspace, dtype=torch.uint8, device=self.transfer.device)

    def hidden_states(self, blocks: int) -> HiddenStates:
        """Room for the hidden states of so many blocks in one evaluation."""
        return HiddenStates(self.transfer, self.plan.hidden, blocks)

    def ready(self, groups: Iterable[Sequence[nn.Module]]) -> Generator[list[Call], None, None]:
        """Modules by groups, ready to be called on the device: as they are, or with weights copied one group ahead."""
        if self.plan.weights == "resident":
            yield from (list(group) for group in groups)
            return
        ahead: deque[list[tuple[nn.Module, PendingCopy]]] = deque()
        try:
            for group in groups:
                ahead.append([(module, self.transfer.copy_to_device(list(module.parameters()))) for module in group])
                if len(ahead) == 2:
                    yield [partial(_call_with, module, copy.wait()) for module, copy in ahead.popleft()]
            yield [partial(_call_with, module, copy.wait()) for module, copy in ahead.popleft()]
        finally:
            self.transfer.settle()
            ahead.clear()


class HiddenStates:
    """Tokens of all blocks between two groups of layers: kept on the device, or on the host and copied back ahead."""

    def __init__(self, transfer: Transfer, tier: Tier, blocks: int) -> None:
        self._transfer, self._tier, self._blocks = transfer, tier, blocks
        self._rooms: list[Tensor] = []  # on the device, (B, blocks, T, D) of whole chunks
        self._host: HostMemory | None = None
        self._kept: dict[range, Tensor] = {}
        self._ahead: dict[range, PendingCopy] = {}

    def take(self, like: Tensor, shape: Sequence[int]) -> None:
        """Room for all tokens, of which a chunk's are (B, n, T, D), if the device is where they are kept."""
        if self._tier == "device" and not self._rooms:
            batch, chunk, *token = shape
            each = max(1, MOST_BYTES // (math.prod(shape) * like.itemsize)) * chunk
            sizes = (min(each, self._blocks - first) for first in range(0, self._blocks, each))
            self._rooms = [like.new_empty((batch, size, *token)) for size in sizes]

    def give_back(self) -> None:
        """Keep none any more, whoever holds a reference to this."""
        self._transfer.settle()
        self._kept.clear()
        self._ahead.clear()
        self._rooms.clear()
        self._host = None

    def store(self, blocks: range, h: Tensor) -> None:
        """Keep the tokens (B, n, T, D) of a chunk until the next group."""
        if self._tier == "device":
            self.take(h, h.shape)
            self._place(blocks)[:] = h
            return
        if blocks not in self._kept:
            self._kept[blocks] = self._host_empty(h.shape, h.dtype)
        self._transfer.copy_to_host(h, self._kept[blocks])

    def load(self, blocks: range, following: range | None) -> Tensor:
        """The tokens of a chunk; those of the following one set off meanwhile."""
        if self._tier == "device":
            return self._place(blocks)
        self._prefetch(blocks)
        (h,) = self._ahead.pop(blocks).wait()
        if following is not None:
            self._prefetch(following)
        return h

    def _place(self, blocks: range) -> Tensor:
        """Of a chunk on the device."""
        room, begin = divmod(blocks.start, self._rooms[0].shape[1])
        return self._rooms[room][:, begin : begin + len(blocks)]

    def _host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._host = self._host or self._transfer.host(math.prod(shape) * dtype.itemsize)
        return self._host.empty(shape, dtype)

    def _prefetch(self, blocks: range) -> None:
        if blocks not in self._ahead:
            self._ahead[blocks] = self._transfer.copy_to_device([self._kept[blocks]])


def is_streamed(plan: MemoryPlan, name: str) -> bool:
    """Whether the parameter of this name stays on the host and is fetched when it is needed."""
    return plan.weights == "streamed" and name.startswith(("layers.", "modulations."))


def distribute_weights(
    model: InfDiT, plan: MemoryPlan, devices: Sequence[torch.device], rank: int | None = None
) -> InfDiT:
    """The model with its parameters where a plan wants them: all on the device, or layers and modulations on the host.

    Of several devices each gets its layers, the first also what comes before them, the last what comes after; layers of
    other processes stay where they are. Parameters that are there already are shared; if all are, this is the model
    itself. rank: see `MemoryPlan.stages`.

    Raises:
        PinFailed: what is to stay on the host cannot be pinned.
    """
    made = plan.weights, plan.pinned, tuple(plan.stages(devices, model.config.num_layers, rank))
    if _placed.get(model) == made:
        return model
    parameters = dict(model.named_parameters())
    piece = max(tensor.numel() * tensor.itemsize for tensor in parameters.values())
    stages = [(device, layers, Transfer(device, plan.pinned).host(piece)) for device, layers in made[2]]

    def wanted(name: str, tensor: Tensor) -> Tensor:
        """The parameter of this name where it is to be."""
        kind, number, *_ = (*name.split("."), "")
        if kind in ("layers", "modulations"):
            own = next((stage for stage in stages if int(number) in stage[1]), None)
            if own is None:
                return tensor
            device, _, host = own
        else:
            device, _, host = stages[-1 if kind.startswith("head") else 0]
        if not is_streamed(plan, name):
            return tensor.to(device)
        if device.type == "cpu" or not plan.pinned or tensor.is_pinned():
            return tensor.to("cpu")
        return host.empty(tensor.shape, tensor.dtype).copy_(tensor)

    state = {name: wanted(name, parameter) for name, parameter in parameters.items()}
    if all(state[name] is parameter for name, parameter in parameters.items()):
        return model
    with torch.device("meta"):
        placed = type(model)(model.config, model.defaults)
    placed.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    _placed[placed] = made
    return placed.requires_grad_(False).eval()


# what was made above
_placed: WeakKeyDictionary[InfDiT, tuple[WeightsKept, bool, tuple[tuple[torch.device, range], ...]]] = (
    WeakKeyDictionary()
)


def _call_with(module: nn.Module, parameters: list[Tensor], *inputs: object) -> Tensor:
    names = (name for name, _ in module.named_parameters())
    return functional_call(module, dict(zip(names, parameters, strict=True)), inputs)


class Transfer:
    """Copies between the host and one device; pinned: beside its arithmetic, where it can."""

    def __init__(self, device: torch.device, pinned: bool = True) -> None:
        self.device, self._pinned, self._paced = device, pinned, device.type in _PACED
        self._stream = _copy_stream(device) if device.type == "cuda" and pinned else None
        self._last: torch.cuda.Event | torch.mps.Event | torch.xpu.Event | None = None
        self._leaving: PendingCopy | None = None
        self._reached = {device}  # devices whose memory copies read or write

    def host(self, piece: int) -> HostMemory:
        """Memory of the host that the device can reach quickly, for tensors of at most about `piece` bytes."""
        return HostMemory(piece, self.device, self._pinned)

    def to_device(self, numbers: np.ndarray) -> Tensor:
        """Numbers as a tensor on the device, without waiting for what the device is doing."""
        tensor = torch.from_numpy(numbers.copy())
        if self._stream is None:
            return tensor.to(self.device)
        with pinning():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    @property
    def beside(self) -> bool:
        """Whether copies run beside the arithmetic."""
        return self._stream is not None

    def copy_to_device(self, tensors: Sequence[Tensor]) -> PendingCopy:
        """Begin to copy tensors from the host to the device, from pinned memory where copies run beside."""
        if self._stream is None:
            return PendingCopy([tensor.to(self.device, copy=True) for tensor in tensors])
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device) for tensor in tensors]
        self._copy(copies, tensors)
        return PendingCopy(copies, self._copied())

    def send(self, tensors: Sequence[Tensor]) -> PendingCopy:
        """The same of tensors anywhere on the host, through pinned memory.

        Raises:
            PinFailed: there is none.
        """
        if self._stream is not None:
            with pinning():
                tensors = [tensor.pin_memory() for tensor in tensors]
        return self.copy_to_device(tensors)

    def copy_to_host(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy a tensor of the device, all of whose arithmetic is queued, into one of the host."""
        if self._stream is None:
            target.copy_(source)
            return
        if self._leaving is not None:
            self._leaving.wait()
        self._copy([target], [source])
        self._leaving = PendingCopy([source], self._copied())  # which keeps it as long as it is read

    def fetch(self, source: Tensor) -> PendingCopy:
        """Begin to copy a tensor of the device, all of whose arithmetic is queued, to the host, into pinned memory.

        Raises:
            PinFailed: there is none.
        """
        if self._stream is None:
            return PendingCopy([source.to("cpu")])
        with pinning():
            on_cuda = self.device.type == "cuda"
            target = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=on_cuda)
        self.copy_to_host(source, target)
        return PendingCopy([target], self._copied())

    def hand_on(self, source: Tensor, device: torch.device, landing: Tensor | None) -> PendingCopy:
        """Begin to copy a tensor of the device, all of whose arithmetic is queued, to another device.

        landing: room for it there, which what is queued there now may still use; None: it takes some.
        """
        if landing is None:
            return PendingCopy([source.to(device)])
        target = landing[: source.numel()].view(source.shape)
        if self._stream is None or device.type != self.device.type:
            return PendingCopy([target.copy_(source)])
        if self._leaving is not None:
            self._leaving.wait()
        self._reached.add(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copy([target], [source])
        self._leaving = PendingCopy([source], self._copied())
        return PendingCopy([target], self._copied())

    def throttle(self) -> None:
        """After each layer of a chunk, wait until the device has done the one before: bar and stop tell the truth."""
        if self._paced:
            if self._last is not None:
                self._last.synchronize()
            backend = _PACED.get(self.device.type, torch.cuda)
            mark = backend.Event()
            mark.record(*(() if backend is torch.mps else (backend.current_stream(self.device),)))
            self._last = mark

    def settle(self) -> None:
        """Let all arithmetic from now on come after all copies: the memory of what they moved can be used again."""
        if self._stream is not None:
            for device in self._reached:
                torch.cuda.current_stream(device).wait_stream(self._stream)
            self._leaving = None

    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Begin to copy, after the arithmetic that is queued now: it may use what is read here, or is written."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def _copied(self) -> torch.cuda.Event:
        """Happens when all copies are done that have begun so far."""
        assert self._stream is not None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs."""
    return torch.cuda.Stream(device)


class HostMemory:
    """Tensors on the host; if pinned and beside an accelerator they are cut from slabs, on CUDA pinned ones.

    PyTorch rounds every pinned allocation up to a power of two. A slab is one, and holds eight pieces or more: what is
    lost is an eighth at most.
    """

    def __init__(self, piece: int, device: torch.device, pinned: bool = True) -> None:
        self._slab_bytes, self._pinned = slab_bytes(piece), device.type == "cuda"
        self._cut = pinned and device.type not in ("cpu", "mps")
        self._slab: Tensor | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape; it keeps its slab alive.

        Raises:
            PinFailed: the slab cannot be pinned.
        """
        if not self._cut:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        size = math.prod(shape) * dtype.itemsize
        if self._slab is None or self._used + size > len(self._slab):
            room = max(size, self._slab_bytes)
            with pinning():
                self._slab = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
            self._used = 0
        piece = self._slab[self._used : self._used + size].view(dtype).view(tuple(shape))
        self._used += -(-size // SLAB_ALIGNMENT) * SLAB_ALIGNMENT
        return piece


class PendingCopy:
    """Tensors that are being copied, to the device or from it."""

    def __init__(self, tensors: list[Tensor], event: torch.cuda.Event | None = None) -> None:
        self._tensors, self._event = tensors, event

    def wait(self) -> list[Tensor]:
        """The tensors; what is queued from now on, on the host what is done, comes after their copies."""
        if self._event is not None:
            device = self._tensors[0].device
            if device.type == "cpu":
                self._event.synchronize()
            else:
                torch.cuda.current_stream(device).wait_event(self._event)
        return self._tensors
