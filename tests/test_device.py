"""Which device is which."""

from __future__ import annotations

import pytest
import torch

from infdit.device import same_device


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("cpu", "cpu", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cuda", "cuda:2", True),
        ("cuda", "cuda:0", False),
        ("cpu", "cuda", False),
        ("mps", "mps:0", True),
    ],
)
def test_same_device(a: str, b: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose current card is the third."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert same_device(torch.device(a), torch.device(b)) is same
    assert same_device(torch.device(b), torch.device(a)) is same
