"""Encoders to be served, and pictures to send them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from elastiformer.encoder import ElasticEncoder
from tests.elastiformer.test_encoders import calibrated, elastic_encoder
from tests.service.conftest import in_house
from tests.tiny_encoders import SIDE, tiny_encoder, tiny_image_processor, tiny_word_tokenizer


def of_text(task: str = "text-classification", family: str = "bert", **changes) -> ElasticEncoder:
    base = tiny_encoder(family, task, **changes)
    return ElasticEncoder(base, tokenizer=tiny_word_tokenizer())


def of_images(
    family: str = "vit", task: str = "image-classification", side: int = SIDE
) -> ElasticEncoder:
    processor = tiny_image_processor(family, side, side)
    return ElasticEncoder(tiny_encoder(family, task), images=processor)


def routed(task: str | None = None, family: str = "bert") -> ElasticEncoder:
    """A calibrated encoder whose routers have opinions."""
    model = calibrated(elastic_encoder(family, task))
    model.tokenizer = tiny_word_tokenizer()
    model.images = tiny_image_processor(family) if model.encoder.reads_images else None
    return model


def picture(seed: int = 0, width: int = 33, height: int = 47, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    numbers = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    return Image.fromarray(numbers)


def content(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def uri(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def visit(model: ElasticEncoder, talk, **options) -> None:
    in_house(talk, models={"tiny": model}, **options)
