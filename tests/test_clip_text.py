"""CLIP's vectors of texts, and the direction they give, against clipmath.py; tokens against the published merges."""

from __future__ import annotations

import gc
import gzip
import logging
import math
import socket
from pathlib import Path

import pytest
import torch
from clipmath import (
    END,
    SMALL,
    SMALL_TEXT,
    START,
    Weights,
    load_small,
    needs_open_clip,
    preprocess_by_hand,
    preprocess_whole_by_hand,
    quick_gelu,
    random_image,
    save,
    text_by_hand,
    text_shapes,
    text_weights,
    tower_by_hand,
    tower_shapes,
    tower_weights,
    unit,
)

from infdit.checkpoint import convert
from infdit.clip import CLIPEncoder, clip_embedding, guide, load_clip, loader, text_direction
from infdit.clip import encoder as towers
from infdit.clip.encoder import CLIPTextEncoder, tokenize
from infdit.tensorfile import CheckpointError

DATA = Path(__file__).parent / "data"
CAT = [320, 1125, 539, 320, 2368]  # "a photo of a cat", as printed in many a notebook
POSITIVE, NEGATIVE = "HD, high resolution, clear.", "noisy,blurry,low resolution."
CLEAR = [4414, 267, 1400, 9977, 267, 3143, 269]
NOISY = [33495, 267, 21977, 267, 1042, 9977, 269]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPEncoder, Weights]:
    """A small CLIP with both towers, and its weights."""
    weights = tower_weights() | text_weights()
    path = save(tmp_path_factory.mktemp("full"), weights | {"logit_scale": torch.tensor(4.6)})
    return load_small(path), weights


def half(tmp_path: Path) -> Path:
    """CLIP as a published checkpoint holds it: the text's transformer and ln_final are gone, the rest is there."""
    kept = {n: t for n, t in text_weights().items() if not n.startswith(("transformer.", "ln_final."))}
    tensors = {f"image_encoder.model.{name}": tensor for name, tensor in (tower_weights() | kept).items()}
    inf_dit = {"transformer.layers.0.attention.dense.weight": torch.zeros(4, 4)}  # none of CLIP's
    return save(tmp_path, tensors | inf_dit)


# ---- tokens


@needs_open_clip
@pytest.mark.parametrize(
    ("text", "pieces", "ids"),
    [
        (POSITIVE, "hd , high resolution , clear .", CLEAR),
        (NEGATIVE, "noisy , blurry , low resolution .", NOISY),
        ("a photo of a cat", "a photo of a cat", CAT),
    ],
)
def test_tokens_are_entries_of_the_published_merges(text: str, pieces: str, ids: list[int]) -> None:
    """Entry 512 + i is what merge i makes; before these come 256 bytes, and 256 that end a word, ! being the first."""
    import open_clip

    lines = gzip.decompress((Path(str(open_clip.__file__)).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = ["".join(line.split()) for line in lines.decode().split("\n")[1:]]
    words = [256 + ord(p) - ord("!") if len(p) == 1 else 512 + merges.index(f"{p}</w>") for p in pieces.split()]
    assert words == ids
    assert tokenize([text]).tolist() == [[START, *ids, END] + [0] * (75 - len(ids))]


@needs_open_clip
def test_case_and_spaces_do_not_count_and_no_text_is_two_marks() -> None:
    rows = tokenize(["a photo of a cat", "  A  PHOTO\nof a Cat ", ""])
    assert rows.dtype == torch.int64
    assert torch.equal(rows[0], rows[1])
    assert rows[2].tolist() == [START, END] + [0] * 75


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("infdit.clip")]


@needs_open_clip
def test_a_text_is_cut_at_77_tokens_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    fits, long = "cat " * 75, "cat " * 75 + "in a hat, " + "on a mat " * 30
    with caplog.at_level(logging.WARNING):
        rows = tokenize([fits])
        assert warnings_of(caplog) == []
        rows = torch.cat([rows, tokenize([long])])
    assert rows.shape == (2, 77)
    assert rows.tolist() == [[START, *[2368] * 75, END]] * 2
    (message,) = warnings_of(caplog)
    assert "reads 75 tokens and this text has 169" in message
    assert "'in a hat , on a mat" in message
    assert len(message) < 200


@needs_open_clip
def test_one_token_too_many_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize(["cat " * 76])
    assert len(warnings_of(caplog)) == 1


@needs_open_clip
def test_texts_need_no_network(full: tuple[CLIPEncoder, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("asked for the network")

    towers._tokenizer.cache_clear()
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert full[0].text(["anything"]).shape == (1, SMALL_TEXT.output_dim)


# ---- the tower


@needs_open_clip
def test_vectors_are_the_written_out_transformer(full: tuple[CLIPEncoder, Weights]) -> None:
    encoder, weights = full
    texts = [POSITIVE, NEGATIVE, "", "cat " * 99]
    expected = torch.cat([text_by_hand(ids, weights) for ids in (CLEAR, NOISY, [], [2368] * 75)])
    vectors = encoder.text(texts)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert (vectors[0] - text_by_hand(CLEAR, weights, quick_gelu)[0]).abs().max() > 1e-3


@needs_open_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_computed_in_float32_at_least(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tower_weights() | text_weights()
    encoder = load_small(save(tmp_path, {name: tensor.float() for name, tensor in weights.items()}), dtype)
    vectors = encoder.text([POSITIVE, NEGATIVE])
    assert vectors.dtype == torch.float32
    expected = torch.cat([text_by_hand(CLEAR, weights), text_by_hand(NOISY, weights)])
    torch.testing.assert_close(vectors.double(), expected, rtol=0, atol=1e-5)


@needs_open_clip
def test_the_default_sizes_are_those_beside_vit_l_14() -> None:
    with torch.device("meta"):
        tower = CLIPTextEncoder().tower
    state = tower.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == text_shapes(towers.VIT_L_14_TEXT)
    assert sum(tensor.numel() for tensor in state.values()) == 123_650_304
    attentions = [module for module in tower.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    assert [attention.num_heads for attention in attentions] == [12] * 12


@needs_open_clip
def test_the_tower_is_there_only_while_a_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alive() -> int:
        return sum(type(thing) is CLIPTextEncoder for thing in gc.get_objects())

    placed: list[str] = []
    place = loader._place
    noted = lambda path, tensors, *to: placed.extend(tensors) or place(path, tensors, *to)  # noqa: E731
    monkeypatch.setattr(loader, "_place", noted)
    during: list[int] = []
    forward = CLIPTextEncoder.forward
    monkeypatch.setattr(CLIPTextEncoder, "forward", lambda *a: during.append(alive()) or forward(*a))
    encoder = load_small(save(tmp_path, tower_weights() | text_weights()))
    image = random_image(1, 3, 28, 28)
    encoder(image)
    clip_embedding(encoder, image)
    clip_embedding(encoder, image, "same", " same ")
    clip_embedding(encoder, image, POSITIVE, NEGATIVE, strength=0)
    assert (set(placed), during) == (set(tower_weights()), [])
    clip_embedding(encoder, image, POSITIVE, NEGATIVE)
    assert set(placed) == set(tower_weights()) | set(text_weights())
    assert (during, alive()) == ([1], 0)  # both texts at once, and gone without a garbage collection


# ---- files


@needs_open_clip
@pytest.mark.parametrize("prefix", ["", "module.", "image_encoder.model."])
def test_text_towers_are_read_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    weights = tower_weights() | text_weights()
    inf_dit = {"transformer.layers.0.attention.dense.weight": torch.zeros(4, 4)} if prefix else {}
    path = save(tmp_path, {prefix + name: tensor for name, tensor in weights.items()} | inf_dit)
    torch.testing.assert_close(load_small(path).text([POSITIVE]), text_by_hand(CLEAR, weights), rtol=0, atol=1e-10)


@needs_open_clip
def test_a_checkpoints_half_gives_the_vectors_of_a_full_file(
    tmp_path: Path, full: tuple[CLIPEncoder, Weights]
) -> None:
    image = random_image(2, 3, 40, 90)
    encoder = load_small(half(tmp_path))
    for view in ("crop", "pad"):
        assert torch.equal(encoder(image, view), full[0](image, view))
    assert torch.equal(clip_embedding(encoder, image, POSITIVE, NEGATIVE, strength=0), full[0](image))


def one_sentence(error: pytest.ExceptionInfo[CheckpointError], path: Path) -> str:
    message = str(error.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message.removeprefix(str(path))) < 300
    return message


@needs_open_clip
def test_text_for_the_half_is_refused_in_one_sentence_that_names_the_file_to_get(tmp_path: Path) -> None:
    source = torch.load(DATA / "tiny.mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    clip = tower_weights() | {"logit_scale": torch.tensor(4.6)}
    clip = {f"image_encoder.model.{name}": tensor for name, tensor in clip.items()}
    torch.save({"module": source["module"] | clip}, tmp_path / "source.pt")
    paths = convert(tmp_path / "source.pt", tmp_path / "target.safetensors")
    (split,) = [path for path in paths if path.name == "target.clip.safetensors"]
    for path in (half(tmp_path), split, tmp_path / "source.pt"):
        with pytest.raises(CheckpointError) as caught:
            clip_embedding(load_small(path), random_image(1, 3, 28, 28), negative="noisy")
        message = one_sentence(caught, path)
        assert "holds only the half of CLIP that sees pictures" in message
        assert "give open_clip_pytorch_model.bin of laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K" in message


@needs_open_clip
def test_wrong_and_damaged_text_towers_are_told_when_a_text_comes(tmp_path: Path) -> None:
    weights = tower_weights() | text_weights()
    del weights["ln_final.bias"]
    weights["text_projection"] = torch.zeros(32, 20)
    weights["transformer.resblocks.2.ln_1.weight"] = torch.zeros(32)
    path = save(tmp_path, weights)
    encoder = load_small(path)
    with pytest.raises(CheckpointError) as caught:
        encoder.text(["x"])
    message = one_sentence(caught, path)
    assert "its text tower lacks ln_final.bias" in message
    assert "unknown transformer.resblocks.2.ln_1.weight" in message
    assert "text_projection (torch.float32 (32, 20) instead of (32, 24))" in message
    weights = tower_weights() | text_weights()
    weights["token_embedding.weight"][7, 7] = math.inf
    path = save(tmp_path, weights)
    with pytest.raises(CheckpointError) as caught:
        load_small(path).text(["x"])
    assert "token_embedding.weight is not finite" in one_sentence(caught, path)


@needs_open_clip
def test_an_encoder_without_a_file_says_so() -> None:
    with torch.device("meta"):
        encoder = CLIPEncoder(SMALL)
    with pytest.raises(ValueError, match="use load_clip"):
        encoder.text(["x"])


# ---- guidance


@needs_open_clip
@pytest.mark.parametrize(
    ("positive", "negative", "ids"),
    [
        (POSITIVE, NEGATIVE, (CLEAR, NOISY)),
        (POSITIVE, "", (CLEAR, [])),  # the other is the empty text
        ("", NEGATIVE, ([], NOISY)),
        (" ", "a photo of a cat", ([], CAT)),
    ],
)
@pytest.mark.parametrize("strength", [0.5, 2.0, 10.0])
def test_guidance_is_equation_5(
    full: tuple[CLIPEncoder, Weights], positive: str, negative: str, ids: tuple[list[int], list[int]], strength: float
) -> None:
    encoder, weights = full
    image = random_image(2, 3, 30, 70)
    towards, away = (text_by_hand(tokens, weights) for tokens in ids)
    for view, pixels in (("crop", preprocess_by_hand), ("pad", preprocess_whole_by_hand)):
        picture = tower_by_hand(pixels(image, SMALL.image_size), weights)
        expected = unit(picture + strength * (towards - away))
        found = clip_embedding(encoder, image, positive, negative, strength, view)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if strength == 2:  # as published
        assert torch.equal(clip_embedding(encoder, image, positive, negative, view="pad"), found)


@needs_open_clip
@pytest.mark.parametrize(
    ("positive", "negative", "strength"),
    [("", "", 2.0), (" ", "\n", 2.0), (POSITIVE, NEGATIVE, 0.0), (POSITIVE, POSITIVE + " ", 5.0)],
)
def test_without_a_direction_the_vector_is_the_pictures_to_the_last_bit(
    full: tuple[CLIPEncoder, Weights], positive: str, negative: str, strength: float
) -> None:
    image = random_image(3, 3, 30, 70)
    assert torch.equal(clip_embedding(full[0], image, positive, negative, strength), full[0](image))


@needs_open_clip
def test_more_strength_leads_further_and_exchanged_texts_the_other_way(full: tuple[CLIPEncoder, Weights]) -> None:
    encoder, image = full[0], random_image(1, 3, 30, 30)
    direction = text_direction(encoder, POSITIVE, NEGATIVE)
    assert direction is not None
    assert direction.shape == (SMALL_TEXT.output_dim,)
    along = [
        float(clip_embedding(encoder, image, POSITIVE, NEGATIVE, strength) @ unit(direction))
        for strength in (0, 0.25, 0.5, 1, 2, 4, 8)
    ]
    assert along == sorted(along)
    assert along[-1] - along[0] > 0.1
    other_way = text_direction(encoder, NEGATIVE, POSITIVE)
    assert other_way is not None
    torch.testing.assert_close(other_way, -direction, rtol=0, atol=1e-12)


def test_guide_by_hand() -> None:
    """I = (1, 0), d = (−1/2, 3/4), α = 2: (0, 3/2), of length 1 (0, 1); at α = 4/5 (3/5, 3/5)."""
    picture, direction = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([-0.5, 0.75])
    assert guide(picture, direction, 2.0)[0].tolist() == [0, 1]
    torch.testing.assert_close(guide(picture, direction, 0.8)[0], torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(guide(picture, direction, 2.0)[1], torch.tensor([-0.4, 2.3]) / math.hypot(0.4, 2.3))
    assert guide(picture, direction, 0.0) is picture
    assert guide(picture, None, 2.0) is picture


@pytest.mark.parametrize("strength", [-0.1, 10.1, math.nan, math.inf])
def test_strengths_out_of_range_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 10"):
        guide(torch.ones(1, 4) / 2, torch.ones(4), strength)


@needs_open_clip
def test_a_strength_out_of_range_is_refused_before_anything_is_read(full: tuple[CLIPEncoder, Weights]) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 10"):
        clip_embedding(full[0], torch.zeros(0), strength=-1)


# ---- full size


@pytest.mark.slow
@needs_open_clip
def test_full_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = tower_shapes(towers.VIT_L_14) | text_shapes(towers.VIT_L_14_TEXT)
    weights = {n: torch.randn(s, generator=generator).mul_(0.02).to(torch.bfloat16) for n, s in shapes.items()}
    encoder = load_clip(save(tmp_path, weights), dtype=torch.bfloat16, device="cpu")
    assert sum(p.numel() * p.element_size() for p in encoder.parameters()) == 2 * 303_966_208
    image = random_image(1, 3, 48, 64, dtype=torch.float32)
    alone, led = encoder(image), clip_embedding(encoder, image, POSITIVE, NEGATIVE)
    assert led.shape == alone.shape == (1, 768)
    torch.testing.assert_close(led.norm(dim=-1), torch.ones(1), rtol=0, atol=1e-5)
    assert (led - alone).norm() > 0.01
