"""The figures of `python -m benchmarks`: each against a closed form or arithmetic of its own, and one whole run."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infdit
from benchmarks import quality, scores
from benchmarks.__main__ import main
from benchmarks.quality import Scores, Settings, Thresholds
from infdit.model import InfDiT

ROOT = Path(__file__).parents[1]
SIDE = 64
X = np.arange(SIDE)[None, :] + np.zeros((SIDE, 1))  # column of each pixel
KEEPS = Scores(30, 0.8, 1, 1, 0.1, 0.3, 40, 1, 1, 1)  # passes everything beside BICUBIC
BICUBIC = Scores(30, 0.8, 0, 0, 0, 0.2, 40, 1.3, 1.3, 0)


def sine(cycles: int, amplitude: float = 10, phase: float = 0.3) -> np.ndarray:
    """A whole number of cycles across the picture; half Nyquist is SIDE/4."""
    return 100 + amplitude * np.sin(2 * np.pi * cycles * X / SIDE + phase)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(16, 235, shape)


def photograph(path: Path, size: tuple[int, int]) -> Path:
    """Smooth noise with an edge: something in every band."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) // 4 + 50  # nothing is clipped
    large[:, size[0] // 2 :] += 80
    Image.fromarray(large + rng.integers(0, 30, large.shape, dtype=np.uint8)).save(path)
    return path


# ---- the figures


def test_luma_is_bt_601() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]], np.uint8)
    expected = [16, 235, 81.481, 144.553, 40.966, 16 + 219 * 128 / 255]
    np.testing.assert_allclose(scores.luma(colours)[0], expected, atol=1e-3)


def test_weights_of_luma_and_the_border_are_written_down_once() -> None:
    """For training, benchmarks and reports alike."""
    files = [path for room in ("infdit", "benchmarks", "training") for path in (ROOT / room).rglob("*.py")]
    weights = [path.name for path in files if re.search(r"0?\.299\b|65\.481,", path.read_text("utf-8"))]
    borders = [path.name for path in files if re.search(r"^_?BORDER =", path.read_text("utf-8"), re.MULTILINE)]
    assert (weights, borders) == (["seams.py"], ["scores.py"])


@pytest.mark.parametrize("offset", [1, 5, 255])
def test_psnr_of_a_constant_offset(offset: int) -> None:
    a = np.zeros((20, 30))
    assert scores.psnr(a, a + offset) == pytest.approx(20 * math.log10(255 / offset))
    assert scores.psnr(a, a) == math.inf


def test_psnr_of_bytes_does_not_wrap_and_leaves_out_the_border() -> None:
    a, b = np.full((12, 12), 10, np.uint8), np.full((12, 12), 20, np.uint8)
    assert scores.psnr(a, b) == scores.psnr(b, a) == pytest.approx(20 * math.log10(25.5))
    b[4:8, 4:8] = 11
    assert scores.psnr(a, b, border=4) == pytest.approx(20 * math.log10(255))


def test_ssim_is_the_double_loop() -> None:
    a, b = random(1, 17, 14), random(2, 17, 14)
    b = 0.7 * a + 0.3 * b
    distance = np.arange(11) - 5
    weights = np.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(17 - 10):
        for j in range(14 - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = 6.5025, 58.5225
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert scores.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-12)
    assert scores.ssim(np.pad(a, 4), np.pad(b, 4, constant_values=9), border=4) == pytest.approx(np.mean(values))
    assert scores.ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert scores.ssim(a, b) < 0.95


def test_ssim_of_two_constants() -> None:
    a, b = np.full((12, 12), 100.0), np.full((12, 12), 120.0)
    assert scores.ssim(a, b) == pytest.approx((2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025))


@pytest.mark.parametrize(("cycles", "share"), [(1, 0), (8, 0), (14, 0), (18, 1), (24, 1), (30, 1)])
def test_energy_is_that_of_sines_above_half_nyquist(cycles: int, share: float) -> None:
    for y in (sine(cycles), sine(cycles).T):
        assert scores.energy(y) == pytest.approx(share * 10**2 / 2, rel=0.01, abs=1e-9)
    both = scores.energy(np.stack([sine(cycles), 2 * sine(cycles)]))
    assert both == pytest.approx([share * 50, share * 200], rel=0.01, abs=1e-9)


def test_energy_counts_by_radius() -> None:
    diagonal = 100 + 10 * np.sin(2 * np.pi * (13 * X + 13 * X.T) / SIDE)  # 13 cycles on each axis: radius 18.4 of 16
    assert scores.energy(diagonal) == pytest.approx(50, rel=0.01)


def test_energy_ignores_that_the_edges_do_not_fit() -> None:
    assert scores.energy(X * 2.0 + X.T) < 1e-3  # a ramp: as a periodic picture it has a step of 128


def test_energy_ratio() -> None:
    assert scores.energy_ratio(sine(24, 5), sine(28, 10)) == pytest.approx(0.25, rel=0.01)
    assert scores.energy_ratio(sine(24) + sine(4, 50), sine(24)) == pytest.approx(1, rel=0.01)
    assert scores.energy_ratio(np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))) == 0


def test_energy_ratio_over_nothing_is_over_rounding() -> None:
    colours = np.random.default_rng(0).uniform(0, 255, (256, 256, 3))
    rounding = (np.rint(colours) - colours) @ [65.481 / 255, 128.553 / 255, 24.966 / 255]
    assert scores.energy_ratio(rounding, np.zeros((256, 256))) == pytest.approx(1, rel=0.05)


def test_correlation_knows_sign_and_phase() -> None:
    low = sine(4, 50)
    for b, expected in (
        (sine(24) + low, 1),
        (-sine(24), -1),
        (sine(24, 99), 1),
        (sine(24, phase=0.3 + math.pi / 2), 0),
        (sine(28), 0),
        (np.zeros_like(low), 0),
    ):
        assert scores.correlation(sine(24), b) == pytest.approx(expected, abs=1e-3)
    half = sine(24) + sine(29)
    assert scores.correlation(sine(24), half) == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert scores.correlation(sine(12), sine(12), scores.INPUT_NYQUIST) == pytest.approx(1)


def test_flattest_tiles() -> None:
    y = random(3, 70, 90)
    y[16:32, 32:48] = 50
    y[48:64, 0:16] *= 0.1
    found = scores.flattest(y, 0.1)
    assert list(found) == [1 * 5 + 2, 3 * 5 + 0]  # of 4 × 5 whole tiles
    np.testing.assert_array_equal(scores.tiles(y)[found[1]], y[48:64, 0:16])
    assert len(scores.flattest(y)) == 4


@pytest.mark.parametrize("period", [4, 16])
def test_seam_of_steps_at_every_line(period: int) -> None:
    stairs = np.floor(X / period) * 3 + np.floor(X.T / period) * 3
    assert scores.seam(stairs, period) == math.inf
    assert scores.seam(stairs + X + X.T, period) == pytest.approx(4)  # 1 everywhere, 4 across a line
    assert scores.seam(stairs[2:, 1:] + X[2:, 1:], period) < 1.01  # another place is another grid
    assert scores.seam(X, period) == pytest.approx(1, abs=0.01)
    one_way = np.floor(X / period) * 3 + X
    assert scores.seam(one_way + 2 * X.T, period) == pytest.approx((4 + 2) / (1 + 2))  # across 4, 2; elsewhere 1, 2


def test_seam_of_nothing() -> None:
    assert scores.seam(np.zeros((16, 16)), 4) == 1
    assert math.isnan(scores.seam(random(0, 16, 16), 32))  # one block: no line
    assert scores.seam(random(0, 512, 512), 4) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("amount", [0.5, 40.0])
def test_blue_noise_is_what_was_asked(amount: float) -> None:
    noise = scores.blue_noise((96, 64), amount, np.random.default_rng(0))
    assert scores.energy(noise) == pytest.approx(amount)
    assert (noise**2).mean() == pytest.approx(amount, rel=0.1)  # all of it is up there
    power = np.abs(np.fft.fft2(noise)) ** 2
    fy, fx = np.fft.fftfreq(96)[:, None], np.fft.fftfreq(64)
    radius = np.sqrt(fy**2 + fx**2)
    assert power[radius <= 0.25].sum() < 1e-20 * power.sum()
    lower, upper = (power[(radius > r) & (radius < r + 0.1)].mean() for r in (0.25, 0.55))
    assert upper / lower == pytest.approx(0.6 / 0.3, rel=0.15)


# ---- the judgement


def test_what_keeps_all_limits_passes() -> None:
    assert quality.failures(KEEPS, BICUBIC, Thresholds()) == []
    assert len(quality.failures(BICUBIC, BICUBIC, Thresholds())) == 3


@pytest.mark.parametrize(
    ("column", "passes", "fails"),
    [
        ("psnr", 28.51, 28.49),
        ("energy", 0.61, 0.59),
        ("energy", 1.19, 1.21),
        ("flat_energy", 1.99, 2.01),
        ("correlation", 0.0, -0.001),
        ("consistency", 38.01, 37.99),
        ("patch_seam", 1.02, 1.04),
        ("block_seam", 1.02, 1.04),
    ],
)
def test_each_limit(column: str, passes: float, fails: float) -> None:
    assert quality.failures(replace(KEEPS, **{column: passes}), BICUBIC, Thresholds()) == []
    assert len(quality.failures(replace(KEEPS, **{column: fails}), BICUBIC, Thresholds())) == 1
    assert quality.failures(replace(KEEPS, **{column: fails, "psnr": math.nan}), BICUBIC, Thresholds()) == [] or (
        column not in ("psnr", "energy")
    )


def test_a_model_that_is_certain_must_win_decibels_and_may_be_soft() -> None:
    soft = replace(KEEPS, psnr=BICUBIC.psnr + 0.6, energy=0.1, flat_energy=0.1, patch_seam=1.11, block_seam=1.07)
    soft = replace(soft, consistency=BICUBIC.consistency + 1)
    assert quality.failures(soft, BICUBIC, quality.CERTAIN) == []
    for column, value in {"psnr": BICUBIC.psnr, "patch_seam": 1.13, "block_seam": 1.09, "flat_energy": 1.3}.items():
        assert len(quality.failures(replace(soft, **{column: value}), BICUBIC, quality.CERTAIN)) == 1, column


def test_halved_pictures_lose_the_grid_of_a_jpeg(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grid = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(grid).save(tmp_path / "a.png")
    halved = quality._case(tmp_path / "a.png", Settings(halve=True), False).low
    assert np.array_equal(halved, grid[::2, ::2])


def test_mean_leaves_out_what_cannot_be_told() -> None:
    row = quality.mean([Scores(psnr=1, energy=4), Scores(psnr=math.inf), Scores(energy=5)])
    assert (row.psnr, row.energy) == (math.inf, 4.5)
    assert math.isnan(row.ssim)


# ---- whole runs


def table(text: str) -> dict[str, dict[str, str]]:
    """The last table of a report: cells by row and column."""
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("mean of"))
    heads = lines[start][22:].replace("corr ¼", "wide").split()
    rows = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        rows[line[:22].strip()] = dict(zip(heads, line[22:].split(), strict=True))
    return rows


def test_command(tmp_path: Path, noisy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph(tmp_path / "a.png", (72, 67))
    options = ["--model", str(noisy_file), "--steps", "1,2", "--sampler", "heun", "--sigma-max", "0.03"]
    options += ["--device", "cpu", "--each"]
    assert main(["--quality", str(tmp_path), *options]) == 0
    out, err = capsys.readouterr()
    assert "100%" in err
    assert "a.png" in out
    rows = table(out)
    assert list(rows) == ["original", "bicubic", "Lanczos", "bicubic + noise", "1 step", "2 steps"]
    perfect = ["inf", "1.0000", "1.000", "1.000", "1.000", "1.000", "inf", "1.000", "1.000", "-"]
    assert [value for head, value in rows["original"].items() if head != "LPIPS"] == perfect
    assert rows["original"].get("LPIPS", "0.000") == "0.000"  # it is left out without the package
    assert float(rows["bicubic + noise"]["energy"]) == pytest.approx(float(rows["2 steps"]["energy"]), rel=0.05)
    verdicts = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith(("original  ", "bicubic  ")))
    assert verdicts["original"] == "passes"
    assert verdicts["bicubic"].startswith("fails: energy 0.")
    assert "bicubic + noise       fails: " in out

    with Image.open(tmp_path / "a.png") as image:  # Pillow's own way round, without the table's code
        original = image.convert("RGB").crop((0, 0, 64, 64))
    low = original.resize((16, 16), Image.Resampling.BICUBIC)
    large = low.resize((64, 64), Image.Resampling.BICUBIC)
    error = (np.array(original, float) - np.array(large, float)) @ [65.481, 128.553, 24.966] / 255
    assert rows["bicubic"]["PSNR"] == f"{10 * np.log10(255**2 / (error[4:-4, 4:-4] ** 2).mean()):.2f}"
    error = np.array(large.resize((16, 16), Image.Resampling.BICUBIC), float) - np.array(low, float)
    assert rows["bicubic"]["LR"] == f"{10 * np.log10(255**2 / (error**2).mean()):.2f}"


def test_the_row_is_what_upscale_gives(tmp_path: Path, noisy_mini: InfDiT) -> None:
    """One picture, run by hand: the model's row is that of its own picture at the settings given."""
    path = photograph(tmp_path / "a.png", (64, 64))
    model = noisy_mini
    text = "\n".join(quality.report(path, model, Settings((2,), "euler", 0.1, seed=5)))
    original = np.array(Image.open(path))
    low = np.array(Image.open(path).resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255
    result = infdit.upscale(model, torch.from_numpy(low)[None], steps=2, sampler="euler", sigma_max=0.1, seed=5)
    a, b = scores.luma((result[0] * 255).round().to(torch.uint8).numpy()), scores.luma(original)
    row = {head: float(cell) for head, cell in table(text)["2 steps"].items()}
    assert row["PSNR"] == pytest.approx(scores.psnr(a, b, 4), abs=0.01)
    tiles = [(a[i : i + 16, j : j + 16], b[i : i + 16, j : j + 16]) for i in range(0, 64, 16) for j in range(0, 64, 16)]
    flat = sorted(tiles, key=lambda pair: pair[1].var())[:4]  # a fifth of 16, and a bit
    expected = sum(float(scores.energy(p)) for p, _ in flat) / sum(float(scores.energy(q)) for _, q in flat)
    assert row["flat"] == pytest.approx(expected, abs=6e-4)  # three decimals are printed
    assert row["patch"] == pytest.approx(scores.seam(a, 4) / scores.seam(b, 4), abs=0.01)
    assert row["block"] == pytest.approx(scores.seam(a, 32) / scores.seam(b, 32), abs=0.01)


def test_presets_are_rows_beside_where_the_ode_leads(
    tmp_path: Path, noisy_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "REFERENCE", 30)
    path = photograph(tmp_path / "a.png", (32, 32))
    assert main(["--quality", str(path), "--presets", "--model", str(noisy_file), "--sigma-max", "0.5"]) == 0
    rows = table(capsys.readouterr().out)
    names = ["heun, 100 steps", "paper (39)", "balanced (13)", "draft (8)"]
    assert list(rows)[-4:] == names
    far = [float(rows[name]["ODE"]) for name in names]
    assert far[0] == 0 < far[1] < far[3]
    assert all(rows[name]["ODE"] == "-" for name in ("bicubic", "bicubic + noise"))
    low = Image.open(path).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(low, np.float32) / 255)[None]
    model = infdit.load_model(noisy_file, device="cpu")
    draft = infdit.upscale(model, image, sigma_max=0.5, preset="draft")
    exact = infdit.upscale(model, image, sigma_max=0.5, steps=30, sampler="heun")
    assert far[3] == pytest.approx(2 * (draft - exact).square().mean().sqrt().item(), abs=1e-5)


def test_without_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        photograph(tmp_path / f"{name}.png", (80, 64))
    assert main(["--without-original", str(tmp_path), "--steps", "1", "--crop", "18", "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 pictures" in out
    rows = table(out)
    assert list(rows) == ["bicubic", "Lanczos", "bicubic + noise", "1 step (default)"]
    assert list(rows["bicubic"]) == ["energy", "LR", "patch", "block", "s"]
    assert float(rows["1 step (default)"]["LR"]) > 20
    assert rows["bicubic"]["energy"] == "1.000"
    assert rows["bicubic"]["block"] == rows["bicubic"]["patch"]  # what bicubic has of blocks, the input has


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quality", "missing"], "no such file"),
        (["--quality", "{}", "--crop", "31"], "31×31 is too small"),
        (["--quality", "{}", "--limit", "0"], "limit 0 must be at least 1"),
        (["--quality", "{}", "--sigma-max", "0"], "sigma_max 0"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    photograph(tmp_path / "a.png", (64, 64))
    assert main([*(argument.format(tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "1,,2", "x", "1,-2", ""])
def test_steps_that_are_none(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--quality", "x", "--steps", steps])
    assert exit_.value.code == 2
    assert "must be numbers of steps" in capsys.readouterr().err


@pytest.mark.parametrize(("folder", "expected"), [("kodak", 27.22), ("gb82", 31.55)])
def test_bicubic_on_known_pictures(folder: str, expected: float) -> None:
    """dB as others measured it: the arithmetic from the file to the figure."""
    given = os.environ.get("INFDIT_TEST_PICTURES")
    if given is None or not (Path(given) / folder).is_dir():
        pytest.skip(f"set INFDIT_TEST_PICTURES to a folder that has {folder}/")
    found = []
    for path in infdit.picture.find_pictures([Path(given) / folder]):
        case = quality._case(path, Settings(), True)
        assert case.original is not None
        height, width = case.original.shape[:2]
        enlarged = quality._resized(case.low, height, width)
        found.append(scores.psnr(scores.luma(enlarged), scores.luma(case.original), scores.BORDER))
    assert np.mean(found) == pytest.approx(expected, abs=0.005)
