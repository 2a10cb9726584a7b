"""CLIP's vectors of pictures against the formulas of clipmath.py, on a small tower with random weights in float64.

Texts and guidance: test_clip_text.py. The command line: test_cli_clip.py.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clipmath import (
    SMALL,
    load_small,
    needs_open_clip,
    preprocess_by_hand,
    preprocess_whole_by_hand,
    quick_gelu,
    random_image,
    save,
    tower_by_hand,
    tower_shapes,
    tower_weights,
)

import infdit
from infdit.checkpoint import convert
from infdit.clip import CLIPEncoder, OpenCLIPMissingError, load_clip, loader, preprocess
from infdit.clip import encoder as towers
from infdit.tensorfile import CheckpointError, TensorFile

DATA = Path(__file__).parent / "data"


# ---- preprocessing


@pytest.mark.parametrize(
    ("h", "w"),
    [
        (224, 224),  # nothing to resize
        (224, 229),  # only the crop, at 2.5, which goes to 2
        (231, 224),  # only the crop, at 3.5, which goes to 4
        (300, 450),  # shrinking
        (451, 300),
        (50, 33),  # enlarging
        (1, 1),
        (2, 90),
        (60, 3),
    ],
)
def test_preprocess_is_the_written_out_formula(h: int, w: int) -> None:
    image = random_image(1, 3, h, w)
    torch.testing.assert_close(preprocess(image), preprocess_by_hand(image, 224), rtol=0, atol=1e-11)


def test_preprocess_equals_torchs_own_resize_cut_in_the_middle() -> None:
    image = random_image(2, 3, 301, 500)
    width = int(224 * 500 / 301)
    resized = F.interpolate(image, (224, width), mode="bicubic", antialias=True, align_corners=False)
    left = (width - 224) // 2
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (towers.MEAN, towers.STD))
    expected = ((resized[..., left : left + 224] + 1) / 2 - mean) / std
    torch.testing.assert_close(preprocess(image), expected, rtol=0, atol=1e-10)


@needs_open_clip  # which brings torchvision
@pytest.mark.parametrize(("h", "w"), [(224, 229), (180, 411), (613, 256), (1, 1)])
def test_preprocess_equals_the_transforms_that_the_authors_compose(h: int, w: int) -> None:
    from torchvision import transforms

    compose = transforms.Compose(
        [
            transforms.Lambda(lambda x: (x + 1) / 2),
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(224),
            transforms.Normalize(mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711]),
        ]
    )
    image = random_image(2, 3, h, w)  # float64, for torch places the kernel in the image's own precision
    torch.testing.assert_close(preprocess(image), compose(image), rtol=0, atol=1e-6)  # mean and std there are float32


def test_preprocess_of_a_plain_colour_is_that_colour_standardised() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 17, 40)
    out = preprocess(image)
    expected = [(0 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(out, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 224, 224), rtol=0, atol=2e-6)


@pytest.mark.parametrize("axis", [2, 3])
def test_preprocess_of_a_very_long_strip_is_its_middle(axis: int) -> None:
    # resized whole, this would be 224 × 22,400,224 pixels: 60 GB; the crop is the middle pixel's reach, 5 pixels
    length = 100_001
    shape = [1, 3, 1, 1]
    shape[axis] = length
    image = random_image(*shape)
    middle = image.narrow(axis, length // 2 - 4, 9)  # longer than the reach, so both agree
    torch.testing.assert_close(preprocess(image), preprocess_by_hand(middle, 224), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("h", "w"),
    [
        (224, 224),  # as the crop
        (300, 300),
        (300, 451),  # shrinking
        (451, 300),
        (50, 33),  # enlarging, and an odd number of columns left over
        (1, 1),
        (2, 90),  # 4 rows
        (1, 300),  # none, but for the one that is always there
        (300, 1),
    ],
)
def test_the_whole_picture_is_the_written_out_formula(h: int, w: int) -> None:
    image = random_image(2, 3, h, w)
    expected = preprocess_whole_by_hand(image, 224)
    torch.testing.assert_close(preprocess(image, view="pad"), expected, rtol=0, atol=1e-11)
    if h == w:
        assert torch.equal(preprocess(image, view="pad"), preprocess(image))


def test_the_sides_of_a_panorama_are_seen_padded_and_lost_cropped() -> None:
    panorama = random_image(1, 3, 60, 240)
    changed = panorama.clone()
    changed[..., :60] += 0.5
    changed[..., -60:] -= 0.5
    assert torch.equal(preprocess(changed), preprocess(panorama))
    difference = (preprocess(changed, view="pad") - preprocess(panorama, view="pad"))[0, 0]
    assert difference[84:140, :50].mean() > 0.5 / 2 / 0.2687 - 0.05
    assert difference[84:140, -50:].mean() < -0.5 / 2 / 0.2687 + 0.05
    assert difference[:84].abs().max() == difference[140:].abs().max() == 0  # padding


@needs_open_clip
def test_padding_adds_nothing_to_its_tokens(tmp_path: Path) -> None:
    """The reason for its colour: CLIP's patch convolution has no bias."""
    convolution = load_small(save(tmp_path, tower_weights())).tower.conv1
    pixels = preprocess(random_image(1, 3, 10, 40), SMALL.image_size * 2, view="pad")  # 56: 14 of picture in the middle
    tokens = convolution(pixels)  # (1, 32, 4, 4)
    assert tokens[:, :, [0, 3]].abs().max() == 0
    assert tokens[:, :, 1:3].abs().min() > 0


def test_another_view_is_refused_with_the_two_that_there_are() -> None:
    with pytest.raises(ValueError, match="'whole', must be one of crop, pad"):
        preprocess(torch.zeros(1, 3, 8, 8), view="whole")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("axis", [2, 3])
def test_the_whole_of_a_very_long_strip_fits_into_memory(axis: int) -> None:
    shape = [1, 3, 1, 1]
    shape[axis] = 112_000
    image = torch.linspace(-1, 1, 112_000, dtype=torch.float64).view(1, 1, *shape[2:]).expand(shape)
    line = preprocess(image, view="pad")[0].select(4 - axis, 111)  # (3, 224), the only one that is no padding
    steps = (line * torch.tensor(towers.STD)[:, None]).diff()[:, 4:-4]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 224), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_preprocess_works_in_float32_at_least(dtype: torch.dtype) -> None:
    image = random_image(1, 3, 40, 30).to(dtype)
    out = preprocess(image)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), preprocess_by_hand(image.double(), 224), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1, 3, 0, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_preprocess_refuses_what_is_no_batch_of_images(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be floating point") as caught:
        preprocess(image)
    assert f"{image.dtype} {tuple(image.shape)}" in str(caught.value)


# ---- the tower


@needs_open_clip
@pytest.mark.parametrize(("h", "w"), [(28, 28), (45, 33), (9, 61), (1, 1)])
def test_vectors_are_the_written_out_vit(tmp_path: Path, h: int, w: int) -> None:
    weights = tower_weights()
    encoder = load_small(save(tmp_path, weights))
    image = random_image(2, 3, h, w)
    expected = tower_by_hand(preprocess_by_hand(image, SMALL.image_size), weights)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(image), expected, rtol=0, atol=1e-10)


@needs_open_clip
def test_a_view_is_chosen_for_the_vectors(tmp_path: Path) -> None:
    weights, image = tower_weights(), random_image(1, 3, 20, 50)
    encoder = load_small(save(tmp_path, weights))
    for name, pixels in (("crop", preprocess_by_hand), ("pad", preprocess_whole_by_hand)):
        expected = tower_by_hand(pixels(image, SMALL.image_size), weights)
        torch.testing.assert_close(encoder(image, name), expected, rtol=0, atol=1e-10)
    assert torch.equal(encoder(image), encoder(image, "crop"))


@needs_open_clip
def test_long_batches_are_the_same_pictures(tmp_path: Path) -> None:
    encoder, images = load_small(save(tmp_path, tower_weights())), random_image(19, 3, 30, 20)
    together, alone = encoder(images), torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert together.shape == (19, SMALL.output_dim)


@needs_open_clip
def test_the_activation_is_exact_gelu(tmp_path: Path) -> None:
    weights = tower_weights()
    encoder = load_small(save(tmp_path, weights))
    activations = [module for module in encoder.modules() if "GELU" in type(module).__name__]
    assert len(activations) == SMALL.layers
    assert all(type(module) is torch.nn.GELU and module.approximate == "none" for module in activations)
    pixels = preprocess_by_hand(random_image(1, 3, 28, 28), SMALL.image_size)
    quick = tower_by_hand(pixels, weights, quick_gelu)
    assert (encoder.tower(pixels) / encoder.tower(pixels).norm() - quick).abs().max() > 1e-3


@needs_open_clip
def test_quick_gelu_in_open_clips_configurations_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip.factory

    path, image = save(tmp_path, tower_weights()), random_image(1, 3, 28, 28)
    before = load_small(path)(image)
    for configuration in open_clip.factory._MODEL_CONFIGS.values():
        monkeypatch.setitem(configuration, "quick_gelu", True)
    assert torch.equal(load_small(path)(image), before)


@needs_open_clip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vectors_have_unit_length_and_at_least_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tower_weights()
    image = random_image(3, 3, 50, 40)
    vectors = load_small(save(tmp_path, weights), dtype)(image.to(dtype))
    assert vectors.shape == (3, SMALL.output_dim)
    assert vectors.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3, dtype=vectors.dtype), rtol=0, atol=1e-6)
    expected = tower_by_hand(preprocess_by_hand(image, SMALL.image_size), weights)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(vectors.double(), expected, rtol=0, atol=tolerance)


@needs_open_clip
def test_the_default_sizes_are_vit_l_14() -> None:
    with torch.device("meta"):
        tower = CLIPEncoder().tower
    state = tower.state_dict()
    shapes = {f"visual.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == tower_shapes(towers.VIT_L_14)
    assert sum(tensor.numel() for tensor in state.values()) == 303_966_208
    attentions = [module for module in tower.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    assert [attention.num_heads for attention in attentions] == [16] * 24  # heads show in no shape


@needs_open_clip
def test_loading_copies_nothing_that_need_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: tensor.float() for name, tensor in tower_weights().items()}
    path = save(tmp_path, weights)
    monkeypatch.setattr(loader, "read_tensors", lambda _: TensorFile(weights, {}))
    encoder = load_small(path, torch.float32)
    for name, parameter in encoder.tower.named_parameters():
        assert parameter.data_ptr() == weights[f"visual.{name}"].data_ptr()
        assert not parameter.requires_grad
    assert not encoder.training


@needs_open_clip
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_a_file_of_float32_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    monkeypatch.setattr(loader, "default_dtype", lambda _: torch.bfloat16)
    path = save(tmp_path, {name: tensor.to(stored) for name, tensor in tower_weights().items()})
    encoder = load_clip(path, device="cpu", config=SMALL)
    expected = torch.float32 if stored == torch.float32 else torch.bfloat16
    assert {parameter.dtype for parameter in encoder.parameters()} == {expected}


# ---- names


TEXT = {
    "positional_embedding": torch.zeros(77, 8),
    "text_projection": torch.zeros(8, 8),
    "logit_scale": torch.zeros(()),
    "token_embedding.weight": torch.zeros(9, 8),
    "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
    "ln_final.bias": torch.zeros(8),
}


@needs_open_clip
@pytest.mark.parametrize("prefix", ["", "module.", "image_encoder.model.", "module.image_encoder.model."])
@pytest.mark.parametrize("outer", [None, "plain", "state_dict", "module"])
def test_names_and_layouts_that_are_read(tmp_path: Path, prefix: str, outer: str | None) -> None:
    weights = tower_weights()
    tensors = {prefix + name: tensor for name, tensor in (weights | TEXT).items()}
    if outer is None:
        path = save(tmp_path, tensors)
    else:
        path = tmp_path / "clip.bin"
        torch.save(tensors if outer == "plain" else {outer: tensors, "epoch": 3}, path)
    tower = load_small(path).tower
    assert all(torch.equal(tensor, weights[f"visual.{name}"]) for name, tensor in tower.state_dict().items())


@needs_open_clip
def test_no_code_of_the_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    path = tmp_path / "clip.bin"
    torch.save({"state_dict": tower_weights(), "trap": Trap()}, path)
    load_small(path)
    assert not (tmp_path / "sprung").exists()


# ---- refusals


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_small(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message
    return message


@needs_open_clip
def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    weights = tower_weights()
    del weights["visual.proj"]
    weights["visual.conv1.weight"] = torch.zeros(32, 3, 16, 16)
    weights["visual.ln_pre.weight"] = torch.ones(32, dtype=torch.int64)
    weights["visual.attn_pool.query"] = torch.zeros(4)
    message = refusal(save(tmp_path, weights))
    assert "lacks visual.proj" in message
    assert "unknown visual.attn_pool.query" in message
    assert "visual.conv1.weight (torch.float32 (32, 3, 16, 16) instead of (32, 3, 14, 14))" in message
    assert "visual.ln_pre.weight (torch.int64" in message


@needs_open_clip
def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in tower_weights().items() if "resblocks.1" not in name}
    message = refusal(save(tmp_path, weights))
    assert message.count("visual.transformer.resblocks.1.") == 3
    assert "and 9 more" in message


@needs_open_clip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = tower_weights()
    weights["visual.transformer.resblocks.1.mlp.c_fc.bias"][5] = value
    assert "visual.transformer.resblocks.1.mlp.c_fc.bias is not finite" in refusal(save(tmp_path, weights))


@needs_open_clip
@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"vision_model.embeddings.class_embedding": torch.zeros(4)}, "Hugging Face"),
        (TEXT, "no CLIP vision tower"),
        ({"visual.proj": torch.zeros(4), "module.visual.proj": torch.zeros(4)}, "visual.proj twice"),
    ],
)
def test_other_files_are_refused_with_the_one_to_give(
    tmp_path: Path, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    message = refusal(save(tmp_path, tensors))
    assert expected in message
    assert "open_clip_pytorch_model.bin of laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K" in message


@needs_open_clip
def test_a_file_known_to_be_wrong_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, tower_weights())
    monkeypatch.setitem(loader.KNOWN_WRONG, hashlib.sha256(path.read_bytes()).hexdigest(), "somebody's quick CLIP")
    monkeypatch.setattr(loader, "read_tensors", lambda _: pytest.fail("was read"))
    assert "somebody's quick CLIP" in refusal(path)


@needs_open_clip
def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "cannot be opened" in refusal(tmp_path / "absent.safetensors")
    assert "is a folder; give a file" in refusal(tmp_path)
    path = save(tmp_path, tower_weights())
    path.write_bytes(path.read_bytes()[:-100])
    refusal(path)


# ---- which weights


def warnings_of(caplog: pytest.LogCaptureFixture, path: Path) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_small(path)
    return [record.getMessage() for record in caplog.records if record.name == "infdit.clip.loader"]


@needs_open_clip
def test_a_file_that_nobody_knows_gives_one_warning_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, tower_weights())
    (message,) = warnings_of(caplog, path)
    assert str(path) in message
    assert hashlib.sha256(path.read_bytes()).hexdigest() in message
    assert "quick-GELU" in message
    assert "wrong vectors" in message


@needs_open_clip
def test_the_known_file_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, tower_weights())
    monkeypatch.setitem(loader.KNOWN, hashlib.sha256(path.read_bytes()).hexdigest(), "the one of this test")
    assert warnings_of(caplog, path) == []


def test_a_file_is_hashed_once_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.bin"
    path.write_bytes(b"a" * 100)
    first = loader._file_digest(path)
    assert first == hashlib.sha256(b"a" * 100).hexdigest()
    opened: list[Path] = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or original(self, *a, **k))
    assert loader._file_digest(path) == first
    assert not opened
    path.write_bytes(b"b" * 100)
    os.utime(path, (1, 1))
    assert loader._file_digest(path) == hashlib.sha256(b"b" * 100).hexdigest()


def test_known_digests_are_sha256_and_on_one_side_only() -> None:
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in [*loader.KNOWN, *loader.KNOWN_WRONG])
    assert not loader.KNOWN.keys() & loader.KNOWN_WRONG.keys()


def converted_clip(tmp_path: Path) -> Path:
    """What `convert` splits off a checkpoint that holds a CLIP model."""
    module = torch.load(DATA / "tiny.mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    module |= {f"image_encoder.model.{name}": tensor for name, tensor in (tower_weights() | TEXT).items()}
    torch.save({"module": module}, tmp_path / "source.pt")
    written = convert(tmp_path / "source.pt", tmp_path / "target.safetensors")
    (path,) = [path for path in written if path.name == "target.clip.safetensors"]
    return path


@needs_open_clip
def test_what_convert_wrote_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = converted_clip(tmp_path)
    assert warnings_of(caplog, path) == []
    image, weights = random_image(1, 3, 28, 28), tower_weights()
    expected = tower_by_hand(preprocess_by_hand(image, SMALL.image_size), weights)
    torch.testing.assert_close(load_small(path)(image), expected, rtol=0, atol=1e-10)


@needs_open_clip
def test_a_conversion_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = converted_clip(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the lowest-lying bits of a number: finite still
    path.write_bytes(content)
    assert "does not match the SHA-256 written in it" in refusal(path)


# ---- without open_clip


def test_the_module_imports_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for name in [name for name in sys.modules if name.startswith("infdit.clip")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(infdit, "clip", infdit.clip)  # which the second import sets, and which is to be put back
    module = importlib.import_module("infdit.clip")
    assert module.CLIPEncoder is not CLIPEncoder
    assert module.preprocess(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("broken", [False, True])
def test_without_open_clip_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    if broken:  # what a torchvision for another torch does
        (tmp_path / "open_clip").mkdir()
        (tmp_path / "open_clip" / "__init__.py").write_text("raise RuntimeError('operator nms\\ndoes not exist')")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "open_clip", None)
    for attempt in (CLIPEncoder, lambda: load_clip(tmp_path / "any.safetensors")):
        with pytest.raises(OpenCLIPMissingError, match="pip install open_clip_torch") as caught:
            attempt()
        assert isinstance(caught.value, ImportError)
        assert "\n" not in str(caught.value)
        assert ("operator nms does not exist" in str(caught.value)) == broken


# ---- full size


@pytest.mark.slow
@needs_open_clip
def test_full_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        for name, shape in tower_shapes(towers.VIT_L_14).items()
    }
    encoder = load_clip(save(tmp_path, weights), dtype=torch.bfloat16, device="cpu")
    assert sum(p.numel() * p.element_size() for p in encoder.parameters()) == 2 * 303_966_208
    with torch.inference_mode():
        vector = encoder(random_image(1, 3, 48, 64, dtype=torch.float32))
    assert vector.shape == (1, 768)
    torch.testing.assert_close(vector.norm(dim=-1), torch.ones(1), rtol=0, atol=1e-5)
