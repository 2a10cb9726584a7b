"""Models that tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dense
import pytest
import torch
from safetensors.torch import save_file

import infdit

DATA = Path(__file__).parent / "data"
Weights = dict[str, torch.Tensor]
MakeModel = Callable[..., tuple[infdit.model.InfDiT, Weights]]


@pytest.fixture(scope="session", autouse=True)
def _two_cores() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """make_model(period=…, dtype=…, **sizes of dense.random_weights) → (model, the same weights by published names)."""

    def make(period: int = 128, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int) -> tuple:
        weights = dense.random_weights(seed, dtype=dtype, **sizes)
        path = tmp_path / "random.safetensors"
        save_file(weights, path, {"config": json.dumps({"position_period": period})})
        return infdit.load_model(path, dtype=dtype, device="cpu"), weights

    return make
