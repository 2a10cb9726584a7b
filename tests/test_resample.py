"""The aligned resampler against torch's antialiased bicubic, Keys' formula pixel by pixel, and straight lines."""

import math
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from clipmath import keys_cubic

from infdit.conditioning import PIECE, conditioning_pictures

MULTIPLES_OF_4 = [
    ((7, 9), (28, 36)),
    ((10, 10), (12, 36)),
    ((33, 5), (40, 20)),
    ((1, 1), (4, 4)),
    ((100, 50), (132, 200)),
    ((1, 40), (4, 60)),
]


OTHERS = [
    ((7, 9), (29, 35)),
    ((5, 1), (17, 3)),
    ((41, 30), (163, 119)),
    ((97, 98), (98, 131)),  # lr is nearly four times smaller than the picture
    ((9, 50), (PIECE + 15, 2 * PIECE + 7)),  # in pieces both ways
    ((150, 33), (PIECE + 73, 50)),  # lr too
]


def padded(size: tuple[int, int], block: int = 32) -> tuple[int, int]:
    return tuple(-(-side // block) * block for side in size)


@pytest.mark.parametrize(("source", "target"), MULTIPLES_OF_4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_where_the_target_is_a_multiple_of_4(source: tuple, target: tuple, dtype: torch.dtype) -> None:
    image = torch.rand((2, 3, *source), generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    lr, up = conditioning_pictures(image, target, padded(target))
    h, w = target
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    # torch rounds its weights to the picture's dtype
    tolerance = {"atol": 3e-5 if dtype == torch.float32 else 1e-12, "rtol": 0}
    torch.testing.assert_close(up[..., :h, :w], F.interpolate(image, (h, w), **options).clamp(-1, 1), **tolerance)
    torch.testing.assert_close(
        lr[..., : h // 4, : w // 4], F.interpolate(image, (h // 4, w // 4), **options), **tolerance
    )


def gathered(image: torch.Tensor, ratio: float, count: int, axis: int) -> torch.Tensor:
    """`count` pixels along an axis, each the weighted mean of what the kernel reaches, in float64.

    Beyond the picture's edge there is nothing for its own pixels, and for those of the padding the edge itself.
    """
    length, stretch = image.shape[axis], max(ratio, 1.0)
    made = []
    for i in range(count):
        centre = (i + 0.5) * ratio
        taps = range(math.floor(centre - 2 * stretch) - 1, math.ceil(centre + 2 * stretch) + 1)
        taps = [j for j in taps if 0 <= j < length or centre >= length]
        weights = torch.tensor([keys_cubic((j + 0.5 - centre) / stretch) for j in taps], dtype=torch.float64)
        reached = image.double().index_select(axis, torch.tensor([min(max(j, 0), length - 1) for j in taps]))
        made.append(torch.tensordot(reached, weights / weights.sum(), ([axis], [0])))
    return torch.stack(made, axis)


@pytest.mark.parametrize(("source", "target"), OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula_at_any_size(source: tuple, target: tuple, dtype: torch.dtype) -> None:
    """With the padding."""
    image = torch.rand((2, 3, *source), generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    whole = padded(target)
    for found, factor in zip(conditioning_pictures(image, target, whole), (4, 1), strict=True):
        expected = image
        for axis in (2, 3):
            ratio, count = factor * source[axis - 2] / target[axis - 2], whole[axis - 2] // factor
            expected = gathered(expected, ratio, count, axis)
        expected = expected if factor == 4 else expected.clamp(-1, 1)
        torch.testing.assert_close(found.double(), expected, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=0)


@pytest.mark.parametrize(
    ("source", "target"), [(50, 77), (50, 101), (64, 65), (30, 119), (41, 163), (97, 98), (33, 131)]
)
@pytest.mark.parametrize("axis", [2, 3])
def test_a_ramp_is_the_same_through_up_and_lr(source: int, target: int, axis: int) -> None:
    """Away from the edges, where every kernel loses its outer half, both lie on the ramp itself."""
    ramp = (torch.arange(source, dtype=torch.float64) + 0.5) / source  # in fractions of the picture
    image = ramp.view([1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1]).expand(1, 3, source, source)
    lr, up = conditioning_pictures(image, (target, target), padded((target, target)))
    lr, up = (x.select(5 - axis, x.shape[5 - axis] // 4)[0, 0] * target for x in (lr, up))  # in target pixels
    edge = 2 * max(4 * source // target + 1, 4) * target // source + 1  # twice the widest kernel
    centres = torch.arange(len(up), dtype=torch.float64) + 0.5
    inner = slice(edge, target - edge)
    assert target > 2 * edge
    torch.testing.assert_close(up[inner], centres[inner], atol=0.05, rtol=0)
    means = up.unflatten(0, (-1, 4)).mean(1)
    inner = slice(4, (target - 12) // 4)
    assert len(means[inner]) > 5
    torch.testing.assert_close(lr[inner], means[inner], atol=0.05, rtol=0)
    outside = slice(target // 4 + 5, None)  # the edge repeated
    torch.testing.assert_close(lr[outside], means[outside], atol=0.05, rtol=0)


def test_padding_repeats_the_edge() -> None:
    image = torch.rand((1, 3, 5, 6), generator=torch.Generator().manual_seed(1)) * 2 - 1
    lr, up = conditioning_pictures(image, (9, 11), (32, 32))
    corner = image[:, :, -1, -1]
    torch.testing.assert_close(lr[..., -1, -1], corner)
    torch.testing.assert_close(up[..., -1, -1], corner)


def test_constant_pictures_stay_constant_and_up_is_clipped() -> None:
    for value in (-1.0, 0.3, 1.0):
        for picture in conditioning_pictures(torch.full((1, 3, 3, 17), value), (7, 40), (32, 64)):
            torch.testing.assert_close(picture, torch.full_like(picture, value), atol=1e-6, rtol=0)
    step = torch.tensor([-1.0, -1, -1, 1, 1, 1]).expand(1, 3, 6, 6)
    assert conditioning_pictures(step, (24, 24), (32, 32))[1].abs().max() == 1


@pytest.mark.slow
def test_a_large_picture_is_prepared_nearly_as_fast_as_torch_would() -> None:
    """2000×1143 ×4: within 1.5 of the time that torch's own bicubic takes, of this process on one thread."""
    image = torch.rand((1, 3, 1143, 2000), generator=torch.Generator().manual_seed(2)) * 2 - 1
    size = 4 * 1143, 4 * 2000

    def theirs() -> None:
        for h, w in (size, (1143, 2000)):
            F.interpolate(image, (h, w), mode="bicubic", antialias=True, align_corners=False).clamp_(-1, 1)

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = [(seconds(lambda: conditioning_pictures(image, size, size)), seconds(theirs)) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert min(ours for ours, _ in taken) <= 1.5 * min(other for _, other in taken)
