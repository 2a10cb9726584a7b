"""How much memory something takes at its peak, as Linux counts what the process holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

_SELF = Path("/proc/self")


def growth(act: Callable[[], object]) -> int:
    """Bytes that the process holds more at the peak of an act than before; where nothing tells, a test is skipped."""
    try:
        (_SELF / "clear_refs").write_text("5")  # the peak is what is held now
    except OSError:
        pytest.skip("no peak can be taken here")
    before = _held("RSS")
    act()
    return max(0, _held("HWM") - before)


def _held(name: str) -> int:
    return int(re.search(rf"Vm{name}:\s*(\d+)", (_SELF / "status").read_text())[1]) << 10
