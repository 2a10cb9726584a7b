"""Drives the nodes through ComfyUI's own validator and executor, in one process and without a server.

    python drive.py COMFYUI BASE FINDINGS.json

Run by conftest.py with ComfyUI's Python. Each function marked @case gives a dictionary of what it found; the tests
decide what is right. BASE has this pack in custom_nodes.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import time
import traceback

import harness

# in their order
FILES = (
    "cases_upscale", "cases_unfinished", "cases_advanced", "cases_native", "cases_models", "cases_memory",
    "cases_made_up",
)  # fmt: skip


def main() -> None:
    asyncio.run(harness.load_core())
    harness.make_pictures()
    harness.make_models()
    harness.comfy.utils.set_progress_bar_global_hook(harness.on_bar)
    for name in FILES:
        importlib.import_module(name)
    findings = {}
    for name, function in harness.CASES.items():
        began = time.perf_counter()
        try:
            findings[name] = function()
        except Exception:  # noqa: BLE001 - it is handed to the test that asks for this case
            findings[name] = {"traceback": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - began:.2f} s", flush=True)
    findings["network"] = {"reached": harness.NETWORK}
    harness.FINDINGS.write_text(json.dumps(findings, default=str))


if __name__ == "__main__":
    main()
