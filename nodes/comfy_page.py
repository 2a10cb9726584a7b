"""What a page shows and asks for: pictures as ComfyUI has them, the bar, the live picture, the stop button."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import comfy.model_management as mm
import folder_paths
import torch
from aiohttp import web
from comfy.cli_args import LatentPreviewMethod, args
from comfy.utils import ProgressBar
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..infdit import OutOfMemory, Report
from ..infdit.device import out_of_memory
from ..infdit.progress import PREVIEW_SIDE, Preview
from ..infdit.upscale import check_image
from .words import in_language

BAR_INTERVAL = 0.1  # seconds between two moves of the bar: each is a message to every open page
TEXT_INTERVAL = 0.5  # likewise, of the text under it
SURE = 0.01  # share of a run after which its pace tells when it ends: the first blocks are slow
BLANK = " "  # a line that says nothing: pages ignore empty ones
MOST_PAGES = 1000  # whose language is remembered

P = ParamSpec("P")
R = TypeVar("R")

_lines: set[str] = set()  # nodes on which a line of text stands
_failed: set[str] = set()  # those of them on which it says why they failed
_languages: dict[str, str] = {}  # of pages, by the id of their client; the newest last


def from_image(image: Tensor) -> Tensor:
    """ComfyUI's IMAGE, on any device, maybe of half precision, → (B, h, w, 3 or 4) float32 on the CPU.

    Pictures of one channel are grey. Not to be changed, for it may be the one that was given.

    Raises:
        ValueError: what cannot be enlarged.
    """
    if not isinstance(image, Tensor):  # a link may carry anything
        raise ValueError(f"image is of type {type(image).__name__}: connect a node that gives an IMAGE")
    image = image.float().cpu() if image.is_floating_point() else image
    image = image.expand(-1, -1, -1, 3) if image.dim() == 4 and image.shape[-1] == 1 else image
    check_image(image)
    return image


def to_image(image: Tensor) -> Tensor:
    """A picture → ComfyUI's IMAGE or MASK: where, and in the dtype that, this ComfyUI wants to have it."""
    dtype = mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32  # since 0.18
    return image.to(mm.intermediate_device(), dtype)


def _server() -> Any:  # noqa: ANN401 - ComfyUI's
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)  # tests run without one


def tell(text: str, node_id: str | None) -> None:
    """Put a line of text on a node, where there is a page to show it; BLANK only in place of another."""
    send = getattr(_server(), "send_progress_text", None)
    if send is None or node_id is None or (text == BLANK and node_id not in _lines):
        return
    (_lines.discard if text == BLANK else _lines.add)(node_id)
    send(in_language(text, page_language()), node_id)


def telling(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node that says on its own line of text why it fails; see `told`."""
    node.execute = classmethod(told(node.execute.__func__))  # pyright: ignore
    return node


def told(function: Callable[P, R]) -> Callable[P, R]:
    """A function that says on the line of the node that runs, which may be one of core's, why it fails.

    The page hides it elsewhere. When a run begins, the line of the last one goes; `listen_to_pages` sees to nodes that
    do not run then.
    """

    @wraps(function)
    def telling_why(*given: P.args, **named: P.kwargs) -> R:
        context = get_executing_context()
        node_id = None if context is None else context.node_id
        tell(BLANK, node_id)
        try:
            return function(*given, **named)
        except BaseException as error:
            if not out_of_memory(error) or isinstance(error, OutOfMemory):
                _tell_failure(_reason(error), node_id)
                raise
            failure = f"out of memory: close other programs, or make a smaller picture ({_first_line(error)})"
        _tell_failure(failure, node_id)
        raise OutOfMemory(failure)  # out here nothing refers to the error any more, which kept all that was held

    return telling_why


def refusal(text: str, node: type[io.ComfyNode]) -> str:
    """What `validate_inputs` of a node has to say, said on the node too, which does not run then."""
    _tell_failure(text, getattr(node.hidden, "unique_id", None))
    return text


def _tell_failure(text: str, node_id: str | None) -> None:
    """Short, for a node shows two lines: without the folders above that of the models."""
    tell(text.replace(folder_paths.models_dir, Path(folder_paths.models_dir).name), node_id)
    _failed.update([node_id] if node_id else [])


def _reason(error: BaseException) -> str:
    """What an error says, of a file the name without its folders."""
    if isinstance(error, mm.InterruptProcessingException):
        return "stopped"
    path = str(getattr(error, "path", ""))
    return str(error).replace(path, Path(path).name) if path else str(error) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def page_language() -> str:
    """Of the page whose prompt runs, by its short name; English for programs."""
    return _languages.get(getattr(_server(), "client_id", None) or "", "en")


def listen_to_pages() -> None:
    """Have pages tell their language (web/language.js), and a prompt take away what nodes that failed before say.

    What the prompt finds in ComfyUI's cache does not run, and would keep it.
    """
    server = _server()
    if server is None:
        return

    def forget(prompt: object) -> object:
        while _failed:
            tell(BLANK, _failed.pop())
        return prompt

    @server.routes.post("/infdit/language")
    async def learn(request: web.Request) -> web.Response:
        try:
            said = await request.json()
            client, language = str(said["client"])[:64], str(said["language"])[:16]
        except (ValueError, TypeError, KeyError):
            return web.Response(status=400, text='send JSON as {"client": ID, "language": "en"}')
        _languages.pop(client, None)
        _languages[client] = language
        while len(_languages) > MOST_PAGES:
            del _languages[next(iter(_languages))]
        return web.Response()

    server.add_on_prompt_handler(forget)


def wants_pictures() -> bool:
    """Whether live pictures are wanted: unless --preview-method, or the page's setting in its place, says none."""
    said = any(word.startswith("--preview-m") for word in sys.argv)  # without a word, ComfyUI's own samplers show none
    return not said or args.preview_method != LatentPreviewMethod.NoPreviews


class Bar:
    """The bar, the live picture and a line of text on the node that runs, and its stop button.

    Raises, when moved:
        InterruptProcessingException: the user has pressed stop.
    """

    def __init__(self, node_id: str | None = None, pictures: int = 1) -> None:
        self._node_id, self._pictures = node_id, pictures
        self._bar: ProgressBar | None = None
        self._began, self._prepared = time.monotonic(), 0
        self._shown = self._told = float("-inf")

    def move(self, done: int, total: int, preview: Preview | None = None, text: str = "") -> None:
        """Show what is done of a total."""
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        preview = preview if wants_pictures() else None
        if preview is None and done != total and now - self._shown < BAR_INTERVAL:
            return
        bar = self._bar = self._bar or ProgressBar(total)
        picture = None if preview is None else ("JPEG", Image.fromarray(preview().numpy()), PREVIEW_SIDE)
        bar.update_absolute(done, total, picture)
        self._shown = now
        if text and now - self._told >= TEXT_INTERVAL:
            self.tell(text)

    def show(self, report: Report, done: int, total: int, preview: Preview | None) -> None:
        """Move, with the time left in words: `progress` of `infdit.upscale`, whose report says what it does."""
        number = min(done * self._pictures // total + 1, self._pictures)
        which = f"picture {number} of {self._pictures}, " if self._pictures > 1 else ""
        if report.doing == "preparing":  # at a pace of its own
            self._began, self._prepared = time.monotonic(), done
            self.move(done, total, preview, f"{which}preparing")
            return
        since, left = done - self._prepared, ""
        if since >= SURE * total:
            left = f", {duration((time.monotonic() - self._began) * (total - done) / since)} left"
        self.move(done, total, preview, f"{which}{done / total:.0%}{left}")

    def fill(self) -> None:
        """Show that all is done: a sampler may have needed fewer evaluations than were counted on."""
        if self._bar is not None and self._bar.current < self._bar.total:
            self._bar.update_absolute(self._bar.total)

    def tell(self, text: str) -> None:
        """Show a line of text on the node, where there is a page to show it."""
        self._told = time.monotonic()
        tell(text, self._node_id)


def duration(seconds: float) -> str:
    """A time for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
