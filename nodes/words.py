"""What nodes say, in the language of the page: English is written where it is known, and translated line by line.

locales/LANGUAGE/report.json has pairs of a pattern and what stands in its place, applied in their order. What has no
pattern stays English, and so do receipts, which are for programs.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

LOCALES = Path(__file__).parents[1] / "locales"
RECEIPT = "receipt: "


def in_language(text: str, language: str) -> str:
    """Lines of text in a language by its short name, such as zh; zh-TW is better served with zh than not at all."""
    patterns = _patterns(language.partition("-")[0])
    return "\n".join(line if line.startswith(RECEIPT) else _translated(line, patterns) for line in text.split("\n"))


def _translated(line: str, patterns: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, words in patterns:
        line = pattern.sub(words, line)
    return line


@cache
def _patterns(language: str) -> list[tuple[re.Pattern[str], str]]:
    path = LOCALES / language / "report.json"
    if not language.isalpha() or not path.is_file():
        return []
    return [(re.compile(pattern), words) for pattern, words in json.loads(path.read_text(encoding="utf-8"))]
