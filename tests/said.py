"""docs/errors.md as tests read it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")


def rows(heading: str, column: str = "said") -> list[tuple[str, str]]:
    """(what was done, what was said) under a heading, of the table whose second column is called so."""
    section = PAGE.partition(f"\n## {heading}\n")[2]
    table = section.partition(f"| done | {column} |\n|---|---|\n")[2].partition("\n\n")[0]
    return re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE)
