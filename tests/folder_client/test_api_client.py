"""api_client/upscale_folder.py against a server that answers as ComfyUI does: what it sends, keeps and says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from folder_client.fake import (
    FAILS,
    Answers,
    Fake,
    all_are_made,
    body,
    one_sentence,
    pixel,
    pixel_of,
    result_of,
    results,
    run,
    run_all,
    serving,
)

from api_client import upscale_folder as client


@pytest.mark.parametrize("has_jobs", [True, False])
def test_each_picture_is_uploaded_upscaled_and_kept(server: Fake, folder: Path, has_jobs: bool) -> None:
    server.has_jobs = has_jobs
    assert run(server, folder) == 1  # one of them failed
    made = {path.name: pixel(path) for path in results(folder.parent / "out")}
    assert made == {name + ".png": pixel_of((name + end).encode() * 3)
                    for name, end in (("a", ".png"), ("c.jpg", ""), ("c.webp", ""))}  # fmt: skip
    asked = [client.image_of(prompt) for prompt in server.prompts.values()]
    digests = [hashlib.sha256(content).hexdigest()[:16] for _, content in sorted(server.uploads.items())]
    assert asked == [f"upscale_folder/{d} {n}" for d, n in zip(digests, sorted(server.uploads), strict=True)]
    shipped = json.loads(client.WORKFLOW.read_text(encoding="utf-8"))
    sent = next(iter(server.prompts.values()))
    for node in (*shipped.values(), *sent.values()):
        if node["class_type"] == "LoadImage":
            node["inputs"].pop("image")
    assert sent == shipped


def test_a_failed_picture_is_told_in_its_line(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    run(server, folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    assert lines[2] == "2 of 4  b.png  failed: LoadImage: cannot identify image file"


def test_what_is_there_is_left_alone_unless_forced(server: Fake, folder: Path) -> None:
    out = folder.parent / "out"
    out.mkdir()
    mine = result_of(b"mine")
    (out / "a.png").write_bytes(mine)
    run(server, folder)
    assert (out / "a.png").read_bytes() == mine
    assert "a.png" not in server.uploads
    run(server, folder, "--force")
    assert pixel(out / "a.png") == pixel_of(b"a.png" * 3)


def test_what_other_settings_made_is_not_taken_for_done(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / FAILS).unlink()
    size = ("--set", "InfDiTUpscale.size.scale=2", "--set", "SaveImage.filename_prefix=2024")
    assert run(server, folder, *size) == 0
    assert run(server, folder, *size) == 0
    assert capsys.readouterr().out.count("is there already") == len(server.prompts) == 3
    before = {path: path.read_bytes() for path in results(folder.parent / "out")}
    assert run(server, folder) == 1
    told = "made with other settings, or of another picture: give another -o, or --force"
    assert capsys.readouterr().out.count(told) == 3
    (folder.parent / "out" / "a.png").write_bytes(b"<html>")
    assert run(server, folder, *size) == 1
    assert "is there, but no whole picture" in capsys.readouterr().out
    assert len(server.prompts) == 3
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "a.png")


def test_settings_are_sent(server: Fake, folder: Path) -> None:
    run(server, folder, "--set", "InfDiTUpscale.size=longest side", "--set", "InfDiTUpscale.size.longest_side=900")
    (upscale,) = client.nodes_of(next(iter(server.prompts.values())), "InfDiTUpscale")
    assert upscale["inputs"]["size"] == "longest side"
    assert upscale["inputs"]["size.longest_side"] == 900


def test_a_rejected_workflow_ends_the_run(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    server.rejects = True
    assert run(server, folder) == 2
    assert "U: Value -1 smaller than min of 0 (steps)" in one_sentence(capsys)
    assert len(server.uploads) == 1


def test_a_prompt_that_somebody_removed_ends_the_run(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    server.forgets = True
    assert run(server, folder) == 2
    assert "taken out of ComfyUI's queue" in one_sentence(capsys)


def test_no_server(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    assert client.main([str(folder), "-o", str(tmp_path / "out"), "--server", address]) == 2
    assert f"no ComfyUI answers at http://{address}" in one_sentence(capsys)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_of_another_kind(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, status: int) -> None:
    """As Python's own http.server, which can take no uploads."""
    with serving() as other:
        other.hostile["/upload"] = body(b"", status)
        assert client.main([str(folder), "-o", str(tmp_path / "out"), "--server", other.address]) == 2
    assert one_sentence(capsys).endswith(": give the address of a ComfyUI with --server\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "InfDiTUpscale.stepps=2"], "InfDiTUpscale has no input stepps, only "),
        (["--set", "Nothing.steps=2"], "nodes InfDiTModelLoader, InfDiTUpscale, LoadImage, PreviewAny, SaveImage"),
        (["--set", "InfDiTUpscale.steps"], "is not NODE.INPUT=VALUE"),
        (["--workflow", "nowhere.json"], "nowhere.json cannot be read"),
        (["--workflow", str(client.WORKFLOW.parents[1] / client.WORKFLOW.name)], "is not in API format"),
    ],
)
def test_wrong_arguments(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], said: str
) -> None:
    assert run(server, folder, *arguments) == 2
    assert said in one_sentence(capsys)
    assert server.uploads == {}


def test_folders_that_cannot_be(server: Fake, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(server, empty) == 2
    assert "has no pictures" in one_sentence(capsys)
    assert run(server, tmp_path / "nowhere") == 2
    assert "cannot be opened" in one_sentence(capsys)
    assert client.main([str(folder), "-o", str(folder), "--server", server.address]) == 2
    assert "is the input folder" in one_sentence(capsys)


# ---- the API key


def test_the_key_goes_to_one_host_in_a_header_and_nowhere_else(
    server: Fake, many: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may keep pictures elsewhere."""
    with serving() as store:
        store.prompts, store.uploads = server.prompts, server.uploads

        def leads_away(answers: Answers) -> None:
            answers.send_response(302)
            answers.send_header("Location", f"{store.address}{answers.path}")
            answers.end_headers()

        server.hostile["/view"] = leads_away
        monkeypatch.setenv(client.KEY, "secret-1")
        assert run(server, many) == 0
        assert set(server.headers) == {"secret-1"}
        assert set(store.headers) == {None}
    all_are_made(many)
    server.hostile = {"/prompt": lambda answers: answers.answer(b"no " + answers.headers["X-API-Key"].encode(), 400)}
    assert run(server, many, "--force", "--api-key", "secret-2") == 2
    said = capsys.readouterr()
    assert "no ***" in said.err
    assert "secret" not in said.out + said.err + (many.parent / "out" / client.RECEIPTS).read_text()


@pytest.mark.parametrize(
    ("key", "servers", "said"),
    [
        ("a\nb", ["127.0.0.1"], "has characters that no header can have"),
        ("k", ["https://a.test", "https://b.test"], "would go to a.test and b.test"),
        ("k", ["http://a.test"], "would go to no server with https"),
    ],
)
def test_a_key_that_others_could_read(
    folder: Path, key: str, servers: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert run_all(folder, servers, "--api-key", key) == 2
    assert said in one_sentence(capsys)


def test_receipts_do_not_follow_a_link_out_of_the_folder(
    server: Fake, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / client.RECEIPTS).symlink_to(tmp_path / "mine")
    assert run(server, folder) == 2
    assert f"{client.RECEIPTS} cannot be written" in one_sentence(capsys)
    assert not (tmp_path / "mine").exists()


def test_a_picture_that_was_replaced_is_not_taken_for_done(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    run(server, folder)
    (folder / "a.png").write_bytes(b"another")
    run(server, folder)
    assert "a.png is there, made with other settings, or of another picture" in capsys.readouterr().out


# ---- names and addresses


def test_what_is_left_out_is_said(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "more").mkdir()
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")
    (folder / "b.psd").write_bytes(b"8BPS")
    run(server, folder)
    assert capsys.readouterr().out.splitlines()[0] == "left out: 1 folder, 1 × .psd, 1 × .txt, 1 × hidden"
    assert sorted(server.uploads) == ["a.png", FAILS, "c.jpg", "c.webp"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_not_utf8(server: Fake, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in (b"\xfcber.png", 'ü \x1b[31m".png'.encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
    server.slowness = 0
    command = [sys.executable, client.__file__, folder, "-o", out, "--server", server.address]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "→" in done.stdout.decode("utf-8")
    assert b"\x1b" not in done.stdout
    assert {os.fsencode(path.name): pixel(path) for path in results(out)} == {
        os.fsencode(path.name): pixel_of(path.read_bytes()) for path in folder.iterdir()
    }


def test_no_two_results_have_one_name() -> None:
    names = ["a.jpg", "a.png", "a.jpg.png", "B.png", "b.jpg", "c.gif"]
    results = client.result_names([Path(name) for name in names], Path("out"))
    assert len({path.name.casefold() for path in results.values()}) == len(names)
    assert results[Path("c.gif")] == Path("out/c.png")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost", "http://localhost:8188"),
        ("http://10.0.0.1/", "http://10.0.0.1:8188"),
        ("http://host:80/comfy/", "http://host:80/comfy"),
        ("https://host", "https://host:443"),
        ("[::1]", "http://[::1]:8188"),
    ],
)
def test_addresses(given: str, address: str) -> None:
    assert client.Server(given).address == address


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "host:port", "host:99999", "a b", "a:b@host", "[::1"])
def test_no_addresses(server: Fake, folder: Path, given: str, capsys: pytest.CaptureFixture) -> None:
    assert client.main([str(folder), "-o", str(folder.parent / "out"), "--server", given]) == 2
    assert "is no address like http://127.0.0.1:8188" in one_sentence(capsys)


def test_no_proxy_for_this_machine(server: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (folder / FAILS).unlink()
    assert run(server, folder) == 0


# ---- targets and stops


@pytest.mark.skipif(not Path("/proc").exists(), reason="a folder that not even root can write to")
def test_a_target_that_cannot_be_written_is_found_first(
    server: Fake, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in ("/proc", "/proc/no", tmp_path / "file", tmp_path / "file" / "out"):
        arguments = [str(folder), "-o", str(out), "--server", server.address]
        assert client.main(arguments) == 2
        assert "give another -o" in one_sentence(capsys)
    assert server.uploads == {}


def test_a_target_that_is_gone_stops_the_run_and_says_where_the_result_is(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", gone)
    assert run(server, folder) == 2
    error = one_sentence(capsys)
    assert "No space left on device" in error
    assert "ComfyUI has kept the result in its output folder as a.png" in error
    assert list(server.uploads) == ["a.png"]
    assert results(folder.parent / "out") == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_by_a_stop(server: Fake, folder: Path, how: signal.Signals) -> None:
    held, cancelled = threading.Event(), []
    server.hostile = {"/jobs": lambda answers: (held.set(), answers.answer({"status": "in_progress"}))[1]}
    out = folder.parent / "out"
    command = [sys.executable, client.__file__, folder, "-o", out, "--server", server.address]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert held.wait(20)
    server.hostile["/interrupt"] = lambda answers: (cancelled.append(1), answers.answer({}))[1]
    running.send_signal(how)
    running.communicate(timeout=20)
    assert results(out) == []
    if how != signal.SIGKILL:
        assert (running.returncode, cancelled) == (130, [1])


def test_what_a_kill_left_while_it_wrote_is_removed_when_it_is_old(tmp_path: Path) -> None:
    names = {".0123456789abcdef.part": 7200, ".123456789abcdef0.part": 60, ".mine.part": 7200, "a.png": 7200}
    for name, age in names.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    client.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names.keys() - {".0123456789abcdef.part"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_reader_who_has_read_enough_and_a_full_disk(server: Fake, folder: Path) -> None:
    command = [sys.executable, client.__file__, folder, "-o", folder.parent / "out"]
    command += ["--server", server.address]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"No space left on device" in done.stderr


def test_no_wait_is_endless(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hostile = {"/jobs": lambda answers: answers.answer({"status": "in_progress"})}
    assert run(server, folder, "--hours", "1e-5") == 2
    assert "not done after 1e-05 hours" in one_sentence(capsys)
