"""What an evaluation costs beside its products: kernels and bytes of a layer, and the share of time that Python takes.

Kernels are counted from the operations that are really executed, on fake tensors on a fake accelerator: one for each
that touches data. Attention is one, a product with its bias is one, a view is none; a norm of what is not contiguous is
two, for it is copied first. Python's seconds are all that PyTorch's profiler does not find within an operation, what
itself takes with them; what a card takes is foretold by the cost model.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infdit import attention, fuse
from infdit.config import LR_FACTOR, InfDiTConfig
from infdit.denoiser import Conditioning, Denoiser
from infdit.grid import BlockGrid
from infdit.memory.cost import CostModel
from infdit.memory.plan import MemoryPlan

from .dry_run import ACCELERATOR, FakeAccelerator, fake_model
from .speed import random_model

PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention")  # whose bytes are not counted
CUDA = torch.device("cuda")


class Kernels(TorchDispatchMode):
    """Counts what an accelerator is asked to do while it is `on`.

    Attributes:
        names: how many kernels of each name; moved: bytes that they read and write, of those that are no products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on, self.names, self.moved = False, Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - PyTorch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        result = func(*args, **kwargs)
        if self.on and not func.is_view and func.namespace != "prim" and "empty" not in name:
            kwargs.pop("out", None)
            read = [x for x in tree_leaves((args[name == "copy_" :], kwargs)) if isinstance(x, Tensor)]
            written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.count(name, [] if name in PRODUCTS else read + written)
            if name == "native_layer_norm" and not read[0].is_contiguous():
                self.count("copy for a norm", [read[0]] * 2)
        return result

    def count(self, name: str, touched: Sequence[Tensor]) -> None:
        """One kernel, and the tensors that it reads or writes."""
        self.names[name] += 1
        self.moved[name] += sum(map(_bytes, touched))


def _bytes(x: Tensor) -> int:
    """Of a tensor, each number once, also where parts of it are the same: in windows, or expanded."""
    moved = [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    span = 1 + sum((size - 1) * stride for size, stride in moved)
    return min(torch.Size(size for size, _ in moved).numel(), span) * x.itemsize


@torch.no_grad()
def of_a_layer(
    config: InfDiTConfig, chunk: int, line: int, lines: int = 2, triton: bool = False
) -> tuple[Kernels, int]:
    """Kernels of a layer that is not the first, in bf16, and the number of chunks that it came by.

    line: blocks of one; lines: of the picture; triton: with the kernel of `infdit.fuse`.
    """
    config, kernels = replace(config, num_layers=2), Kernels()

    def norm_and_turn(qk: Tensor, norm: torch.nn.LayerNorm, turns: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (torch.empty_like(part) for part in qk.chunk(2, -2))
        if kernels.on:
            kernels.count("norm and turn", [qk, turns, q, k])
        return q, k

    height, width = lines * config.block_size, line * config.block_size
    fused = mock.patch.object(attention, "fused", lambda *which: True)
    asked = mock.patch.dict(os.environ, {fuse.SWITCH: "1" if triton else ""})
    kernel = mock.patch.object(fuse, "_kernel", lambda *which: norm_and_turn)
    with fused, asked, kernel, FakeTensorMode(allow_non_fake_inputs=True), FakeAccelerator():
        x, up = (torch.empty(1, 3, height, width, device=ACCELERATOR) for _ in range(2))
        lr = torch.empty(1, 3, height // LR_FACTOR, width // LR_FACTOR, device=ACCELERATOR)
        plan = MemoryPlan(2, chunk, sweep="rows")
        denoise = Denoiser(fake_model(config, torch.bfloat16), Conditioning(lr, up), plan, device=ACCELERATOR)
        layer = denoise.model.layers[1]
        layer.register_forward_pre_hook(lambda *_: setattr(kernels, "on", True))
        layer.register_forward_hook(lambda *_: setattr(kernels, "on", False))
        with kernels:
            denoise(x, 1.0)
    return kernels, len(denoise.benches[0].chunks)


@torch.no_grad()
def in_python(config: InfDiTConfig, size: tuple[int, int], plan: MemoryPlan) -> tuple[float, float]:
    """Seconds of an evaluation of so many blocks outside calls of PyTorch, and of all of it.

    size: (height, width) in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn((1, 3, *size), generator=generator) for _ in range(2))
    lr = torch.randn((1, 3, *(side // LR_FACTOR for side in size)), generator=generator)
    denoise = Denoiser(random_model(config, torch.float32), Conditioning(lr, up), plan)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        denoise(x, 1.0)
        seconds = time.perf_counter() - began
    return seconds - 1e-6 * sum(event.self_cpu_time_total for event in seen.key_averages()), seconds


def report(config: InfDiTConfig, size: tuple[int, int], chunk: int) -> Iterator[str]:
    """Lines: a layer of the published width, kernel by kernel; then Python's share of a model's evaluation.

    config: of the model whose evaluation of size (height, width) is profiled; chunk: blocks of its chunks.
    """
    published = InfDiTConfig()
    counted, chunks = of_a_layer(published, 4, 4096 // published.block_size)
    yield f"a layer of width {published.hidden_size}, 4 blocks of 1024 tokens in bf16, of 4096 pixels a line:"
    for name, count in counted.names.most_common():
        yield f"{count / chunks:7.2f} {counted.moved[name] / chunks / 1e6:8.1f} MB   {name}"
    kernels, moved = counted.names.total() / chunks, counted.moved.total() / chunks
    yield f"{kernels:7.2f} {moved / 1e6:8.1f} MB   kernels, and bytes of those that are neither product nor attention"
    counted, chunks = of_a_layer(published, 4, 4096 // published.block_size, triton=True)
    kernels, moved = counted.names.total() / chunks, counted.moved.total() / chunks
    yield f"{kernels:7.2f} {moved / 1e6:8.1f} MB   with {fuse.SWITCH}=1"
    grid, plan = BlockGrid.covering(*size, config.block_size), MemoryPlan(config.num_layers, chunk)
    (python, whole), chunks = in_python(config, (grid.height, grid.width), plan), -(-grid.blocks // chunk)
    card = CostModel.family(CUDA, torch.bfloat16).evaluation(config, grid, plan, torch.bfloat16)
    yield (
        f"{size[1]}×{size[0]}, {config.num_layers} layers of width {config.hidden_size}, {chunk} blocks at a time: "
        f"{1e3 * python / chunks:.1f} ms in Python, {python / whole:.1%} of the time on this CPU, "
        f"{1e3 * card / chunks:.1f} ms on a card by the cost model"
    )
