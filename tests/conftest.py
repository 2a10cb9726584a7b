"""Models that tests share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import dense
import pytest
import torch
from safetensors.torch import load_file, save_file

import infdit
from infdit.memory import measure

if find_spec("numpy._core") is None:  # before numpy 1.26; files in data/ were pickled by numpy 2, which calls it so
    sys.modules |= {f"numpy._core{part}": sys.modules[f"numpy.core{part}"] for part in ("", ".multiarray")}
DATA = Path(__file__).parent / "data"
# how a model is sampled that starts from noise and takes any number of steps, which the bundled one is not
NOISY = infdit.SamplingDefaults(steps=1, sampler="euler", sigma_max=0.1, sigma_min=0.01)
Weights = dict[str, torch.Tensor]
MakeModel = Callable[..., tuple[infdit.model.InfDiT, Weights]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Here and in programs that tests start: on tensors this small threads only wait for each other.

    The cores have a test process each.
    """
    torch.set_num_threads(1)
    with mock.patch.dict("os.environ", OMP_NUM_THREADS="1"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What tests write need not outlive a power cut."""
    with mock.patch("os.fsync", lambda file: None):
        yield


@pytest.fixture(scope="session", autouse=True)
def _figures_of_a_family() -> Iterator[None]:
    """Plans depend on what a device does in a second: for tests it is the same at all times."""
    with mock.patch.object(measure, "measured", lambda device, dtype: None):
        yield


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What needs a real ComfyUI is not even read where it is left out, unless it is named."""
    return True if collection_path.name == "comfy" and "not comfy" in config.option.markexpr else None


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """make_model(period=…, dtype=…, **sizes of dense.random_weights) → (model, the same weights by published names)."""

    def make(period: int = 128, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int) -> tuple:
        weights = dense.random_weights(seed, dtype=dtype, **sizes)
        path = tmp_path / "random.safetensors"
        save_file(weights, path, {"config": json.dumps({"position_period": period})})
        return infdit.load_model(path, dtype=dtype, device="cpu"), weights

    return make


@pytest.fixture(scope="session")
def noisy_mini() -> infdit.model.InfDiT:
    """The bundled model's weights in float32, sampled from noise: for what is true of any weights."""
    model = infdit.load_model("mini", dtype=torch.float32, device="cpu")
    model.defaults = NOISY
    return model


@pytest.fixture
def noisy_file(tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "models" / "noisy.safetensors"
    path.parent.mkdir()
    metadata = {"config": json.dumps({"position_period": 1024}), "defaults": json.dumps(asdict(NOISY))}
    save_file(load_file(infdit.checkpoint.BUNDLED["mini"]), path, metadata)
    return path
