"""Parameters by their published names and by those of `InfDiT`: one table, read both ways.

Tensors have the published shapes on disk. Here the two embeddings, published as convolutions, are linear, the tables of
positions have no batch, and the embeddings of the four slots, one tensor for all layers, lie with their layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_FIELDS = {"i": r"\d+", "p": "weight|bias", "half": "[02]", "kv": "query|key_value", "qk": "query|key"}
_MIXIN, _LAYER = "mixins.adaln_layer.", "transformer.layers.{i}."
_TABLE = [  # (published, ours)
    ("mixins.patch_embed.proj.{p}", "patch_embed.{p}"),
    (_MIXIN + "proj_lr.{p}", "lr_embed.{p}"),
    ("time_embed.mlp.{half}.{p}", "noise_embed.{half}.{p}"),
    ("cond_embed.map_vector.{half}.{p}", "vector_embed.{half}.{p}"),
    (_MIXIN + "adaLN_modulations.{i}.1.{p}", "modulations.{i}.{p}"),
    (_MIXIN + "q_layer_norm.{i}.{p}", "layers.{i}.qk_norm.{p}"),
    (_LAYER + "attention.query_key_value.{p}", "layers.{i}.qkv.{p}"),
    (_LAYER + "attention.dense.{p}", "layers.{i}.out.{p}"),
    (_LAYER + "mlp.dense_h_to_4h.{p}", "layers.{i}.mlp.0.{p}"),
    (_LAYER + "mlp.dense_4h_to_h.{p}", "layers.{i}.mlp.2.{p}"),
    (_MIXIN + "cross_attention.{kv}.{p}", "layers.0.cross.{kv}.{p}"),
    (_MIXIN + "cross_attention.dense.{p}", "layers.0.cross.out.{p}"),
    (_MIXIN + "cross_q_ln.{p}", "layers.0.cross.query_norm.{p}"),
    (_MIXIN + "cross_k_ln.{p}", "layers.0.cross.key_norm.{p}"),
    (_MIXIN + "lr_{qk}_position_embedding", "layers.0.cross.{qk}_position"),
    (_MIXIN + "post_cross_attention_layernorm.{p}", "layers.0.mlp_norm.{p}"),
    ("mixins.final_layer.adaLN_modulation.1.{p}", "head_modulation.{p}"),
    ("mixins.final_layer.linear.{p}", "head.{p}"),
]
SLOT_EMBED = _MIXIN + "re_pos_embed"  # (L, 4, H, d)
QKV_WEIGHT = r"transformer\.layers\.\d+\.attention\.query_key_value\.weight"
DROPPED = [  # (pattern, reason)
    (r"mixins\.adaln_layer\.rope\.freqs_(cos|sin)", "tables of rotary angles, which are computed"),
    (r"mixins\.adaln_layer\.k_layer_norm\.\d+\.(weight|bias)", "never used: q_layer_norm serves the keys too"),
    (r"transformer\.position_embeddings(\.weight)?", "never used: positions are rotary"),
]


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a pattern whose groups are its fields."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(
        f"(?P<{piece}>{_FIELDS[piece]})" if odd else re.escape(piece)
        for piece, odd in ((piece, i % 2) for i, piece in enumerate(pieces))
    ))  # fmt: skip


_FROM_PUBLISHED = [(_pattern(published), ours) for published, ours in _TABLE]
TO_PUBLISHED = [(_pattern(ours), published) for published, ours in _TABLE]  # `training.export` reads it backwards


def is_published(name: str) -> bool:
    """Whether a model has a parameter of this published name."""
    return name == SLOT_EMBED or translated(name, _FROM_PUBLISHED) is not None


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of `InfDiT`, as views; names that no model has are left out."""
    state = {f"layers.{i}.slot_embed": slots for i, slots in enumerate(tensors.get(SLOT_EMBED, ()))}
    for name, tensor in tensors.items():
        if ours := translated(name, _FROM_PUBLISHED):
            if ours.endswith("embed.weight"):
                tensor = tensor.flatten(1)
            state[ours] = tensor[0] if ours.endswith("_position") else tensor
    return state


def translated(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    """A name by one of the tables; None where it is in none of its lines."""
    return next((to.format(**match.groupdict()) for pattern, to in table if (match := pattern.fullmatch(name))), None)
