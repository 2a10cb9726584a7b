"""The zip that ComfyUI's registry would serve, made as `comfy node pack` makes it."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked(root: Path = ROOT, *options: str) -> set[str]:
    """What git keeps and is there; options: as `git ls-files` has them."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.check_output([git, "ls-files", "-z", *options], cwd=root, text=True)
    return {path for path in listed.split("\0") if path and (root / path).exists()}


def packed(root: Path = ROOT) -> set[str]:
    """What is packed: tracked files less those of .comfyignore, whose patterns are git's."""
    return tracked(root) - tracked(root, "--ignored", "--cached", "--exclude-from=.comfyignore")


def pack(path: Path) -> Path:
    """Write the zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(packed()):
            archive.write(ROOT / name, name)
    return path
