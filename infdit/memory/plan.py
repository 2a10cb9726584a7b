"""How an evaluation is cut into pieces and what that holds: the picture is the same for every plan.

The bytes are closed forms, counted as they are when most is held, tensor by tensor, from the code of `model`, `uniba`,
`denoiser`, `samplers` and `upscale`. `benchmarks.peak_meter` counts the same while it runs; tests compare the two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

import torch

from ..config import LR_FACTOR, InfDiTConfig
from ..device import one_memory, slab_bytes
from ..disk import PIECE
from ..grid import BlockGrid, Sweep
from ..samplers import SamplerInfo, get_sampler
from ..sizes import passes, passes_by
from .footprint import CPU, FLOAT32, Footprint, Weights, pixel_bytes, staged_bytes, workspace

Tier = Literal["device", "host"]
Place = Literal["device", "host", "disk"]
WeightsKept = Literal["resident", "streamed"]
Stage = tuple[torch.device, range]  # and its layers
CHUNK_TOKENS = 4096  # enough rows for every matrix product to run at full speed; four blocks of the published model
SEGMENTS = 22 * 2**20  # bytes of CUDA's allocator that are taken and not given out: one segment of each kind
STRIP_BYTES = 2**13  # for each pixel along a side, of what is worked on in strips: pixels in float64 and weights


@dataclass(frozen=True)
class MemoryPlan:
    """A schedule of the sweep, see `uniba`. Every plan is legal on every device.

    Attributes:
        group: layers that are swept together. All of them is the paper's schedule: keys and values of every layer
            are kept, hidden states are not. 1 keeps one layer's keys and values, and all hidden states.
        chunk: blocks that are computed together.
        weights: "resident" on the device, or "streamed" from the host a group at a time, the next group meanwhile.
        hidden: place of hidden states between groups, "device" or "host".
        images: place of the pictures and the sampler's state, "device", "host" or "disk", where results are too then.
        sweep: direction of the lines of blocks, "rows" or "columns"; "auto" takes the short side.
        pinned: whether what is on the host is pinned, so that it is copied beside the arithmetic; where it cannot be
            had, copies are plain and all wait for them.
        layers: how many of them each of several devices, or processes, has in turn, which work at the same time;
            empty: one has all.
        peak_bytes, host_bytes, disk_bytes, reason: predictions of the planner and why it chose; empty for a plan made
            by hand.

    A group or chunk beyond what exists means all of it.

    Raises:
        ValueError: a group or chunk under 1, a value that is none of those named.
    """

    group: int = 28
    chunk: int = 4
    weights: WeightsKept = "resident"
    hidden: Tier = "device"
    images: Place = "device"
    sweep: Sweep = "auto"
    peak_bytes: int | None = field(default=None, compare=False)
    host_bytes: int | None = field(default=None, compare=False)
    reason: str = field(default="", compare=False)
    pinned: bool = True
    layers: tuple[int, ...] = ()
    disk_bytes: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.group < 1 or self.chunk < 1:
            raise ValueError(f"group {self.group} and chunk {self.chunk} must be at least 1: a layer, a block")
        for name, kinds in (("weights", WeightsKept), ("hidden", Tier), ("images", Place), ("sweep", Sweep)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(get_args(kinds))}")

    def stages(self, devices: Sequence[torch.device], depth: int, rank: int | None = None) -> list[Stage]:
        """Which device has which of `depth` layers; those that would have none are left out.

        rank: of the process that has the first of the devices, where every process has one, see `ranks`.

        Raises:
            ValueError: `layers` that are not all, or of more devices than there are.
        """
        counts = self.layers or (depth,)
        if sum(counts) != depth or min(counts) < 0 or (rank is None and len(counts) > len(devices)):
            raise ValueError(f"layers {counts} over {len(devices)} devices must be all {depth}, some on each")
        shares = list(zip(counts, accumulate(counts), strict=True))[rank or 0 :]
        return [(device, range(end - count, end)) for device, (count, end) in zip(devices, shares) if count]  # noqa: B905

    @classmethod
    def default(cls, config: InfDiTConfig) -> MemoryPlan:
        """All layers at once, in chunks that are large enough to be fast and small beside the keys and values."""
        return cls(group=config.num_layers, chunk=max(1, CHUNK_TOKENS // config.block_tokens))


@dataclass(frozen=True)
class Workload:
    """What a run computes and where: all that its memory and time depend on, beside the plan.

    Attributes:
        config: sizes of the model.
        height, width: of the result in pixels.
        batch: pictures of the run, which are worked on one after another.
        dtype: of the network.
        device: what computes. Where it and the host have one memory, everything is the device's.
        beside: further devices that may take some of the layers.
        sampler: name, or what it holds.
        weights: the only place that plans may give them; None: any.
        source: height, width and channels of the pictures given; None: RGB of a quarter of the result's sides.
        evaluations: of a picture, about as many: they share what is done once a run.
        fitted: whether results are made faithful to the pictures given, see `fidelity`.
        noise_given: whether the noise of all pictures is given, in place of a generator.
        pinnable: bytes of the host that may be pinned; None: as many as the driver lets.
        folder: where pictures may lie that memory does not hold; None: nowhere.
        scales: the only scales that the model is asked for, and the share of the noise levels of each; none: any.
        shrunk: of a pass: (height, width) of what is made of its result, if that is made smaller.
        strength: of a pass: share of the noise levels.
    """

    config: InfDiTConfig
    height: int
    width: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU
    sampler: str | SamplerInfo = "heun"
    weights: WeightsKept | None = None
    source: tuple[int, int, int] | None = None
    noise_given: bool = False
    pinnable: int | None = None
    fitted: bool = False
    beside: tuple[torch.device, ...] = ()
    evaluations: int = 40
    folder: str | None = None
    scales: tuple[tuple[int, float], ...] = ()
    shrunk: tuple[int, int] | None = None
    strength: float = 1.0

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that may compute."""
        return self.device, *self.beside

    @property
    def device_kinds(self) -> str:
        """Their kinds, of which each has its own rounding, like "cuda"."""
        return "+".join(dict.fromkeys(device.type for device in self.devices))

    @cached_property
    def passes(self) -> tuple[Workload, ...]:
        """What is computed one after another until the size is reached, for each picture; itself if that is enough."""
        if self.source is None:
            return (self,)
        *given, channels = self.source
        found, before, target = list[Workload](), (given[0], given[1]), (self.height, self.width)
        shares, plain = dict(self.scales), [(size, size, 0) for size in passes(before, target)]
        for (height, width), size, scale in passes_by(shares, before, target) if shares else plain:
            part = replace(self, height=height, width=width, source=(*before, channels), scales=())
            shrunk = None if (height, width) == size else size
            found.append(replace(part, shrunk=shrunk, strength=shares.get(scale, 1.0)))
            before = size
        return tuple(found)

    @property
    def way(self) -> str:
        """By way of which sizes it is computed, for people; empty where one pass is enough."""
        sizes = [size for part in self.passes for size in ((part.height, part.width), part.shrunk) if size]
        between = ", ".join(f"{width}×{height}" for height, width in sizes[:-1])
        count = f"{len(self.passes)} passes, " if self.passes[1:] else ""
        return f"{count}by way of {between}" if between else ""

    @property
    def unified_memory(self) -> bool:
        """Whether the device's memory is the host's: planners keep everything in place there, within one budget."""
        return one_memory(self.device)

    @property
    def grid(self) -> BlockGrid:
        """Blocks of what the last pass computes."""
        last = self.passes[-1]
        return BlockGrid.covering(last.height, last.width, self.config.block_size)

    def footprint(self, plan: MemoryPlan) -> Footprint:
        """What the whole of `upscale()` holds under a plan when it holds most; of several devices the fullest."""
        if plan.layers:
            shares = [held for _, held in self.footprints(plan)]
            weights, hidden = sum(held.host_weights for held in shares), sum(held.host_hidden for held in shares)
            images, disk = shares[0].host_images, shares[0].disk
            fullest = max(shares, key=lambda held: held.device)
            return replace(fullest, host_weights=weights, host_hidden=hidden, host_images=images, disk=disk)
        parts = self.passes
        given, made = self._always(parts)
        phases: list[Footprint] = []
        for part in parts:
            read, between = part._passing(parts)
            phases += part._phases(plan, given + read, made + between)
        device = max(phases, key=lambda held: held.device)
        host = max(phases, key=lambda held: held.host)
        disk = max(held.disk for held in phases)
        return replace(device, host_hidden=host.host_hidden, host_images=host.host_images, disk=disk)

    def footprints(self, plan: MemoryPlan) -> list[tuple[torch.device, Footprint]]:
        """The same of each of several devices; pictures are on the first or on none."""
        stages, without = plan.stages(self.devices, self.config.num_layers), replace(plan, images="host")
        return [(d, self.share(without if n else plan, d, len(layers))) for n, (d, layers) in enumerate(stages)]

    def share(self, plan: MemoryPlan, device: torch.device, layers: int) -> Footprint:
        """What one of several devices holds for so many layers: as for a model that has no more, and tokens.

        One chunk waits there until it is taken, and one leaves.
        """
        config = replace(self.config, num_layers=layers)
        held = replace(self, config=config, device=device, beside=()).footprint(replace(plan, layers=()))
        chunk = max(min(plan.chunk, part.grid.blocks) for part in self.passes)
        tokens = chunk * config.block_tokens * config.hidden_size * self.dtype.itemsize
        return replace(held, hidden=held.hidden + 2 * tokens)

    def _phases(self, plan: MemoryPlan, given: int, made: int) -> list[Footprint]:
        """What one pass holds while an evaluation runs, between two of them, and when it is finished.

        given, made: bytes of pictures that are beside the sampler's: those given, and results.
        """
        config, method = self.config, get_sampler(self.sampler)
        grid = BlockGrid.covering(self.height, self.width, config.block_size, plan.sweep)
        weights = Weights.of(config, self.dtype)
        group, chunk = min(plan.group, config.num_layers), min(plan.chunk, grid.blocks)
        unit = config.block_tokens * config.hidden_size * self.dtype.itemsize  # the hidden state of one block
        ring = 2 * (1 if chunk == grid.blocks else group) * min(grid.line + 1 + chunk, grid.blocks) * unit
        kept = grid.blocks * unit if group < config.num_layers else 0
        picture = 3 * FLOAT32 * grid.height * grid.width
        streamed, hidden_away, images_away = plan.weights == "streamed", plan.hidden == "host", plan.images != "device"
        on_disk = plan.images == "disk"
        # copies to or from it, of states that are saved too; beside a host of its own never the most that it holds
        on_the_way = 0 if self.device.type == "cpu" or images_away else 7 * picture // 2
        one, always = self.unified_memory and plan.images != "host", 0 if self.unified_memory else on_the_way
        segments = SEGMENTS if self.device.type == "cuda" else 0

        staged = plan.pinned and self.device.type not in ("cpu", "mps")
        cut = chunk * (pixel_bytes(config) + staged * staged_bytes(config, self.dtype)) * images_away

        def phase(held: int, on_the_way: int = always, **parts: int) -> Footprint:
            """What is held beside so many bytes of pictures."""
            beside = given + on_the_way + (0 if on_disk else made) + cut
            around = beside if one else 0
            return Footprint(
                **{"ring": 0, "hidden": 0, "workspace": 0, "host_hidden": 0} | parts,
                images=around + (0 if images_away else held),
                disk=made + held if on_disk else 0,
                host_weights=self._slabs(plan, weights.streamable, weights.largest) if streamed else 0,
                host_images=beside - around + (held if plan.images == "host" else 0),
            )

        conditioning, at_rest = picture + picture // LR_FACTOR**2, weights.resident if streamed else weights.total
        sampling = {
            "ring": ring,
            "hidden": 0 if hidden_away else kept,
            "workspace": workspace(config, self.dtype, grid, chunk, self.device) + segments,
            "host_hidden": self._slabs(plan, kept, chunk * unit) if hidden_away else 0,
        }
        evaluating = {
            "weights": weights.resident + weights.streamed(group) if streamed else weights.total,
            "hidden": min(kept, 3 * chunk * unit) if hidden_away else kept,
        }
        called = picture * (sys.version_info < (3, 11))  # the start: until then a caller held what it called with
        strips = 3 * min(picture, FLOAT32 * PIECE) if method.by_rows else 0  # of the sampler's arithmetic
        between = sampling | ({"workspace": 0} if self.device.type == "cpu" else {})  # see `Offloader.room`
        return [
            phase(conditioning + called + method.evaluating * picture, **sampling | evaluating),
            phase(
                conditioning + called + method.pictures * picture + (0 if on_disk else strips),
                always + (strips if on_disk else 0),
                weights=at_rest,
                **between,
            ),
            phase(conditioning + picture, on_the_way, weights=at_rest),
            phase(0, self._fitting(), weights=at_rest),
        ]

    def _always(self, parts: Sequence[Workload]) -> tuple[int, int]:
        """Bytes of what goes in, all pictures and noise that is given, and of what comes out, all results."""
        (height, width, channels), result = parts[0]._read, self.height * self.width
        noise = sum(part.grid.height * part.grid.width for part in parts) if self.noise_given else 0
        pixels = FLOAT32 * self.batch
        return pixels * (channels * height * width + 3 * noise), pixels * channels * result

    def _passing(self, parts: Sequence[Workload]) -> tuple[int, int]:
        """Bytes of one picture in this pass of all: as it is read, and what the pass before and this one make of it."""
        (height, width, channels), result = self._read, self.height * self.width
        made = (self is not parts[0]) * height * width + (self is not parts[-1] or self.shrunk is not None) * result
        if self.shrunk is not None and self is not parts[-1]:
            made += self.shrunk[0] * self.shrunk[1]
        return FLOAT32 * channels * 2 * height * width, FLOAT32 * channels * made

    def _fitting(self) -> int:
        """Bytes that `fidelity` holds: small pictures of the sizes given, strips and weights of both sides."""
        height, width, _ = self._read
        return 3 * FLOAT32 * (6 if self.fitted else 2) * height * width + STRIP_BYTES * (self.height + self.width)

    @property
    def _read(self) -> tuple[int, int, int]:
        """Height, width and channels of the pictures that are read."""
        return self.source or (-(-self.height // LR_FACTOR), -(-self.width // LR_FACTOR), 3)

    def _slabs(self, plan: MemoryPlan, size: int, piece: int) -> int:
        """Bytes of host memory that tensors of together `size` take, each a `piece` at most, cut from slabs."""
        slab = slab_bytes(piece)
        return size if self.device.type in ("cpu", "mps") or not plan.pinned else -(-size // (slab - piece)) * slab
