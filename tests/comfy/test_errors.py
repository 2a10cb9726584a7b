"""docs/errors.md says what is said inside ComfyUI: each of its sentences was, in a case of drive.py. Numbers apart."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from said import rows

pytestmark = pytest.mark.comfy

NUMBER = r"-?\d[\d.]*"
SAID = [said for heading in ("said on the node", "said in the report") for _, said in rows("In ComfyUI", heading)]


def texts(found: object) -> Iterator[str]:
    """All lines in it, wherever."""
    if isinstance(found, str):
        yield from found.splitlines()
    for inner in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        yield from texts(inner)


@pytest.mark.parametrize("said", SAID)
def test_it_is_said(inside: dict, said: str) -> None:
    sentence = re.sub(r"^\*on [^*]+:\* ", "", said)
    pattern = ".*".join(NUMBER.join(map(re.escape, re.split(NUMBER, part))) for part in sentence.split("…"))
    assert any(re.fullmatch(pattern, line) for line in texts(inside)), "nothing says so"
