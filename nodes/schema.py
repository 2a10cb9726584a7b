"""What the schemas share: the link type, the category, and fields that only newer versions of ComfyUI know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from comfy_api.latest import io

CATEGORY = "image/upscaling/Inf-DiT"

InfDiTModel = io.Custom("INFDIT_MODEL")


def search_aliases(*names: str) -> dict[str, Sequence[str]]:
    """Other names to find a node by, as keywords for io.Schema: none where it has no such field (before 0.11).

    io.Schema raises TypeError for a keyword that it does not know, and then the whole pack fails to load.
    """
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return {"search_aliases": list(names)} if "search_aliases" in known else {}
