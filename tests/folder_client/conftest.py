"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from folder_client.fake import (
    FAILS,
    Fake,
    serving,
)

from api_client import upscale_folder as client


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL", 0.01), ("SILENCE", 0.04), ("REST", 0.05), ("LONGEST_REST", 0.1)):
        monkeypatch.setattr(client, name, seconds)


@pytest.fixture
def server() -> Iterator[Fake]:
    with serving() as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    for name in ("a.png", FAILS, "c.jpg", "c.webp", "notes.txt"):
        (made / name).write_bytes(name.encode() * 3)
    return made


@pytest.fixture
def many(tmp_path: Path) -> Path:
    made = tmp_path / "many"
    made.mkdir()
    for number in range(12):
        (made / f"{number:02}.png").write_bytes(f"{number}".encode() * 5)
    return made
