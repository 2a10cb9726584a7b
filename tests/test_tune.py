"""`tune` in the shell: what it leaves beside a model, and what `upscale` makes of that."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import dense
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import infdit
from infdit import tune
from infdit.__main__ import main
from infdit.checkpoint import read_checkpoint
from infdit.presets import PRESETS, sampling
from infdit.samplers import karras_sigmas
from infdit.sidecar import schedules_path
from training.export import restate

PAPER = infdit.SamplingDefaults()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "random.safetensors"
    metadata = {"config": json.dumps({"position_period": 128}), "defaults": json.dumps(asdict(PAPER))}
    save_file(dense.random_weights(0, layers=1, dtype=torch.float32), path, metadata)
    infdit.convert(path, path)  # states a SHA-256
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((12, 9)).convert("RGB").save(path)
    return path


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "REFERENCE", 16)


@pytest.fixture
def _two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("infdit.tune", "infdit.cli.tune"):
        monkeypatch.setattr(f"{module}.ROUNDS", 2)


def tuned(model: Path, picture: Path, *more: str) -> int:
    return main(["tune", str(picture), "--model", str(model), "--crop", "8", "--device", "cpu", *more])


@pytest.mark.usefixtures("_two_rounds")
def test_it_fits_writes_and_upscale_takes_it_up(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tuned(model, picture, "--evaluations", "3,5") == 0
    (fits,) = json.loads(schedules_path(model).read_text())["fits"].values()
    assert [len(fit["levels"]) for fit in fits] == [3, 5]
    assert all(fit["distance"] <= fit["karras"] for fit in fits)
    defaults = read_checkpoint(model).defaults
    assert torch.equal(sampling(defaults, "draft", 5).sigmas, torch.tensor([*fits[1]["levels"], 0.0]))
    assert sampling(defaults).sampler == "heun", "without a preset nothing changes"
    asked = ["upscale", str(picture), "-o", str(tmp_path / "out.png"), "--model", str(model), "--device", "cpu"]
    assert main([*asked, "--preset", "draft"]) == 0
    told = r"preset: draft, noise levels tuned to this model, 8 evaluations, about \d+ \w+ foretold; "
    said = capsys.readouterr()
    assert re.search(told, said.out)
    assert re.search(r"5 evaluations: +100%", said.err), "a bar"
    infdit.convert(model, tmp_path / "copy.safetensors")
    assert read_checkpoint(tmp_path / "copy.safetensors").defaults == defaults, "a copy has them in its metadata"


def fits_of(model: Path, picture: Path, counts: Sequence[int]) -> list[dict]:
    """What is found for them, from nothing."""
    schedules_path(model).unlink(missing_ok=True)
    assert tuned(model, picture, "--evaluations", ",".join(map(str, counts)), "--dtype", "fp32") == 0
    (fits,) = json.loads(schedules_path(model).read_text())["fits"].values()
    assert [len(fit["levels"]) for fit in fits] == [*counts]
    return fits


@pytest.fixture
def steps_file(tmp_path: Path) -> Path:
    """The bundled model, told to take several steps from noise, as in docs/sampling.md."""
    path = tmp_path / "steps.safetensors"
    restate(infdit.checkpoint.BUNDLED["mini"], path, infdit.SamplingDefaults(4, "dpmpp_2m", 0.03, 0.01))
    return path


def test_the_bundled_weights_are_nearer_than_by_karras_and_the_same_twice(
    steps_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as is said, by `upscale`, which knows nothing of fits."""
    for module in ("infdit.tune", "infdit.cli.tune"):
        monkeypatch.setattr(f"{module}.ROUNDS", 1)
    pixels = (76 + 100 * torch.rand((1, 8, 8, 3), generator=torch.Generator().manual_seed(1))).round()  # never clipped
    Image.fromarray(pixels[0].byte().numpy()).save(tmp_path / "texture.png")
    fits = fits_of(steps_file, tmp_path / "texture.png", (5, 7))
    assert fits == fits_of(steps_file, tmp_path / "texture.png", (5, 7))
    model = infdit.load_model(steps_file, torch.float32, "cpu")

    def ends(sampler: str, sigmas: torch.Tensor) -> torch.Tensor:
        return 2 * infdit.upscale(model, pixels / 255, sampler=sampler, sigmas=sigmas)

    low, top = model.defaults.sigma_min, model.defaults.sigma_max
    goal = ends("heun", karras_sigmas(tune.REFERENCE, low, top))
    for fit in fits:
        count = len(fit["levels"])
        for levels, said in (([*fit["levels"], 0.0], fit["distance"]), (karras_sigmas(count, low, top), fit["karras"])):
            off = (ends("dpmpp_3m", torch.as_tensor(levels)) - goal).square().mean().sqrt().item()
            assert off == pytest.approx(said, rel=0.02)
        assert fit["distance"] < 0.9 * fit["karras"]


@pytest.mark.slow
def test_every_number_of_evaluations_is_as_good_as_karras(steps_file: Path, picture: Path) -> None:
    fits = fits_of(steps_file, picture, range(5, 21))
    assert all(fit["distance"] <= fit["karras"] for fit in fits)
    assert sum(fit["distance"] < 0.9 * fit["karras"] for fit in fits) > 4
    assert fits_of(steps_file, picture, range(5, 9)) == fits[:4]


@pytest.mark.usefixtures("_two_rounds")
def test_it_goes_on_where_it_was_stopped(model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds the same twice."""
    assert tuned(model, picture, "--evaluations", "3,4") == 0
    whole = schedules_path(model).read_text()
    schedules_path(model).unlink()
    improve, done = tune.Fitting.improve, []

    def stopped(self: tune.Fitting, fit: tune.Fit) -> tune.Fit:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(fit)
        return improve(self, fit)

    monkeypatch.setattr(tune.Fitting, "improve", stopped)
    assert tuned(model, picture, "--evaluations", "3,4") == 130
    assert schedules_path(model).exists()
    monkeypatch.setattr(tune.Fitting, "improve", improve)
    assert tuned(model, picture, "--evaluations", "3,4") == 0
    assert schedules_path(model).read_text() == whole


def test_there_is_nothing_to_tune_in_a_model_of_one_step(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(picture), "--model", "mini"]) == 2
    assert "nothing to tune" in capsys.readouterr().err


def test_pictures_that_are_too_small_are_refused(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(picture), "--model", str(model)]) == 2
    assert "smaller --crop" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"fits": 3}', '{"fits": {"a": [{"levels": [1, 2], "distance": 1, "karras": 1}]}}', "\0"]
)
def test_a_file_that_is_none_is_told(model: Path, text: str) -> None:
    schedules_path(model).write_text(text)
    with pytest.raises(infdit.CheckpointError, match="delete it, or tune again"):
        read_checkpoint(model)


def test_levels_of_another_model_are_not_taken(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit = {"levels": [40, 1], "distance": 1, "karras": 1}
    schedules_path(model).write_text(json.dumps({"model": "another", "fits": {"a": [fit]}}))
    assert read_checkpoint(model).defaults == PAPER
    assert "fitted to another model" in caplog.text


def test_metadata_with_levels_that_rise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(dense.random_weights(0, layers=1), path, {"defaults": json.dumps({"tuned": [[1.0, 2.0]]})})
    with pytest.raises(infdit.CheckpointError, match="falling numbers"):
        read_checkpoint(path)


def test_presets_of_the_bundled_model_change_not_one_bit() -> None:
    image = torch.rand((1, 9, 8, 3), generator=torch.Generator().manual_seed(0))
    mini = infdit.load_model("mini", torch.float32, "cpu")
    plain = infdit.upscale(mini, image)
    assert all(torch.equal(infdit.upscale(mini, image, preset=name), plain) for name in PRESETS)


def test_paper_is_the_published_default_to_the_bit(model: Path) -> None:
    image = torch.rand((1, 3, 4, 3), generator=torch.Generator().manual_seed(0))
    network = infdit.load_model(model, torch.float32, "cpu")
    found = infdit.upscale(network, image, preset="paper", seed=3)
    assert torch.equal(found, infdit.upscale(network, image, seed=3))
    assert not torch.equal(found, infdit.upscale(network, image, preset="balanced", seed=3))


def test_plan_foretells_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1024x1024", "--preset", "balanced", "--device", "cuda"]) == 0
    assert "13 evaluations (dpmpp_3m)" in capsys.readouterr().out
