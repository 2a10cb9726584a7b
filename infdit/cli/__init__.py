"""The commands of `python -m infdit`: each file adds its arguments to a parser and runs. Here is what they share."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

import torch

FAILED, BAD_INPUT = 1, 2  # exit statuses: of several pictures some were not made; nothing was
BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """One line in place of argparse's usage and message."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """--budget, --device, --dtype."""
    parser.add_argument("--budget", type=bytes_of, metavar="X", help="memory to use, like 4GiB; default: what is free")
    device = "cpu, cuda, cuda:1, xpu, mps, or several that share the work, like cuda:0,cuda:1; default: the best one"
    parser.add_argument("--device", "--devices", metavar="NAME", help=device)
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help="of the network (default auto)")


def strengths_of(text: str) -> list[float]:
    """1,0.5 → [1.0, 0.5]."""
    try:
        return [float(strength) for strength in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1, or one a pass like 1,0.5") from None


def size_of(text: str) -> tuple[int, int]:
    """WxH → (height, width)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(width) < 8 and len(height) < 8):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT in pixels, like 4096x2304")
    return int(height), int(width)


def bytes_of(text: str) -> int:
    """4GiB, 512MiB, 1.5g → bytes."""
    match = re.fullmatch(r"([0-9.]+) *([kmgt]?)i?b?", text.strip().lower())
    if match is None or match[1].count(".") > 1 or match[1] == "." or len(match[1]) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} must be an amount of memory like 4GiB or 512MiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
