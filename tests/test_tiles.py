"""Tiles that a teacher answers, drawings, and training on them; the teacher is a small network of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import infdit
from infdit.config import InfDiTConfig
from training import __main__ as command
from training import data, drawings, teachers, tiles
from training.gradients import Recipe
from training.loop import Trainer
from training.start import from_nothing

CONFIG = InfDiTConfig(num_layers=2, hidden_size=16, num_heads=2, block_size=16, vector_dim=0, position_period=64)
TINY = Recipe(crop=32, crops=4, parts=2, warmup=5, bridge=0.1, tiles=6)
SIDE = 4 * tiles.SIDE


def picture(seed: int, side: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (20, 20, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


PICTURES = [picture(i) for i in range(3)]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """ESRGAN's generator without blocks, that enlarges by nearest neighbours and blurs: known by closed form."""
    passing = torch.zeros(3, 3, 3, 3)
    passing[range(3), range(3), 1, 1] = 1
    weights = {f"c{i}.{kind}": passing.clone() if kind == "w" else torch.zeros(3) for i in range(6) for kind in "wb"}
    weights["c1.w"] *= 0  # the trunk's branch
    path = tmp_path / "teacher.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def answers(teacher: Path, tmp_path: Path) -> tiles.Answers:
    return tiles.Answers(teacher, tmp_path / "answers")


def test_tiles_follow_from_their_number_and_are_of_all_kinds() -> None:
    made = [tiles.tile(PICTURES, 0, i) for i in range(80)]
    for tile, again in zip(made[:8], (tiles.tile(PICTURES, 0, i) for i in range(8)), strict=True):
        assert np.array_equal(tile.low, again.low)
    assert not np.array_equal(made[0].low, tiles.tile(PICTURES, 1, 0).low)
    for tile in made:
        assert tile.low.shape == (tiles.SIDE, tiles.SIDE, 3)
        assert tile.low.dtype == np.uint8
        if tile.grey:
            assert (tile.low == tile.low[..., :1]).all()
        if tile.original is not None:
            assert tile.original.shape == (SIDE, SIDE, 3)
            again = F.avg_pool2d(torch.tensor(tile.original).movedim(-1, 0).float(), 4).movedim(0, -1)
            assert (again - torch.tensor(tile.low).float()).abs().mean() < 16, "the same picture, smaller"
    drawn, whole = sum(t.drawn for t in made), sum(t.original is not None for t in made)
    assert 4 < drawn < 24
    assert 35 < whole < 70
    assert 4 < sum(t.grey for t in made) < 24


def test_an_answer_is_the_teachers_and_is_asked_for_once(
    answers: tiles.Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = next(t for i in range(99) if not (t := tiles.tile(PICTURES, 0, i)).drawn and not t.grey)
    answer = answers(tile)
    assert np.array_equal(answer, tile.low.repeat(4, 0).repeat(4, 1)), "this teacher repeats pixels"
    monkeypatch.setattr(answers, "_ask", lambda low: pytest.fail("asked twice"))
    assert np.array_equal(answers(tile), answer)


def test_grey_tiles_have_grey_answers(answers: tiles.Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = next(t for i in range(99) if not (t := tiles.tile(PICTURES, 0, i)).drawn and t.grey)
    tinted = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    monkeypatch.setattr(answers, "_ask", lambda low: tinted)
    answer = answers(tile)
    assert (answer == answer[..., :1]).all()
    assert np.abs(answer[..., 0] - tinted @ [0.299, 0.587, 0.114]).max() <= 0.51


def test_what_is_learned(answers: tiles.Answers) -> None:
    """Answers, their mixture with the originals, and of drawings the originals alone; in place on the conditioning."""
    for share in (0.0, 0.25, 1.0):
        source = tiles.Tiles(PICTURES, answers, 9, share)
        for tile in (tiles.tile(PICTURES, 0, i) for i in range(30)):
            goal = source._goal(tile).astype(np.float64)
            if tile.drawn:
                assert np.array_equal(goal, tile.original)
            elif tile.original is not None:
                expected = (1 - share) * answers(tile).astype(np.float64) + share * tile.original.astype(np.float64)
                assert np.abs(goal - expected).max() < 1e-3
    crops = tiles.Tiles(PICTURES, answers, 9).draw(6, 64, (0, 100, 0))
    assert crops.hr.shape == crops.up.shape == (6, 3, 64, 64)
    assert crops.lr.shape == (6, 3, 16, 16)
    assert (F.avg_pool2d(crops.hr, 4) - crops.lr).abs().mean() < 0.02, "goal and conditioning show the same place"
    other = tiles.Tiles(PICTURES, answers, 9).draw(6, 64, (0, 100, 1))
    assert not torch.equal(crops.up, other.up)


def test_some_crops_are_to_become_twice_as_large(answers: tiles.Answers) -> None:
    crops = tiles.Tiles(PICTURES, answers, 9, doubled=0.5).draw(40, 64, (0, 100, 0))
    twice = crops.scale == 2
    assert 8 < twice.sum() < 32
    assert (crops.scale[~twice] == 4).all()
    assert crops.hr.shape == crops.up.shape == (40, 3, 64, 64)
    for cell, which in ((2, twice), (4, ~twice)):
        off = F.avg_pool2d(crops.hr, cell) - F.avg_pool2d(crops.up, cell)
        assert off[which].abs().mean() < 0.02, "goal and conditioning show the same place"
    missing = (crops.hr - crops.up).square().mean((1, 2, 3))
    assert missing[twice].mean() < 0.7 * missing[~twice].mean()


def test_the_first_steps_use_few_tiles(answers: tiles.Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()
    original = tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda p, s, i, damaged: asked.add(i) or original(p, s, i, damaged))
    source = tiles.Tiles(PICTURES, answers, 10**6)
    for part in range(40):
        source.draw(1, 32, (0, 0, part))
    assert max(asked) < tiles.FIRST
    for part in range(40):
        source.draw(1, 32, (0, 10**5, part))
    assert tiles.FIRST < max(asked) < tiles.FIRST + 10**5 * tiles.EACH_STEP


def test_some_tiles_are_damaged_on_their_way_down() -> None:
    pairs = [(tiles.tile(PICTURES, 0, i), tiles.tile(PICTURES, 0, i, damaged=0.5)) for i in range(60)]
    changed = [not np.array_equal(a.low, b.low) for a, b in pairs]
    assert 8 < sum(changed) < 40
    for (clean, damaged), different in zip(pairs, changed, strict=True):
        if clean.original is None:
            assert not different, "nothing to begin with"
        else:
            assert np.array_equal(clean.original, damaged.original)
            assert np.abs(clean.low.astype(int) - damaged.low).mean() < 25
        assert not damaged.grey or (damaged.low == damaged.low[..., :1]).all()


def test_answers_are_made_consistent(answers: tiles.Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a careless teacher says of colours and brightness is put right; what it adds above them stays."""
    tile = next(t for i in range(99) if (t := tiles.tile(PICTURES, 0, i)).original is None and not t.grey)
    fine = 20 * np.where(np.indices((SIDE, SIDE)).sum(0) % 2, 1, -1)[..., None]
    monkeypatch.setattr(
        answers, "_ask", lambda low: np.clip(low.repeat(4, 0).repeat(4, 1) * 0.7 + 40 + fine, 0, 255).astype(np.uint8)
    )
    goals = [tiles.Tiles(PICTURES, answers, 9, consistent=c)._goal(tile).astype(np.float32) for c in (False, True)]
    off = [np.abs(np.asarray(torch.nn.functional.interpolate(
        torch.from_numpy(g).movedim(-1, 0)[None], (tiles.SIDE, tiles.SIDE), mode="bicubic", antialias=True
    )[0].movedim(0, -1)) - tile.low).mean() for g in goals]  # fmt: skip
    assert off[1] < 0.2 * off[0]
    kept = [float((np.diff(g, axis=1) * np.diff(fine, axis=1)).mean()) for g in goals]
    assert kept[1] > 0.8 * kept[0]


def test_a_perceptual_term_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the mean difference in red, which is known."""

    class Red(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b)[:, 0].abs().mean((1, 2))

    monkeypatch.setattr("training.gradients.st_lpips", lambda network: Red())
    recipe = replace(TINY, precision="float32", ends=1.0, clean=1.0)
    source = data.Photographs(PICTURES)
    without, with_it = (
        Trainer(from_nothing(CONFIG, 0), replace(recipe, perceptual=p), source, 1).advance() for p in (0.0, 3.0)
    )
    expected = 0.0
    for part in range(recipe.parts):
        crops = source.draw(2, 32, (0, 0, part))
        skip = 0.25 / (0.1**2 + 0.25)  # a new model's F is 0
        expected += float((skip * crops.up - crops.hr)[:, 0].abs().mean()) / recipe.parts
    assert with_it - without == pytest.approx(3 * expected, rel=1e-4)


def test_a_perceptual_term_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.gradients.st_lpips", lambda network: None)
    with pytest.raises(ValueError, match="pip install stlpips-pytorch"):
        Trainer(from_nothing(CONFIG, 0), replace(TINY, perceptual=1.0), data.Photographs(PICTURES), 1)


def test_first_losses_with_a_teacher_repeat(teacher: Path, tmp_path: Path) -> None:
    """Whoever asks first, and whether the answers are there already."""
    losses = []
    for workers in (2, 1):
        source = tiles.Tiles(PICTURES, tiles.Answers(teacher, tmp_path / "both"), TINY.tiles)
        run = Trainer(from_nothing(CONFIG, 0), replace(TINY, rate=4e-3), source, workers)
        losses.append([run.advance() for _ in range(8)])
    assert losses[0] == losses[1]


def test_the_command_takes_a_teacher(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(("a_00", "b_00", "c")):
        Image.fromarray(PICTURES[i]).save(folder / f"{name}.png")
    options = "--layers 2 --width 16 --heads 2 --block 16 --crop 32 --crops 2 --parts 2 --hold-out 1 --bridge 0.1"
    run = [str(folder), *options.split(), "--workers", "2", "--device", "cpu", "--teacher", str(teacher)]
    out = tmp_path / "out"
    assert command.main([*run, "-o", str(out), "--steps", "2"]) == 0
    defaults = infdit.load_model(out / "last.safetensors", device="cpu").defaults
    assert (defaults.steps, defaults.sigma_max, defaults.start_noise, defaults.most_steps) == (1, 0.1, 0.0, 1)
    assert list((out / "answers" / teachers.digest(teacher)).glob("*.png"))
    assert not list(out.rglob("*.part"))
    assert command.main([*run, "-o", str(out), "--resume", "--steps", "3"]) == 0
    run[-1] = str(tmp_path / "nobody.safetensors")
    assert command.main([*run, "-o", str(tmp_path / "new"), "--steps", "1"]) == 2
    assert "nobody.safetensors" in capsys.readouterr().err


def test_drawings_are_clean_and_of_many_kinds() -> None:
    rng = np.random.default_rng(0)
    made = [drawings.draw(64, rng) for _ in range(60)]
    assert all(x.shape == (64, 64, 3) and x.dtype == np.uint8 for x in made)
    assert len({x.tobytes() for x in made}) > 50
    assert sum((x == x[..., :1]).all() for x in made) > 10, "many have no colour"
    flats = [x for x in made if (x == x[0, 0]).all()]
    assert flats, "some are one colour throughout"
