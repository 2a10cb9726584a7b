"""Model files: where they are, which ones a node offers, and the published .pt, which is converted once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import folder_paths
from safetensors import SafetensorError, safe_open

from ..infdit import CheckpointError, convert
from ..infdit.checkpoint import clip_path as clip_beside
from ..infdit.clip.loader import CONVERTED, WEIGHTS
from .inputs import shown

FOLDER = "infdit"
CLIP_FOLDERS = ("clip_vision", FOLDER)
EXTENSIONS = {".safetensors", ".pt"}
CLIP_SUFFIX = ".clip.safetensors"  # of the CLIP models that `convert` puts beside a model
BUNDLED = "mini (bundled)"  # in the list of files
MADE_FROM = "converted_from"  # metadata of a file that was converted here: its source as it was
HELP = 'The README tells more under "Models".'

_log = logging.getLogger(__name__)


def register_model_folder() -> None:
    """Make models/infdit known, beside whatever the user's extra model paths already say about it."""
    folder_paths.add_model_folder_path(FOLDER, str(_folder(FOLDER)))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


# ---- models


def model_files() -> list[str]:
    """What the loader offers: the bundled model, files of models/infdit, without the CLIP models among them."""
    files = folder_paths.get_filename_list(FOLDER)
    return [BUNDLED, *(name for name in files if not name.endswith(CLIP_SUFFIX))]


def missing_model(name: str) -> str:
    """What to do about a model that is not there."""
    if not _is_name(name):
        return f"model_name is {shown(name)}: choose {BUNDLED!r}, or a file of {_folder(FOLDER)}. {HELP}"
    target = Path(name).with_suffix(".safetensors")
    return (
        f"{name} is not in {_folder(FOLDER)}: put it there and press R, or choose {BUNDLED!r}. The published "
        f"checkpoint goes there as it is, or as what `python -m infdit convert mp_rank_00_model_states.pt {target}` "
        f"makes of it. {HELP}"
    )


def model_path(name: str) -> str:
    """The file behind an entry of the list; "mini" for the bundled one.

    Raises:
        CheckpointError: the file is gone.
    """
    return "mini" if name == BUNDLED else _path((FOLDER,), name, missing_model)


def converted(path: str, progress: Callable[[int, int], None]) -> str:
    """The .safetensors beside a published .pt, made now unless it is there already; any other file itself.

    The .pt is never touched, and neither are files that were not made from it; if there is no place to write to, the
    .pt itself serves.

    Raises:
        CheckpointError: a file that cannot be used.
    """
    source = Path(path)
    if source.suffix != ".pt":
        return path
    target = source.with_suffix(".safetensors")
    origin = f"{source.name} {source.stat().st_size} {source.stat().st_mtime_ns}"
    if target.exists() and _metadata(target).get(MADE_FROM) == origin:
        return str(target)
    clip = clip_beside(target)
    if _is_not_ours(target, MADE_FROM) or _is_not_ours(clip, "source", CONVERTED):
        _log.info("%s is used as it is: what lies beside it under the names of its conversion is not from here", source)
        return path
    try:
        convert(source, target, progress, {MADE_FROM: origin})
    except CheckpointError as error:
        if error.path == source:
            raise
        _log.warning("%s is used as it is: %s", source, error)
        return path
    return str(target)


def _is_not_ours(path: Path, key: str, value: str | None = None) -> bool:
    found = _metadata(path).get(key) if path.exists() else value or ""
    return found is None or (value is not None and found != value)


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():  # a pipe would never begin
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


# ---- CLIP


def clip_files() -> list[str]:
    """Files that may hold CLIP: those split off a checkpoint, then all of models/clip_vision and of models/infdit."""
    lists = {folder: folder_paths.get_filename_list(folder) for folder in CLIP_FOLDERS}
    split = [name for name in lists[FOLDER] if name.endswith(CLIP_SUFFIX)]
    return list(dict.fromkeys([*split, *(name for names in lists.values() for name in names)]))


def missing_clip(name: str) -> str:
    """What to do about CLIP that is not there."""
    folders = " or ".join(str(_folder(folder)) for folder in CLIP_FOLDERS)
    if not _is_name(name):
        return f"clip_name is {shown(name)}: choose a file of {folders}. {HELP}"
    return f"{name} is not in {folders}: put {WEIGHTS} into the first, or the published .pt into the second. {HELP}"


def clip_path(name: str) -> str:
    """The file behind an entry of the list.

    Raises:
        CheckpointError: the file is gone.
    """
    return _path(CLIP_FOLDERS, name, missing_clip)


# ---- both


def _is_name(name: object) -> bool:
    """Whether it names a file: a link, or a prompt written by hand, may carry anything."""
    return isinstance(name, str) and name.isprintable() and Path(name).name.strip(" .") != ""


def fingerprint(folders: Sequence[str], name: str) -> str:
    """Changes when the file does."""
    path = _find(folders, name)
    if path is None:
        return str(name)
    stat = Path(path).stat()
    return f"{path} {stat.st_mtime_ns} {stat.st_size}"


def _path(folders: Sequence[str], name: str, missing: Callable[[str], str]) -> str:
    path = _find(folders, name)
    if path is None:
        raise FileNotFoundError(missing(name))
    return path


def _find(folders: Sequence[str], name: str) -> str | None:
    if not _is_name(name):
        return None
    return next((path for folder in folders if (path := folder_paths.get_full_path(folder, name))), None)


def _folder(folder: str) -> Path:
    return Path(folder_paths.models_dir) / folder
