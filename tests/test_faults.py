"""A campaign of faults: whatever happens ends in a right picture or in the error that is documented, soon.

Files are damaged at random, cut, or filled with absurd numbers; memory runs out at every allocation in turn; a run is
ended at every call of progress; disks fill up; a model's file is replaced. Few cases here, thousands with -m slow.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import tifffile
import torch
from clipmath import SMALL, SMALL_TEXT, tower_weights
from clipmath import save as save_clip
from conftest import DATA
from filebytes import chunk, interlaced, png, psd, stored, tiff
from peaks import TELLS, growth
from PIL import Image, features
from safetensors.torch import save_file
from shell import make_picture, run
from torch.utils._python_dispatch import TorchDispatchMode

import infdit
from benchmarks.peak_meter import PeakMeter
from infdit import InfDiTConfig, MemoryPlan
from infdit.checkpoint import read_checkpoint
from infdit.clip import load_clip
from infdit.device import out_of_memory
from infdit.memory.planner import OutOfMemory
from infdit.model import InfDiT
from infdit.picture import Picture, PictureError, check_png, read_note, read_picture, write_picture
from infdit.receipt import ReceiptError, parse_receipt
from infdit.resume import SavedRun
from infdit.samplers import get_sampler
from infdit.sidecar import Fit, tuned_levels, write_fits
from infdit.tensorfile import CheckpointError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # its own remarks about the damage
SOON = 10  # seconds
ABSURD = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16 - 1, 2**24)


# ---------------------------------------------------------------- files that somebody made up


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, with bits turned over, with bytes and numbers replaced, with parts moved, doubled or left out."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        size = max(1, len(found))
        at = rng.randrange(min(size, 400)) if rng.random() < 0.6 else rng.randrange(size)  # heads matter most
        end = min(size, at + rng.choice([1, 4, 8, 64, 1000]))
        match rng.randrange(8):
            case 0:
                del found[at:]
            case 1 if found:
                found[at] ^= 1 << rng.randrange(8)
            case 2 if found:
                found[at] = rng.randrange(256)
            case 3:
                found[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(ABSURD))
            case 4:
                found[at:at] = found[at:end]
            case 5:
                del found[at:end]
            case 6:
                found[at:end] = rng.randbytes(end - at)
            case 7:
                digits = [i for i in range(len(found)) if chr(found[i]).isdigit()][:2000]
                if digits:  # of texts like JSON's
                    i = rng.choice(digits)
                    found[i : i + 1] = rng.choice([b"-1", b"1e999", b"NaN", b"99999999999999999999", b"[]", b'"'])
    return mended(bytes(found)) if rng.random() < 0.5 else bytes(found)


def mended(data: bytes) -> bytes:
    """A PNG whose checksums are right again, so that more than these is put to the test."""
    if not data.startswith(b"\x89PNG"):
        return data
    place, found = 8, data[:8]
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        found, place = found + data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)), place + length + 12
    return found


@contextmanager
def soon() -> Iterator[None]:
    """Raise where something takes longer than it may."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {SOON} s")

    alarm = hasattr(signal, "SIGALRM")
    before = signal.signal(signal.SIGALRM, late) if alarm else None
    began = time.monotonic()
    try:
        if alarm:
            signal.alarm(SOON)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks about the damage
            yield
    finally:
        if alarm:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < SOON


def pictures(folder: Path) -> list[Path]:
    """One of every format and depth that is read."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8))
    kinds: dict[str, dict[str, Any]] = {
        "a.png": {}, "b.jpg": {"dpi": (72, 72), "xmp": b"<x/>"}, "c.webp": {"lossless": True}, "d.webp": {},
        "e.tif": {"compression": "tiff_lzw"}, "f.tif": {}, "g.bmp": {}, "h.gif": {}, "i.ppm": {},
        "o.jp2": {}, "p.tga": {"compression": "tga_rle"}, "q.pcx": {}, "r.sgi": {}, "s.ico": {"sizes": [(9, 9)]},
        **({"t.avif": {}} if "avif" in features.get_supported() else {}),
    }  # fmt: skip
    for name, options in kinds.items():
        exif = Image.Exif()
        exif.update({271: "Maker", 306: "2026:01:02 03:04:05", 274: 6})
        image.save(folder / name, **options, **({"exif": exif} if name[0] in "abce" else {}))
    (folder / "u.png").write_bytes(interlaced(np.asarray(image)))
    (folder / "v.png").write_bytes(interlaced(rng.integers(0, 65536, (9, 14, 3), np.uint16)))
    (folder / "w.psd").write_bytes(psd(np.asarray(image)))
    image.convert("CMYK").save(folder / "j.tif")
    image.convert("P").save(folder / "k.png")
    pixels = torch.from_numpy(rng.random((9, 14, 4), np.float32))
    deep = Picture(pixels, None, False, note='{"receipt": 1}', bits=16, exif=b"", xmp=b"<x/>", dpi=(300, 300))
    write_picture(folder / "l.png", deep)
    for name, bits in ("m.tif", 16), ("n.tif", 32):
        write_picture(folder / name, replace(deep, bits=bits))
    return sorted(folder.iterdir())


def read_any_picture(path: Path) -> None:
    try:
        seen = read_picture(path).pixels
        assert seen.isfinite().all() and seen.min() >= 0 and seen.max() <= 1
    except PictureError as error:
        assert "\n" not in str(error)
    read_note(path)
    try:
        check_png(path)
    except ValueError as error:
        assert "\n" not in str(error)


def checkpoints(folder: Path) -> list[Path]:
    tensors = {name: tensor.clone() for name, tensor in tiny().state_dict().items()}
    save_file(tensors, folder / "plain.safetensors", {"config": json.dumps({"position_period": 64})})
    shutil.copy(DATA / "tiny.mp_rank_00_model_states.pt", folder / "tiny.pt")
    return sorted(folder.iterdir())


def read_any_checkpoint(path: Path) -> None:
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        assert "\n" not in str(error)


def clips(folder: Path) -> list[Path]:
    tensors = tower_weights()
    torch.save(tensors, folder / "clip.pt")
    return [save_clip(folder, tensors), folder / "clip.pt"]


def read_any_clip(path: Path) -> None:
    try:
        load_clip(path, torch.float32, "cpu", SMALL, SMALL_TEXT)
    except CheckpointError as error:
        assert "\n" not in str(error)


def schedules(folder: Path) -> list[Path]:
    fits = {2: Fit((2.0, 0.5), 0.1, 0.2), 3: Fit((3.0, 1.0, 0.1), 0.1, 0.2)}
    write_fits(folder / "m.schedules.json", "a digest", {"a run": fits})
    return [folder / "m.schedules.json"]


def read_any_schedules(path: Path) -> None:
    try:
        for levels in tuned_levels(path.with_name("m.safetensors"), "a digest"):
            assert all(level > 0 for level in levels)
    except CheckpointError as error:
        assert "\n" not in str(error)


X = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)


def sample_with(path: Path, stop: bool = False) -> torch.Tensor:
    """What a sampler makes of X beside this state; stop: after a step."""
    saved, calls = SavedRun(path), []

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(sigma)
        if stop and len(calls) == 3:
            raise KeyboardInterrupt
        return x / 2

    saved.begin({"seed": 1}, [])
    sigmas, info = torch.tensor([1.0, 0.6, 0.4, 0.2, 0.1]), get_sampler("dpmpp_2m")
    return saved.sample(0, None, X, lambda steps: None, info, denoise, [X.clone()], sigmas, lambda state: None)


def states(folder: Path) -> list[Path]:
    with pytest.raises(KeyboardInterrupt):
        sample_with(folder / "run", stop=True)
    return [folder / "run.0.state"]


def read_any_state(path: Path) -> None:
    """A state that is not as it was written counts for nothing: what comes out is right."""
    name = path.with_name("run")
    path.replace(name.with_name("run.0.state"))
    assert torch.equal(sample_with(name), sample_with(path.with_name("afresh")))
    for file in path.parent.glob("*.state"):
        file.unlink()


def receipts(folder: Path) -> list[Path]:
    make_picture(folder / "in.png", (8, 6))
    assert run("upscale", folder / "in.png", "-o", folder / "out.png", "--receipt", folder / "out.json") == 0
    return [folder / "out.json", folder / "out.png"]


def read_any_receipt(path: Path) -> None:
    for text in (path.read_text("utf-8", "replace"), read_note(path)):
        try:
            parse_receipt(text)
        except ReceiptError as error:
            assert "\n" not in str(error)


READERS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path], None], int]] = {
    "pictures": (pictures, read_any_picture, 5500),
    "checkpoints": (checkpoints, read_any_checkpoint, 1500),
    "states": (states, read_any_state, 1000),
    "receipts": (receipts, read_any_receipt, 1000),
    "clips": (clips, read_any_clip, 500),
    "schedules": (schedules, read_any_schedules, 500),
}
AT_HAND = 48 * 2**20  # bytes that Python, Pillow and what unpacks take for themselves


def needed(path: Path) -> int:
    """Bytes that a file needs by itself: its own, or those of the float32 of the pixels that it says it has."""
    height, width = 0, 0
    with suppress(Exception), Image.open(path) as image:
        width, height = image.size
    with suppress(Exception), tifffile.TiffFile(path) as tiff:
        height, width = tiff.pages.first.imagelength, tiff.pages.first.imagewidth
    return max(path.stat().st_size, height * width * 4 * 4)


def read_within_need(read: Callable[[Path], None], path: Path) -> None:
    """Read a file soon, in no more than four times the memory that it needs."""
    most = 4 * needed(path) + AT_HAND

    def act() -> None:
        with soon():
            read(path)

    taken = growth(act) if TELLS else act() or 0
    assert taken <= most, f"{taken >> 20} MiB were taken, and {most >> 20} MiB would be right"


def culprits(reader: str, folder: Path, cases: int, seed: int) -> list[str]:
    """Damaged files that end in anything but success or a sentence, and in what; each is kept in the folder."""
    found: list[str] = []
    make, read, _ = READERS[reader]
    (folder / "whole").mkdir()
    (folder / "damaged").mkdir()
    files, rng = [(path, path.read_bytes()) for path in make(folder / "whole")], random.Random(seed)
    for case in range(cases):
        path, data = files[case % len(files)]
        target = folder / "damaged" / path.name
        target.write_bytes(damaged(data, rng))
        kept = target.read_bytes()
        try:
            read_within_need(read, target)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            culprit = folder / f"culprit {case} {path.name}"
            culprit.write_bytes(kept)
            found.append(f"{culprit}: {error!r}")
    return found


@pytest.mark.parametrize("reader", READERS)
def test_made_up_files_end_in_words(reader: str, tmp_path: Path) -> None:
    assert culprits(reader, tmp_path, READERS[reader][2] // 50, seed=0) == []


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_thousands_of_made_up_files_end_in_words(reader: str, tmp_path: Path) -> None:
    """10,000 in all."""
    assert culprits(reader, tmp_path, READERS[reader][2], seed=1) == []


def of_tags(count: int, each: int) -> bytes:
    """A TIFF of one grey pixel and so many tags that say that the same bytes are theirs, so many each."""
    size = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 1}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in size.items()]
    entries += [struct.pack("<HHII", tag, 7, each, 8) for tag in range(1000, 1000 + count)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(min(each, 2**15))


def in_jpeg(exif: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0" + exif)
    return file.getvalue()


@cache
def packed() -> bytes:
    return zlib.compress(bytes(2**27))


GREY = png(1, [b"\7"], 8, 0)
FLOAT = {256: 1, 257: 1, 258: 32, 259: 8, 262: 1, 277: 1, 339: 3}
LOOP = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 0)  # EXIF's own part is what it lies in
BOMBS: dict[str, Callable[[], bytes]] = {
    "profile": lambda: png(1, [b"\7"], 8, 0, iCCP=b"x\0\0" + packed()),
    "text": lambda: png(1, [b"\7"], 8, 0, zTXt=b"Comment\0\0" + packed()),
    "xmp": lambda: png(1, [b"\7"], 8, 0, iTXt=b"XML:com.adobe.xmp\0\1\0\0\0" + packed()),
    "rows": lambda: GREY[:33] + chunk(b"IDAT", packed()) + GREY[-12:],
    "a large tag": lambda: of_tags(1, 2**32 - 1),
    "many tags": lambda: of_tags(4000, 60_000),
    "a large tag of EXIF": lambda: in_jpeg(of_tags(1, 2**32 - 1)),
    "many tags of EXIF": lambda: in_jpeg(of_tags(2000, 30_000)[: 2**16 - 100]),
    "a loop of EXIF": lambda: in_jpeg(b"II*\0\x08\0\0\0" + LOOP),
    "floats": lambda: tiff(FLOAT, packed()),
    "floats by PackBits": lambda: tiff(FLOAT | {259: 32773}, b"\x81\0" * 2**18),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_to_more_than_it_needs(name: str, tmp_path: Path) -> None:
    """Small files that would fill the memory; the picture beside such a note is read all the same."""
    path = stored(tmp_path / "x", BOMBS[name]())
    assert path.stat().st_size < 2**20
    read_within_need(read_any_picture, path)
    warnings.simplefilter("ignore")  # Pillow's own remarks
    if name != "rows" and "floats" not in name:
        assert read_picture(path).pixels.numel() in (3, 8 * 8 * 3)


# ---------------------------------------------------------------- runs that something happens to


def tiny(dtype: torch.dtype = torch.float32) -> InfDiT:
    config = InfDiTConfig(2, 64, 2, block_size=16, vector_dim=0, position_period=64)
    with torch.device("meta"):
        model = InfDiT(config).to(dtype)
    model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return model.eval()


IMAGE = torch.rand(1, 8, 10, 4, generator=torch.Generator().manual_seed(1))
RUN: dict[str, Any] = {"steps": 2, "sampler": "dpmpp_2m", "fidelity": 1.0, "budget": 2**24}


class RunsOut(TorchDispatchMode):
    """Memory that runs out at one allocation: the `at`-th operation that makes a storage fails, as PyTorch says it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.made = at, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.made += 1
            if self.made == self.at:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return result


def nothing_left(meter: PeakMeter) -> bool:
    if any(meter.live.values()):
        gc.collect()
    return not any(meter.live.values())


def finished_when_out_at_every(step: int) -> int:
    """Runs that end in the right picture all the same; the others end in a sentence, and none leaves anything."""
    model = tiny()
    right = infdit.upscale(model, IMAGE, **RUN)
    with RunsOut(-1) as whole:
        infdit.upscale(model, IMAGE, **RUN)
    assert whole.made > 300
    ended = 0
    for at in range(1 + step // 2, whole.made + 1, step):
        with soon():
            try:
                with PeakMeter() as meter, RunsOut(at):
                    seen = infdit.upscale(model, IMAGE, **RUN)
                assert torch.equal(seen, right), at
                ended += 1
                del seen
            except (RuntimeError, MemoryError) as error:
                assert isinstance(error, OutOfMemory) or out_of_memory(error), (at, error)
        assert nothing_left(meter), at
    assert torch.equal(infdit.upscale(model, IMAGE, **RUN), right)
    return ended


def test_memory_that_runs_out_anywhere() -> None:
    assert finished_when_out_at_every(307) > 0, "evaluations are repeated"


@pytest.mark.slow
def test_memory_that_runs_out_at_many_places() -> None:
    assert finished_when_out_at_every(13) > 0, "evaluations are repeated"


class Stop(BaseException):
    """What a user's stop raises."""


PLANS = MemoryPlan(1, 2), MemoryPlan(1, 2, "streamed", "host", "disk")


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.images)
def test_a_stop_at_every_call_of_progress(plan: MemoryPlan, every: int, tmp_path: Path) -> None:
    model, options = tiny(), {**RUN, "budget": None, "plan": plan, "folder": tmp_path}
    calls: list[int] = []
    right = infdit.upscale(model, IMAGE, progress=lambda done, total, preview: calls.append(done), **options)
    for last in range(0, len(calls), every):
        left = iter(range(last))

        def progress(done: int, total: int, preview: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Stop

        with soon(), pytest.raises(Stop) as kept, PeakMeter() as meter:
            infdit.upscale(model, IMAGE, progress=progress, **options)
        gc.collect()
        assert sum(meter.live.values()) < 100, last  # but noise levels, whoever holds a traceback, as this does
        del kept
        assert nothing_left(meter), last
        assert list(tmp_path.iterdir()) == []
    assert torch.equal(infdit.upscale(model, IMAGE, **options), right)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 255.0])
def test_numbers_that_no_picture_has(value: float) -> None:
    image = IMAGE.clone()
    image[0, 3, 4, 1] = value
    with pytest.raises(ValueError, match=r"finite|0\.\.1"):
        infdit.upscale(tiny(), image, **RUN)


def test_two_runs_at_once(tmp_path: Path) -> None:
    """Of one model, in turns by the step, with states of one name: one overwrites the other's, and neither minds."""
    model, options = tiny(), {"steps": 4, "sampler": "dpmpp_2m", "plan": PLANS[1], "folder": tmp_path}
    alone = [infdit.upscale(model, IMAGE, seed=seed, **options) for seed in (1, 2)]
    turn = threading.Barrier(2, timeout=10)

    def one(seed: int) -> torch.Tensor:
        saved = SavedRun(tmp_path / "run")
        return infdit.upscale(model, IMAGE, seed=seed, callback=lambda _: turn.wait(), resume=saved, **options)

    with soon(), ThreadPoolExecutor(2) as threads:
        together = list(threads.map(one, (1, 2)))
    assert not torch.equal(*alone)
    assert all(map(torch.equal, together, alone))
    assert [path.name for path in tmp_path.iterdir()] == ["run.0.state"]


def test_a_model_that_is_replaced_during_a_run(tmp_path: Path, noisy_file: Path) -> None:
    """As downloads replace files: the run goes on with what it was begun with."""
    make_picture(tmp_path / "in.png")
    model, options = tmp_path / "model.safetensors", {"steps": 2, "sampler": "euler"}
    shutil.copy(noisy_file, model)
    image, loaded = read_picture(tmp_path / "in.png").pixels[None], infdit.load_model(model, device="cpu")
    right = infdit.upscale(loaded, image, **options)
    del loaded

    def progress(done: int, total: int, preview: object) -> None:
        if model.stat().st_size > 9:
            (tmp_path / "new").write_bytes(b"no model")
            (tmp_path / "new").replace(model)

    loaded = infdit.load_model(model, device="cpu")
    assert torch.equal(infdit.upscale(loaded, image, progress=progress, **options), right)
    with pytest.raises(CheckpointError):
        infdit.load_model(model, device="cpu")


def test_a_model_that_is_written_to_during_a_run(tmp_path: Path, noisy_file: Path) -> None:
    """As `cp` writes: over what is there. Weights are read when they are needed, and would be wrong.

    Of a file that was cut short, reading them ends the process.
    """
    weights, model, image = noisy_file.read_bytes(), tmp_path / "model.safetensors", IMAGE

    def begin() -> tuple[InfDiT, Path]:
        model.write_bytes(weights)
        own = read_checkpoint(model).state_dict()["head.weight"].dtype  # as it is used without a copy
        return infdit.load_model(model, dtype=own, device="cpu"), model

    loaded, path = begin()
    options = {"steps": 2, "sampler": "euler", "plan": MemoryPlan(1, 1)}
    right = infdit.upscale(loaded, image, **options)

    def progress(done: int, total: int, preview: object) -> None:
        if done > total / 2:
            path.write_bytes(weights)

    with pytest.raises(CheckpointError, match="was written to while a model read from it; load it again"):
        infdit.upscale(loaded, image, progress=progress, **options)
    loaded, _ = begin()
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="was written to"):
        infdit.upscale(loaded, image, **options)
    loaded, _ = begin()
    path.unlink()
    assert torch.equal(infdit.upscale(loaded, image, **options), right)  # a file that has gone is there to who has it


MORE_DISKS = ("png", 0), ("png", 1), ("tif", 40), ("webp", 40)


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
@pytest.mark.parametrize(
    ("suffix", "kilobytes"),
    [("png", 40), ("jpg", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_DISKS)],
)
def test_a_disk_that_is_full(kilobytes: int, suffix: str, tmp_path: Path) -> None:
    """As far as a limit on what files can hold stands in for one: one sentence, nothing half written."""
    make_picture(tmp_path / "in.png", (64, 48))
    resource = pytest.importorskip("resource")

    def limited() -> None:
        os.environ["TMPDIR"] = str(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10,) * 2)

    ends, writes = os.pipe()
    arguments = "upscale", tmp_path / "in.png", "-o", tmp_path / f"out.{suffix}", "--scale", 3
    process = forks.infdit(*arguments, stderr=writes, first=limited)
    os.close(writes)
    with os.fdopen(ends) as pipe:
        said = pipe.read()
    process.join(120)
    if process.exitcode == 0:  # a JPEG is small
        assert Image.open(tmp_path / f"out.{suffix}").size == (192, 144)
        return
    assert "Traceback" not in said
    assert process.exitcode == 2 and "cannot be" in said.splitlines()[-1], said[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


SMALL_DISK = "mount -t tmpfs -o size={size}k tmpfs {folder} && {python} -m infdit {command}; s=$?; ls {folder}; exit $s"


@pytest.mark.parametrize(("suffix", "size"), [("png", 40), pytest.param("tif", 60, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up(suffix: str, size: int, tmp_path: Path) -> None:
    """A real one, in memory: one sentence, nothing half written, and the result is kept elsewhere."""
    alone = ["unshare", "-rm", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*alone, "mount -t tmpfs tmpfs /mnt"], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    source, folder, kept = make_picture(tmp_path / "in.png", (64, 48)), tmp_path / "small", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    command = f"upscale {source} -o {folder}/out.{suffix} --scale 3 --device cpu"
    script = SMALL_DISK.format(size=size, folder=folder, python=sys.executable, command=command)
    done = subprocess.run(
        [*alone, script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "TMPDIR": str(kept)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert done.stdout.split() == [], "nothing is left there"
    (result,) = kept.rglob("out.*")
    assert str(result) in done.stderr.splitlines()[-1]
    assert Image.open(result).size == (192, 144)


@pytest.mark.parametrize("seed", range(3))
def test_options_that_nobody_would_type(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, rng = make_picture(tmp_path / "in.png", (4, 3)), random.Random(seed)
    names = ("scale", "size", "longest", "megapixels", "steps", "sampler", "denoise", "fidelity", "seed", "budget")
    values = ("0", "-1", "nan", "inf", "1e999", "", "x", "9" * 30, "0x0", "1x1", "99999999x1", "-0.0", "½", "\0", "1.5")
    for case in range(40):
        chosen = [(f"--{name}", rng.choice(values)) for name in rng.sample(names, rng.choice([1, 1, 2]))]
        options = [part for option in chosen for part in option]
        with soon():
            status = run("upscale", source, "-o", tmp_path / f"{case}.png", "--device", "cpu", *options)
        said = capsys.readouterr().err
        assert status in (0, 2) and "Traceback" not in said, (options, said)
        assert (tmp_path / f"{case}.png").exists() == (status == 0), options
    assert {path.suffix for path in tmp_path.iterdir()} <= {".png"}
