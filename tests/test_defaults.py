"""What another pack leaves behind in PyTorch's defaults changes nothing, not in one bit."""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import clipmath
import pytest
import torch
from safetensors.torch import save_file

import infdit
from infdit import MemoryPlan
from infdit.clip import clip_embedding, load_clip
from infdit.model import InfDiT
from infdit.resume import SavedRun

Run = Callable[[InfDiT, Path], list[torch.Tensor]]
ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "tests" / "data" / "tiny.mp_rank_00_model_states.pt"  # listens to a vector of 32 numbers
FACTORIES = {
    *("arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted"),
    *("empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}


def unnamed(tree: ast.AST) -> list[str]:
    """Calls that leave dtype or device to PyTorch's defaults, but for parameters: those are as `nn.Linear`'s beside
    them, in the dtype and on the device that whoever builds a network has set for that, "meta" to read a file."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    built = {id(given) for call in calls if ast.unparse(call.func) == "nn.Parameter" for given in call.args}
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"
        if call.func.attr in FACTORIES and id(call) not in built
        if not {"dtype", "device"} <= {word.arg for word in call.keywords}
    ] + [
        f"{node.lineno}: {ast.unparse(node)}, which hides calls"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        if FACTORIES & {alias.name for alias in node.names}
    ]


@pytest.mark.parametrize("room", ["infdit", "nodes"])
def test_every_tensor_is_made_with_its_dtype_and_device(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py"))
    assert len(paths) > 10
    found = {str(path.relative_to(ROOT)): unnamed(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: calls for path, calls in found.items() if calls} == {}
    seen = "torch.zeros(3, device=d)\nnn.Parameter(torch.empty(3))\ntorch.eye(3, dtype=t, device=d)\n"
    assert unnamed(ast.parse(seen + "from torch import ones")) == [
        "1: torch.zeros(3, device=d)", "4: from torch import ones, which hides calls"
    ]  # fmt: skip


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque and transparent."""
    shape = {"generator": torch.Generator("cpu").manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    return torch.rand((1, 12, 17, 3), **shape), torch.rand((1, 9, 11, 4), **shape).round(decimals=1)


def upscaled(model: InfDiT, folder: Path) -> list[torch.Tensor]:
    opaque, clear = pictures()
    plan, bundled = MemoryPlan(2, 3, "streamed", "host", "host"), infdit.load_model("mini", torch.float32, "cpu")
    return [
        infdit.upscale(bundled, opaque, 3.3),
        infdit.upscale(bundled, clear, 5.0, fidelity=1.0, colour_match=True),  # in two passes
        infdit.upscale(model, opaque, steps=2, sampler="heun", plan=plan),
        infdit.upscale(model, clear, steps=3, sampler="dpmpp_2m", size=(31, 40)),
        infdit.upscale(model, clear, steps=1, plan=replace(plan, images="disk"), folder=folder),
    ]


def resumed(model: InfDiT, folder: Path) -> list[torch.Tensor]:
    """Of a run that ends before its last step."""

    def end(state: dict) -> None:
        if state["i"] == 2:
            raise InterruptedError

    settings, saved = {"steps": 3, "sampler": "dpmpp_2m", "scale": 2.0}, SavedRun(folder / "run")
    with pytest.raises(InterruptedError):
        infdit.upscale(model, pictures()[1], callback=end, resume=saved, **settings)
    report = infdit.Report()
    result = infdit.upscale(model, pictures()[1], resume=saved, report=report, **settings)
    assert report.resumed
    saved.remove()
    return [result]


def told(model: InfDiT, folder: Path) -> list[torch.Tensor]:
    """By CLIP, of a small tower with random weights, both by its picture and by text."""
    sizes = (replace(sizes, output_dim=32) for sizes in (clipmath.SMALL, clipmath.SMALL_TEXT))
    encoder = load_clip(folder / "clip.safetensors", torch.float32, "cpu", *sizes)
    listens, (picture, _) = infdit.load_model(PUBLISHED, torch.float32, "cpu"), pictures()
    vector = clip_embedding(encoder, picture.movedim(-1, 1) * 2 - 1, "clear", "noisy")
    return [vector, infdit.upscale(listens, picture, 2.0, steps=1, clip_embedding=vector)]


@contextmanager
def left_behind(default: torch.dtype | str) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize("run", [upscaled, resumed, pytest.param(told, marks=clipmath.needs_open_clip)])
def test_defaults_of_dtype_and_device_do_not_matter(run: Run, noisy_mini: InfDiT, tmp_path: Path) -> None:
    vision, text = (replace(sizes, output_dim=32) for sizes in (clipmath.SMALL, clipmath.SMALL_TEXT))
    save_file(clipmath.tower_weights(vision) | clipmath.text_weights(text), tmp_path / "clip.safetensors")
    expected = run(noisy_mini, tmp_path)
    for default in (torch.bfloat16, torch.float64, "meta"):
        with left_behind(default):
            found = run(noisy_mini, tmp_path)
        # under a default device PyTorch's own MultiheadAttention, which CLIP has, takes a way of another last bit
        atol = 1e-4 if (run, default) == (told, "meta") else 0
        same = [torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(found, expected, strict=True)]
        assert same == [True] * len(same), default
