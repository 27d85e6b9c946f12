"""What a model's answer is. Pure Python: no torch."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """What an encoder is asked for."""

    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    IMAGE_CLASSIFICATION = "image-classification"
    FEATURES = "features"


TEXT_GENERATION = "text-generation"
IMAGE_TEXT_TO_TEXT = "image-text-to-text"
