"""ST-LPIPS: what any such score must do, with random weights, and the package's own values where it is there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.perceptual import STLPIPS, st_lpips

# what the package's own code gave for `pair`, in float32
KNOWN = {"alex": [0.0544, 0.0627], "vgg": [0.2597, 0.2952]}


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and the same made smooth."""
    x = torch.rand((2, 3, 96, 80), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x, F.avg_pool2d(x, 3, 1, 1)


@pytest.fixture
def score() -> STLPIPS:
    """A network of the form of "alex", four channels wide."""
    generator = torch.Generator().manual_seed(0)
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    blur = torch.tensor([1.0, 2.0, 1.0])
    blur = (blur[:, None] * blur / 16).expand(4, 1, 3, 3)
    layers = [(1, 0, 3, 11), (1, 1, 0, 0), (2, 4, 0, 0), (2, 5, 4, 5), (3, 8, 0, 0), (3, 9, 4, 3)]
    for part, number, inputs, side in [*layers, (4, 11, 4, 3), (5, 13, 4, 3)]:
        name = f"net.slice{part}.{number}"
        if inputs:
            state[f"{name}.weight"] = torch.randn((4, inputs, side, side), generator=generator) / (inputs**0.5 * side)
            state[f"{name}.bias"] = torch.zeros(4)
        else:
            state[f"{name}.filt"] = blur
    state |= {f"lin{i}.model.1.weight": torch.ones(1, 4, 1, 1) for i in range(5)}
    return STLPIPS("alex", state)


def test_it_is_a_distance(score: STLPIPS) -> None:
    a, b = pair()
    assert (score(a, a) == 0).all()
    torch.testing.assert_close(score(a, b), score(b, a))
    near, far = score(a, torch.lerp(a, b, 0.2)), score(a, b)
    assert (near > 0).all()
    assert (near < far).all()
    torch.testing.assert_close(score(a[:1], b[:1]), far[:1])


def test_a_shift_of_a_pixel_costs_little(score: STLPIPS) -> None:
    coarse = torch.rand((1, 3, 12, 12), generator=torch.Generator().manual_seed(1)) * 2 - 1
    smooth = F.interpolate(coarse, (96, 96), mode="bicubic").clamp(-1, 1)
    other = F.interpolate(coarse.flip(-1), (96, 96), mode="bicubic").clamp(-1, 1)
    assert score(smooth, smooth.roll(1, -1)) < 0.2 * score(smooth, other)


def test_gradients_lead_to_what_looks_alike(score: STLPIPS) -> None:
    a, b = pair()
    moved = b.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(a, moved).sum(), moved)
    with torch.no_grad():
        assert (score(a, moved - 0.05 * gradient / gradient.abs().max()) < score(a, moved)).all()


@pytest.mark.parametrize("network", list(KNOWN))
def test_the_published_values(network: str) -> None:
    known = st_lpips(network)
    if known is None:
        pytest.skip("the package stlpips-pytorch is not there: pip install stlpips-pytorch --no-deps")
    with torch.inference_mode():
        torch.testing.assert_close(known(*pair()), torch.tensor(KNOWN[network]), rtol=0, atol=6e-5)
