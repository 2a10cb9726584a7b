"""Memory: weights in ComfyUI's management, budgets, plans, and what happens when there is not enough. See drive.py."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from harness import PACK_DIR, PICTURES, TAKEN, case, pack, patched, prompt, run, take

MIB = 2**20
PLANS = "What Inf-DiT would hold in memory"
CARD = torch.device("cuda:0")  # which is not there: what would move to it is a stand-in


@case
def memory() -> dict:
    """Whether the weights are ComfyUI's: in its list of loaded models, and back after it has thrown them out."""
    run(prompt("pixel", steps=1))
    first = TAKEN["value"]
    loaded = [type(m.model.model).__name__ for m in mm.current_loaded_models]
    patcher = mm.current_loaded_models[0].model
    run(prompt("pixel", steps=1, seed=9))
    same = mm.current_loaded_models[0].model is patcher
    mm.unload_all_models()
    left = [type(m.model.model).__name__ for m in mm.current_loaded_models]
    ended = run(prompt("pixel", steps=1, seed=8))["end"]
    run(prompt("pixel", steps=1))
    return {
        "loaded": loaded,
        "same": same,
        "left": left,
        "end": ended,
        "difference": (first - TAKEN["value"]).abs().max().item(),
    }


@case
def budgets() -> dict:
    """The same picture under several budgets, with the plans that were made."""
    PICTURES["square"] = PICTURES["wide"][:, :, :24].repeat(1, 2, 2, 1)
    node, planner = pack("nodes.upscale"), pack("infdit.memory.planner")
    seen: list[Any] = []

    def spy(workload: Any, *args: Any) -> Any:
        planned = choose(workload, *args)
        seen.append(planned.plan)
        return planned

    choose, found = node.plan_run, {}
    for name, mib in (("automatic", 0), ("24 MiB", 24), ("40 MiB", 40), ("2 MiB", 2)):
        with patched(node, plan_run=spy):
            ended = run(prompt("square", steps=2, memory_budget=mib / 1024))
        found[name] = {key: ended[key] for key in ("end", "message", "type")} | {"report": TAKEN.get("report")}
        if ended["end"] == "success":
            found[name] |= {"peak": seen[-1].peak_bytes, "group": seen[-1].group, "chunk": seen[-1].chunk}
            found.setdefault("pictures", []).append(TAKEN["value"])
    typed = float(found["2 MiB"]["message"].partition("type ")[2].split()[0])
    found["as it was told to type"] = {"end": run(prompt("square", steps=1, memory_budget=typed))["end"]}
    pictures = found.pop("pictures")
    found["difference"] = max((pictures[0] - other).abs().max().item() for other in pictures[1:])
    memory, small = pack("nodes.comfy_memory"), 28 * MIB
    with patched(planner, free_bytes=lambda device: small), patched(memory, free_bytes=lambda device: small):
        for name, mib in (("little free", 0), ("less free than asked", 200)):
            with patched(node, plan_run=spy):
                ended = run(prompt("square", steps=1, memory_budget=mib / 1024))
            found[name] = {"end": ended["end"], "message": ended["message"], "peak": seen[-1].peak_bytes}
    return found


@case
def host_too_small() -> dict:
    """More than this machine has: refused before anything is loaded, and the next run works."""
    planner, memory = pack("infdit.memory.planner"), pack("nodes.comfy_memory")
    mm.unload_all_models()
    with patched(planner, free_bytes=lambda device: MIB), patched(memory, free_bytes=lambda device: MIB):
        ended = run(prompt("wide", steps=1, seed=71))
    found = {key: ended.get(key) for key in ("end", "message", "type")} | {"loaded": len(mm.current_loaded_models)}
    return found | {"after": run(prompt("wide", steps=1, seed=71))["end"]}


class OutOf:
    """Stands in for a function, and says a number of times that memory has run out."""

    def __init__(self, function: Any, times: int, after: int = 0) -> None:
        self.function, self.times, self.after, self.calls = function, times, after, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.after < self.calls <= self.after + self.times:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
        return self.function(*args, **kwargs)


@case
def out_of_memory() -> dict:
    """Memory that runs out in every attempt, and where no plan can help; each time a good run after it."""
    denoiser, upscale = pack("infdit.denoiser"), pack("infdit.upscale")
    unloaded: list[str] = []
    found = {}
    for name, module, attribute, times in (
        ("always", denoiser, "sweep", 10**6),
        ("outside", upscale, "conditioning_pictures", 1),
    ):
        failing = OutOf(getattr(module, attribute), times)
        with (
            patched(module, **{attribute: failing}),
            patched(mm, unload_all_models=lambda: unloaded.append("all")),
        ):
            ended = run(prompt("wide", steps=1, seed=32))
        found[name] = {key: ended.get(key) for key in ("end", "message", "type")}
        found[name] |= {"calls": failing.calls, "unloaded": list(unloaded), "alive": live()}
        found[name]["after"] = run(prompt("small", steps=1, seed=33 + failing.calls))["end"]
        TAKEN.clear()
        found[name]["alive after"] = live()
    return found


@case
def resumed() -> dict:
    """A run that goes on after memory ran out gives the picture of an undisturbed one."""
    denoiser = pack("infdit.denoiser")
    asked = {"steps": 3, "sampler_name": "heun", "seed": 41}
    failing = OutOf(denoiser.sweep, 1, 2)
    with patched(denoiser, sweep=failing):
        ended = run(prompt("wide", **asked))
    image, report = TAKEN["value"], TAKEN["report"]
    run(prompt("wide", **asked | {"denoise": 0.0}))  # so that nothing of the first is cached
    again = run(prompt("wide", **asked))
    return {
        "ends": [ended["end"], again["end"]],
        "calls": failing.calls,
        "report": report,
        "difference": (image - TAKEN["value"]).abs().max().item(),
    }


def live() -> tuple[int, int]:
    """Number and bytes of the tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return len(storages), sum(storages.values())


@case
def given_back() -> dict:
    """Tensors alive after each of some runs, after one that was stopped, after one that failed."""
    found = []
    for seed in range(50, 55):
        run(prompt("small", seed=seed))
        TAKEN.clear()
        found.append(live())
    look = mm.throw_exception_if_processing_interrupted

    def press() -> None:
        raise mm.InterruptProcessingException

    with patched(mm, throw_exception_if_processing_interrupted=press):
        stopped = run(prompt("small", seed=60))["end"]
    assert mm.throw_exception_if_processing_interrupted is look
    run(prompt("small", seed=61))
    TAKEN.clear()
    return {"alive": found, "stopped": stopped, "after": live()}


# ---- a graphics card that is not there


class Network:
    """What `comfy_memory` asks of a network."""

    def __init__(self, config: Any, calls: list) -> None:
        self.config, self.dtype, self.calls = config, torch.bfloat16, calls
        self.defaults = pack("infdit.config").SamplingDefaults()

    def to(self, device: object) -> Network:
        self.calls.append(("to", str(device)))
        return self


def other_model(size: int) -> SimpleNamespace:
    return SimpleNamespace(device=CARD, model=object(), model_loaded_memory=lambda: size)


@case
def card() -> dict:
    """Which plan is chosen and what ComfyUI is asked for, by what is free and what idle models hold."""
    memory, planner, footprint = map(pack, ("nodes.comfy_memory", "infdit.memory.planner", "infdit.memory.plan"))
    config, weights, gib = pack("infdit.config").InfDiTConfig(), footprint.Weights, 2**30
    calls: list[Any] = []
    patcher = SimpleNamespace(load_device=CARD, offload_device=torch.device("cpu"))
    model = memory.ManagedModel("published", Network(config, calls), patcher)
    ours = SimpleNamespace(device=CARD, model=patcher, model_loaded_memory=lambda: 0)
    workload = footprint.Workload(config, 4096, 4096, device=CARD, source=(1024, 1024, 3))
    found: dict[str, Any] = {"weights": weights.of(config, torch.bfloat16).total}
    for name, free, idle, budget, only in (
        ("much free", 22 * gib, 0, None, None),
        ("idle models", gib // 2, 8 * gib, None, None),
        ("little in all", gib // 4, gib // 2, None, None),
        ("budget", 22 * gib, 0, 4 * gib, None),
        ("budget beyond", gib // 4, gib // 2, 4 * gib, None),
        ("too little", gib // 8, 0, None, None),
        ("resident", 22 * gib, 8 * gib, None, "resident"),
        ("half is too little", 8 * gib, 8 * gib, None, None),
    ):
        calls.clear()
        others = [other_model(idle)] if idle else []

        def free_memory(size: float, device: object, keep_loaded: Any = (), others: Any = others, **_: object) -> None:
            calls.append(("free", size, [ours in keep_loaded, *(other in keep_loaded for other in others)]))

        asked = replace(workload, weights=only)
        with (
            patched(planner, free_bytes=lambda device: 64 * gib),
            patched(
                mm,
                get_free_memory=lambda device, free=free: free,
                extra_reserved_memory=lambda: 0,
                current_loaded_models=[ours, *others],
                free_memory=free_memory,
                load_models_gpu=lambda models, **kwargs: calls.append(("load", kwargs)),
                soft_empty_cache=lambda: calls.append(("empty cache",)),
            ),
        ):
            try:
                planned = memory.plan_run(asked, budget)
            except planner.BudgetTooSmall as error:
                found[name] = {"refused": str(error), "least": error.least}
                continue
            plan, thrifty, smaller = planned.plan, planner.thrifty_plan(asked), planned.smaller().plan
            in_place = planner.thrifty_plan(asked, in_place=True)
            result = memory.with_weights(model, plan, lambda network: calls.append(("work",)) or "done")
        found[name] = {
            "peak": plan.peak_bytes,
            "weights": plan.weights,
            "smaller": {"weights": smaller.weights, "peak": smaller.peak_bytes},
            "thrifty": plan == thrifty,
            "in place": plan == in_place,
            "half": free // 2,
            "thrifty peak": thrifty.peak_bytes,
            "calls": list(calls),
            "result": result,
        }
    found["budget bytes"] = [memory.budget_bytes(x) for x in (0.0, 0.5)]
    return found


@case
def yielding() -> dict:
    """What ComfyUI is asked for beside models that yield by themselves, by what its free_memory takes."""
    memory, gib = pack("nodes.comfy_memory"), 2**30
    plans, config, calls = pack("infdit.memory.plan").MemoryPlan, pack("infdit.config").InfDiTConfig(), list[Any]()

    def today(size: float, device: object, keep_loaded: Any = (), for_dynamic: bool = False, pins_required: int = 0,
              ram_required: int = 0) -> None:  # fmt: skip
        calls.append(["free", size, len(keep_loaded), for_dynamic, pins_required, ram_required])

    def oldest(size: float, device: object, keep_loaded: Any = ()) -> None:
        calls.append(["free", size, len(keep_loaded)])

    patcher = SimpleNamespace(load_device=CARD, offload_device=torch.device("cpu"), model_size=lambda: 7)
    dynamic = SimpleNamespace(is_dynamic=lambda: True, pinned_memory_size=lambda: 3 * gib)
    plain, found = SimpleNamespace(is_dynamic=lambda: False), dict[str, Any]()
    away = plans(1, 1, "streamed", "host", "host", peak_bytes=5, host_bytes=9)
    small = plans(1, 1, peak_bytes=5, host_bytes=9)
    for name, free_memory, other, plan in (
        ("streamed", today, dynamic, away),
        ("unpinned", today, dynamic, replace(away, pinned=False)),
        ("small", today, dynamic, small),
        ("small beside plain", today, plain, small),
        ("streamed in 0.8.0", oldest, plain, away),
        ("clip", today, dynamic, None),
        ("clip beside plain", today, plain, None),
    ):
        calls.clear()
        loaded = SimpleNamespace(device=CARD, model=other, model_loaded_memory=lambda: 8 * gib)
        with patched(
            mm,
            free_memory=free_memory,
            load_models_gpu=lambda models, **kwargs: calls.append(["load"]),
            soft_empty_cache=lambda: None,
            current_loaded_models=[loaded],
            get_free_memory=lambda device: gib,
            MAX_PINNED_MEMORY=5 * gib,
            TOTAL_PINNED_MEMORY=4 * gib,
        ):
            if plan is None:
                with memory.clip_at_work(memory.ManagedCLIP("clip", Network(config, []), patcher)):
                    pass
            else:
                model = memory.ManagedModel("published", Network(config, []), patcher)
                memory.with_weights(model, plan, lambda network: None)
            found[name] = {"calls": list(calls), "pinnable": memory.pinnable() / gib}
    return found


@case
def host_that_is_full() -> dict:
    """A run that the host has no room for: older results are thrown away, and it is planned again."""
    memory, planner, gib = pack("nodes.comfy_memory"), pack("infdit.memory.planner"), 2**30
    config = pack("infdit.config").InfDiTConfig()
    workload = pack("infdit.memory.plan").Workload(config, 4096, 4096, device=CARD, source=(1024, 1024, 3))
    free, asked = [gib], []

    def release(size: float) -> None:
        asked.append(size)
        free[0] = int(size * 0.9) + 1

    module = SimpleNamespace(extra_ram_release=release)
    with (
        mock.patch.dict(sys.modules, {"comfy.memory_management": module}),
        patched(planner, free_bytes=lambda device: free[0]),
        patched(mm, get_free_memory=lambda device: 4 * gib, extra_reserved_memory=lambda: 0, current_loaded_models=[]),
    ):
        plan = memory.plan_run(workload, gib // 2).plan
    return {"asked": asked, "host": plan.host_bytes}


@case
def template_of_plans() -> dict:
    """The Memory Plan's template as it is, where so many GiB of main memory are free and there is no card."""
    asked = json.loads((PACK_DIR / "workflows" / "api" / f"{PLANS}.json").read_text(encoding="utf-8"))
    asked = {key: node for key, node in asked.items() if node["class_type"].startswith("InfDiT")}
    plans = [key for key, node in asked.items() if node["class_type"] == "InfDiTMemoryPlan"]
    asked |= {f"take {key}": take("STRING", key, 0, key) for key in plans}
    planner, memory, found = pack("infdit.memory.planner"), pack("nodes.comfy_memory"), {}
    for gib in (12, 3):
        free: Any = lambda device, size=gib * 2**30: size  # noqa: E731
        with patched(planner, free_bytes=free), patched(memory, free_bytes=free):
            ended = run(asked)
        found[gib] = {"end": ended["end"], "verdicts": [TAKEN[key].splitlines()[2] for key in plans]}
    return found


@case
def chosen_dtypes() -> dict:
    """What auto means on a card, by what ComfyUI knows of it and by its flags."""
    memory, found = pack("nodes.comfy_memory"), {}
    for name, bf16, fp16, flags in (
        ("Ampere", True, True, ()),
        ("Turing", False, True, ()),
        ("old", False, False, ()),
        ("force_fp32", True, True, ("force_fp32",)),
        ("force_fp16", True, True, ("force_fp16", "fp16_unet")),  # the one sets the other
        ("bf16_unet", False, False, ("bf16_unet",)),
        ("fp32_unet", True, True, ("force_fp16", "fp32_unet")),
    ):
        known = {"should_use_bf16": lambda device, b=bf16: b, "should_use_fp16": lambda device, f=fp16: f}
        with patched(mm, **known), patched(mm.args, **dict.fromkeys(flags, True)):
            found[name] = str(memory.comfy_dtype(CARD)).removeprefix("torch.")
    with patched(mm.args, force_fp32=True):
        found["forced on a CPU"] = str(memory.comfy_dtype(torch.device("cpu"))).removeprefix("torch.")
    return found


@case
def pins() -> dict:
    """What of main memory may be pinned by ComfyUI's count, and what a plan then says; -1: --disable-pinned-memory."""
    memory, planner, gib = pack("nodes.comfy_memory"), pack("infdit.memory.planner"), 2**30
    patcher = SimpleNamespace(load_device=CARD, offload_device=torch.device("cpu"))
    network = Network(pack("infdit.config").InfDiTConfig(), [])
    model, found = memory.ManagedModel("published", network, patcher), {}
    for name, most in (("plenty", 64 * gib), ("little", 4 * gib), ("disabled", -1)):
        with (
            patched(mm, MAX_PINNED_MEMORY=most, TOTAL_PINNED_MEMORY=gib, get_free_memory=lambda device: gib),
            patched(planner, free_bytes=lambda device: 64 * gib),
        ):
            workload = model.workload((1, 1024, 1024, 3), (4096, 4096), "heun")
            plan = memory.plan_run(workload, gib // 2).plan
            lines = pack("nodes.report").plan_lines(workload, plan)
        found[name] = {"pinnable": workload.pinnable / gib, "pinned": plan.pinned, "lines": lines}
    return found


@case
def not_finite() -> dict:
    """A network whose numbers outgrow fp16: one sentence, and a good run after it."""
    layer = pack("infdit.model").Layer
    original = layer.forward
    with patched(layer, forward=lambda *args: original(*args) * float("inf")):
        ended = run(prompt("small", {"dtype": "fp16"}, steps=3, seed=81))
    return {key: ended[key] for key in ("end", "message", "type")} | {
        "after": run(prompt("small", {"dtype": "fp16"}, steps=1, seed=82))["end"]
    }


@case
def measured_on_a_card() -> dict:
    """What the card's allocator is asked for, and what is made of its numbers: 1000 bytes are other models'."""
    planner, footprint, runs = pack("infdit.memory.planner"), pack("infdit.memory.plan"), pack("infdit.run")
    plan, config = pack("infdit.memory.plan").MemoryPlan, pack("infdit.config").InfDiTConfig()
    workload = footprint.Workload(config, 4096, 4096, device=CARD)
    ours = footprint.Weights.of(config, workload.dtype).total
    found: dict[str, Any] = {"weights": ours}
    for kept in ("resident", "streamed"):
        there = 1000 + (ours if kept == "resident" else 0)
        report, reset = runs.Report(), []
        network = SimpleNamespace(device=CARD if kept == "resident" else torch.device("cpu"))
        planned = planner.PlannedRun(workload, plan(1, 1, kept), lambda device: 0)
        with (
            patched(
                torch.cuda,
                memory_allocated=lambda device, there=there: there,
                memory_reserved=lambda device, there=there: there + 24,
                reset_peak_memory_stats=lambda device, reset=reset: reset.append(str(device)),
                max_memory_allocated=lambda device, there=there: there + 5000,
                max_memory_reserved=lambda device, there=there: there + 7000,
            ),
            runs.Run(network, planned, lambda done: None, report).at_work(),
        ):
            pass
        found[kept] = {"peak": report.peak_bytes, "reserved": report.reserved_bytes, "reset": reset}
    return found


# ---- a graphics card that is not there, under ComfyUI's own management


class Part(torch.nn.Module):
    """A gibibyte of weights that takes no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2**28, device="meta"), requires_grad=False)


def on_meta(network: torch.nn.Module) -> ModelPatcher:
    """ComfyUI's hand on a model; it takes any device but the CPU for a card."""
    return ModelPatcher(network, load_device=torch.device("meta"), offload_device=torch.device("cpu"))


@case
def management() -> dict:
    """Our model and another of 10 GiB on a card of 12 GiB, moved by ComfyUI's own code; only the moving is a stand-in.

    What each has on the card while or after what the names in the result say.
    """
    memory, planner = pack("nodes.comfy_memory"), pack("infdit.memory.planner")
    meta, gib = torch.device("meta"), 2**30
    config = pack("infdit.config").InfDiTConfig()
    with meta:
        network = pack("infdit.model").InfDiT(config).to(torch.bfloat16)
    idle = torch.nn.ModuleList(Part() for _ in range(10))
    idle.device = torch.device("cpu")
    other, patcher = on_meta(idle), on_meta(memory.InfDiTWeights(network, torch.device("cpu")))
    model = memory.ManagedModel("published", network, patcher)

    def free(device: object = None, torch_free_too: bool = False) -> Any:
        left = 12 * gib - sum(m.model_loaded_memory() for m in mm.current_loaded_models if m.device == meta)
        return (left, 0) if torch_free_too else left

    found: dict[str, Any] = {}

    def go(name: str, weights: str | None, budget: int | None = None, side: int = 4096) -> None:
        shape = {"source": (side // 4, side // 4, 3), "device": meta, "weights": weights}
        workload = pack("infdit.memory.plan").Workload(config, side, side, **shape)
        plan = memory.plan_run(workload, budget).plan
        memory.with_weights(model, plan, lambda network: note(name, plan))

    def note(name: str, plan: Any = None) -> None:
        loaded = {m.model: m.model_loaded_memory() for m in mm.current_loaded_models if m.device == meta}
        found[name] = {
            "ours": loaded.get(patcher, 0) / gib,
            "other": loaded.get(other, 0) / gib,
            "free": free() / gib,
            "peak": None if plan is None else plan.peak_bytes / gib,
            "kept": None if plan is None else plan.weights,
        }

    def story() -> None:
        for once in ("", " again"):
            mm.load_models_gpu([other], force_full_load=True)
            note(f"other loaded{once}")
            for name, *asked in (("streamed",), ("streamed with 6 GiB", 6 * gib, 8192), ("resident",)):
                go(name + once, name.split()[0], *asked)
        go("resident after resident", "resident")
        theirs = [loaded for loaded in mm.current_loaded_models if loaded.model is other]
        mm.free_memory(free() + gib / 2, meta, keep_loaded=theirs)  # half a GiB for somebody else
        note("ours evicted in part")
        go("resident after that", "resident")
        mm.free_memory(1e30, meta)  # what "Unload models" does to a card
        note("all unloaded")

    mm.unload_all_models()
    with (
        patched(mm, get_free_memory=free, extra_reserved_memory=lambda: 0),
        patched(planner, free_bytes=lambda device: 64 * gib),
        patched(torch.nn.Module, to=lambda self, *args, **kwargs: self),
    ):
        story()
    return found
