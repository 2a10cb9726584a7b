"""The import graph: nodes → infdit, never back; ComfyUI's internals in nodes/comfy_*.py only; no cycles, few levels.

    infdit/*                 standard library, third parties, relative imports within infdit
    nodes/*                  besides those: comfy_api and folder_paths, and infdit, relatively
    nodes/comfy_*.py         besides those: comfy.*
    __init__.py of the pack  the standard library and nodes, relatively
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# top-level modules of ComfyUI, and our own by their absolute names: inside ComfyUI `nodes` is ComfyUI's nodes.py
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "server"}
OURS = {"infdit", "nodes", "tests", "training", "benchmarks"}
LIBRARY, NODES = sorted((ROOT / "infdit").rglob("*.py")), sorted((ROOT / "nodes").rglob("*.py"))
LAZY = {"open_clip", "torchvision", "transformers", "matplotlib", "requests"}  # slow or broken where nobody needs them


def imports(source: str, module: str, package: bool = False, everywhere: bool = True) -> Iterator[str]:
    """Absolute dotted names of what a module imports: modules, or names within them.

    everywhere: also within functions; not what is only for type checkers.
    """
    parts = module.split(".")
    home = parts if package else parts[:-1]
    for node in _statements(ast.parse(source), everywhere):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            yield from (".".join(filter(None, (*base, node.module, alias.name))) for alias in node.names)


def _statements(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if not everywhere and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _statements(child, everywhere)


def absolute(source: str) -> set[str]:
    """Top-level names of the absolute imports of a source."""
    tree = ast.parse(source)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level and n.module}
    return {name.split(".")[0] for name in names}


def name_of(path: Path) -> str:
    """The dotted name of a file within the pack, which itself is "pack"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("pack", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def graph(paths: list[Path], everywhere: bool) -> dict[str, set[str]]:
    """Which of these modules imports which."""
    known = {name_of(path) for path in paths}

    def module(name: str) -> str | None:  # the longest known beginning: a name comes from the module that defines it
        beginnings = itertools.accumulate(name.split("."), "{}.{}".format)
        return max((b for b in beginnings if b in known), key=len, default=None)

    found = {}
    for path in paths:
        targets = imports(path.read_text(), name_of(path), path.name == "__init__.py", everywhere)
        found[name_of(path)] = {m for m in map(module, targets) if m is not None} - {name_of(path)}
    return found


def cycle(edges: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=by_name)
def test_library_knows_nothing_of_comfyui(path: Path) -> None:
    assert absolute(path.read_text()) & (COMFYUI | OURS) == set()


@pytest.mark.parametrize("path", LIBRARY, ids=by_name)
def test_library_imports_nothing_outside_itself(path: Path) -> None:
    targets = imports(path.read_text(), name_of(path), path.name == "__init__.py")
    assert [t for t in targets if t.startswith("pack") and not (t + ".").startswith("pack.infdit.")] == []


@pytest.mark.parametrize("path", LIBRARY, ids=by_name)
def test_library_imports_slow_packages_only_when_they_are_needed(path: Path) -> None:
    targets = imports(path.read_text(), name_of(path), path.name == "__init__.py", everywhere=False)
    assert LAZY & {target.split(".")[0] for target in targets} == set()


def test_library_has_no_import_cycles() -> None:
    assert len(LIBRARY) > 5
    assert cycle(graph(LIBRARY, everywhere=True)) == []


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """1 for a module that imports none of the others, else one more than the highest that it imports."""
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(edges).static_order():
        found[name] = 1 + max((found[other] for other in edges[name]), default=0)
    return found


def test_library_has_few_levels_and_no_module_imports_upwards() -> None:
    """Rooms from the ground up: what is in one imports from those below it, or from its own."""
    edges = graph(LIBRARY, everywhere=True)
    shell = ("pack.infdit.cli.", "pack.infdit.__main__")
    library = {name: below for name, below in edges.items() if not f"{name}.".startswith(shell)}
    assert max(levels(library).values()) <= 7, "what can be imported; the shell is above it"
    assert max(levels(edges).values()) <= 8
    rooms = {name: room_of(name) for name in edges}
    upward = [(a, b) for a, others in edges.items() for b in others if rooms[b] > rooms[a]]
    assert upward == []


ROOMS = (  # architecture.md draws them
    (
        "attention", "config", "fuse", "grid", "kernel", "rotary", "samplers", "presets", "tune",
        "device", "names", "sizes", "tensorfile", "draft", "disk", "seams", "sidecar",
    ),
    ("conditioning", "blocks", "model", "memory.plan", "memory.measure", "memory.offload", "memory.planner", "memory"),
    ("uniba", "stages", "denoiser"),
    ("run", "selfcheck", "progress", "fidelity", "receipt", "resume", "upscale"),
    ("clip", "checkpoint", "picture", "ranks"),
    ("", "cli", "__main__"),
)


def room_of(name: str) -> int:
    """The floor that a module is on, by its longest beginning that is named."""
    parts = name.removeprefix("pack.infdit").removeprefix(".")
    for beginning in (".".join(parts.split(".")[:n]) for n in range(parts.count(".") + 1, -1, -1)):
        for floor, modules in enumerate(ROOMS):
            if beginning in modules and (beginning or not parts):
                return floor
    raise AssertionError(f"{name} is in none of ROOMS: say where it belongs")


@pytest.mark.parametrize("path", [*LIBRARY, *NODES], ids=by_name)
def test_functions_are_short(path: Path) -> None:
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}
    assert long == {}


@pytest.mark.parametrize("path", NODES, ids=by_name)
def test_only_what_is_named_after_it_uses_comfyui_internals(path: Path) -> None:
    internals = {"comfy", "comfy_execution"} if path.name.startswith("comfy_") else set()
    allowed = {"comfy_api", "folder_paths"} | internals
    assert absolute(path.read_text()) & (COMFYUI | OURS) <= allowed


def test_nodes_have_no_import_cycles() -> None:
    assert len(NODES) > 3
    assert cycle(graph(NODES, everywhere=True)) == []


def test_nobody_imports_a_module_of_tests() -> None:
    """What several of them need is in a module of its own."""
    files = [path for folder in ("tests", "training", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    texts = {by_name(path): path.read_text(encoding="utf-8") for path in files}
    likely = {name: text for name, text in texts.items() if re.search(r"^\s*(from|import) .*\btest_", text, re.M)}
    found = {(name, what) for name, text in likely.items() for what in imports(text, "pack")}
    assert sorted(pair for pair in found if any(part.startswith("test_") for part in pair[1].split("."))) == []


def test_pack_only_registers() -> None:
    source = (ROOT / "__init__.py").read_text()
    assert absolute(source) <= {"sys"}
    assert set(imports(source, "pack", package=True)) == {"sys", "pack.nodes.extension.comfy_entrypoint"}
    assert "NODE_CLASS_MAPPINGS" not in source  # where it exists, ComfyUI ignores comfy_entrypoint


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import comfy.utils", {"comfy"}),
        ("def f():\n    from comfy import utils", {"comfy"}),
        ("from nodes import NODE_CLASS_MAPPINGS", {"nodes"}),
        ("from . import nodes\nfrom .comfy import x", set()),
    ],
)
def test_the_check_sees_imports_anywhere(source: str, found: set[str]) -> None:
    assert absolute(source) & (COMFYUI | OURS) == found


@pytest.mark.parametrize(
    ("source", "everywhere", "found"),
    [
        ("from . import schema", True, {"pack.nodes.schema"}),
        ("from ..infdit.grid import BlockGrid", True, {"pack.infdit.grid.BlockGrid"}),
        ("try:\n    import open_clip\nexcept ImportError:\n    pass", False, {"open_clip"}),
        ("class A:\n    def f(self):\n        import open_clip", False, set()),
        ("if TYPE_CHECKING:\n    import open_clip", False, set()),
    ],
)
def test_the_check_resolves_names(source: str, everywhere: bool, found: set[str]) -> None:
    assert set(imports(source, "pack.nodes.upscale", everywhere=everywhere)) == found


def test_the_check_sees_a_cycle() -> None:
    ring = dict(itertools.pairwise("abca"))
    assert cycle({key: {value} for key, value in ring.items()})
