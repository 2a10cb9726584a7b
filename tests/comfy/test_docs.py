"""Translations against the schemas that ComfyUI hands out, and help pages as its frontend asks for them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).parents[2]
ENGLISH = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read()


def said(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def inputs_of(schema: dict, prefix: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """The frontend's keys of inputs, size.scale being size_scale, with what the schema says of them."""
    for name, (_, *rest) in (schema.get("required", {}) | schema.get("optional", {})).items():
        options = rest[0] if rest else {}
        yield prefix + name, said(options.get("display_name", name), options.get("tooltip"))
        if options.get("control_after_generate"):
            yield "control_after_generate", said("control after generate", None)
        for option in options.get("options") or []:
            if isinstance(option, dict):
                yield from inputs_of(option["inputs"], f"{name}_")


@pytest.mark.parametrize("node", ENGLISH)
def test_english_is_what_the_schema_says(server: tuple[str, Path], node: str) -> None:
    schema = json.loads(get(f"{server[0]}/object_info/{node}"))[node]
    outputs = enumerate(zip(schema["output_name"], schema["output_tooltips"], strict=True))
    assert ENGLISH[node] == {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": dict(inputs_of(schema["input"])),
        "outputs": {str(i): said(*texts) for i, texts in outputs},
    }


def test_both_languages_reach_the_frontend(server: tuple[str, Path]) -> None:
    served = json.loads(get(f"{server[0]}/i18n"))
    assert served["en"]["nodeDefs"] == ENGLISH
    assert served["zh"]["nodeDefs"].keys() == ENGLISH.keys()


@pytest.mark.parametrize("node", ENGLISH)
def test_help_page_and_its_picture_reach_the_frontend(server: tuple[str, Path], node: str) -> None:
    address, base = server
    (pack,) = (base / "custom_nodes").iterdir()
    folder = f"{address}/extensions/{pack.name}/docs"
    assert get(f"{folder}/{node}/zh.md").decode().startswith("# ")
    page = get(f"{folder}/{node}.md").decode()
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert len(get(f"{folder}/{picture}")) == (ROOT / "web" / "docs" / picture).stat().st_size
