"""EDM preconditioning (Karras et al. 2022, table 1) around the sweep:

    D(x; σ) = c_skip·x + c_out·F(c_in·[x, up]; ¼·ln σ, lr, clip)

with σ_data = 0.5. x, the result and the arithmetic here are float32 or float64; the network has its own dtype.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .blocks import Canvas, cut, cut_windows
from .config import LR_FACTOR
from .grid import Area, BlockGrid, Geometry, Positions
from .memory.footprint import LEVELS, chunk_workspace
from .memory.offload import Offloader, PendingCopy, distribute_weights
from .memory.plan import MemoryPlan
from .model import InfDiT, MakeWindow
from .stages import Belt, Elsewhere, Handover, Progress, Stops
from .uniba import Chunk, Give, Take, Workbench, sweep

SIGMA_DATA = 0.5
Modulations = tuple[list[Tensor], Tensor]  # of the layers and of the head
Painted = Callable[[Canvas, Tensor], None]  # a result that is not whole yet, and the enlarged picture under it


@dataclass(frozen=True)
class Conditioning:
    """The picture that is to be upscaled, as the network sees it.

    Attributes:
        lr: (B, 3, h/4, w/4) in [-1, 1].
        lr_upscaled: (B, 3, h, w) in [-1, 1], the same picture by bicubic; h and w whole blocks.
        clip_embedding: (B, vector_dim), unit length; None stands for zeros.
    """

    lr: Tensor
    lr_upscaled: Tensor
    clip_embedding: Tensor | None = None

    def to(self, device: torch.device) -> Conditioning:
        """The same with its pictures on a device."""
        return replace(self, lr=self.lr.to(device), lr_upscaled=self.lr_upscaled.to(device))


class Denoiser:
    """`denoise(x, sigma)`: the posterior mean of the picture, given x = picture + σ·noise.

    Args:
        model: the network.
        conditioning: of B pictures; they and x are on the device, or on the CPU if the plan has images on the host.
        plan: how the evaluation is cut and what is kept where; None: `MemoryPlan.default`.
        positions, origin: see `grid.Geometry`.
        progress: is called with the number of blocks after each layer of a chunk.
        device: what computes; None: where the model is. Several: the plan's `layers` in turn.
        levels: noise levels that will be asked for; what depends on them alone is computed for many at once.
        painted: is shown the result while it grows, after each chunk of blocks but the last; it may not keep it.
        elsewhere: other processes, each with the plan's `layers` of its rank; then there is one device here.

    Raises:
        ValueError: shapes that do not fit the model or each other.
    """

    def __init__(
        self, model: InfDiT, conditioning: Conditioning, plan: MemoryPlan | None = None,
        positions: Positions = "continuous", origin: tuple[int, int] = (0, 0),
        progress: Callable[[int], None] | None = None, device: torch.device | Sequence[torch.device] | None = None,
        painted: Painted | None = None, levels: Sequence[float] = (), elsewhere: Elsewhere | None = None,
    ) -> None:
        self.conditioning, self._elsewhere, self._stops = conditioning, elsewhere, Stops()
        self.progress = self._stops.noting(progress or (lambda done: None))
        self.painted = painted and self._stops.noting(painted)
        self._levels, self._modulated = list(dict.fromkeys(levels)), dict[float, Modulations]()
        self.plan = plan or MemoryPlan.default(model.config)
        *_, h, w = conditioning.lr_upscaled.shape
        block = model.config.block_size
        if h % block or w % block:
            raise ValueError(f"{h}×{w} pixels must be whole blocks of {block}: pad them first")
        batch = len(conditioning.lr_upscaled)
        quarter = (batch, 3, h // LR_FACTOR, w // LR_FACTOR)
        if conditioning.lr.shape != quarter:
            raise ValueError(f"lr of shape {tuple(conditioning.lr.shape)} must be a quarter of lr_upscaled: {quarter}")
        vector, width = conditioning.clip_embedding, model.config.vector_dim
        if vector is not None and width and vector.shape != (batch, width):
            raise ValueError(f"clip_embedding of shape {tuple(vector.shape)} must be {(batch, width)}")
        grid = BlockGrid.covering(h, w, block, self.plan.sweep)
        config, chunk = model.config, min(self.plan.chunk, grid.blocks)
        devices = [device or model.device] if device is None or isinstance(device, torch.device) else device
        self.benches: list[Workbench] = []
        rank = None if elsewhere is None else elsewhere.rank
        for device, layers in self.plan.stages(devices, config.num_layers, rank):
            room = chunk_workspace(config, model.dtype, grid, chunk, device)
            if layers.start:  # whose hidden states lie in a landing
                room -= chunk * config.block_tokens * config.hidden_size * model.dtype.itemsize
            self.benches.append(Workbench(config, layers, grid, batch, Offloader(self.plan, device, room)))
        self.model = distribute_weights(model, self.plan, devices, rank)
        self.geometry = Geometry(grid, config.block_side, config.position_period, positions, origin)

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """D(x; σ), like x, for x (B, 3, h, w) of float32 or float64 and sigma 0-d or (B,), above 0."""
        if x.shape != self.conditioning.lr_upscaled.shape:
            raise ValueError(f"x of {tuple(x.shape)} must have the shape {tuple(self.conditioning.lr_upscaled.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x of {x.dtype} must be float32 or float64: the network has a dtype of its own")
        # a tensor elsewhere is not looked at: that would wait for the device
        if not ((sigma.device.type != "cpu" or (sigma > 0).all()) if isinstance(sigma, Tensor) else sigma > 0):
            raise ValueError(f"sigma {sigma} must be above 0: a picture without noise needs no denoising")
        on_the_host = not isinstance(sigma, Tensor) or (sigma.dim() == 0 and sigma.device.type == "cpu")
        level = float(sigma) if on_the_host else None
        # a number stays one: to bring it to the device would be to wait for that
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device="cpu" if on_the_host else x.device)
        sigma = sigma if on_the_host else sigma.expand(len(x))
        if self._elsewhere is not None:
            self._elsewhere.evaluate(sigma, level)
        modulations, head_modulation = self._modulations(sigma, level)
        with closing(_Pictures(self, x, sigma, head_modulation)) as pictures:
            self._sweep(modulations, pictures.read, pictures.write, pictures.prepare)
            return pictures.result()

    def pass_on(self, sigma: Tensor, level: float | None) -> None:
        """The same in a process that has some layers of those between: what comes from another goes on to another."""
        elsewhere, (modulations, _) = self._elsewhere, self._modulations(sigma, level)
        assert elsewhere is not None
        self.benches[0].take(modulations[0])
        self._expect(elsewhere)
        self._sweep(modulations, partial(_take_from, elsewhere, self.progress), None)

    def _sweep(
        self, modulations: list[Tensor], read: Take, write: Give | None,
        prepare: Callable[[range], None] = lambda blocks: None,
    ) -> None:
        """All layers over all blocks, on one device or on several at a time; write: None where others do it."""
        devices = [bench.offload.transfer.device for bench in self.benches]
        first = self.benches[0].layers.start
        for bench in self.benches[1:] if not modulations[0].requires_grad else ():
            bench.take(modulations[bench.layers.start - first])
        ways = zip(self.benches[:-1], self.benches[1:], strict=True)
        handed: list[Handover | Elsewhere] = [
            Handover(a.offload.transfer, b.offload.transfer.device, b.landings) for a, b in ways
        ]
        if self._elsewhere is not None:
            handed.append(self._elsewhere)

        # no closure: an error's traceback keeps the functions that it came through, and these what they close over
        stages = [partial(self._stage, n, modulations, handed, read, write, prepare) for n in range(len(devices))]
        if self._elsewhere is not None and write is not None:
            stages.append(partial(self._finish, self._elsewhere, write))
            devices.append(devices[-1])
        try:
            if len(stages) == 1:
                stages[0](self.progress)
            else:
                Belt(self.progress, self._stops).run(stages, devices)
        except BaseException:
            for bench in self.benches:
                bench.give_back()
            raise

    def _stage(
        self, number: int, modulations: list[Tensor], handed: Sequence[Handover | Elsewhere], read: Take,
        write: Give | None, prepare: Callable[[range], None], progress: Progress,
    ) -> None:
        """The layers of one bench; what is not read or written here is handed on."""
        bench, first = self.benches[number], self.benches[0].layers.start
        take = partial(_take_from, handed[number - 1], progress) if number else read
        give = write if number == len(handed) and write else partial(_give_to, handed[number], progress)
        own = modulations[bench.layers.start - first : bench.layers.stop - first]
        sweep(self.model, bench, self.geometry, own, take, give, progress, *(() if number else (prepare,)))

    def _finish(self, elsewhere: Elsewhere, write: Give, progress: Progress) -> None:
        """Take all chunks from the last of the processes that have the other layers."""
        bench, others = self.benches[-1], len(self.model.layers) - self.benches[-1].layers.stop
        self._expect(elsewhere)
        for blocks in bench.chunks:
            write(Chunk(self.geometry, blocks, bench.offload, self.model), elsewhere.take(progress))
            progress(len(blocks) * others)

    def _expect(self, elsewhere: Elsewhere) -> None:
        bench, config = self.benches[0], self.model.config
        batch, token = len(self.conditioning.lr), (config.block_tokens, config.hidden_size)
        shapes = [(batch, len(blocks), *token) for blocks in bench.chunks]
        elsewhere.expect(shapes, self.model.dtype, bench.offload.transfer.device, bench.landings)

    def _modulations(self, sigma: Tensor, level: float | None) -> Modulations:
        """Of one noise level, or of one for each picture; weights come by once for LEVELS of those foreseen."""
        if level is None:
            return self._modulate(sigma)
        if level in self._modulated:
            return self._modulated[level]
        batch, levels, foreseen = len(self.conditioning.lr), [level], level in self._levels
        if foreseen:
            first = self._levels.index(level) // LEVELS * LEVELS  # wherever a run begins: the same ones at once
            levels, self._modulated = self._levels[first : first + LEVELS], {}
        layers, head = self._modulate(torch.tensor(levels, dtype=sigma.dtype, device="cpu").repeat_interleave(batch))
        rows = [slice(i, i + batch) for i in range(0, len(levels) * batch, batch)]
        made = {key: ([m[:, row] for m in layers], head[:, row]) for key, row in zip(levels, rows, strict=True)}
        if foreseen:
            self._modulated = made
        return made[level]

    def _modulate(self, sigma: Tensor) -> Modulations:
        vector = self.conditioning.clip_embedding
        if vector is not None:
            vector = vector.repeat(len(sigma) // len(vector), 1)
        c_noise = (sigma.log() / 4).to(self.benches[0].offload.transfer.device)
        with closing(self._modulation_layers()) as linears:
            return self.model.modulations_for(c_noise, vector, linears)

    def _modulation_layers(self) -> Generator[Callable[[Tensor], Tensor], None, None]:
        """Those of all stages, each on its device."""
        for bench in self.benches:
            device = bench.offload.transfer.device
            with closing(bench.offload.ready([self.model.modulations[i]] for i in bench.layers)) as ready:
                for (linear,) in ready:
                    yield partial(_on, device, linear)


def _take_from(handed: Handover | Elsewhere, progress: Progress, chunk: Chunk) -> tuple[Tensor, None]:
    return handed.take(progress), None


def _give_to(handed: Handover | Elsewhere, progress: Progress, chunk: Chunk, h: Tensor) -> None:
    handed.give(h, progress)


def _on(device: torch.device, linear: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
    return linear(c.to(device))


class _Pictures:
    """The pictures of one evaluation, where they meet the tokens: cut into blocks, and put together of them.

    Those that are not on the device are cut and copied one chunk ahead of the arithmetic, and pasted one behind, where
    copies run beside it.
    """

    def __init__(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, head_modulation: Tensor) -> None:
        """x: (B, 3, h, w); sigma: (B,), or 0-d on the CPU; head_modulation: see `InfDiT.modulations_for`."""
        self._model, self._grid, self._given = denoiser.model, denoiser.geometry.grid, denoiser.conditioning
        self._painted, self._modulation, self._x = denoiser.painted, head_modulation, x
        self._from, self._to = (denoiser.benches[i].offload.transfer for i in (-1, 0))
        self._away = denoiser.plan.images != "device"
        self._coming: dict[range, PendingCopy] = {}
        self._leaving: deque[tuple[list[Area], PendingCopy]] = deque()
        s = sigma[:, None, None, None, None] if sigma.dim() else sigma  # beside blocks of pixels (B, n, 3, h, w)
        norm = (s**2 + SIGMA_DATA**2).sqrt()
        self._c_skip, self._c_out, self._c_in = SIGMA_DATA**2 / norm**2, s * SIGMA_DATA / norm, 1 / norm
        self._canvas = Canvas(self._grid, x)
        if not head_modulation.requires_grad:
            self._canvas.take()

    def prepare(self, blocks: range) -> None:
        """Begin to bring a chunk that will be read."""
        if self._away and self._to.beside:
            self._coming[blocks] = self._to.send(self._cut(self._grid.areas(blocks)))

    def read(self, chunk: Chunk) -> tuple[Tensor, MakeWindow]:
        """The tokens of a chunk, and what makes those of its windows."""
        if chunk.blocks in self._coming:
            pixels, windows = self._coming.pop(chunk.blocks).wait()
        else:
            pixels, windows = self._cut(chunk.areas)
            if self._away:
                pixels, windows = self._to.send([pixels, windows]).wait()
        return self._model.embed(pixels), partial(self._model.embed_lr, windows, chunk.inside)

    def write(self, chunk: Chunk, h: Tensor) -> None:
        """Take the tokens of a chunk after the last layer."""
        pixels = self._model.unembed(h, self._modulation)
        there = self._from.fetch(pixels) if self._away else PendingCopy([pixels])
        self._leaving.append((chunk.areas, there))
        if len(self._leaving) > (self._away and self._from.beside):
            self._paste()

    def result(self) -> Tensor:
        """D(x; σ), of which all blocks are written."""
        while self._leaving:
            self._paste()
        return self._canvas.image

    def close(self) -> None:
        """Keep no block any more, whoever holds a reference to this."""
        self._coming.clear()
        self._leaving.clear()

    def _cut(self, at: list[Area]) -> list[Tensor]:
        block, up, lr = self._grid.block, self._given.lr_upscaled, self._given.lr
        pixels = torch.cat((cut(self._x, at, block), cut(up, at, block).to(self._x.dtype)), 2)
        windows = cut_windows(lr, at, block // LR_FACTOR)
        return [(self._c_in * pixels).to(self._model.dtype), windows.to(self._model.dtype)]  # published: of all six

    def _paste(self) -> None:
        at, copy = self._leaving.popleft()
        (pixels,) = copy.wait()
        known = self._c_skip * cut(self._x, at, self._grid.block)
        self._canvas.paste(at, known + self._c_out * pixels.to(self._x))
        if self._painted is not None and not self._canvas.whole:
            self._painted(self._canvas, self._given.lr_upscaled)
