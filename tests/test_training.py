"""The training program on models of a few thousand parameters and pictures of noise and edges."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infdit
from benchmarks import scores
from infdit import Conditioning, MemoryPlan
from infdit.config import InfDiTConfig, SamplingDefaults
from infdit.denoiser import Denoiser
from infdit.rotary import rotary_turns, rotate
from training import __main__ as command
from training import data, degrade, validate
from training.attention import PlainAttention
from training.export import export
from training.export import main as export_command
from training.gradients import Recipe, _bridge, across, of_crops, periodic, unevenness
from training.grow import widen
from training.loop import Decay, Trainer
from training.optimizer import Optimizer, orthogonal
from training.start import from_nothing

CONFIG = InfDiTConfig(num_layers=2, hidden_size=16, num_heads=2, block_size=16, vector_dim=0, position_period=64)
TINY = Recipe(crop=32, crops=4, parts=2, warmup=5)


def picture(seed: int, side: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def trainer(recipe: Recipe = TINY, workers: int = 2) -> Trainer:
    return Trainer(from_nothing(CONFIG, recipe.seed), recipe, data.Photographs([picture(i) for i in range(3)]), workers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, name in enumerate(("a_00", "a_v1", "b_00", "b_11", "c")):
        Image.fromarray(picture(i)).save(pictures / f"{name}.png")
    return pictures


# ---- pictures


def test_photographs_are_held_out_whole() -> None:
    names = ("budgie_a-b_00", "budgie_a-b_31", "budgie_a-b_v0", "x_300dpi_v1", "x_300dpi_10", "pia19808_v0", "pia19808")
    assert {data.photograph(Path(f"{n}.jpg")) for n in names} == {"budgie_a-b", "x_300dpi", "pia19808"}
    paths = [Path(f"{n}.jpg") for n in names]
    for count in (1, 2):
        train, held = data.split(paths, count)
        assert sorted(train + held) == sorted(paths)
        assert len({data.photograph(p) for p in held}) == count
        assert not {data.photograph(p) for p in held} & {data.photograph(p) for p in train}
        assert data.split(paths[::-1], count)[1] == held[::-1]
    with pytest.raises(ValueError, match="hold out 1 to 2"):
        data.split(paths, 3)


def test_crops_follow_from_the_seed_and_lie_on_their_conditioning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(degrade, "DAMAGED", 0.0)
    photographs = data.Photographs([picture(i) for i in range(3)])
    for seed in range(8):
        crops, again = (photographs.draw(2, 32, (7, seed, 0)) for _ in range(2))
        other = photographs.draw(2, 32, (7, seed, 1))
        assert torch.equal(crops.hr, again.hr)
        assert torch.equal(crops.lr, again.lr)
        assert not torch.equal(crops.hr, other.hr)
        # the pictures are smooth, so every filter gives nearly the mean of 4×4 pixels
        assert (F.avg_pool2d(crops.hr, 4) - crops.lr).abs().mean() < 0.01
        assert (crops.up - crops.hr).abs().mean() < 0.01
        shifted = (crops.up - crops.hr.roll(2, -1))[..., 2:]
        assert shifted.abs().mean() > 2 * (crops.up - crops.hr).abs().mean(), "half a low-resolution pixel off"


def test_most_low_resolution_pictures_are_clean() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    undamaged = {degrade.clean(tile, r).tobytes() for r in degrade._FILTERS}
    rng = np.random.default_rng(1)
    made = [degrade.degrade(tile, rng) for _ in range(400)]
    assert all(x.shape == (16, 16, 3) and x.dtype == np.uint8 for x in made)
    assert 0.75 < sum(x.tobytes() in undamaged for x in made) / 400 < 0.9
    assert {x.tobytes() for x in made} >= undamaged


# ---- one step


def test_loss_is_plain_l2_on_the_network_output() -> None:
    """With one noise level for all crops, F by hand from D: F = (D − c_skip·x)/c_out, and what it should have been."""
    sigma = 0.7
    recipe = Recipe(crop=32, crops=2, parts=1, sigma_mean=float(np.log(sigma)), sigma_std=0.0, precision="float32")
    run = trainer(recipe, workers=1)
    for parameter in run.model.parameters():  # modulation, too, so that the noise level matters
        torch.nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    run.step = 3
    crops = run.gradients.crops(3, 0)
    rng = np.random.default_rng([0, 3, 0, 1])
    noise = torch.from_numpy(rng.standard_normal(crops.hr.shape, np.float32))
    row, column = (int(block) * 4 for block in rng.integers(64 // 4 - 2 + 1, size=2))
    x = crops.hr + sigma * noise
    plan = MemoryPlan(9, 99)
    with torch.no_grad():
        denoise = Denoiser(run.model, Conditioning(crops.lr, crops.up), plan, origin=(row, column))
        denoised = denoise(x, sigma)
    skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5
    given, wanted = (denoised - skip * x) / out, (crops.hr - skip * x) / out
    assert run.advance() == pytest.approx(float((given - wanted).square().mean()), rel=1e-4)


def test_loss_of_the_bridge() -> None:
    """From the enlarged picture itself: what D leaves to be done, in units of F."""
    recipe = Recipe(crop=32, crops=2, parts=1, bridge=0.1, ends=1, clean=1, precision="float32")
    run = trainer(recipe, workers=1)
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    crops = run.gradients.crops(0, 0)
    rng = np.random.default_rng([0, 0, 0, 1])
    for draws in (crops.hr.numel(), 2, 2, 2, 2):  # noise; t and k, which end and clean make 1 and 0
        rng.standard_normal(draws, np.float32) if draws > 2 else rng.random(draws)
    row, column = (int(block) * 4 for block in rng.integers(64 // 4 - 2 + 1, size=2))
    denoise = Denoiser(run.model, Conditioning(crops.lr, crops.up), MemoryPlan(9, 99), origin=(row, column))
    with torch.no_grad():
        left = (denoise(crops.up, 0.1) - crops.hr) * (0.1**2 + 0.25) ** 0.5 / (0.1 * 0.5)
    assert run.advance() == pytest.approx(float(left.square().mean()), rel=1e-4)


def test_losses_of_crops() -> None:
    """Two crops, one with ten times the error: by hand."""
    error = torch.tensor([1.0, -10.0])[:, None, None, None].expand(2, 3, 4, 4)
    epsilon, lines = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 21.0])
    torch.testing.assert_close(of_crops("squares", error, lines, epsilon), torch.tensor([1.0, 121.0]))
    torch.testing.assert_close(of_crops("roots", error, lines, epsilon), torch.tensor([1.25, 121.25]).sqrt())
    expected = torch.tensor([1.25, 100.25]).sqrt() + lines
    torch.testing.assert_close(of_crops("charbonnier", error, lines, epsilon), expected)
    with pytest.raises(ValueError, match="squares, charbonnier, roots"):
        Recipe(loss="cubes")


def test_the_bridge_mixes_ways_and_noise() -> None:
    recipe = Recipe(crops=1000, parts=1, bridge=0.1)
    t, k = _bridge(recipe, 1000, np.random.default_rng(0))
    assert 0.55 < (t == 1).mean() < 0.65
    assert t.min() > 0
    assert 0.65 < (k == 0).mean() < 0.75
    assert k.max() <= 1


def test_seam_term_counts_differences_across_lines_only() -> None:
    """Half the squared step, averaged over lines and axes: 1 for pure noise of size 1."""
    noise = torch.randn(2, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(across(noise, 4), torch.ones(2), rtol=0, atol=0.01)
    torch.testing.assert_close(across(noise, 512), torch.zeros(2))
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)  # columns step by 1 everywhere, rows not at all
    torch.testing.assert_close(across(ramp, 4), torch.tensor([0.25]))
    steps = torch.tensor([0.0, 5.0, 0.0, 5.0, 2.0, 9.0, 2.0, 9.0]).expand(1, 3, 8, 8)  # from 5 to 2 across the line
    torch.testing.assert_close(across(steps, 4), torch.tensor([9 / 4]))


def test_positions_lie_all_over_the_period(monkeypatch: pytest.MonkeyPatch) -> None:
    origins: list[tuple[int, int]] = []

    class Recorded(Denoiser):
        def __init__(self, *args: object, origin: tuple[int, int]) -> None:
            origins.append(origin)
            super().__init__(*args, origin=origin)

    monkeypatch.setattr("training.gradients.Denoiser", Recorded)
    run = trainer(workers=1)
    for _ in range(24):
        run.advance()
    assert {x % 4 for origin in origins for x in origin} == {0}
    assert {x for origin in origins for x in origin} == set(range(0, 64 - 8 + 1, 4)), "all places, none across the seam"


def test_plain_attention_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, generator=generator) for n in (5, 7, 7))
    expected = F.scaled_dot_product_attention(q, k, v)
    with PlainAttention():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected, rtol=0, atol=1e-12)


def test_what_is_the_same_in_all_cells_is_found_and_detail_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(1, 3, 4, 4, generator=generator)
    pattern -= pattern.mean((2, 3), keepdim=True)
    assert periodic(pattern.repeat(1, 1, 16, 16), 4).item() == pytest.approx(pattern.square().mean().item(), rel=1e-4)
    assert periodic(torch.randn(1, 3, 64, 64, generator=generator), 4).item() < 0.03  # of noise of size 1
    assert periodic(torch.ones(1, 3, 64, 64), 4).item() == 0, "brightness is no pattern"


@pytest.mark.parametrize("cell", [4, 32])
def test_unevenness_is_that_of_the_score(cell: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    picture[:, cell::cell] //= 3  # a grid of lines
    score = scores.seam(picture @ np.array([0.299, 0.587, 0.114]), cell)
    x = torch.from_numpy(picture.astype(np.float32)).movedim(-1, 0)[None] / 127.5 - 1
    assert score > 1.1
    assert unevenness(x, cell).item() == pytest.approx((score - 1) ** 2, rel=0.01)
    assert unevenness(torch.zeros(1, 3, 64, 64), cell).item() == 0  # nothing anywhere
    assert unevenness(x[..., :cell, :cell], cell).item() == 0  # no line


def test_orthogonal_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 16), (2, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
        assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizers_descend(kind: str) -> None:
    """Least squares in 8 unknown columns: the error falls a hundredfold."""
    generator = torch.Generator().manual_seed(0)
    given, truth = (torch.randn(n, 8, generator=generator) for n in (64, 8))
    weight = torch.zeros(8, 8, requires_grad=True)
    optimizer = Optimizer(["layers.0.out.weight"], [weight], kind)
    errors = []
    for step in range(300):
        error = (given @ (weight - truth)).square().mean()
        optimizer.step(torch.autograd.grad(error, [weight]), 0.2 * (1 - step / 300))
        errors.append(error.item())
    assert errors[-1] < errors[0] / 100


def test_decay_is_a_straight_line() -> None:
    decay = Decay(start=80, factor=0.5, length=20)
    assert [decay.at(step) for step in (80, 90, 100, 101)] == [0.5, 0.25, 0.0, 0.0]


def test_heads_of_a_new_model_look_at_the_patches_around() -> None:
    """For patches inside a block, the key that gets most weight is the one at the head's offset, content or none."""
    config = InfDiTConfig(3, 6 * 32, 6, block_size=32, vector_dim=0)
    side, width = 8, 32
    steps = torch.arange(side, dtype=torch.float32)[None]
    turns = rotary_turns(steps + 40, steps + 96, width, torch.float32)[0]  # of a block somewhere
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    inner = (row > 0) & (row < 7) & (column > 0) & (column < 7)
    content = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = [(0, 0), (-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1)]
    layer = from_nothing(config, 0).layers[0]
    for tokens, least in ((torch.zeros_like(content), 1.0), (content, 0.5)):
        q, k, _ = layer.qkv(tokens).view(64, 3, 6, width).unbind(1)
        q, k = (rotate(layer.qk_norm(x), turns) for x in (q, k))
        found = torch.einsum("thd,khd->htk", q, k).argmax(-1)
        for head, (down, right) in enumerate(expected):
            wanted = (row + down) * side + column + right
            assert (found[head] == wanted)[inner].float().mean() >= least, (head, least)


def test_a_new_model_looks_at_the_nearest_low_resolution_tokens() -> None:
    config = InfDiTConfig(1, 6 * 32, 6, block_size=32, vector_dim=0)
    cross = from_nothing(config, 0).layers[0].cross
    found = torch.einsum("thd,whd->htw", cross.query_position, cross.key_position).argmax(-1)
    side, tokens = 8, 12  # patches of a block; low-resolution tokens, of two patches each, of three blocks
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    down, right = row % 2 * 2 - 1, column % 2 * 2 - 1  # the nearer side of the patch's own token
    for head, (rows, columns) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1)]):
        wanted = (4 + row // 2 + rows * down) * tokens + 4 + column // 2 + columns * right
        assert (found[head] == wanted).all(), head


def test_a_new_bridge_is_the_enlarged_picture() -> None:
    """F is 0 at first, and c_skip nearly 1."""
    crops = data.Photographs([picture(0)]).draw(1, 32, (0, 0, 0))
    with torch.no_grad():
        result = Denoiser(from_nothing(CONFIG, 0), Conditioning(crops.lr, crops.up))(crops.up, 0.03)
    torch.testing.assert_close(result, crops.up, rtol=0, atol=0.004)


@pytest.mark.parametrize(("width", "vector"), [(16, 0), (24, 5), (32, 0), (56, 5)])
def test_a_wider_model_computes_the_same(width: int, vector: int) -> None:
    """Random weights everywhere: modulation, affine norms, biases, positions, the vector."""
    model = from_nothing(replace(CONFIG, vector_dim=vector), 0)
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, 0.1, 0.4, generator=torch.Generator().manual_seed(i))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = widen(model, width, seed=1)
    assert (wide.config.hidden_size, wide.config.num_heads) == (width, width // 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    generator = torch.Generator().manual_seed(2)
    up, noise = torch.randn(2, 1, 3, 32, 48, generator=generator, dtype=torch.float64)
    lr = torch.randn(1, 3, 8, 12, generator=generator, dtype=torch.float64)
    clip = torch.randn(1, vector, generator=generator, dtype=torch.float64) if vector else None
    for sigma in (0.05, 2.0, 40.0):
        pair = [
            Denoiser(m.double().requires_grad_(False), Conditioning(lr, up, clip), MemoryPlan(9, 99))(
                up + sigma * noise, sigma
            )
            for m in (model, wide)
        ]
        torch.testing.assert_close(pair[1], pair[0], rtol=0, atol=3e-5)


def test_what_was_added_learns() -> None:
    """After two steps every weight has moved that is not there to be zero: nothing is stuck between two zeros."""
    wide = widen(from_nothing(CONFIG, 0), 32, seed=1)
    before = [p.detach().clone() for p in wide.parameters()]
    run = Trainer(wide, replace(TINY, optimizer="adamw"), data.Photographs([picture(i) for i in range(3)]), 1)
    for _ in range(3):
        run.advance()
    for name, old, new in zip(run.names, before, run.parameters, strict=True):
        if name.endswith("weight") and old.dim() == 2:
            assert (new != old).float().mean() > 0.99, name


def test_a_model_cannot_be_made_narrower() -> None:
    for width in (8, 20):
        with pytest.raises(ValueError, match="multiple of 8 and at least 16"):
            widen(from_nothing(CONFIG, 0), width, seed=0)


# ---- whole runs


@pytest.mark.parametrize(("precision", "bridge"), [("float32", 0.0), ("bfloat16", 0.1)])
def test_first_losses_repeat_and_workers_do_not_matter(precision: str, bridge: float) -> None:
    recipe = Recipe(crop=32, crops=4, parts=2, warmup=5, precision=precision, bridge=bridge)
    runs = [trainer(recipe, workers) for workers in (2, 2, 1)]
    losses = [[run.advance() for _ in range(8)] for run in runs]
    assert losses[0] == losses[1] == losses[2]
    assert trainer(replace(recipe, seed=1)).advance() != losses[0][0]


@pytest.mark.parametrize("bridge", [0.0, 0.1])
def test_training_learns(bridge: float) -> None:
    """On crops that neither has seen, beside a model that has not been trained."""
    recipe = replace(TINY, bridge=bridge, rate=1e-2, precision="float32")
    trained, new = (trainer(recipe, workers=1) for _ in range(2))
    for _ in range(45):
        trained.advance()
    new.step = trained.step
    trained.decay = new.decay = Decay(0, 0.0, 1)  # the rate is 0
    assert sum(trained.advance() for _ in range(6)) < 0.9 * sum(new.advance() for _ in range(6))


def test_a_worker_that_ends_is_said() -> None:
    run = trainer(workers=2)
    run.advance()
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(ChildProcessError, match="--resume"):
        run.advance()


def train(*arguments: object) -> int:
    sizes = "--layers 2 --width 16 --heads 2 --block 16 --crop 32 --crops 2 --parts 2 --hold-out 1 --warmup 2"
    return command.main([*sizes.split(), "--device", "cpu", "--workers", "2", *(str(a) for a in arguments)])


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_resuming_is_not_having_stopped(folder: Path, tmp_path: Path, precision: str) -> None:
    """Five steps, the last two decaying, at once and in five sessions of a step each."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    options = (folder, "--precision", precision, "--decay", 0.4, "--validate-every", 2)
    assert train(*options, "-o", whole, "--steps", 5) == 0
    assert train(*options, "-o", pieces, "--steps", 5, "--stop-after", 0) == 0
    for done in range(1, 5):
        assert torch.load(pieces / "state.pt", weights_only=True)["trainer"]["step"] == done
        assert train(*options, "-o", pieces, "--resume", "--stop-after", 0) == 0
    states = [torch.load(f / "state.pt", weights_only=True)["trainer"] for f in (whole, pieces)]
    assert states[0]["step"] == 5
    assert states[0]["decay"] == states[1]["decay"] == {"start": 3, "factor": 1.0, "length": 2}
    for key in ("model", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(*(s[key] for s in states), strict=True))
    leaves = [torch.utils._pytree.tree_leaves(state["optimizer"]) for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True) if isinstance(a, torch.Tensor))
    tensors = [infdit.checkpoint.read_checkpoint(f / "last.safetensors").tensors for f in (whole, pieces)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_what_a_run_leaves(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train(folder, "-o", out, "--minutes", 0.02, "--validate-every", 3, "--provenance", "A test.") == 0
    assert {p.name for p in out.iterdir()} == {"state.pt", "log.jsonl", "best.safetensors", "last.safetensors"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "gain" in line]
    assert validated[-1]["step"] == lines[-1]["step"] > 0
    assert validated[-1]["rate"] == 0.0
    assert {"loss", "minutes", "gain_1", "gain_2", "gain_5", "patch_seam", "block_seam"} <= validated[-1].keys()
    checkpoint = infdit.checkpoint.read_checkpoint(out / "best.safetensors")
    assert checkpoint.verify()
    assert checkpoint.metadata["provenance"].startswith("A test.")
    assert {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}
    assert train(folder, "-o", out, "--resume", "--minutes", 0.03, "--decay-from-now", "--seam", 1) == 0
    longer = torch.load(out / "state.pt", weights_only=True)
    assert longer["trainer"]["step"] > lines[-1]["step"]
    assert longer["recipe"]["seam"] == 1
    assert longer["recipe"]["crop"] == 32
    capsys.readouterr()
    assert train(folder, "-o", out, "--steps", 1) == 2
    assert "--resume" in capsys.readouterr().err
    assert train(folder, "-o", tmp_path / "w", "--steps", 1, "--init", out / "best.safetensors", "--width", 24) == 0
    assert infdit.load_model(tmp_path / "w" / "last.safetensors", device="cpu").config.hidden_size == 24
    assert train(tmp_path / "out", "-o", tmp_path / "new", "--steps", 1) == 2
    assert "no pictures" in capsys.readouterr().err


def test_exported_weights_come_back(tmp_path: Path) -> None:
    model = from_nothing(CONFIG, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    export(tmp_path / "m.safetensors", model.state_dict(), CONFIG, "here")
    back = infdit.load_model(tmp_path / "m.safetensors", dtype=torch.float32, device="cpu")
    assert back.config == CONFIG
    assert back.defaults.sampler in infdit.samplers.SAMPLERS
    expected = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    files = [str(tmp_path / name) for name in ("m.safetensors", "n.safetensors")]
    export_command([*files, "--steps", "3", "--sampler", "heun", "--sigma-max", "2"])
    again = infdit.checkpoint.read_checkpoint(tmp_path / "n.safetensors")
    assert again.verify()
    assert again.metadata["provenance"] == "here"
    assert again.defaults == SamplingDefaults(steps=3, sampler="heun", sigma_max=2.0, sigma_min=0.01)
    assert all(torch.equal(tensor.float(), expected[name]) for name, tensor in again.state_dict().items())


# ---- validation


def test_validation_is_by_the_scores_of_the_bench() -> None:
    """Of a new bridge, which is the enlarged picture but for c_skip: by hand, from the crops."""
    crops = data.centres([picture(i, 128) for i in range(2)], 64)
    found = validate.validate(from_nothing(CONFIG, 0), {4: crops}, bridge=0.03)
    skip = 0.25 / (0.03**2 + 0.25)

    def luma(x: torch.Tensor) -> np.ndarray:
        eight = ((x.clamp(-1, 1) + 1) * 127.5).round().double()
        return (torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255 @ eight.flatten(1)).numpy() + 16

    def loss(x: torch.Tensor, i: int) -> float:
        inner = np.pad(np.ones((56, 56), bool), 4).ravel()
        return float(((luma(x) - luma(crops.hr[i]))[inner] ** 2).mean())

    expected = [10 * np.log10(loss(crops.up[i], i) / loss(skip * crops.up[i], i)) for i in range(2)]
    assert found["gain"] == found["gain_0.03"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert {"patch_seam", "block_seam"} < found.keys()
