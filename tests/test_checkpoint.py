"""Files that are right are read in full, files that are wrong are refused in a sentence, and none is ever run."""

import argparse
import copy
import io
import json
import pickle
import random
import re
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import dense
import forks
import numpy
import pytest
import torch
from conftest import DATA
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infdit
from infdit import CheckpointError, InfDiTConfig
from infdit.checkpoint import read_checkpoint
from infdit.tensorfile import read_tensors, tensor_digest

PUBLISHED = DATA / "tiny.mp_rank_00_model_states.pt"
TINY = InfDiTConfig(3, 64, 4, 4, 32, 32, 128)


def rezipped(change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """The published file, its members changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(PUBLISHED) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def with_program(target: Path, program: bytes) -> Path:
    """The published file with another pickle."""
    target.write_bytes(rezipped(lambda name, old: program if name.endswith("data.pkl") else old))
    return target


# ---- what is right


def test_published_file_is_read_like_torch_reads_it() -> None:
    expected = torch.load(PUBLISHED, weights_only=False)["module"]  # our own file
    found = read_tensors(PUBLISHED).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_all_but_tensors_is_walked_over(tmp_path: Path) -> None:
    """What trainers put beside the weights, and every kind of view of a storage."""
    base = torch.randn(7, 5)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    tensors = {f"{dtype}": torch.arange(6).to(dtype) for dtype in (*dtypes, torch.uint8, torch.bool, torch.complex64)}
    tensors |= {"base": base, "turned": base.t(), "part": base[2:5, 1::2], "scalar": torch.tensor(3.0)}
    tensors |= {"empty": torch.empty(0, 4), "parameter": torch.nn.Parameter(base)}
    beside = {
        "arguments": argparse.Namespace(path=tmp_path, size=torch.Size([3]), dtype=torch.float16),
        "random": (numpy.random.get_state(), random.getstate(), torch.get_rng_state()),
        "containers": [{1, 2}, frozenset("a"), defaultdict(int, a=1), {(1, 2): b"x"}, 1j, 2**80, OrderedDict(a={})],
        "optimizer": torch.optim.Adam([torch.nn.Parameter(base)]).state_dict(),
    }
    for state in ({"module": tensors, **beside}, {**beside, "state_dict": OrderedDict(tensors)}):
        torch.save(state, tmp_path / "m.pt")
        found = read_tensors(tmp_path / "m.pt").tensors
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(found[name].dtype == tensors[name].dtype for name in tensors)


def test_every_key_is_accounted_for() -> None:
    checkpoint = read_checkpoint(PUBLISHED)
    everything = set(read_tensors(PUBLISHED).tensors)
    assert set(checkpoint.tensors) | set(checkpoint.dropped) == everything
    assert not set(checkpoint.tensors) & set(checkpoint.dropped)
    assert all(re.search(r"rope\.|k_layer_norm|position_embeddings", name) for name in checkpoint.dropped)
    assert checkpoint.config == TINY
    parameters = dict(infdit.load_model(PUBLISHED).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == sum(t.numel() for t in checkpoint.tensors.values())


def test_parameters_of_the_published_size() -> None:
    """The published parameters, less the k_layer_norm that is never used: 28 layers of weight and bias of 80."""
    with torch.device("meta"):
        model = infdit.model.InfDiT(InfDiTConfig())
    assert sum(p.numel() for p in model.parameters()) == 753_435_248 - 28 * 2 * 80


def test_convert_and_back(tmp_path: Path) -> None:
    target = tmp_path / "tiny.safetensors"
    assert infdit.convert(PUBLISHED, target) == [target]
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert InfDiTConfig(**json.loads(metadata["config"])) == TINY
    paper = {"steps": 20, "sampler": "heun", "sigma_max": 40.0, "sigma_min": 0.002}
    assert json.loads(metadata["defaults"]) == paper | {"start_noise": 1.0, "most_steps": None}
    assert metadata["sha256"] == tensor_digest(load_file(target))
    old, new = infdit.load_model(PUBLISHED, torch.float32), infdit.load_model(target, torch.float32)
    assert new.config == TINY
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert read_checkpoint(target).verify()
    assert not read_checkpoint(PUBLISHED).verify()
    again = tmp_path / "again.safetensors"
    infdit.convert(target, again)
    with safe_open(again, "pt") as file:
        assert file.metadata() == metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "tiny.safetensors"]


def test_clip_inside_the_checkpoint_goes_beside_it(tmp_path: Path) -> None:
    state = torch.load(PUBLISHED, weights_only=False)
    clip = {"visual.proj": torch.ones(4, 3), "logit_scale": torch.tensor(2.0)}
    state["module"] |= {f"image_encoder.model.{name}": tensor for name, tensor in clip.items()}
    source = tmp_path / "with_clip.pt"
    torch.save(state, source)
    written = infdit.convert(source, tmp_path / "x.safetensors")
    assert [path.name for path in written] == ["x.clip.safetensors", "x.safetensors"]
    found = load_file(written[0])
    assert found.keys() == clip.keys()
    assert all(torch.equal(found[name], clip[name]) for name in clip)
    assert infdit.load_model(source).config == TINY


def test_dtype_device_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    defaults = {"steps": 3, "sampler": "euler", "sigma_max": 5.0, "sigma_min": 0.01}
    save_file(dense.random_weights(0, dtype=torch.float16), path, {"defaults": json.dumps(defaults)})
    model = infdit.load_model(path, dtype=torch.float32, device="cpu")
    assert (model.dtype, model.device, model.training) == (torch.float32, torch.device("cpu"), False)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.defaults == infdit.SamplingDefaults(**defaults)
    assert model.config.position_period == 1024
    assert infdit.load_model("mini").config.vector_dim == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_maps_the_file_instead_of_reading_it(tmp_path: Path) -> None:
    """With 85 MB of weights the process grows by little memory of its own: pages of the file are not its own."""
    weights = dense.random_weights(0, layers=5, hidden=512, heads=8, vector_dim=0, dtype=torch.float32)
    save_file(weights, tmp_path / "m.safetensors", {})
    torch.save({"module": weights}, tmp_path / "m.pt")
    size = sum(t.numel() * t.itemsize for t in weights.values())

    def private() -> int:
        held = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"RssAnon:\s*(\d+)", held)[1]) * 1024

    def load() -> None:
        infdit.load_model("mini")
        for name in ("m.safetensors", "m.pt"):
            before = private()
            model = infdit.load_model(tmp_path / name, torch.float32, "cpu")
            assert private() - before < size / 5, name
            del model

    process = forks.fork(load)
    process.join()
    assert process.exitcode == 0


# ---- what is wrong


class Bomb:
    """Pickles to a call of os.system."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.proof}",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    proof, path, name = tmp_path / "was here", tmp_path / "bomb.pt", "time_embed.mlp.0.bias"
    state = torch.load(PUBLISHED, weights_only=False)
    torch.save({"a": Bomb(proof), "hyper": OrderedDict(b=Bomb(proof)), **state}, path)
    assert infdit.load_model(path).config == TINY
    state["module"][name] = Bomb(proof)  # in place of a weight
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        infdit.load_model(path)
    assert not proof.exists()


def test_modules_named_in_a_checkpoint_are_not_imported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' is no named tensor"):
        read_tensors(with_program(tmp_path / "import.pt", b"\x80\x02" + entry(b"cthis\ns\n") + b"."))
    assert "this" not in sys.modules


def storage(key: str) -> bytes:
    """Four float32 by reference."""
    return b"(U\x07storagectorch\nFloatStorage\nU" + bytes([len(key)]) + key.encode() + b"U\x03cpuK\x04tQ"


ZERO, ONE, FOUR, HUGE = b"K\x00", b"K\x01\x85", b"K\x04\x85", b"J\xff\xff\xff\x7f"


def endless(before: bytes = b"N", times: int = 60) -> bytes:
    """A tuple of twice a tuple of twice a tuple …: 2^times places to look at, in memory `times`."""
    return before + b"".join(b"q%ch%c\x86" % (n, n) for n in range(times))


def tensor(source: bytes = storage("0"), offset: bytes = ZERO, size: bytes = FOUR, stride: bytes = ONE) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + source + offset + size + stride + b"\x89}tR"


def entry(value: bytes) -> bytes:
    return b"}U\x01a" + value + b"s"


HOSTILE = {
    "a tensor that ends beyond its storage": entry(tensor(size=HUGE + b"\x85")),
    "a tensor that starts beyond its storage": entry(tensor(offset=HUGE)),
    "a tensor of a huge stride": entry(tensor(stride=b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85")),
    "a tensor of a stride beyond 64 bits": entry(tensor(stride=b"\x8a\x09" + b"\xff" * 8 + b"\x3f\x85")),
    "a tensor of a negative stride": entry(tensor(offset=b"K\x04", stride=b"J\xff\xff\xff\xff\x85")),
    "a tensor of a negative offset": entry(tensor(offset=b"J\xff\xff\xff\xff")),
    "a tensor of more elements than its storage": entry(tensor(size=HUGE + b"\x85", stride=b"K\x00\x85")),
    "a tensor without strides": entry(tensor(stride=b")")),
    "a tensor of text": entry(tensor(size=b"U\x01x")),
    "a tensor of endless sizes": entry(tensor(size=endless())),
    "a tensor of an endless offset": entry(tensor(offset=endless())),
    "a tensor of dimensions without end": entry(tensor(size=b"(" + b"K\x01" * 50_000 + b"t")),
    "a tensor out of a tensor of arguments": entry(b"ctorch._utils\n_rebuild_tensor_v2\n" + tensor() + b"R"),
    "a storage that is not there": entry(tensor(storage("999"))),
    "a storage outside of data": entry(tensor(storage("../version"))),
    "a storage of another kind": entry(b"U\x04evilQ"),
    "a storage of endless tuples": entry(endless() + b"Q"),
    "a key of nested tuples": b"}N" + b"\x85" * 1_000_000 + b"K\x01s",
    "a key of endless tuples": b"}" + endless() + b"K\x01s",
    "keys that are no text": b"}K\x01" + tensor() + b"s",
    "a memo of 2^32 places": b"}r\xff\xff\xff\xff",
    "a text of 2 GB": b"X\xff\xff\xff\x7f",
    "bytes of 2^60": b"\x96" + struct.pack("<Q", 2**60),
    "a number of 100000 digits": entry(b"L" + b"9" * 100_000 + b"L\n"),
    "lists in lists": b"]" * 200_000 + b"a" * 199_999,
    "a pickle of 5 MB": b"}" + b"N0" * 2_500_000,
    "a call of text": b"U\x01x)R",
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}U\x07__doc__U\x05pwnedsb",
    "an extension": b"\x82\x01",
    "nothing on the stack": b"",
    "no dict": b"K\x01",
    "noise": bytes(range(256)),
    "no end": b"}(",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_pickles(program: bytes, tmp_path: Path) -> None:
    path = with_program(tmp_path / "hostile.pt", b"\x80\x02" + program + b".")
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: .+; .+\.$"):
        print(read_tensors(path))


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """A campaign of flipped bytes in the pickle: read, or refused as damaged; nothing else."""
    with zipfile.ZipFile(PUBLISHED) as archive:
        program = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        damaged = bytearray(program)
        for _ in range(3):
            at, value = torch.randint(0, 2**31, (2,), generator=generator).tolist()
            damaged[at % len(program)] = value % 256
        try:
            read_checkpoint(with_program(tmp_path / "damaged.pt", bytes(damaged)))
        except CheckpointError as error:
            assert len(str(error)) < 2000


def zip_of_aliases() -> bytes:
    """The published file with a directory that names the same bytes again and again."""
    file = io.BytesIO(rezipped(lambda name, old: old))
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        archive.filelist += [copy.copy(largest) for _ in range(50)]
        archive.writestr("x", b"")  # so that the directory is written
    return file.getvalue()


def other_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    return file.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


PT = PUBLISHED.read_bytes()
SAFETENSORS = (DATA / "tiny.safetensors").read_bytes()
DAMAGED = {
    "cut in half": (lambda: PT[: len(PT) // 2], "not a zip file"),
    "a few bytes": (lambda: PT[:100], "not a zip file"),
    "one bit": (lambda: flipped(PT, len(PT) // 2), "checksum"),
    "deflated": (lambda: rezipped(lambda name, old: old, zipfile.ZIP_DEFLATED), "compressed"),
    "packed by LZMA": (lambda: rezipped(lambda name, old: old, zipfile.ZIP_LZMA), "compressed"),
    "big-endian": (lambda: rezipped(lambda name, old: b"big" if name.endswith("byteorder") else old), "big-endian"),
    "a zip of aliases": (zip_of_aliases, "share their bytes"),
    "a zip of something else": (other_zip, r"data\.pkl"),
    "old torch": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "before version 1.6"),
    "a plain pickle": (lambda: pickle.dumps({"a": 1}, protocol=2), "not a complete"),
    "safetensors cut": (lambda: SAFETENSORS[:-1], "not a complete"),
    "safetensors header only": (lambda: SAFETENSORS[:50], "not a complete"),
    "safetensors huge header": (lambda: struct.pack("<Q", 2**60) + SAFETENSORS[8:], "not a complete"),
    "html of a share page": (lambda: b"<!DOCTYPE html><html>log in</html>", "not a complete"),
    "empty": (lambda: b"", "not a complete"),
}


@pytest.mark.parametrize(("make", "message"), DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_files(make: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"bad\.pt: .*{message}.*; .+\.$"):
        print(read_tensors(tmp_path / "bad.pt"))


def test_convert_never_harms_its_source(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    infdit.convert(PUBLISHED, model)
    clip = tmp_path / "m.clip.safetensors"
    clip.write_bytes(b"mine")
    infdit.convert(model, model)
    assert clip.read_bytes() == b"mine"
    source = model.rename(tmp_path / "q.clip.safetensors")
    with pytest.raises(CheckpointError, match="take the place of its source"):
        infdit.convert(source, tmp_path / "q.safetensors")
    assert source.exists()


def test_tensors_that_share_memory_are_converted_or_refused(tmp_path: Path) -> None:
    state = torch.load(PUBLISHED, weights_only=False)
    both = state["module"]["mixins.adaln_layer.q_layer_norm.0.bias"]
    state["module"]["mixins.adaln_layer.q_layer_norm.1.bias"] = both
    torch.save(state, tmp_path / "tied.pt")
    with pytest.raises(CheckpointError, match="share memory"):
        infdit.convert(tmp_path / "tied.pt", tmp_path / "tied.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tied.pt"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be opened.*check the path"):
        infdit.load_model(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="is a folder; give a file"):
        infdit.load_model(tmp_path)


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "unknown key": (lambda w: w.update({"lora.up": torch.ones(1)}), "lora.up"),
    "missing bias": (lambda w: w.pop("time_embed.mlp.2.bias"), "noise_embed.2.bias is missing"),
    "missing table": (lambda w: w.pop("mixins.adaln_layer.re_pos_embed"), "re_pos_embed is missing"),
    "missing layer": (lambda w: [w.pop(k) for k in list(w) if "layers.2." in k], "4 slots of 3 layers, and 2 layers"),
    "wrong shape": (
        lambda w: w.update({"mixins.final_layer.linear.bias": torch.ones(47)}),
        r"head.bias has shape \(47,\) instead of \(48,\)",
    ),
    "integers": (
        lambda w: w.update({"mixins.final_layer.linear.bias": torch.ones(48, dtype=torch.int64)}),
        "int64, not one of",
    ),
    "NaN": (lambda w: w["time_embed.mlp.0.weight"].fill_(float("nan")), "not finite"),
    "infinity": (lambda w: w["mixins.adaln_layer.re_pos_embed"][2, 3].fill_(float("inf")), "slot_embed.*not finite"),
    "fp8": (
        lambda w: w.update({"mixins.final_layer.linear.bias": torch.ones(48).to(torch.float8_e4m3fn)}),
        "float8_e4m3fn, not one of",
    ),
    "layers without end": (
        lambda w: w.update({"mixins.adaln_layer.re_pos_embed": torch.ones(10**9, 0, 2, 8)}),
        "1000000000 layers, and 3 layers",
    ),
    "one layer too many": (
        lambda w: w.update({"mixins.adaln_layer.q_layer_norm.3.bias": torch.ones(8)}),
        "layers.3.qk_norm.bias is one layer too many",
    ),
    "odd number of tokens": (
        lambda w: w.update({"mixins.adaln_layer.lr_query_position_embedding": torch.ones(1, 65, 2, 8)}),
        "query_position has shape",
    ),
    "odd heads": (
        lambda w: w.update({"mixins.adaln_layer.re_pos_embed": torch.ones(3, 4, 2, 9)}),
        "multiple of 4",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_tensors_are_named(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    weights = dense.random_weights(0, dtype=torch.float32)
    change(weights)
    path = tmp_path / "wrong.safetensors"
    save_file(weights, path, {})
    with pytest.raises(CheckpointError, match=message):
        infdit.load_model(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": '{"num_layers": 4}'}, "contradicts"),
        ({"config": '{"position_period": "x"}'}, "sizes that make no Inf-DiT"),
        ({"config": '{"position_period": 0}'}, "at least 1"),
        ({"config": "{"}, "unreadable metadata"),
        ({"config": "[" * 200_000}, "unreadable metadata"),
        ({"config": "1" * 5000}, "unreadable metadata"),
        ({"config": '{"position_period": 2.5}'}, "whole numbers"),
        ({"config": '{"position_period": 1' + "0" * 400 + "}"}, "whole numbers"),
        ({"defaults": '{"steps": 10000000000}'}, "whole number up to"),
        ({"defaults": '{"sigma_max": 1' + "0" * 400 + "}"}, "defaults"),
        ({"defaults": '{"sampler": "magic"}'}, "magic"),
        ({"defaults": '{"steps": 0}'}, "at least 1"),
        ({"defaults": '{"steps": "many"}'}, "defaults"),
        ({"defaults": '{"sigma_max": -1}'}, "sigma_max"),
    ],
)
def test_wrong_metadata(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    save_file(dense.random_weights(0, dtype=torch.float32), path, metadata)
    with pytest.raises(CheckpointError, match=message):
        infdit.load_model(path)


def test_a_changed_weight_does_not_match_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    infdit.convert(PUBLISHED, path)
    infdit.load_model(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        infdit.load_model(path)


def test_weights_that_overflow_a_dtype(tmp_path: Path) -> None:
    weights = dense.random_weights(0, dtype=torch.float32)
    weights["time_embed.mlp.0.weight"][3, 4] = 1e6
    path = tmp_path / "large.safetensors"
    save_file(weights, path, {})
    assert infdit.load_model(path, torch.bfloat16, "cpu").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"noise_embed\.0\.weight overflows torch\.float16; load it as"):
        infdit.load_model(path, torch.float16, "cpu")


def test_convert_does_not_leave_the_clip_of_another_model(tmp_path: Path) -> None:
    old = tmp_path / "tiny.clip.safetensors"
    save_file({"visual.proj": torch.ones(4, 3)}, old, {"source": infdit.clip.loader.CONVERTED})
    infdit.convert(PUBLISHED, tmp_path / "tiny.safetensors")
    assert not old.exists()


def test_convert_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    """Another tool's file under the name that a CLIP model would have, and one that is no tensor file at all."""
    mine = tmp_path / "tiny.clip.safetensors"
    save_file({"visual.proj": torch.ones(4, 3)}, mine, {"source": "somebody else"})
    for _ in range(2):
        before = mine.read_bytes()
        infdit.convert(PUBLISHED, tmp_path / "tiny.safetensors")
        assert mine.read_bytes() == before
        mine.write_bytes(b"notes")


def test_convert_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "tiny.safetensors"
    shutil.copy(PUBLISHED, target)
    before = target.read_bytes()
    monkeypatch.setattr(infdit.checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        infdit.convert(PUBLISHED, target)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    assert target.read_bytes() == before
    with pytest.raises(CheckpointError, match=r"end in \.safetensors"):
        infdit.convert(PUBLISHED, tmp_path / "x.ckpt")


def test_a_header_of_any_length_is_not_taken_for_an_old_pickle(tmp_path: Path) -> None:
    """The low byte of a .safetensors header's length is 0x80 for one in 32 files, which also begins a pickle."""
    for extra in range(0, 256, 8):
        path = tmp_path / f"{extra}.safetensors"
        save_file({"a" * (extra + 1): torch.zeros(2)}, path)
        assert list(read_tensors(path).tensors) == ["a" * (extra + 1)]
