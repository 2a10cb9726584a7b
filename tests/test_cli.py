"""python -m infdit as a person types it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import forks
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import PUBLISHED, make_picture, one_line, pixels_of, run

from infdit.checkpoint import BUNDLED
from infdit.cli import bytes_of
from infdit.memory.planner import format_bytes


def test_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = make_picture(tmp_path / "in.png"), tmp_path / "out.png"
    assert run("upscale", source, "-o", target) == 0
    said = capsys.readouterr()
    assert "100%" in said.err
    assert str(target) in said.out
    with Image.open(target) as image:
        assert (image.size, image.mode) == ((48, 36), "RGB")


def test_options(tmp_path: Path, noisy_file: Path) -> None:
    source = make_picture(tmp_path / "in.webp", mode="RGBA", lossless=True)
    assert run("upscale", source, "-o", tmp_path / "a.webp", "--size", "30x18", "--steps", 2, "--sampler", "heun") == 0
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.size, image.mode) == ((30, 18), "RGBA")
    for name, seed in (("1", 1), ("2", 2), ("again", 1)):
        options = ("--seed", seed, "--denoise", 0.8, "--scale", 1.5, "--device", "cpu", "--dtype", "fp32")
        assert run("upscale", source, "-o", tmp_path / f"{name}.png", "--model", noisy_file, *options) == 0
    first, other, again = (pixels_of(tmp_path / f"{name}.png") for name in ("1", "2", "again"))
    assert first == again != other


def test_a_faithful_result_beyond_4_says_how_alike_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    with Image.open(Path(__file__).parents[1] / "pictures" / "flowers.png") as flowers:
        flowers.crop((80, 60, 112, 92)).save(source)
    assert run("upscale", source, "-o", target, "--scale", 6, "--fidelity", 1, "--colour-match") == 0
    said = capsys.readouterr().out
    with Image.open(source) as given, Image.open(target) as result:
        assert result.size == (given.width * 6, given.height * 6)
    assert float(re.search(r"LR consistency ([\d.]+) dB, ΔE2000 [\d.]+; peak [\d.]+ [MG]iB\n", said)[1]) > 60
    assert run("plan", "512x512", "--scale", 16, "--device", "cuda", "--budget", "2GiB") == 0
    assert "2 passes, by way of 128×128" in capsys.readouterr().out


def test_folder_with_one_broken_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.jpg", "a.png"):
        make_picture(folder / name)
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    status = run("upscale", folder, "-o", tmp_path / "out", "--scale", 2)
    assert status == 1
    assert "c.png" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_picture(tmp_path / "in.png")
    before = source.read_bytes()
    assert run("upscale", source, "-o", source, "--force") == 2
    assert "is an input" in one_line(capsys)
    assert run("upscale", source, "-o", tmp_path, "--force") == 2
    assert "is an input" in one_line(capsys)
    other = tmp_path / "other.png"
    other.write_bytes(b"precious")
    assert run("upscale", source, "-o", other) == 2
    assert "--force" in one_line(capsys)
    assert (source.read_bytes(), other.read_bytes()) == (before, b"precious")
    assert run("upscale", source, "-o", other, "--force") == 0
    assert other.read_bytes() != b"precious"


def test_two_inputs_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [make_picture(tmp_path / name) for name in ("x.png", "x.bmp")]
    assert run("upscale", *sources, "-o", tmp_path / "out") == 2
    assert "both become" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_or_is_not_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [make_picture(tmp_path / name) for name in ("x.png", "y.png")]
    assert run("upscale", *sources, "-o", sources[0] / "out") == 2
    assert "cannot be made" in one_line(capsys)
    assert run("upscale", sources[0], "-o", tmp_path / "new.png", "--resume", sources[1]) == 2
    assert "cannot be made (File exists): choose a folder for --resume" in one_line(capsys)
    assert run("upscale", sources[0], "-o", tmp_path / "nowhere" / "x.png") == 2
    assert "make its folder first, or choose another" in one_line(capsys)
    assert run("upscale", *sources, "-o", tmp_path / "out", "--model", "no.pt") == 2
    assert not (tmp_path / "out").exists()


def test_out_of_memory_on_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    sources = [make_picture(tmp_path / name) for name in ("x.png", "y.png")]
    with monkeypatch.context() as patch:
        patch.setattr("infdit.cli.upscale.upscale", too_large)
        assert run("upscale", sources[0], "-o", tmp_path / "out.png") == 2
        assert "out of memory" in one_line(capsys)
        assert run("upscale", *sources, "-o", tmp_path / "out") == 1
        assert capsys.readouterr().err.count("out of memory") == 2


def test_a_console_without_the_letters_we_print(tmp_path: Path) -> None:
    source, target = make_picture(tmp_path / "in.png"), tmp_path / "out.png"
    for arguments in (["--help"], ["upscale", source, "-o", target], ["plan", "64x48"]):
        said = io.TextIOWrapper(io.BytesIO(), "ascii")
        with redirect_stdout(said), redirect_stderr(io.TextIOWrapper(io.BytesIO(), "ascii")):
            assert run(*arguments) == 0
    assert target.exists()
    assert b"64?48" in said.buffer.getvalue()


BAD = {
    "no input": (["nowhere.png", "-o", "out.png"], "no such file"),
    "no picture": (["text.png", "-o", "out.png"], "text.png"),
    "no output folder": (["in.png", "-o", "no/such/out.png"], "folder"),
    "unknown ending": (["in.png", "-o", "out.xyz"], ".png"),
    "scale": (["in.png", "-o", "out.png", "--scale", "17"], "at most 16"),
    "size": (["in.png", "-o", "out.png", "--size", "10"], "WIDTHxHEIGHT"),
    "size too small": (["in.png", "-o", "out.png", "--size", "5x5"], "height 5"),
    "both": (["in.png", "-o", "out.png", "--size", "24x18", "--scale", "2"], "not allowed"),
    "model": (["in.png", "-o", "out.png", "--model", "no.pt"], "no.pt"),
    "steps": (["in.png", "-o", "out.png", "--steps", "0"], "at least 1"),
    "sampler": (["in.png", "-o", "out.png", "--sampler", "ddim"], "heun"),
    "seed": (["in.png", "-o", "out.png", "--seed", "-1"], "seed"),
    "device": (["in.png", "-o", "out.png", "--device", "tpu9"], "tpu9"),
    "denoise": (["in.png", "-o", "out.png", "--denoise", "2"], "between 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_picture(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("hello")
    assert run("upscale", *arguments) == 2
    assert message in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "text.png"]


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "16384x16384", "--budget", "1.5GiB", "--device", "cuda") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "16384 blocks of 128 px, 28 layers" in lines[0]
    asked = next(line for line in lines if "asked" in line)
    assert float(asked.split()[1]) <= 1.5
    assert "weights streamed" in asked
    assert any("0.5 GiB  at least 0.819 GiB" in line for line in lines)
    assert run("plan", "64x48", "--model", "mini") == 0
    assert "free" in capsys.readouterr().out
    assert run("plan", "64by48") == 2
    assert "WIDTHxHEIGHT" in one_line(capsys)


@pytest.mark.parametrize("native", [False, True])
def test_a_plan_is_in_the_dtype_of_the_run(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device that is here, named or not; of one that is not here it is bfloat16."""
    monkeypatch.setattr("infdit.device._half_precision", lambda device: (native, False))
    source, told = make_picture(tmp_path / "in.png", (8, 8)), tmp_path / "told.json"
    assert run("upscale", source, "-o", tmp_path / "out.png", "--device", "cpu", "--receipt", told) == 0
    dtype = json.loads(told.read_text())["settings"]["dtype"]
    assert dtype == ("bfloat16" if native else "float32")
    capsys.readouterr()
    for device, expected in (("cpu", dtype), ("cpu,cpu", dtype), ("cuda:99", "bfloat16")):
        assert run("plan", "32x32", "--model", "mini", "--device", device, "--budget", "1GiB") == 0
        assert f" as {expected};" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GiB", 4 * 2**30), ("512MiB", 2**29), ("1.5g", 3 * 2**29), ("2 GB", 2**31), ("1000", 1000), ("8k", 8192)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "1 B"), (2**20, "1 MiB"), (4 * 2**30, "4 GiB"), (999 * 2**30, "999 GiB"), (2**40, "1 TiB"), (2**41, "2 TiB")],
)
def test_amounts_for_people(count: float, said: str) -> None:
    assert format_bytes(int(count)) == said


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&- 2>&-", pytest.param("2>&-", marks=pytest.mark.slow)])
def test_closed_streams_lose_no_run(tmp_path: Path, closed: str) -> None:
    source = make_picture(tmp_path / "in.png")
    command = f"{sys.executable} -m infdit upscale {source} -o {tmp_path / 'out.png'} --scale 2 {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    with Image.open(tmp_path / "out.png") as result:
        assert result.size == (24, 18)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_no_model_and_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for arguments in (("info", pipe), ("convert", pipe, tmp_path / "x.safetensors")):
        assert run(*arguments) == 2
        assert one_line(capsys) == f"infdit: {pipe}: is a pipe or a device; give a file."


@pytest.mark.parametrize("command", ["info", "upscale"])
def test_a_folder_or_nothing_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    picture = make_picture(tmp_path / "a.png")
    for name in (str(tmp_path), ""):
        rest = ("-o", tmp_path / "b.png", "--model", name) if command == "upscale" else ()
        assert run(command, picture if rest else name, *rest) == 2
        assert one_line(capsys) == f"infdit: {name or '.'}: is a folder; give a file."


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steering = "\x1b]0;title\x07 \x1b[31m\nsecond line \x9b2J"
    save_file({steering: torch.zeros(1)}, tmp_path / "key.safetensors")
    assert run("info", tmp_path / "key.safetensors") == 2
    said = one_line(capsys)
    assert r"\x1b[31m\nsecond line \x9b2J" in said
    with safe_open(str(BUNDLED["mini"]), "pt") as file:
        metadata = file.metadata() | {"provenance": steering}
    save_file(load_file(BUNDLED["mini"]), tmp_path / "stated.safetensors", metadata)
    assert run("info", tmp_path / "stated.safetensors") == 0
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in said + shown)


def test_no_message_names_a_path_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    make_picture(tmp_path / "pictures" / "good.png")
    broken = tmp_path / "pictures" / "broken.png"
    broken.write_bytes(make_picture(tmp_path / "whole.png", (64, 64)).read_bytes()[:90])
    nowhere = tmp_path / "nowhere" / "x"
    for arguments, named in (
        (("convert", BUNDLED["mini"], nowhere.with_suffix(".safetensors")), nowhere.parent),
        (("upscale", tmp_path / "whole.png", "-o", nowhere.with_suffix(".png")), nowhere.parent),
        (("upscale", broken.parent, "-o", tmp_path / "out"), broken),
        (("info", tmp_path / "gone.safetensors"), tmp_path / "gone.safetensors"),
    ):
        assert run(*arguments) == (1 if named == broken else 2)
        (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("infdit: "))
        assert said.count(str(named)) == 1, said
        assert "None" not in said


@pytest.mark.skipif(os.name != "posix", reason="pipes of a POSIX shell")
@pytest.mark.parametrize("arguments", ["plan 64x48", pytest.param("upscale --help", marks=pytest.mark.slow)])
def test_a_reader_who_has_read_enough(arguments: str) -> None:
    """`| head` and the like: no complaint, and the status that a shell gives for it."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "infdit", *arguments.split()], stdout=writer, stderr=subprocess.PIPE, text=True,
        check=False, cwd=Path(__file__).parents[1], env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_the_output() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "infdit", "plan", "64x48"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[1]
        )
    assert done.returncode == 2
    assert done.stderr == "infdit: the output: No space left on device; send it somewhere else, or make room\n"


def test_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_picture(tmp_path / "in.png", (40, 30))
    assert run("upscale", source, "-o", tmp_path / "out.png", "--budget", "1MiB") == 2
    assert "too little for 160×120: at least" in one_line(capsys)
    for bad in ("lots", "1.2.3GiB", ".", "-1GiB"):
        assert run("upscale", source, "-o", tmp_path / "out.png", f"--budget={bad}") == 2
        assert "an amount of memory like 4GiB" in one_line(capsys)
    assert run("upscale", source, "-o", tmp_path / "out.png", "--budget", "64MiB") == 0


def test_convert_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "tiny.safetensors"
    assert run("convert", PUBLISHED, target) == 0
    assert run("info", target, "--verify") == 0
    text = capsys.readouterr().out
    assert "3 of width 64, 4 heads of 16" in text
    assert "matches" in text
    assert run("info", PUBLISHED, "--verify") == 0
    assert "checksums of its zip" in capsys.readouterr().out
    before = target.read_bytes()
    assert run("convert", PUBLISHED, target) == 2
    assert "--force" in one_line(capsys)
    assert target.read_bytes() == before
    assert run("info", "mini") == 0
    changed = bytearray(before)
    changed[-1] ^= 1
    target.write_bytes(changed)
    assert run("info", target, "--verify") == 2
    capsys.readouterr()
    assert run("info", tmp_path / "none") == 2
    assert "cannot be opened" in one_line(capsys)


def test_clip_named_or_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedding of the picture reaches the network; the CLIP model itself is tested in test_clip.py."""
    seen: list[tuple[Path, tuple[int, ...], float]] = []

    def load(path: Path, **_: object) -> object:
        def encode(image: torch.Tensor) -> torch.Tensor:
            seen.append((Path(path).name, tuple(image.shape), float(image.min())))
            return torch.ones(1, 32)

        return encode

    monkeypatch.setattr("infdit.cli.recipe.load_clip", load)
    source, model = make_picture(tmp_path / "in.png"), tmp_path / "tiny.safetensors"
    assert run("convert", PUBLISHED, model) == 0
    options = ("--model", model, "--steps", 2, "--dtype", "fp32")
    assert run("upscale", source, "-o", tmp_path / "without.png", *options) == 0
    assert seen == []
    assert run("upscale", source, "-o", tmp_path / "named.png", *options, "--clip", "vit.bin") == 0
    (tmp_path / "tiny.clip.safetensors").write_bytes(b"")
    assert run("upscale", source, "-o", tmp_path / "beside.png", *options) == 0
    state = torch.load(PUBLISHED, weights_only=False)
    state["module"]["image_encoder.model.visual.proj"] = torch.ones(2, 2)
    torch.save(state, tmp_path / "whole.pt")
    options = ("--model", tmp_path / "whole.pt", "--steps", 2, "--dtype", "fp32")
    assert run("upscale", source, "-o", tmp_path / "inside.png", *options) == 0
    assert [name for name, _, _ in seen[:3]] == ["vit.bin", "tiny.clip.safetensors", "whole.pt"]
    assert seen[0][1] == (1, 3, 9, 12)
    assert -1 <= seen[0][2] < -0.9
    without, named, beside = (pixels_of(tmp_path / f"{n}.png") for n in ("without", "named", "beside"))
    assert named == beside != without
    for name, pixels, clip in (("named", named, ("--clip", "vit.bin")), ("without", without, ())):
        again, options = tmp_path / f"{name}_again.png", ("--model", model, "--from-receipt", tmp_path / f"{name}.png")
        assert run("upscale", source, "-o", again, *options, *clip) == 0
        assert pixels_of(again) == pixels
    monkeypatch.setattr("infdit.cli.recipe.load_clip", lambda *_, **__: lambda image: torch.zeros(1, 32))
    assert run("upscale", source, "-o", tmp_path / "no.png", "--model", model, "--from-receipt", again) == 0
    options = ("--model", model, "--from-receipt", tmp_path / "named.png")
    assert run("upscale", source, "-o", tmp_path / "never.png", *options) == 2
    assert "named.png: it has another clip than can be had now" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc").exists(), reason="a folder that not even root can write to")
def test_a_target_that_cannot_be_written_is_found_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    monkeypatch.setattr("infdit.cli.upscale.upscale", lambda *_, **__: done.append(1))
    sources = [make_picture(tmp_path / name) for name in ("x.png", "y.png")]
    assert run("upscale", sources[0], "-o", "/proc/x.png") == 2
    assert "/proc/x.png: cannot be written" in one_line(capsys)
    assert run("upscale", *sources, "-o", "/proc") == 2
    assert "cannot be written" in one_line(capsys)
    for folder in ("in/a", "in/b", "out/a"):
        (tmp_path / folder).mkdir(parents=True)
        make_picture(tmp_path / folder / "x.png")
    (tmp_path / "out" / "b").symlink_to("/proc")
    assert run("upscale", tmp_path / "in", "-o", tmp_path / "out", "--recursive", "--force") == 2
    assert "out/b/x.png: cannot be written" in one_line(capsys)
    assert done == []


def test_a_target_that_goes_ends_the_run_and_the_result_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is taken away while the first picture is worked on."""
    from infdit import upscale

    done = []

    def goes(*arguments: object, **options: object) -> torch.Tensor:
        done.append(1)
        shutil.rmtree(out)
        return upscale(*arguments, **options)

    out = tmp_path / "out"
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    monkeypatch.setattr("infdit.cli.upscale.upscale", goes)
    sources = [make_picture(tmp_path / name) for name in ("x.png", "y.png")]
    assert run("upscale", *sources, "-o", out, "--scale", 2) == 2
    (kept,) = (tmp_path / "kept").rglob("*.png")
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out / 'x.png'}: cannot be written (No such file or directory); the result is kept as {kept}." in error
    assert done == [1]
    with Image.open(kept) as image:
        assert image.size == (24, 18)


def test_one_picture_into_a_new_folder(tmp_path: Path) -> None:
    source = make_picture(tmp_path / "in.bmp")
    assert run("upscale", source, "-o", f"{tmp_path}/new/folder/", "--scale", 2) == 0
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["in.png"]


def test_a_folder_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_picture(tmp_path / "in.png")
    (tmp_path / "more").mkdir()
    for name in ("a.xcf", "b.xcf", "readme", "._in.png"):
        (tmp_path / name).write_bytes(b"")
    assert run("upscale", tmp_path, "-o", tmp_path / "more", "--scale", 2) == 0
    assert f"{tmp_path}: left out: 1 folder, 2 × .xcf, 1 × hidden, 1 × no ending" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_by_a_stop(tmp_path: Path, how: signal.Signals) -> None:
    """At once, or where nobody could do it, by the next run; never what another run holds."""
    source, out = make_picture(tmp_path / "in.png", (900, 600)), tmp_path / "out"
    said, says = os.pipe()
    running = forks.infdit("upscale", source, "-o", f"{out}/", stderr=says)
    assert os.read(said, 1)  # the bar
    held = list(out.iterdir())
    assert [path.suffix for path in held] == [".part"]
    small = make_picture(tmp_path / "small.png")
    assert run("upscale", small, "-o", f"{out}/", "--scale", 2) == 0
    assert held[0].exists()
    assert running.pid is not None
    os.kill(running.pid, how)
    running.join(60)
    assert running.exitcode == (130 if how != signal.SIGKILL else -9)
    assert held[0].exists() == (how == signal.SIGKILL)
    assert run("upscale", small, "-o", f"{out}/", "--scale", 2, "--force") == 0
    assert [path.name for path in out.iterdir()] == ["small.png"]


def test_xpu_is_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "4096x4096", "--budget", "2GiB", "--device", "xpu") == 0
    assert "of a xpu in general" in capsys.readouterr().out
    if not torch.xpu.is_available():
        assert run("upscale", make_picture(tmp_path / "in.png"), "-o", tmp_path / "out.png", "--device", "xpu") == 2
        assert "device 'xpu' is not here" in one_line(capsys)


def test_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infdit.cli.upscale.upscale", interrupted)
    source = make_picture(tmp_path / "in.png")
    assert run("upscale", source, "-o", tmp_path / "out.png") == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_icc_profile_and_grey_are_carried_over(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = make_picture(tmp_path / "in.png", icc_profile=profile)
    assert run("upscale", source, "-o", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["icc_profile"] == profile
    grey = make_picture(tmp_path / "grey.png", mode="L")
    assert run("upscale", grey, "-o", tmp_path / "grey4.png") == 0
    with Image.open(tmp_path / "grey4.png") as image:
        assert (image.mode, image.size) == ("L", (48, 36))
