"""Images sent to a server: what can be read is read as Pillow does, all else refused by name."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from elastiformer.encoder import ElasticEncoder
from elastiformer.images import decode
from tests.service.conftest import House
from tests.service.encoders import content, of_images, picture, uri, visit
from tests.tiny_encoders import SIDE, tiny_encoder, tiny_image_processor


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels a side."""

    def part(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"\0" * 1_000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", packed) + part(b"IEND", b"")


WRONG_IMAGES = {
    "a truncated PNG": (uri(content(picture())[:900]), "the image cannot be read"),
    "a truncated JPEG": (uri(content(picture(), "JPEG")[:500], "jpeg"), "cannot be read"),
    "a decompression bomb": (uri(bomb()), "at most 25000000 pixels; got 3600000000 pixels"),
    "1 x 1": (uri(content(picture(0, 1, 1))), "8 to 10000 pixels; got 1 x 1"),
    "20,000 pixels wide": (uri(content(picture(0, 20_000, 9))), "got 20000 x 9"),
    "a format that is not read": (uri(content(picture(), "PPM")), "PNG, JPEG, WEBP, GIF, BMP"),
    "no image": (uri(b"<svg></svg>", "svg+xml"), "not an image in a format"),
    "nothing": (uri(b""), "not an image in a format"),
    "an address": ("http://example.com/cat.png", "fetches no addresses; got 'http://example.com"),
    "a file": ("file:///etc/passwd", "fetches no addresses"),
    "no base64": ("data:image/png;base64,@@@", "is not base64"),
    "plain text": ("data:text/plain,hello", "an image is a data URI"),
}


@pytest.mark.parametrize("wrong", WRONG_IMAGES)
def test_an_image_that_cannot_be_read_is_refused_by_name_and_harms_nobody(wrong):
    given, told = WRONG_IMAGES[wrong]
    model = of_images()

    async def talk(house: House) -> None:
        fine = {"image": uri(content(picture()))}
        expected = (await house.post("/v1/classify", input=fine)).json()["data"]
        for path, body in (
            ("/v1/classify", {"input": [fine, {"image": given}]}),
            ("/predict", {"inputs": {"image": given}}),
        ):
            answer = await house.post(path, **body)
            error = answer.json()["error"]
            assert answer.status_code == 400, answer.text
            assert told in error["message"], error["message"]
            assert error["code"] == "invalid_input"
            assert error["message"].startswith(("input.1:", "inputs:"))
        assert (await house.post("/v1/classify", input=fine)).json()["data"] == expected

    visit(model, talk)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_every_format_and_colour_is_read_as_pillow_reads_it(kind, mode):
    image = picture(7).convert(mode if not (kind == "JPEG" and mode in ("RGBA", "P")) else "L")
    raw = content(image, kind)
    expected = Image.open(io.BytesIO(raw)).convert("RGB")
    assert np.array_equal(np.array(decode(uri(raw, kind.lower()))), np.array(expected))


def test_sixteen_bits_a_pixel_are_the_same_picture_as_eight():
    image = picture(7, mode="L")
    wide = Image.fromarray(np.array(image).astype(np.uint16) * 257)
    for mode in ("L", "RGB"):
        given = decode(uri(content(wide)), mode)
        assert np.array_equal(np.array(given), np.array(image.convert(mode)))


def exif(orientation: int) -> bytes:
    """A camera's remarks, of which the description is no text but a fraction."""
    description = struct.pack("<HHII", 0x010E, 5, 1, 38)
    upright = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    fields = struct.pack("<H", 2) + description + upright + struct.pack("<I", 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + fields + struct.pack("<II", 1, 2)


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_set_upright_whatever_else_its_camera_wrote(orientation):
    raw = content(picture(7), "PNG", exif=exif(orientation))
    sound = Image.Exif()
    sound[0x0112] = orientation
    expected = ImageOps.exif_transpose(
        Image.open(io.BytesIO(content(picture(7), "PNG", exif=sound)))
    )
    assert np.array_equal(np.array(decode(uri(raw))), np.array(expected))


def test_a_greyscale_model_reads_greyscale():
    model = ElasticEncoder(
        tiny_encoder("vit", num_channels=1),
        images=type(tiny_image_processor())(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5]
        ),
    )
    image = picture(4, 28, 28, mode="L")
    resized = np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    pixels_CHW = torch.from_numpy((resized / 255 - 0.5) / 0.5)[None]
    with torch.inference_mode():
        expected = model.base(pixel_values=pixels_CHW[None]).logits[0].softmax(-1)

    async def talk(house: House) -> None:
        answer = (await house.post("/v1/classify", input={"image": uri(content(image))})).json()
        assert answer["data"][0]["probs"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert json.dumps(answer)

    visit(model, talk)
