"""The reference against the published outputs, and against itself: it must be right and see every weight.

Tolerances are those of two float32 programs with different orders of summation: 2e-5 for one D (values up
to 2), 1e-3 for a whole sample (values up to 12). Float64 comparisons allow 1e-10, a million roundings.
"""

import json
from pathlib import Path
from typing import TypedDict

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests import dense

DATA = Path(__file__).parent / "data"
OUTPUTS = [
    ("case0", "denoised.sigma0.05"), ("case0", "denoised.sigma2.0"), ("case0", "denoised.sigma40.0"),
    ("case0", "sampled.heun4"), ("case1", "denoised.sigma1.0"), ("case2", "denoised.sigma1.0"),
    ("case2", "sampled.heun3"), ("case3", "denoised.sigma1.0"), ("case4", "denoised.sigma1.0"),
]  # fmt: skip
UNUSED = ("k_layer_norm", "rope.freqs", "transformer.position_embeddings")
# Added to every key of a head alike, with no rotation after it, so the softmax cannot see it.
INVISIBLE = dense.MIXIN + "cross_k_ln.bias"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return torch.load(DATA / "tiny.mp_rank_00_model_states.pt", weights_only=False)["module"]


def karras(n: int) -> Tensor:
    top, bottom = 40.0 ** (1 / 7), 0.002 ** (1 / 7)
    levels = [(top + i / (n - 1) * (bottom - top)) ** 7 for i in range(n)]
    return torch.tensor([*levels, 0.0], dtype=torch.float64)


class Picture(TypedDict):
    x: Tensor
    up: Tensor
    lr: Tensor


def picture(seed: int, rows: int, columns: int, block: int) -> Picture:
    """x, lr and up in float64 for a grid of rows × columns blocks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, w: int) -> Tensor:
        return torch.randn(1, 3, h, w, generator=generator, dtype=torch.float64)

    h, w = rows * block, columns * block
    return {"x": draw(h, w), "up": draw(h, w), "lr": draw(h // 4, w // 4)}


def test_every_published_output_is_compared():
    with safe_open(DATA / "tiny.safetensors", "pt") as file:
        stored = {key for key in file.keys() if "denoised" in key or "sampled" in key}  # noqa: SIM118
    assert stored == {f"{case}.{name}" for case, name in OUTPUTS}


@pytest.mark.parametrize(("case", "name"), OUTPUTS)
def test_dense_gives_the_published_output(published: dict[str, Tensor], case: str, name: str):
    with safe_open(DATA / "tiny.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        inputs = ("lr", "lr_upscaled", "clip_embedding", "noise", name)
        lr, up, clip, noise, expected = (file.get_tensor(f"{case}.{part}") for part in inputs)

    def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
        return dense.denoise(published, x, sigma, lr, up, clip, patch=config["patch_size"],
                             block=config["block_size"], period=128)  # fmt: skip

    if name.startswith("denoised"):
        sigma = float(name.removeprefix("denoised.sigma"))
        actual, tolerance = denoise(up + noise * sigma, sigma), 2e-5
    else:
        sigmas = karras(int(name.removeprefix("sampled.heun")))
        actual, tolerance = dense.heun(denoise, up + noise * 40, sigmas), 1e-3
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_random_weights_have_the_published_names_and_shapes(published: dict[str, Tensor]):
    mine = dense.random_weights(0, layers=3, hidden=64, heads=4, block=32, vector_dim=32, dtype=torch.float32)
    assert {name: value.shape for name, value in mine.items()} == {
        name: value.shape for name, value in published.items() if not any(part in name for part in UNUSED)
    }


def test_every_weight_matters():
    block = 8
    weights = dense.random_weights(1, layers=3, hidden=16, heads=2, block=block, vector_dim=4)
    inputs = picture(2, 2, 2, block)
    clip = torch.linspace(-1, 1, 4, dtype=torch.float64)[None]

    def change(name: str, index: tuple[int, ...] = ()) -> float:
        value = weights[name].clone()
        generator = torch.Generator().manual_seed(3)
        value[index] += 1e-4 * torch.randn(value[index].shape, generator=generator, dtype=torch.float64)
        changed = dense.denoise({**weights, name: value}, **inputs, sigma=1.0, clip=clip, block=block)
        return (changed - plain).abs().max().item()

    plain = dense.denoise(weights, **inputs, sigma=1.0, clip=clip, block=block)
    changes = {name: change(name) for name in weights}
    assert not any("k_layer_norm" in name for name in weights)
    assert changes.pop(INVISIBLE) < 1e-12
    assert not {name: value for name, value in changes.items() if value < 1e-9}
    table = dense.MIXIN + "re_pos_embed"
    assert min(change(table, (layer, slot)) for layer in range(3) for slot in range(4)) > 1e-9


def test_k_layer_norm_is_not_read(published: dict[str, Tensor]):
    inputs = picture(4, 1, 1, 32)
    reduced = {name: value for name, value in published.items() if not any(part in name for part in UNUSED)}
    full = dense.denoise(published, **inputs, sigma=1.0)
    assert torch.equal(full, dense.denoise(reduced, **inputs, sigma=1.0))


def test_head_norms_twice():
    # Stored outputs cannot show it: the second norm acts only where ε is not small beside the variance.
    # So: no branch adds anything, no modulation, and tokens of about 1e-3.
    weights, inputs = dense.random_weights(17, layers=1), picture(18, 1, 1, 32)
    for name in weights:
        if name.startswith("mixins.patch_embed"):
            weights[name] *= 1e-3
        elif "final_layer.adaLN" in name or ".dense." in name or "dense_4h_to_h" in name:
            weights[name] *= 0
    image = torch.cat([inputs["x"], inputs["up"]], 1) / 1.25**0.5  # σ = 1
    kernel, bias = weights["mixins.patch_embed.proj.weight"], weights["mixins.patch_embed.proj.bias"]
    h = torch.nn.functional.conv2d(image, kernel, bias, stride=4).flatten(2).mT  # (1,T,D)
    for _ in range(2):
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6)
    out = h @ weights["mixins.final_layer.linear.weight"].T + weights["mixins.final_layer.linear.bias"]
    order = out.reshape(1, 8, 8, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 32, 32)
    expected = 0.2 * inputs["x"] + 0.5 / 1.25**0.5 * order
    torch.testing.assert_close(dense.denoise(weights, **inputs, sigma=1.0), expected, rtol=0, atol=1e-10)


def test_sigma_and_clip_belong_to_their_picture():
    weights = dense.random_weights(5, layers=2, vector_dim=4)
    parts = [picture(seed, 1, 1, 32) for seed in (6, 7)]
    x, up, lr = (torch.cat([part[name] for part in parts]) for name in ("x", "up", "lr"))
    sigma, clip = torch.tensor([0.3, 5.0]), torch.eye(2, 4, dtype=torch.float64)
    batch = dense.denoise(weights, x, sigma, lr, up, clip)
    for i, part in enumerate(parts):
        alone = dense.denoise(weights, **part, sigma=sigma[i], clip=clip[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-10)


def test_no_clip_vector_means_zeros():
    weights, inputs = dense.random_weights(8, layers=1, vector_dim=4), picture(9, 1, 1, 32)
    without = dense.random_weights(8, layers=1, vector_dim=0)
    zeros = dense.denoise(weights, **inputs, sigma=1.0, clip=torch.zeros(1, 4, dtype=torch.float64))
    assert torch.equal(dense.denoise(weights, **inputs, sigma=1.0), zeros)
    assert dense.denoise(without, **inputs, sigma=1.0).isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 1), (3, 3)])
def test_continuous_is_wrapped_up_to_the_period_and_not_after(rows: int, columns: int):
    # Blocks only look back, so the blocks before the period (2 of them, 64 px) cannot see what lies after it.
    weights, inputs = dense.random_weights(10), picture(11, rows, columns, 32)
    wrapped, continuous = (
        dense.denoise(weights, **inputs, sigma=1.0, period=16, positions=positions)
        for positions in ("wrapped", "continuous")
    )
    change = (wrapped - continuous).abs().amax((0, 1))  # (h,w)
    assert change[:64, :64].max() < 1e-10
    for r in range(rows):
        for c in range(columns):
            if max(r, c) >= 2:
                assert change[r * 32 : r * 32 + 32, c * 32 : c * 32 + 32].max() > 1e-6


def test_without_slot_embeddings_continuous_is_unwrapped():
    # A rotation alone knows only differences; these are the same whether every frame or no frame is wrapped.
    weights, inputs = dense.random_weights(12), picture(13, 4, 3, 32)
    weights[dense.MIXIN + "re_pos_embed"] *= 0
    unwrapped = dense.denoise(weights, **inputs, sigma=1.0, period=10**6)
    continuous = dense.denoise(weights, **inputs, sigma=1.0, period=16, positions="continuous")
    wrapped = dense.denoise(weights, **inputs, sigma=1.0, period=16)
    torch.testing.assert_close(continuous, unwrapped, rtol=0, atol=1e-10)
    assert (wrapped - unwrapped).abs().max() > 1e-6


@pytest.mark.parametrize("positions", ["wrapped", "continuous"])
def test_origin_shifts_positions(positions: str):
    weights, inputs = dense.random_weights(14), picture(15, 2, 2, 32)

    def at(origin: tuple[int, int], period: int = 16) -> Tensor:
        return dense.denoise(weights, **inputs, sigma=1.0, period=period, positions=positions, origin=origin)

    torch.testing.assert_close(at((16, 32)), at((0, 0)), rtol=0, atol=1e-10)
    for origin in ((8, 0), (0, 8)):
        assert (at(origin, 128) - at((0, 0), 128)).abs().max() > 1e-6
    assert (at((8, 0), 128) - at((0, 8), 128)).abs().max() > 1e-6


def test_heun_solves_a_straight_line_exactly():
    # With D fixed, x - D shrinks in proportion to sigma: the path is straight and every step exact.
    x, target = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    torch.testing.assert_close(dense.heun(lambda x, sigma: target, x, karras(5)), target, rtol=0, atol=1e-10)
    sigmas = karras(5)[:4]
    expected = target + (x - target) * sigmas[-1] / sigmas[0]
    torch.testing.assert_close(dense.heun(lambda x, sigma: target, x, sigmas), expected, rtol=0, atol=1e-10)


def test_heun_takes_two_evaluations_a_step_but_one_for_the_last():
    seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return x / 2

    # By hand: slope at 2 is (4 - 2) / 2 = 1, Euler to 1 gives 3, slope there 1.5: x = 4 - 1.25, then half.
    end = dense.heun(denoise, torch.tensor(4.0), torch.tensor([2.0, 1.0, 0.0]))
    assert seen == [2.0, 1.0, 1.0]
    assert end.item() == pytest.approx(1.375, abs=1e-6)
