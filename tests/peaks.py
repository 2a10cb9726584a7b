"""How much memory something takes at its peak, as Linux counts what the process holds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

_SELF = Path("/proc/self")
TELLS = os.access(_SELF / "clear_refs", os.W_OK)


def growth(act: Callable[[], object]) -> int:
    """Bytes that the process holds more at the peak of an act than before, where the system TELLS."""
    (_SELF / "clear_refs").write_text("5")  # the peak is what is held now
    before = _held("RSS")
    act()
    return max(0, _held("HWM") - before)


def _held(name: str) -> int:
    found = re.search(rf"Vm{name}:\s*(\d+)", (_SELF / "status").read_text())
    assert found is not None
    return int(found[1]) << 10
