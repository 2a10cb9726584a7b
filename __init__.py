"""Registers the nodes with ComfyUI; nothing else. The library is `infdit/`, the nodes over it are `nodes/`."""

import sys

if "folder_paths" in sys.modules:  # inside ComfyUI; pytest, too, imports this file, as the package around tests/
    from .nodes import comfy_entrypoint as comfy_entrypoint
