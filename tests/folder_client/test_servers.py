"""A folder over several servers, which are slow, die, come late or lie."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from folder_client.fake import (
    ANY,
    FAILS,
    Answers,
    Fake,
    all_are_made,
    body,
    one_sentence,
    raw,
    result_of,
    run,
    run_all,
    serving,
    silent,
)

from api_client import upscale_folder as client


def test_servers_share_a_folder_and_receipts_say_which_made_what(many: Path) -> None:
    with serving() as one, serving() as two:
        one.seconds = two.seconds = 0.02
        assert run_all(many, (one.address, two.address, one.address + "/")) == 0
    told = all_are_made(many)
    for server in (one, two):
        made = {(client.image_of(prompt).partition(" ")[2], i) for i, prompt in server.prompts.items()}
        assert made == {(r["picture"], r["prompt_id"]) for r in told if r["server"] == server.address}
        assert len(made) > 2
    assert len(one.prompts) + len(two.prompts) == 12, "no picture twice"
    assert all(receipt["seconds"] > 0 for receipt in told)


def test_a_slow_server_leaves_the_last_pictures_to_a_fast_one(many: Path) -> None:
    with serving() as slow, serving() as fast:
        slow.seconds = 1.5
        assert run_all(many, (slow.address, fast.address)) == 0
    all_are_made(many)
    assert len(slow.prompts) == 1


def answers_garbage(answers: Answers) -> None:
    garbage = random.Random(len(answers.server.headers)).choice([*ANY.values(), b"{}" * 99])
    answers.answer(garbage, random.Random(len(garbage)).choice([200, 200, 400, 500]))


@pytest.mark.parametrize("hostile", ["", "/upload", "/prompt", "/jobs", "/view", "/"])
def test_one_dies_one_starts_late_one_answers_garbage(many: Path, hostile: str) -> None:
    """The fourth is sound; with none hostile the garbage is well formed: pictures of others."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with serving() as sound, serving() as dying, serving() as odd, ExitStack() as later:
        sound.seconds = dying.seconds = 0.1

        def die(answers: Answers) -> None:
            dying.server_close()
            dying.hostile[""] = raw()
            started.append(later.enter_context(serving(port)))

        started: list[Fake] = []
        made = iter(range(2))
        dying.hostile["/view"] = lambda answers: die(answers) if next(made, None) is None else answers.view()
        if hostile:
            odd.hostile[hostile] = answers_garbage
        else:
            odd.hostile["/view"] = body(result_of(b"?", json.loads(client.WORKFLOW.read_text(encoding="utf-8"))))
        assert run_all(many, (odd.address, dying.address, f"127.0.0.1:{port}", sound.address)) == 0
        (late,) = started
        assert late.prompts
    told = all_are_made(many)
    assert {receipt["server"] for receipt in told} <= {dying.address, late.address, sound.address}


def test_what_one_cannot_make_another_may(many: Path, capsys: pytest.CaptureFixture) -> None:
    """Such as for want of memory; what none can make fails once."""
    (many / FAILS).write_bytes(b"broken")
    with serving() as small, serving() as large:
        error = {"node_type": "InfDiTUpscale", "exception_message": "1 GiB is too little"}
        small.hostile["/jobs"] = lambda answers: answers.answer({"status": "failed", "execution_error": error})
        assert run_all(many, (small.address, large.address)) == 1
        assert any(FAILS in client.image_of(prompt) for prompt in large.prompts.values())
    (many / FAILS).unlink()
    assert {receipt["server"] for receipt in all_are_made(many)} == {large.address}
    assert capsys.readouterr().out.count("failed: ") == 1


def test_a_slow_server_tries_what_the_fast_one_cannot_make(many: Path) -> None:
    """Even as the last, when the fast one would be done with anything else long before."""
    (many / FAILS).write_bytes(b"broken")
    ended: list[int] = []
    with serving() as fast, serving() as slow:
        slow.seconds = 1.0
        work = threading.Thread(
            target=lambda: ended.append(run_all(many, (fast.address, slow.address))), daemon=True
        )  # fmt: skip
        work.start()
        work.join(60)
        assert ended == [1]


def test_a_run_whose_answer_is_lost_is_found_by_its_id(server: Fake, many: Path) -> None:
    """Else it would be queued a second time."""
    lost: list[str] = []

    def lose(answers: Answers) -> None:
        asked = json.loads(answers.body)
        server.prompts[asked["prompt_id"]] = asked["prompt"]
        lost.append(asked["prompt_id"])

    server.hostile["/prompt"] = lose
    assert run(server, many) == 0
    assert [receipt["prompt_id"] for receipt in all_are_made(many)] == lost == list(server.prompts)


def test_what_a_lost_server_still_has_is_taken_from_it(many: Path) -> None:
    """When it answers again: another has made it by then."""
    taken: list[dict] = []
    with serving() as sound, serving() as lost:
        sound.seconds = 0.05
        silent_until = time.monotonic() + 0.25
        for path in ("/jobs", "/queue", "/interrupt"):
            lost.hostile[path] = lambda a: None if time.monotonic() < silent_until else heard(a)

        def heard(answers: Answers) -> None:
            if answers.command == "POST":
                taken.append(json.loads(answers.body))
            answers.post(answers.body) if answers.command == "POST" else answers.get()

        assert run_all(many, (sound.address, lost.address)) == 0
        first = next(iter(lost.prompts))
    assert taken[:2] == [{"delete": [first]}, {"prompt_id": first}]
    assert first not in {receipt["prompt_id"] for receipt in all_are_made(many)}


def test_one_that_never_answers_does_not_hold_up_the_rest(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is asked in vain while the run ends."""
    monkeypatch.setattr(client, "PATIENCE", 1.0)
    with serving() as sound, serving() as mute:
        mute.hostile[""] = silent
        sound.seconds = 0.02
        assert run_all(many, (mute.address, sound.address)) == 0
    all_are_made(many)


def test_none_left(many: Path, capsys: pytest.CaptureFixture) -> None:
    with serving() as one, serving() as two:
        one.rejects = True
        two.hostile["/upload"] = body(b"", 503)
        assert run_all(many, (one.address, two.address)) == 2
    error = one_sentence(capsys)
    assert "ComfyUI rejects the workflow: U: Value -1" in error
    assert f"{two.address}/api/upload/image answers 503" in error
