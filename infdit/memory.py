"""How an evaluation is cut into pieces. The picture is the same for every plan; memory and speed are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .config import InfDiTConfig
from .grid import Sweep
from .tiers import Tier

Weights = Literal["resident", "streamed"]

CHUNK_TOKENS = 4096  # enough rows for every matrix product to run at full speed; four blocks of the published model


@dataclass(frozen=True)
class MemoryPlan:
    """A schedule of the sweep (INFDIT.md section 7).

    Every plan is legal on every device and gives the same picture.

    Attributes:
        group: layers that are swept together. All of them is the paper's schedule: keys and values of every layer
            are kept, hidden states are not. 1 keeps one layer's keys and values, and all hidden states.
        chunk: blocks that are computed together.
        weights: "resident" on the device, or "streamed" from the host a group at a time, the next group meanwhile.
        hidden: where hidden states are kept between groups, "device" or "host".
        images: where the pictures and the sampler's state are, "device" or "host".
        sweep: whether lines of blocks run along "rows" or "columns"; "auto" takes the short side.

    A group or chunk beyond what exists means all of it.

    Raises:
        ValueError: a group or chunk under 1, an unknown sweep.
    """

    group: int = 28
    chunk: int = 4
    weights: Weights = "resident"
    hidden: Tier = "device"
    images: Tier = "device"
    sweep: Sweep = "auto"

    def __post_init__(self) -> None:
        if self.group < 1 or self.chunk < 1:
            raise ValueError(f"group {self.group} and chunk {self.chunk} must be at least 1: a layer, a block")
        for name, kinds in (("weights", Weights), ("hidden", Tier), ("images", Tier), ("sweep", Sweep)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(get_args(kinds))}")

    @classmethod
    def default(cls, config: InfDiTConfig) -> MemoryPlan:
        """All layers at once, in chunks that are large enough to be fast and small beside the keys and values."""
        return cls(group=config.num_layers, chunk=max(1, CHUNK_TOKENS // config.block_tokens))
