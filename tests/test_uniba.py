"""Every schedule of the sweep equals the dense transcription; the ring is as small as it is said to be."""

import itertools
import re
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import MakeModel
from sweeps import BLOCK, EXACT, PERIOD, SIDE, SIZES, random_inputs, reference
from torch.utils._python_dispatch import TorchDispatchMode

from infdit import Conditioning, Denoiser, MemoryPlan, uniba
from infdit.blocks import cut, cut_windows
from infdit.model import InfDiT

GRIDS = sorted({*itertools.product(range(1, 6), range(1, 4)), *itertools.product(range(1, 4), range(1, 6))})


def plans(blocks: int, every: bool = False) -> Iterator[MemoryPlan]:
    """Of all groups, in chunks that come out even and do not, half of them by rows; every: in all chunks, both ways."""
    chunks = range(1, blocks + 1) if every else sorted({1, 2, blocks // 2 + 1, blocks} - {blocks + 1})
    for group, chunk, sweep in itertools.product((1, 2, 3), chunks, ("rows", "columns")):
        if every or (group + chunk + (sweep == "rows")) % 2:
            yield MemoryPlan(group, chunk, sweep=sweep)
    yield MemoryPlan(9, 99)  # more than there is


FEW = [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (3, 5), (5, 3)]
CROSSING = [grid for grid in GRIDS if max(grid) * SIDE > PERIOD]  # elsewhere both kinds of positions are the same


@pytest.mark.parametrize(
    ("grid", "positions", "every"),
    [
        *itertools.product(FEW, ["continuous"], [False]),
        *itertools.product([(1, 3), (4, 2), (5, 3)], ["wrapped"], [False]),
        *(
            pytest.param(grid, positions, True, marks=pytest.mark.slow)
            for positions, grids in (("continuous", GRIDS), ("wrapped", CROSSING))
            for grid in grids
        ),
    ],
    ids=str,
)
def test_every_schedule_equals_the_dense_transcription(
    grid: tuple[int, int], positions: str, every: bool, make_model: MakeModel
) -> None:
    model, weights = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(*grid)
    expected = reference(weights, x, sigma, conditioning, positions=positions)
    for plan in plans(grid[0] * grid[1], every):
        result = Denoiser(model, conditioning, plan, positions=positions)(x, sigma)
        torch.testing.assert_close(result, expected, msg=lambda m, plan=plan: f"{plan}: {m}", **EXACT)


def test_the_network_at_once_is_what_the_sweep_computes_in_pieces(make_model: MakeModel) -> None:
    """F by `InfDiT.forward`, and out of D: (D − c_skip·x) / c_out."""
    model, _ = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(3, 2)
    denoise = Denoiser(model, conditioning, MemoryPlan(1, 2))
    norm = (sigma**2 + 0.25).sqrt()[:, None, None, None]
    c_skip, c_out = 0.25 / norm**2, sigma[:, None, None, None] / 2 / norm
    expected = (denoise(x, sigma) - c_skip * x) / c_out

    geometry, grid = denoise.geometry, denoise.geometry.grid
    chunk = uniba.Chunk(geometry, range(grid.blocks), denoise.benches[0].offload, model)
    pixels = torch.cat([cut(x, chunk.areas, BLOCK), cut(conditioning.lr_upscaled, chunk.areas, BLOCK)], 2)
    result = model(
        pixels / norm[:, None],
        cut_windows(conditioning.lr, chunk.areas, BLOCK // 4),
        chunk.inside,
        chunk.turns,
        partial(uniba.KVRing(grid.blocks).keep, chunk),
        sigma.log() / 4,
        conditioning.clip_embedding,
    )
    torch.testing.assert_close(result, cut(expected, chunk.areas, BLOCK), **EXACT)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (3, 2)], ids=str)
def test_every_schedule_in_single_precision(grid: tuple[int, int], make_model: MakeModel) -> None:
    model, weights = make_model(period=PERIOD, dtype=torch.float32, **SIZES)
    x, conditioning, sigma = random_inputs(*grid)
    exact = {name: weight.double() for name, weight in weights.items()}
    expected = reference(exact, x, sigma, conditioning, positions="continuous")
    single = Conditioning(
        *(t.float() for t in (conditioning.lr, conditioning.lr_upscaled, conditioning.clip_embedding))
    )
    for plan in plans(grid[0] * grid[1]):
        result = Denoiser(model, single, plan)(x.float(), sigma.float())
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("hidden", ["device", "host"])
@pytest.mark.parametrize("images", ["device", "host"])
def test_where_things_are_kept_changes_nothing(weights: str, hidden: str, images: str, make_model: MakeModel) -> None:
    model, published = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(3, 2)
    expected = reference(published, x, sigma, conditioning, positions="continuous")
    for group, chunk in ((1, 1), (1, 4), (2, 4), (2, 6), (3, 1)):
        denoise = Denoiser(model, conditioning, MemoryPlan(group, chunk, weights, hidden, images))
        torch.testing.assert_close(denoise(x, sigma), expected, **EXACT)
        torch.testing.assert_close(denoise(x, sigma), expected, **EXACT)  # nothing of the first is left behind


class NoScatter(TorchDispatchMode):
    """A device on which tensors can be read and written by slices alone: elsewhere single ones have gone astray."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not re.search("index|gather|scatter|masked|take", str(func)), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hidden", ["device", "host"])
def test_all_is_read_and_written_by_slices(hidden: str, make_model: MakeModel) -> None:
    model, weights = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(3, 4)
    with NoScatter():
        found = Denoiser(model, conditioning, MemoryPlan(2, 5, "streamed", hidden))(x, sigma)
    torch.testing.assert_close(found, reference(weights, x, sigma, conditioning, positions="continuous"), **EXACT)
    with pytest.raises(AssertionError, match="index"), NoScatter():
        x.index_select(0, torch.tensor([1]))


class Products(TorchDispatchMode):
    """Rows of all products of matrices: for each number a library may make a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
            self.rows.add(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [2, 3, 4])
def test_products_are_of_whole_chunks_wherever_they_lie_in_the_ring(chunk: int, make_model: MakeModel) -> None:
    model, _ = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(4, 5)
    denoise = Denoiser(model, conditioning, MemoryPlan(2, chunk))
    with Products() as seen:
        denoise(x, sigma)
    config, chunks = model.config, {len(blocks) for blocks in denoise.benches[0].chunks}
    tokens = {len(x) * blocks * each for blocks in chunks for each in (config.block_tokens, config.window_tokens)}
    values = {blocks * config.block_tokens for blocks in chunks}  # a picture at a time
    assert values <= seen.rows <= tokens | values | {len(sigma)}


@pytest.mark.parametrize("positions", ["wrapped", "continuous"])
def test_origin_of_a_crop(positions: str, make_model: MakeModel) -> None:
    model, weights = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(3, 2)
    here = reference(weights, x, sigma, conditioning, positions=positions)
    for origin in ((0, 3), (5, 0), (SIDE, 7 * SIDE), (13, 102)):
        expected = reference(weights, x, sigma, conditioning, positions=positions, origin=origin)
        assert (expected - here).abs().max() > 1e-6
        for plan in (MemoryPlan(), MemoryPlan(1, 1)):
            result = Denoiser(model, conditioning, plan, positions=positions, origin=origin)(x, sigma)
            torch.testing.assert_close(result, expected, **EXACT)


def test_positions_differ_only_behind_the_period(make_model: MakeModel) -> None:
    model, _ = make_model(period=PERIOD, **SIZES)
    for grid in ((1, 4), (4, 1)):
        x, conditioning, sigma = random_inputs(*grid)
        wrapped, continuous = (Denoiser(model, conditioning, positions=p)(x, sigma) for p in ("wrapped", "continuous"))
        axis = 3 if grid[0] == 1 else 2
        before, behind = ((wrapped - continuous).abs().narrow(axis, start, 2 * BLOCK).max() for start in (0, 2 * BLOCK))
        assert before < 1e-12
        assert behind > 1e-4


@pytest.mark.parametrize("shift", [(2, 0), (0, 2), (2, 4)])
def test_a_picture_moved_by_periods_is_the_same_away_from_borders(
    shift: tuple[int, int], make_model: MakeModel
) -> None:
    """Only the continuous form can do this: a block must not know at which side of a seam it lies."""
    depth, rows, columns = SIZES["layers"], 8, 8
    model, _ = make_model(period=PERIOD, **SIZES)
    x, c, sigma = random_inputs(rows, columns, batch=1)
    small = Denoiser(model, c)(x, sigma)
    large_x, large_c, _ = random_inputs(rows + shift[0], columns + shift[1], batch=1, seed=2)
    for large, own, size in (
        (large_x, x, BLOCK),
        (large_c.lr_upscaled, c.lr_upscaled, BLOCK),
        (large_c.lr, c.lr, BLOCK // 4),
    ):
        large[..., shift[0] * size :, shift[1] * size :] = own
    moved = Denoiser(model, Conditioning(large_c.lr, large_c.lr_upscaled, c.clip_embedding))(large_x, sigma)
    moved = moved[..., shift[0] * BLOCK :, shift[1] * BLOCK :]
    inner = (slice(None), slice(None), slice((depth + 1) * BLOCK, None), slice((depth + 1) * BLOCK, None))
    torch.testing.assert_close(moved[inner], small[inner], **EXACT)
    assert (moved - small).abs().max() > 1e-3, "blocks near the border see what was there before"


def test_the_ring_holds_a_line_a_block_and_a_chunk(make_model: MakeModel) -> None:
    model, _ = make_model(period=PERIOD, **SIZES)
    rings: list[uniba.KVRing] = []

    class Recorded(uniba.KVRing):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            rings.append(self)

    with mock.patch.object(uniba, "KVRing", Recorded):
        for (rows, columns), chunk, sweep in itertools.product([(6, 2), (2, 6)], (1, 3), ("rows", "columns", "auto")):
            x, conditioning, sigma = random_inputs(rows, columns, batch=1)
            rings.clear()
            Denoiser(model, conditioning, MemoryPlan(2, chunk, sweep=sweep))(x, sigma)
            line = {"rows": columns, "columns": rows, "auto": min(rows, columns)}[sweep]
            held = [ring.kept.shape[2] for ring in rings]
            assert len(rings) == 2, "those of a group are used by the next"
            assert max(held) <= line + 1 + chunk


def test_gradients_with_one_chunk(make_model: MakeModel) -> None:
    """Of the whole network, against central differences along a random direction."""
    model, _ = make_model(period=PERIOD, **SIZES)
    model.requires_grad_(True)
    x, conditioning, sigma = random_inputs(2, 3, batch=1)
    denoise = Denoiser(model, conditioning, MemoryPlan(28, 99))

    def loss() -> torch.Tensor:
        return denoise(x, sigma).square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    losses = []
    step = 1e-5
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(d, alpha=step * (1 if sign == 1 else -2))
            losses.append(loss())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=1e-6, atol=0)


def test_low_precision_at_real_width(make_model: MakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = make_model(period=1024, dtype=torch.float32, layers=1, hidden=1280, heads=16, block=BLOCK, vector_dim=0)
    generator = torch.Generator().manual_seed(0)
    lr, up, x = (torch.randn((1, 3, s, 2 * s), generator=generator).clamp(-1, 1) for s in (4, 16, 16))
    for dtype, sigma in ((torch.bfloat16, 40.0), (torch.float16, 1.0)):
        noisy = up + sigma * x
        exact, low = (Denoiser(m, Conditioning(lr, up))(noisy, sigma) for m in (model, _copy(model, dtype)))
        deviation = (low - exact).abs()
        with capsys.disabled():
            print(
                f"\n{dtype}, width 1280, σ {sigma}: deviates by {deviation.max():.4f}, mean {deviation.mean():.5f}",
                end="",
            )
        assert torch.isfinite(low).all()
        assert low.dtype == torch.float32
        # c_out is at most 0.5 and F about 1; roundings of relative size 2^-9 add up over some 30 operations a layer
        assert deviation.mean() < 0.5 * 2**-9 * 30**0.5


def _copy(model: InfDiT, dtype: torch.dtype) -> InfDiT:
    with torch.device("meta"):
        copy = InfDiT(model.config)
    copy.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, assign=True)
    return copy


def test_wrong_shapes_are_refused(make_model: MakeModel) -> None:
    model, _ = make_model(**SIZES)
    x, c, sigma = random_inputs(2, 2)
    with pytest.raises(ValueError, match="whole blocks"):
        Denoiser(model, Conditioning(c.lr, c.lr_upscaled[..., :-4]))
    with pytest.raises(ValueError, match="quarter"):
        Denoiser(model, Conditioning(c.lr[..., 1:], c.lr_upscaled))
    with pytest.raises(ValueError, match=r"must be \(2, 8\)"):
        Denoiser(model, Conditioning(c.lr, c.lr_upscaled, torch.zeros(2, 9)))
    with pytest.raises(ValueError, match="quarter"):
        Denoiser(model, Conditioning(c.lr[:1], c.lr_upscaled))
    for nothing in (0.0, torch.tensor(0.0), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="above 0"):
            Denoiser(model, c)(x, nothing)
    with pytest.raises(ValueError, match="float32 or float64"):
        Denoiser(model, c)(x.half(), sigma)
    with pytest.raises(ValueError, match="shape"):
        Denoiser(model, c)(x[..., BLOCK:], sigma)
    with pytest.raises(ValueError, match="positions"):
        Denoiser(model, c, positions="unwrapped")
    with pytest.raises(ValueError, match="at least 1"):
        MemoryPlan(group=0)


def test_weights_of_modulations_come_by_once_for_many_levels(make_model: MakeModel) -> None:
    """Twenty levels at a time; one that nobody foresaw, and one for each picture, are computed when they come."""
    model, _ = make_model(period=PERIOD, **SIZES)
    x, conditioning, sigma = random_inputs(1, 2)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.modulations[0].register_forward_hook(count)
    levels = torch.logspace(1, -2, 45, dtype=torch.float64).tolist()
    foreseen, unaware = (Denoiser(model, conditioning, MemoryPlan(1, 1), levels=known) for known in (levels, ()))
    for level, fetched in ((0, 1), (19, 0), (20, 1), (44, 1), (44, 0), (None, 1), (44, 0), (1, 1)):
        asked = 0.123 if level is None else levels[level]
        before = calls
        result = foreseen(x, asked)
        assert calls - before == fetched, level
        torch.testing.assert_close(result, unaware(x, asked), **EXACT)
    torch.testing.assert_close(foreseen(x, sigma), unaware(x, sigma), **EXACT)
