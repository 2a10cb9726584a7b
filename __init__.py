"""Registers the nodes and their help pages with ComfyUI; nothing else. The library is `infdit/`, the nodes over it
are `nodes/`."""

import sys

WEB_DIRECTORY = "./web"  # docs/<node id>.md there is a node's help page; what its scripts do their first lines say

if "folder_paths" in sys.modules:  # inside ComfyUI; pytest, too, imports this file, as the package around tests/
    from .nodes.extension import comfy_entrypoint as comfy_entrypoint
