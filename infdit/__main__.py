"""The shell: `python -m infdit upscale | plan | convert | info | bench`."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Sequence

from .clip import OpenCLIPMissingError
from .device import out_of_memory
from .run import OutOfMemory
from .shell import benching, models, planning, upscaling
from .shell.arguments import BAD_INPUT, Parser
from .tensorfile import CheckpointError

INTERRUPTED = 130  # exit status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no × must not turn success into failure
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (CheckpointError, OpenCLIPMissingError, ValueError) as error:
        print(f"infdit: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"infdit: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"infdit: {error if isinstance(error, OutOfMemory) else upscaling.OUT_OF_MEMORY}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("infdit: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="infdit", description="Upscale pictures to any resolution with Inf-DiT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in (upscaling, planning, models, benching):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
