"""Text that leads the picture's vector: the paper's equation 5 (switched off in the published code).

Î = norm(I + α·(C_pos − C_neg)),  I the picture's vector, C those of two texts, all of length 1

Texts lie in a cone of their own, far from the pictures. The difference takes out what all texts have in common and
leaves the direction from what the negative says to what the positive says. So where only one text is given the
other is the empty text, not a zero vector: with zero, Î would mostly move towards "is a text". Two equal texts,
empty ones among them, have no direction, and Î is I to the last bit, as it is at strength 0.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .encoder import CLIPEncoder, View

STRENGTH = 2.0  # α in the published code, beside these texts
POSITIVE = "HD, high resolution, clear."
NEGATIVE = "noisy,blurry,low resolution."
MAX_STRENGTH = 10.0  # beyond it the picture itself hardly counts any more


def clip_embedding(
    encoder: CLIPEncoder, image: Tensor, positive: str = "", negative: str = "", strength: float = STRENGTH,
    view: View = "crop",
) -> Tensor:
    """The vector that `upscale` and `Conditioning` take as clip_embedding.

    The text tower is read only if there is a direction to follow, and let go before the picture is looked at.

    Args:
        encoder: see `load_clip`.
        image: (B, 3, h, w) in [-1, 1]: the picture that is upscaled, before anything is done to it.
        positive, negative: what to lead the picture to and away from; empty, of one or both: see above.
        strength: α, 0 (the picture alone) to MAX_STRENGTH; 2 in the published code.
        view: "crop" (the middle square, as published) or "pad" (all of it): see `preprocess`.

    Returns:
        (B, 768) of length 1, float32 (float64 from a float64 encoder), on the encoder's device.

    Raises:
        ValueError: strength or view out of range, or no batch of RGB images.
        CheckpointError: text for a file without a text tower, such as the CLIP of a published checkpoint.
    """
    _check_strength(strength)
    direction = text_direction(encoder, positive, negative) if strength else None
    return guide(encoder(image, view), direction, strength)


def text_direction(encoder: CLIPEncoder, positive: str, negative: str) -> Tensor | None:
    """C_pos − C_neg, (768); None where both texts are the same. Spaces around a text do not count.

    Raises:
        CheckpointError: the encoder's file has no text tower, or a wrong or damaged one.
    """
    positive, negative = positive.strip(), negative.strip()
    if positive == negative:
        return None
    towards, away = encoder.text([positive, negative])
    return towards - away


def guide(embedding: Tensor, direction: Tensor | None, strength: float = STRENGTH) -> Tensor:
    """norm(I + α·direction), equation 5.

    Args:
        embedding: I, (B, 768) of length 1.
        direction: see `text_direction`; None leaves I as it is.
        strength: α, 0 to MAX_STRENGTH; 0 leaves I as it is.

    Returns:
        (B, 768) of length 1.

    Raises:
        ValueError: strength out of range.
    """
    _check_strength(strength)
    if direction is None or strength == 0:
        return embedding
    return F.normalize(embedding + strength * direction, dim=-1)


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(
            f"strength is {strength:g}, must be between 0 and {MAX_STRENGTH:g}: to turn it round, exchange the texts"
        )
