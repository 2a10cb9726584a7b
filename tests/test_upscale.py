"""upscale(): sizes, noise, batches, alpha, progress, refusals; its plumbing against the parts put together by hand."""

import gc
import io
import math
import time
import weakref
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeModel
from PIL import Image

import infdit
from infdit import MemoryPlan, Report, upscale
from infdit.conditioning import fill_transparent, visible_colour
from infdit.model import InfDiT
from infdit.progress import Preview, Watcher
from infdit.upscale import schedule

FAST = {"steps": 1, "sampler": "euler", "sigma_max": 0.1}


@pytest.fixture
def mini(noisy_mini: InfDiT) -> InfDiT:
    return noisy_mini


@pytest.fixture(scope="module")
def bundled() -> InfDiT:
    """As it is: one step without noise."""
    return infdit.load_model("mini", dtype=torch.float32, device="cpu")


def picture(h: int, w: int, channels: int = 3, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((batch, channels, 4, 4), generator=generator)
    smooth = F.interpolate(coarse, (h, w), mode="bilinear").movedim(1, -1)
    return (smooth + 0.1 * torch.rand((batch, h, w, channels), generator=generator)).clamp(0, 1)


def test_equals_its_parts_put_together_by_hand(mini: InfDiT) -> None:
    image = picture(24, 16)
    up = F.interpolate(image.movedim(-1, 1) * 2 - 1, scale_factor=4.0, mode="bicubic", antialias=True).clamp(-1, 1)
    conditioning = infdit.Conditioning(image.movedim(-1, 1) * 2 - 1, up)
    noise = torch.randn((1, 3, 96, 64), generator=torch.Generator().manual_seed(7))
    sigmas = infdit.samplers.karras_sigmas(3, mini.defaults.sigma_min, 5.0)
    y = infdit.samplers.SAMPLERS["heun"](infdit.Denoiser(mini, conditioning), up + sigmas[0] * noise, sigmas)
    expected = (y.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    result = upscale(mini, image, 4.0, steps=3, sampler="heun", sigma_max=5.0, seed=7)
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)


def test_defaults_are_the_models(mini: InfDiT) -> None:
    d = mini.defaults
    image = picture(8, 8)
    assert torch.equal(
        upscale(mini, image), upscale(mini, image, 4.0, steps=d.steps, sampler=d.sampler, sigma_max=d.sigma_max)
    )


@pytest.mark.parametrize(
    ("h", "w", "scale"),
    [(1, 1, 4.0), (1, 1, 1.5), (1, 97, 4.0), (130, 1, 3.0), (3, 5, 1.01), (7, 9, 2.5), (33, 31, 4.0), (20, 30, 1.3333)],
)
def test_exact_sizes_of_any_input(mini: InfDiT, h: int, w: int, scale: float) -> None:
    result = upscale(mini, picture(h, w), scale, **FAST)
    assert result.shape == (1, math.floor(h * scale + 0.5), math.floor(w * scale + 0.5), 3)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1


def test_size_per_axis(bundled: InfDiT) -> None:
    image = picture(20, 30)
    result = upscale(bundled, image, size=(75, 31))
    assert result.shape == (1, 75, 31, 3)
    assert torch.equal(upscale(bundled, image, size=(80, 120)), upscale(bundled, image, 4.0))
    small = F.interpolate(result.movedim(-1, 1), (20, 30), mode="bicubic", antialias=True).movedim(1, -1)
    assert (small - image).abs().mean() < 0.04, "the same picture, stretched"


def test_odd_sizes_are_not_shifted(bundled: InfDiT) -> None:
    """A picture cropped to an odd size gives the same pixels, away from the new edge."""
    image = picture(40, 40)
    whole, part = upscale(bundled, image, 3.0), upscale(bundled, image[:, :33, :31], 3.0)
    inner = slice(0, 48)  # a block and a half before the edge: windows of the low-resolution picture reach that far
    assert (whole[:, inner, inner] - part[:, inner, inner]).abs().mean() < 0.03
    edge = (whole[:, :99, :93] - part).abs()
    assert edge[:, -3:].mean() < 0.08
    assert edge[:, :, -3:].mean() < 0.08


def test_the_picture_does_not_depend_on_the_plan(mini: InfDiT) -> None:
    image, options = picture(20, 30), {"steps": 2, "sampler": "dpmpp_2m", "sigma_max": 5.0}
    expected = upscale(mini, image, **options)
    for plan in (
        MemoryPlan(1, 1, "streamed", "host", "host"),
        MemoryPlan(4, 7, images="host", sweep="rows"),
        MemoryPlan(2, 999, "streamed", sweep="columns"),
        MemoryPlan(99, 1),
    ):
        difference = (upscale(mini, image, plan=plan, **options) - expected).abs().max()
        assert difference < 1e-4, plan  # 1/255 is promised; float32 rounding through two steps


def test_noise_is_one_draw_for_the_batch_as_in_comfyui(mini: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is drawn a piece at a time."""
    monkeypatch.setattr(import_module("infdit.upscale"), "DRAW", 1024)
    image, seed = picture(10, 20, batch=3), 2**63 + 5
    drawn = upscale(mini, image, 4.0, seed=seed, **FAST)
    given = upscale(mini, image, noise=lambda shape: torch.randn(shape, generator=torch.manual_seed(seed)), **FAST)
    assert torch.equal(drawn, given)


def test_batches_are_single_pictures(mini: InfDiT) -> None:
    image = picture(16, 24, batch=2)
    both = upscale(mini, image, 4.0, **FAST)
    assert torch.equal(both[:1], upscale(mini, image[:1], 4.0, **FAST))
    assert not torch.equal(both[1:], upscale(mini, image[1:], 4.0, **FAST)), "each has its own noise"
    assert both.shape == (2, 64, 96, 3)


def test_denoise_shortens_the_schedule() -> None:
    defaults = infdit.SamplingDefaults()
    assert torch.equal(schedule(defaults), infdit.samplers.karras_sigmas(20, 0.002, 40.0))
    half = schedule(defaults, denoise=0.5)
    expected = ((0.002 ** (1 / 7) + 40 ** (1 / 7)) / 2) ** 7  # half-way as Karras measures it
    assert half[0].item() == pytest.approx(expected, rel=1e-6)
    assert len(half) == 21
    assert schedule(defaults, denoise=0).tolist() == [0]
    assert schedule(defaults, steps=4, sigma_max=3.0)[0] == 3


def test_denoise_0_is_bicubic(mini: InfDiT) -> None:
    image = picture(9, 11)
    bicubic = F.interpolate(image.movedim(-1, 1), scale_factor=4.0, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(upscale(mini, image, denoise=0.0), bicubic.movedim(1, -1), atol=1e-5, rtol=0)


# ---- sizes beyond one pass


@pytest.mark.parametrize(("h", "w", "scale"), [(3, 5, 16.0), (9, 7, 5.3), (1, 2, 4.6)])
def test_beyond_4_a_run_is_its_passes(mini: InfDiT, h: int, w: int, scale: float) -> None:
    """Bit by bit what upscaling by 4 and then by the rest gives, each with the same seed; with a batch and alpha."""
    image, size = picture(h, w, channels=4, batch=2), tuple(math.floor(side * scale + 0.5) for side in (h, w))
    by_hand = upscale(mini, upscale(mini, image, 4.0, seed=3, **FAST), size=size, seed=3, **FAST)
    report, states = Report(), []
    result = upscale(mini, image, scale, seed=3, report=report, callback=states.append, **FAST)
    assert result.shape == (2, *size, 4)
    assert torch.equal(result, by_hand)
    assert [(state["picture"], state["left"]) for state in states] == [(0, 1), (0, 0), (1, 1), (1, 0)]
    assert len(report.seconds) == 4


@pytest.mark.parametrize("strengths", [(1, 0.4), (0.5, 0), (0, 1.0)], ids=str)
@pytest.mark.parametrize("name", ["mini", "bundled"])
def test_each_pass_has_its_own_strength(
    request: pytest.FixtureRequest, name: str, strengths: tuple[float, float]
) -> None:
    """As if each pass were run by itself; the bar is one, and comes to its end."""
    model, image, report = request.getfixturevalue(name), picture(9, 7), Report()
    given = {"steps": 2, "sampler": "heun", "sigma_max": 0.1} if name == "mini" else {}
    bar: list[tuple[int, int]] = []
    result = upscale(
        model, image, 16.0, denoise=strengths, report=report, progress=lambda *moves: bar.append(moves[:2]), **given
    )
    by_hand = upscale(model, upscale(model, image, denoise=strengths[0], **given), denoise=strengths[1], **given)
    assert torch.equal(result, by_hand)
    assert bar[-1][0] == bar[-1][1]
    steps = sum(strength > 0 for strength in strengths) * (2 if given else 1)
    assert (len(report.seconds), report.evaluations) == (steps, steps // 2 * 3 if given else steps)


def test_one_strength_is_that_of_every_pass(mini: InfDiT, tmp_path: Path) -> None:
    """Bit by bit, and a state of the one is a state of the other."""
    image, given = picture(3, 5), {"scale": 16.0, **FAST}
    for strength in (1.0, 0.3):
        plain, told = Report(), Report()
        expected = upscale(mini, image, denoise=strength, report=plain, **given)
        assert torch.equal(upscale(mini, image, denoise=[strength, strength], report=told, **given), expected)
        assert told.settings == plain.settings
    saved, report = infdit.SavedRun(tmp_path / "run"), Report()
    for strengths in ((1, 0.3), (1, 0.4)):
        upscale(mini, image, denoise=strengths, resume=saved, report=report, **given)
    assert "another sigmas" in report.resumed[0]


def test_one_bar_goes_over_all_passes_and_a_stop_in_any_ends_the_run(mini: InfDiT) -> None:
    class StopError(Exception):
        pass

    moves: list[tuple[int, int]] = []
    shapes: set[tuple[int, ...]] = set()

    def progress(done: int, total: int, preview: Preview | None) -> None:
        moves.append((done, total))
        if preview is not None:
            shapes.add(tuple(preview().shape))

    given = {"scale": 16.0, "fidelity": 1.0, "plan": MemoryPlan(6, 8), **FAST}
    upscale(mini, picture(6, 14), progress=progress, **given)
    assert {total for _, total in moves} == {moves[-1][0]}
    assert moves == sorted(moves)
    assert shapes == {(24, 56, 3), (96, 224, 3)}
    for at in range(0, len(moves), max(1, len(moves) // 4)):
        calls = iter(range(len(moves)))

        def stop(done: int, total: int, preview: Preview | None, at: int = at, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise StopError

        with pytest.raises(StopError):
            upscale(mini, picture(6, 14), progress=stop, **given)
        assert next(calls, at + 1) == at + 1, "nothing comes after it"


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_scale_1_and_little_more_draw_the_finest_detail_anew(bundled: InfDiT, scale: float) -> None:
    image = F.avg_pool2d(picture(32, 43).movedim(-1, 1), 3, 1).movedim(1, -1)
    result = upscale(bundled, image, scale)
    assert result.shape[1:3] == (math.floor(30 * scale + 0.5), math.floor(41 * scale + 0.5))
    small = F.interpolate(result.movedim(-1, 1), (30, 41), mode="bicubic", antialias=True).movedim(1, -1)
    assert (small - image).abs().mean() < 0.05, "the same picture"


# ---- alpha


def test_alpha_is_lanczos_and_colour_has_no_fringe(bundled: InfDiT) -> None:
    """A red disc on transparent black: every visible pixel of the result is red."""
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    alpha = (((rows - 12) ** 2 + (columns - 12) ** 2) < 64).float()
    image = torch.stack((alpha * 0.9, alpha * 0.1, alpha * 0.1, alpha), -1)[None]
    result = upscale(bundled, image, 4.0)
    lanczos = np.array(Image.fromarray(alpha.numpy()).resize((96, 96), Image.Resampling.LANCZOS)).clip(0, 1)
    np.testing.assert_allclose(result[0, ..., 3].numpy(), lanczos, atol=1e-6)
    visible = result[0][result[0, ..., 3] > 0.02]
    assert (visible[:, 0] - 0.9).abs().max() < 0.1
    assert visible[:, 1:3].max() < 0.2
    dark = upscale(bundled, image[..., :3], 4.0)[0][result[0, ..., 3] > 0.02]
    assert (dark[:, 0] - 0.9).abs().max() > 0.3, "left as it is, black bleeds in"


def test_a_picture_without_a_visible_pixel_in_a_batch(bundled: InfDiT) -> None:
    """It stays as it is, whatever the others are: in colours, and so in what CLIP is told."""
    image = picture(12, 10, channels=4, batch=3)
    image[:, :4, :, 3] = 0
    image[1, ..., 3] = 0
    colour = visible_colour(image)
    assert colour.isfinite().all()
    assert torch.equal(colour[1], image[1, ..., :3].movedim(-1, 0))
    for i in (0, 2):
        assert torch.equal(colour[i : i + 1], visible_colour(image[i : i + 1]))
    assert upscale(bundled, image, 2.0).isfinite().all()


def test_fill_transparent() -> None:
    rgb, alpha = torch.zeros(1, 3, 5, 7), torch.zeros(1, 1, 5, 7)
    rgb[..., 2, 1], alpha[..., 2, 1] = 0.6, 0.25
    torch.testing.assert_close(fill_transparent(rgb, alpha), torch.full_like(rgb, 0.6))
    rgb[:, 0, 2, 5], alpha[..., 2, 5] = 1.0, 1.0
    filled = fill_transparent(rgb, alpha)
    assert torch.equal(filled[..., 2, 1], rgb[..., 2, 1])
    assert filled[0, 0].min() >= 0.59
    assert filled[0, 1].max() <= 0.61
    nothing = torch.zeros(1, 3, 4, 4)
    assert torch.equal(fill_transparent(nothing, torch.zeros(1, 1, 4, 4)), nothing)


# ---- CLIP


def test_clip_embedding(make_model: MakeModel, caplog: pytest.LogCaptureFixture, mini: InfDiT) -> None:
    model, _ = make_model(dtype=torch.float32, vector_dim=8)
    image = picture(8, 8, batch=2)
    with caplog.at_level("WARNING"):
        without = upscale(model, image, **FAST)
        upscale(model, image, **FAST)
    assert [record.getMessage() for record in caplog.records] == [
        "no CLIP embedding for a model that was trained with one: it runs with zeros in its place"
    ]
    assert torch.equal(upscale(model, image, clip_embedding=torch.zeros(1, 8), **FAST), without)
    vectors = F.normalize(torch.randn((2, 8), generator=torch.Generator().manual_seed(0)), dim=1)
    result = upscale(model, image, clip_embedding=vectors, **FAST)
    assert (result - without).abs().max() > 1e-3
    assert torch.equal(upscale(model, image, clip_embedding=vectors[:1], **FAST)[0], result[0])
    with pytest.raises(ValueError, match=r"must be \(2 or 1, 8\)"):
        upscale(model, image, clip_embedding=torch.zeros(3, 8))
    caplog.clear()
    with caplog.at_level("WARNING"):
        upscale(mini, picture(4, 4), clip_embedding=torch.zeros(1, 768), **FAST)
    assert "no CLIP input" in caplog.text


# ---- progress


@pytest.mark.parametrize(("steps", "width", "batch"), [(3, 40, 2), (1, 150, 1)])
def test_progress(mini: InfDiT, steps: int, width: int, batch: int) -> None:
    calls, previews = [], []

    def progress(done: int, total: int, preview: object) -> None:
        calls.append((done, total))
        if preview is not None:
            previews.append(preview())

    image, plan = picture(20, width, batch=batch), MemoryPlan(6, 8)
    upscale(mini, image, 4.0, steps=steps, sampler="heun", progress=progress, plan=plan)
    blocks, rows = 3 * -(-width // 8), 3 * 32
    total = (rows + (2 * steps - 1) * mini.config.num_layers * blocks) * batch
    assert {t for _, t in calls} == {total}
    dones = [done for done, _ in calls]
    assert dones == sorted(dones)
    assert rows + 8 in dones, "between the layers of the first chunk"
    assert dones[-1] == total
    assert len(previews) >= steps * batch, "after each step, and within steps if those take long"
    assert previews[0].shape == ((80, 160, 3) if width == 40 else (68, 512, 3))
    assert previews[0].dtype == torch.uint8


def test_an_exception_out_of_progress_leaves_at_once_and_holds_nothing(mini: InfDiT) -> None:
    class StopError(Exception):
        pass

    calls = 0

    def progress(done: int, total: int, preview: object) -> None:
        nonlocal calls
        calls += done > 96  # rows, which are prepared first
        if calls == 4:
            raise StopError

    held: list[weakref.ref] = []
    original = infdit.uniba.KVRing.keep

    def keep(self: object, chunk: object, k: torch.Tensor, x: torch.Tensor, *values: torch.Tensor) -> object:
        held.extend((weakref.ref(k), weakref.ref(x)))
        return original(self, chunk, k, x, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infdit.uniba.KVRing, "keep", keep)
        with pytest.raises(StopError):
            upscale(mini, picture(20, 150), 4.0, progress=progress, plan=MemoryPlan(6, 8), **FAST)
    assert calls == 4
    assert len(held) == 2 * 4
    gc.collect()
    assert not any(ref() is not None for ref in held)


@pytest.mark.parametrize(("h", "w"), [(20, 100), (100, 20)])
def test_the_live_picture_fills_up_block_by_block(
    bundled: InfDiT, h: int, w: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the only step: blocks as they will be, over the plain enlargement, each once and for all."""
    monkeypatch.setattr(import_module("infdit.progress"), "PREVIEW_DELAY", 0)
    monkeypatch.setattr(import_module("infdit.progress"), "PREVIEW_SHARE", 1e9)
    image, seen = picture(h, w), []

    def progress(done: int, total: int, preview: Preview | None) -> None:
        if preview is not None:
            seen.append(preview().float() / 255)

    result = upscale(bundled, image, progress=progress, plan=MemoryPlan(6, 4))[0]
    plain = upscale(bundled, image, denoise=0.0)[0]
    blocks = [(slice(r, r + 32), slice(c, c + 32)) for r in range(0, 4 * h, 32) for c in range(0, 4 * w, 32)]
    there: set[int] = set()
    for shown in seen:
        done = {i for i, at in enumerate(blocks) if (shown[at] - result[at]).abs().max() < 0.6 / 255}
        assert all((shown[blocks[i]] - plain[blocks[i]]).abs().max() < 0.6 / 255 for i in {*range(len(blocks))} - done)
        assert there < done
        there = done
    assert len(there) == len(blocks)
    assert len(seen) == math.ceil(len(blocks) / 4)


def test_live_pictures_within_a_step_take_little_of_the_time(mini: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which everything takes a second, and a picture ten."""
    now, within = 0.0, 0

    def progress(done: int, total: int, preview: Preview | None) -> None:
        nonlocal now, within
        now += 1 if preview is None else 10
        within += preview is not None

    monkeypatch.setattr(import_module("infdit.progress").time, "monotonic", lambda: now)
    upscale(mini, picture(100, 100), progress=progress, plan=MemoryPlan(6, 1), **FAST)
    within -= 1  # the whole one, after the step
    assert 0 < 10 * within <= 0.02 * now


@pytest.mark.slow
def test_live_pictures_take_a_fiftieth_of_the_time(bundled: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is done for them, in a run that shows them; made into JPEG, as a node sends them."""
    image, taken, shown, original = picture(192, 192), [], [], Watcher.painted

    def progress(done: int, total: int, preview: Preview | None) -> None:
        if preview is not None:
            Image.fromarray(preview().numpy()).save(io.BytesIO(), "JPEG")
            shown.append(done)

    def painted(self: Watcher, *given: object) -> None:
        began = time.process_time()
        original(self, *given)  # type: ignore[arg-type]
        taken.append(time.process_time() - began)

    monkeypatch.setattr(Watcher, "painted", painted)
    upscale(bundled, image, progress=progress)  # the first run of a process is slower
    for kept in taken, shown:
        kept.clear()
    began = time.process_time()
    upscale(bundled, image, progress=progress)
    whole = time.process_time() - began
    print(f"{len(shown)} live pictures take {sum(taken) / whole:.1%} of {whole:.1f} s")
    assert len(shown) > 2, "within the step too"
    assert sum(taken) < 0.03 * whole  # what clocks differ by


def test_a_large_picture_can_be_stopped_at_any_time(mini: InfDiT) -> None:
    """Preparing, drawing of noise, cropping and transparency, without what lies between."""
    doing, gaps, moved, last = Report(), {}, [], time.process_time()

    def progress(done: int, total: int, preview: Preview | None) -> None:
        nonlocal last
        now = time.process_time()
        gaps[doing.doing] = max(gaps.get(doing.doing, 0), now - last)
        moved.append(done)
        last = now

    image = torch.rand((1, 1143, 1000, 4), generator=torch.Generator().manual_seed(0)).round(decimals=1)
    upscale(mini, image, denoise=0.0, progress=progress, report=doing)
    assert set(gaps) == {"preparing", "sampling", "finishing"}
    assert max(gaps.values()) < 0.75  # seconds
    assert len(set(moved)) > 30, "the bar moves meanwhile"


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.99}, "at least 1 and at most 16"),
        ({"scale": 16.01}, "at most 16"),
        ({"scale": float("nan")}, "at least 1"),
        ({"size": (129, 8)}, "height 129"),
        ({"size": (32, 7)}, "width 7"),
        ({"fidelity": 1.01}, "fidelity 1.01 must be between 0"),
        ({"fidelity": float("nan")}, "fidelity nan"),
        ({"sampler": "ddim"}, "heun, euler, dpmpp_2m"),
        ({"steps": 0}, "at least 1"),
        ({"sigma_max": -1.0}, "sigma_max"),
        ({"denoise": 1.5}, "between 0"),
        ({"denoise": [1, 1.5], "scale": 5}, "denoise 1.5 must be between 0"),
        ({"denoise": [1, 0.5]}, "denoise has 2 values, and this size takes 1 pass: give one, or one a pass"),
        ({"denoise": []}, "denoise has 0 values"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"image": torch.zeros(8, 8, 3)}, "must be"),
        ({"image": torch.zeros(1, 8, 8, 2)}, "must be"),
        ({"image": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}, "floating point"),
        ({"image": torch.zeros(0, 8, 8, 3)}, "empty"),
        ({"image": torch.zeros(1, 0, 8, 3)}, "empty"),
        ({"image": torch.full((1, 8, 8, 3), float("nan"))}, "not finite"),
        ({"image": torch.full((1, 8, 8, 3), 255.0)}, "from 255 to 255 and must be of 0..1: divide"),
        ({"image": picture(8, 8) * 2 - 1.6}, "and must be of 0..1"),
    ],
    ids=str,
)
def test_refusals_are_one_sentence(mini: InfDiT, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        upscale(mini, **{"image": picture(8, 8)} | change)
    assert "\n" not in str(error.value)


def test_slight_overshoot_is_clipped(mini: InfDiT) -> None:
    image = picture(8, 8) * 1.6 - 0.3
    assert image.min() < 0
    assert image.max() > 1
    assert torch.equal(upscale(mini, image, **FAST), upscale(mini, image.clamp(0, 1), **FAST))


def test_inputs_are_not_changed_and_half_precision_is_taken(mini: InfDiT) -> None:
    image = picture(8, 8, channels=4).half()
    image[0, :4, :, 3] = 0
    before = image.clone()
    assert upscale(mini, image, **FAST).dtype == torch.float32
    assert torch.equal(image, before)
