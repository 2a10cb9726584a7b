"""Inputs as a link, or a workflow of another version, may give them: refused in words before a node works with them."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable
from functools import wraps
from typing import Any, get_args, get_type_hints

from comfy_api.latest import io

CORE_LINKS = {"NOISE": "generate_noise", "SAMPLER": "sample", "SIGMAS": "tolist"}  # and what only these can do
Check = Callable[[object], str]  # what is wrong with a value, or nothing


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node that raises a ValueError for inputs that it does not have, and for values that are none of theirs.

    Numbers and pictures are checked by whoever knows their limits, names of files by whoever finds them.
    """
    execute: Any = node.execute.__func__  # pyright: ignore[reportFunctionMemberAccess]
    named = inspect.signature(node.validate_inputs).parameters if "validate_inputs" in vars(node) else {}
    known = inspect.signature(execute).parameters
    checks = _checks_of_links(execute) | {
        i.id: check for i in node.define_schema().inputs if i.id not in named and (check := _check_of(i)) is not None
    }

    @wraps(execute)
    def run(cls: type[io.ComfyNode], **inputs: object) -> io.NodeOutput:
        for name, value in inputs.items():
            if name not in known:
                raise ValueError(f"{name} is no input of this node as it is here: disconnect it, or update the pack")
            wrong = checks[name](value) if name in checks else ""
            if wrong:
                raise ValueError(f"{name} is {shown(value)} and {wrong}")
        return execute(cls, **inputs)

    node.execute = classmethod(run)
    return node


def shown(value: object) -> str:
    """A value in one line, however long it is."""
    return " ".join(reprlib.repr(value).split())


def _check_of(given: io.Input) -> Check | None:
    """Of a widget that is no number."""
    if isinstance(given, io.Combo.Input):
        choices = list(given.options or [])
        words = f"must be one of {', '.join(map(str, choices))}"
        return lambda value: "" if isinstance(value, str) and value in choices else words
    if isinstance(given, io.String.Input):
        return lambda value: "" if isinstance(value, str) else "must be a text"
    if isinstance(given, io.Boolean.Input):
        return lambda value: "" if isinstance(value, bool | int) else "must be true or false"
    kind = str(given.get_io_type())
    if kind in CORE_LINKS:
        words = f"must come from a node that gives {kind}"
        return lambda value: "" if hasattr(value, CORE_LINKS[kind]) else words
    return None


def _checks_of_links(execute: Callable[..., object]) -> dict[str, Check]:
    """Of what only nodes of this pack give, by the annotations."""
    found: dict[str, Check] = {}
    for name, hint in get_type_hints(execute).items():
        kinds = tuple(kind for kind in get_args(hint) or (hint,) if isinstance(kind, type))
        ours = (kind for kind in kinds if kind.__module__.startswith(__package__ or "?"))
        if any(not getattr(kind, "_is_protocol", False) for kind in ours):  # what core gives is no class of ours
            words = "must come from an Inf-DiT node"
            found[name] = lambda value, kinds=kinds, words=words: "" if isinstance(value, kinds) else words
    return found
