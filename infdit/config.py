"""What a model is (sizes) and how it likes to be sampled (defaults), as two frozen values."""

from __future__ import annotations

from dataclasses import asdict, dataclass

LR_FACTOR = 4  # pixels of the output per pixel of the low-resolution input: the network always sees 1:4
MAX_SCALE = 4  # of a pass: what the published model was made for
LR_PATCH = 2  # side of a low-resolution token in low-resolution pixels


@dataclass(frozen=True)
class InfDiTConfig:
    """Sizes of one Inf-DiT; the defaults are the published model's (Inf-DiT, section 4.1 and the released weights).

    Raises:
        ValueError: sizes that do not fit together.
    """

    num_layers: int = 28
    hidden_size: int = 1280
    num_heads: int = 16
    patch_size: int = 4  # pixels
    block_size: int = 128  # pixels: the unit that attends to itself and to three neighbours
    vector_dim: int = 768  # of the CLIP embedding; 0 without that input
    position_period: int = 1024  # patches after which the published rotary positions start anew

    def __post_init__(self) -> None:
        if min(self.num_layers, self.hidden_size, self.num_heads, self.patch_size, self.position_period) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_heads {self.num_heads} times a multiple of 4, "
                "for rotary pairs of two axes"
            )
        if self.block_size < 1 or self.block_size % self.patch_size or self.block_size % (LR_FACTOR * LR_PATCH):
            raise ValueError(
                f"block_size {self.block_size} must be a multiple of patch_size {self.patch_size} and of "
                f"{LR_FACTOR * LR_PATCH}, the pixels under one low-resolution token"
            )

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def block_side(self) -> int:
        """Patches along one side of a block."""
        return self.block_size // self.patch_size

    @property
    def block_tokens(self) -> int:
        """Tokens T of a block, one per patch."""
        return self.block_side**2

    @property
    def lr_block_size(self) -> int:
        """Side of a block in low-resolution pixels."""
        return self.block_size // LR_FACTOR

    @property
    def window_side(self) -> int:
        """Low-resolution tokens along one side of the 3×3 blocks that a block sees."""
        return 3 * self.lr_block_size // LR_PATCH

    @property
    def window_tokens(self) -> int:
        """Low-resolution tokens that a block sees."""
        return self.window_side**2


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled when nobody says otherwise; the defaults are the paper's (section 4.1).

    steps: of the Karras schedule; sampler: a name in `samplers.SAMPLERS`; sigma_max, sigma_min: noise levels in
    units of pixels in [-1, 1]; start_noise: share of sigma_max·noise that the start carries, x = up + start_noise ·
    sigma_max · ε. At 0 the model is a bridge: it starts from the enlarged picture itself, σ tells it how far it still
    has to go, and the seed changes nothing. most_steps: steps beyond which nothing is gained; more are not taken.
    tuned: falling noise levels without the 0 at the end, each of as many evaluations, that were fitted to this model.
    scales: the only whole scales of a pass that it is asked for, see `sizes`, each with the share of the noise levels
    that it takes, for less is missing; none: any. A bridge learned what it was shown: one that does not say, 4.
    """

    steps: int = 20
    sampler: str = "heun"
    sigma_max: float = 40.0
    sigma_min: float = 0.002
    start_noise: float = 1.0
    most_steps: int | None = None
    tuned: tuple[tuple[float, ...], ...] = ()
    scales: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start_noise <= 1:
            raise ValueError(f"start_noise {self.start_noise} must be a share of sigma_max, 0 to 1")
        if self.most_steps is not None and self.most_steps < self.steps:
            raise ValueError(f"most_steps {self.most_steps} must not be fewer than the {self.steps} that are taken")
        if not all(type(scale) is int and 1 < scale <= MAX_SCALE and 0 < share <= 1 for scale, share in self.scales):
            raise ValueError(f"scales {self.scales} must be whole, 2 to {MAX_SCALE}, with shares above 0, at most 1")
        if self.start_noise == 0 and not self.scales:
            object.__setattr__(self, "scales", ((MAX_SCALE, 1.0),))

    @property
    def start(self) -> str:
        """In words for people: what the start is, where it is not plain noise over the picture."""
        if self.start_noise == 0:
            return "starts without noise: the seed changes nothing"
        return "" if self.start_noise == 1 else f"starts with {self.start_noise:.3g} of the noise"

    @property
    def few_steps(self) -> str:
        """In words for people: why other numbers of steps gain nothing; empty where they may."""
        if self.most_steps is not None:
            most = "one step" if self.most_steps == 1 else f"{self.most_steps} steps"
            return f"for {most} at most is what this model was made for"
        return "" if self.start_noise else "for this model starts without noise"

    def stated(self) -> dict[str, object]:
        """As a file states it: `tuned` and `scales` only where there is anything."""
        return {name: value for name, value in asdict(self).items() if name not in ("tuned", "scales") or value}
