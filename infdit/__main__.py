"""The shell: `python -m infdit upscale | plan | convert | info | tune`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from .cli import BAD_INPUT, Parser, models, plan, tune, upscale
from .clip import OpenCLIPMissingError
from .device import DeviceFailed, WrongNumbers, out_of_memory
from .memory.planner import OutOfMemory
from .stages import COURIER
from .tensorfile import CheckpointError

INTERRUPTED, PIPE_CLOSED = 130, 141  # exit statuses, as shells have them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if some of several failed, 2 for bad input, 130 if interrupted."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever called; its absence loses no run
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no × must not turn success into failure
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        try:
            options = _parser().parse_args(arguments)
            command: Callable[[argparse.Namespace], int] = options.command
            return command(options)
        finally:
            sys.stdout.flush()  # here, where what it says can still be told; --help too
    except (CheckpointError, DeviceFailed, OpenCLIPMissingError, ValueError, WrongNumbers) as error:
        print(f"infdit: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # whoever read has read enough, like `head`
        _let_go_of(sys.stdout)
        return PIPE_CLOSED
    except OSError as error:
        where, remedy = error.filename, "check the path"
        if where is None:  # what was printed could not be written, to a full disk perhaps
            _let_go_of(sys.stdout)
            where, remedy = "the output", "send it somewhere else, or make room"
        print(f"infdit: {where}: {error.strerror or error}; {remedy}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"infdit: {error if isinstance(error, OutOfMemory) else upscale.OUT_OF_MEMORY}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("infdit: interrupted", file=sys.stderr)
        return INTERRUPTED


def _let_go_of(stream: TextIO) -> None:
    """Send what is still to be written nowhere: Python would try again at exit and complain."""
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="infdit", description="Upscale pictures to any resolution with Inf-DiT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in (upscale, plan, models, tune):
        command.add(commands)
    return parser


def shell() -> NoReturn:
    """Run the command that the shell was given, and leave."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop, as by Ctrl+C
    status = main()
    if any(thread.name == COURIER for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(status)  # it may wait for another process, and would come back to a Python that is no more
    sys.exit(status)


if __name__ == "__main__":
    shell()
