"""What an encoder's answer is. Pure Python: no torch."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """What an encoder is asked for."""

    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    IMAGE_CLASSIFICATION = "image-classification"
    FEATURES = "features"
