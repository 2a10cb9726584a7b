"""Model files: what loads, what is refused, the published .pt, CLIP. See drive.py."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from harness import (
    BASE,
    PACK_DIR,
    PICTURES,
    TAKEN,
    case,
    facts,
    give,
    library,
    load_prompt,
    pack,
    patched,
    prompt,
    run,
    take,
    valid,
)
from safetensors import safe_open
from safetensors.torch import save_file

MODELS = BASE / "models" / "infdit"
MINI = PACK_DIR / "infdit" / "weights" / "mini.safetensors"
PUBLISHED = PACK_DIR / "tests" / "data" / "tiny.mp_rank_00_model_states.pt"  # the published layout, with a CLIP input


def outcome(ended: dict) -> dict:
    return {key: ended.get(key) for key in ("end", "message", "type")}


@case
def dtypes() -> dict:
    """What the choices of dtype load."""
    found = {}
    for name in ("auto", "bf16", "fp16", "fp32"):
        ended = run(load_prompt(dtype=name))
        network = TAKEN["value"].network
        found[name] = {"end": ended["end"], "dtypes": sorted({str(p.dtype) for p in network.parameters()})}
        found[name] |= run(prompt("pixel", {"dtype": name}, steps=1)) | facts(TAKEN["value"])
    library()
    device = importlib.import_module("infdit.device")
    found["auto"]["expected"] = str(device.default_dtype(torch.device("cpu")))
    return found


@case
def files() -> dict:
    """Files that vanish, that are broken, that are something else."""
    mini = MINI.read_bytes()
    contents = {
        "vanishing.safetensors": mini,
        "cut.safetensors": mini[: len(mini) // 2],
        "noise.safetensors": bytes(range(256)) * 64,
        "noise.pt": bytes(range(256)) * 64,
        "empty.safetensors": b"",
    }
    for name, content in contents.items():
        (MODELS / name).write_bytes(content)
    found = {}
    for name in contents:
        gone = (MODELS / name).unlink if name.startswith("vanishing") else None
        found[name] = outcome(run(load_prompt(model_name=name), gone))
    found["unlisted"] = run(load_prompt(model_name="nowhere.safetensors"))
    (MODELS / "linked.safetensors").write_bytes(mini)
    linked = load_prompt(model_name=["name", 0])
    linked["name"] = {"class_type": "Say", "inputs": {"text": "linked.safetensors"}}
    found["linked"] = outcome(run(linked))
    linked["name"]["inputs"]["text"] = "../../../secret.safetensors"
    (BASE / "secret.safetensors").write_bytes(mini)
    found["outside"] = outcome(run(linked))
    (MODELS / "x.clip.safetensors").write_bytes(mini)  # a CLIP model to ComfyUI's eyes, and so no choice
    found["clip"] = run(load_prompt(model_name="x.clip.safetensors"))
    for name in ("", ".", "..", None):
        found[f"named {name!r}"] = {
            kind: outcome(run(asked))
            for kind, asked in (("model", load_prompt(model_name=name)), ("clip", clip_prompt(clip_name=name)))
        }
    found["left"] = sorted(path.name for path in MODELS.glob("noise*"))
    return found


@case
def replaced() -> dict:
    """Which nodes run again: nothing changed; the file's time changed; then, the same file again."""
    path = MODELS / "again.safetensors"
    shutil.copy(MINI, path)
    asked = load_prompt(model_name=path.name)
    found = [run(asked)["ran"], run(asked)["ran"]]
    os.utime(path, (1, 1))
    found += [run(asked)["ran"], run(asked)["ran"]]
    linked = load_prompt(model_name=["name", 0])
    linked["name"] = {"class_type": "Say", "inputs": {"text": path.name}}
    return {"ran": found, "linked": [run(linked)["ran"], run(linked)["ran"]]}


@case
def conversion() -> dict:
    """The published .pt: first used, used again, changed, beside files of others, and where nothing can be written."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    source, target = MODELS / "published.pt", MODELS / "published.safetensors"
    shutil.copy(PUBLISHED, source)
    found: dict[str, Any] = {"before": digest(source)}
    first = run(load_prompt(model_name=source.name))
    found["first"] = {"end": first["end"], "bar": [move[1:3] for move in first["bar"]], "made": target.exists()}
    with safe_open(str(target), "pt") as file:
        found["metadata"] = sorted(file.metadata())
    stamp = target.stat().st_mtime_ns
    again = run(load_prompt(model_name=source.name, dtype="bf16"))
    found["again"] = {"end": again["end"], "bar": len(again["bar"]), "same": target.stat().st_mtime_ns == stamp}
    os.utime(source, (1, 1))
    changed = run(load_prompt(model_name=source.name))
    found["changed"] = {"end": changed["end"], "same": target.stat().st_mtime_ns == stamp}
    found["after"] = digest(source)
    found["left"] = sorted(path.name for path in MODELS.iterdir() if "published" in path.name)

    (MODELS / "mine.pt").write_bytes(PUBLISHED.read_bytes())
    shutil.copy(MINI, MODELS / "mine.safetensors")
    mine = run(load_prompt(model_name="mine.pt"))
    found["not ours"] = {
        "end": mine["end"],
        "kept": digest(MODELS / "mine.safetensors") == digest(MINI),
        "layers": TAKEN["value"].network.config.num_layers,
    }
    (MODELS / "locked.pt").write_bytes(PUBLISHED.read_bytes())
    error = pack("infdit").CheckpointError

    def refuse(source: Path, target: Path, *_: object) -> None:
        raise error(target, "cannot be written (read-only)", "try another folder")

    with patched(pack("nodes.files"), convert=refuse):
        locked = run(load_prompt(model_name="locked.pt"))
    found["locked"] = {"end": locked["end"], "layers": TAKEN["value"].network.config.num_layers}
    return found


@case
def pipes() -> dict:
    """A named pipe in a model's place: beside a published .pt, and chosen as a model and as CLIP."""
    source, pipe, patience = MODELS / "piped.pt", MODELS / "piped.safetensors", 60  # seconds
    shutil.copy(PUBLISHED, source)
    os.mkfifo(pipe)
    # whoever waits for a pipe's other end in this process waits for ever: it is opened from another
    other_end = subprocess.Popen(["sh", "-c", f"sleep {patience}; while : <> '{pipe}'; do sleep 1; done"])
    began = time.monotonic()
    try:
        beside = run(load_prompt(model_name=source.name))
        found = {"beside": outcome(beside) | {"layers": TAKEN["value"].network.config.num_layers}}
        found["model"] = outcome(run(load_prompt(model_name=pipe.name)))
        found["clip"] = outcome(run(clip_prompt(clip_name=pipe.name)))
    finally:
        other_end.kill()
        other_end.wait()
    found["waited"] = time.monotonic() - began > patience
    found["kept"] = pipe.is_fifo()
    for path in (source, pipe):
        path.unlink()
    return found


# ---- CLIP


def small_sizes() -> dict[str, Any]:
    towers = pack("infdit.clip.encoder")
    sizes = {"layers": 1, "heads": 2, "output_dim": 32}
    return {
        "config": towers.VisionConfig(image_size=28, patch_size=14, width=16, **sizes),
        "text_config": towers.TextConfig(width=16, **sizes),
    }


def small_clip(path: Path, text: bool = True) -> None:
    """A file as open_clip writes it, of random weights and small sizes."""
    encoder, sizes = pack("infdit.clip.encoder"), small_sizes()
    torch.manual_seed(5)
    tensors = {f"visual.{k}": v for k, v in encoder.CLIPEncoder(sizes["config"]).tower.state_dict().items()}
    if text:
        tensors |= encoder.CLIPTextEncoder(sizes["text_config"]).tower.state_dict()
    save_file({name: torch.randn_like(tensor) * 0.1 for name, tensor in tensors.items()}, path)


def clip_prompt(picture: str = "small", clip_name: str = "clip.safetensors", **texts: object) -> dict:
    return {
        "clip": {"class_type": "InfDiTCLIPLoader", "inputs": {"clip_name": clip_name}},
        "give": give(picture),
        "encode": {"class_type": "InfDiTCLIPEncode", "inputs": {"clip": ["clip", 0], "image": ["give", 0], **texts}},
        "take": take("INFDIT_CONDITIONING", "encode", 0),
    }


@case
def clip() -> dict:
    """Vectors of pictures and texts beside the library's; files that cannot be used."""
    folder = BASE / "models" / "clip_vision"
    folder.mkdir(exist_ok=True)
    small_clip(folder / "clip.safetensors")
    small_clip(folder / "blind.safetensors", text=False)
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 64)
    infdit_clip, memory = pack("infdit.clip"), pack("nodes.comfy_memory")
    found: dict[str, Any] = {"listed": pack("nodes.files").clip_files()}
    with patched(memory, load_clip=partial(infdit_clip.load_clip, **small_sizes())):
        encoder = memory.load_clip(folder / "clip.safetensors", torch.float32, "cpu")
        colour = {name: PICTURES[name][..., :3].movedim(-1, 1) * 2 - 1 for name in ("small", "batch", "wide")}
        for name, picture, texts in (
            ("picture", "small", {}),
            ("batch", "batch", {}),
            ("texts", "small", {"positive": "a sharp photograph", "negative": "blur", "strength": 3.0}),
            ("no strength", "small", {"positive": "a sharp photograph", "strength": 0.0}),
            ("whole", "wide", {"view": "pad"}),
            ("alpha", "alpha", {}),
        ):
            ended = run(clip_prompt(picture, **texts))
            found[name] = outcome(ended)
            if ended["end"] != "success":
                continue
            vectors = TAKEN["value"].vectors
            found[name] |= {"shape": list(vectors.shape), "length": vectors.norm(dim=-1).tolist()}
            if picture in colour:
                expected = infdit_clip.clip_embedding(encoder, colour[picture], **texts)
                found[name]["difference"] = (vectors - expected).abs().max().item()
            found[name]["told"] = TAKEN["value"].description
            found[name]["warnings"] = TAKEN["value"].warnings
        run(clip_prompt(positive="word " * 100))
        found["long"] = {"warnings": TAKEN["value"].warnings}
        found["blind"] = outcome(run(clip_prompt(clip_name="blind.safetensors", positive="text")))
        found["noise"] = outcome(run(clip_prompt(clip_name="noise.safetensors")))
        found["model"] = outcome(run(clip_prompt(clip_name="again.safetensors")))
    found["unlisted"] = outcome(run(clip_prompt(clip_name="nowhere.safetensors")))
    PICTURES["no pictures"] = torch.zeros(0, 8, 8, 3)
    with patched(memory, load_clip=partial(infdit_clip.load_clip, **small_sizes())):
        found["empty"] = outcome(run(clip_prompt("no pictures")))
    found["limits"] = {
        str(texts): valid(clip_prompt(**texts))
        for texts in ({"strength": -0.1}, {"strength": 10.1}, {"view": "fill"}, {"clip_name": "../clip.safetensors"})
    }
    return found


@case
def conditioning() -> dict:
    """A model that listens to CLIP, one that does not, and one that is told nothing."""
    memory, infdit_clip = pack("nodes.comfy_memory"), pack("infdit.clip")
    shutil.copy(PUBLISHED, MODELS / "listens.pt")
    infdit = library()
    model = infdit.load_model(PUBLISHED, dtype=torch.float32, device="cpu")
    found = {}
    for name, file, told in (
        ("listens", "listens.pt", True),
        ("told nothing", "listens.pt", False),
        ("deaf", "mini (bundled)", True),
    ):
        asked = prompt("small", {"model_name": file}, steps=2, seed=4)
        if told:
            asked |= {key: node for key, node in clip_prompt(positive="sharp").items() if key not in ("give", "take")}
            asked["upscale"]["inputs"]["conditioning"] = ["encode", 0]
            asked["take vectors"] = take("INFDIT_CONDITIONING", "encode", 0, "vectors")
        with patched(memory, load_clip=partial(infdit_clip.load_clip, **small_sizes())):
            ended = run(asked)
        found[name] = outcome(ended) | {"report": TAKEN.get("report", "")}
        if name != "deaf" and ended["end"] == "success":
            vectors = TAKEN["vectors"].vectors if told else None
            image = infdit.upscale(
                model, PICTURES["small"], steps=2, sampler="heun", seed=4, clip_embedding=vectors
            )
            found[name]["difference"] = (TAKEN["value"] - image).abs().max().item()
    return found


@case
def clip_and_memory() -> dict:
    """On a graphics card that is not there: CLIP is brought, used and moved back; with no room it works where it is."""
    memory = pack("nodes.comfy_memory")
    card, calls = torch.device("cuda:0"), []

    class Encoder:
        def to(self, device: object) -> Encoder:
            calls.append(f"to {device}")
            return self

    patcher = type("Patcher", (), {"load_device": card, "offload_device": memory.CPU, "model_size": lambda self: 600})()
    clip = memory.ManagedCLIP("clip", Encoder(), patcher)
    found = {}
    for name, room in (("room", 2**40), ("no room", 2**20)):
        calls.clear()
        with (
            patched(memory, obtainable=lambda device, room=room: room, unload=lambda patcher: calls.append("unload")),
            patched(mm, load_models_gpu=lambda models, **kwargs: calls.append(f"load {sorted(kwargs)}")),
            memory.clip_at_work(clip),
        ):
            calls.append("work")
        found[name] = list(calls)
    return found


def metadata(path: Path) -> dict:
    with safe_open(str(path), "pt") as file:
        return {key: json.loads(value) if value.startswith("{") else value for key, value in file.metadata().items()}
