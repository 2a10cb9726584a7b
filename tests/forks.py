"""Processes of their own that need not import PyTorch anew: forks of this one."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from infdit.__main__ import shell


def fork(act: Callable[[], object]) -> BaseProcess:
    """A process that acts, and ends with status 0, or as the act does."""
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    return process


def infdit(*arguments: object, stderr: int | None = None, first: Callable[[], object] = lambda: None) -> BaseProcess:
    """`python -m infdit` with these arguments.

    stderr: where what it says there goes, or nowhere; first: what the process does before, as to its environment.
    """

    def act() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere if stderr is None else stderr, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 - as Python begins
        sys.argv = ["infdit", *map(str, arguments)]
        tempfile.tempdir = None
        first()
        shell()

    return fork(act)
