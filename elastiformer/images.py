"""Images as callers send them: a data URI becomes pixels, or is refused with what is wrong.

Nothing is fetched: an address is refused. What a file says of its size is checked before its
pixels are unpacked.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from elastiformer.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
LEAST_SIDE, MOST_SIDE, MOST_PIXELS = 8, 10_000, 25_000_000
_URI = re.compile(r"data:(?P<kind>[\w.+/-]*)(?:;[\w=.+-]+)*?;base64,", re.IGNORECASE)
_SHOWN = 40  # characters of a refused address
# What Pillow raises for files that are cut off or say what is not so.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)
# How a camera held an image, and what sets it upright (EXIF's orientation).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(uri: str, mode: str = "RGB", name: str = "input") -> Image.Image:
    """The image of a data URI, upright, in this mode of Pillow's.

    Raises:
        InputError: no data URI, no such format, cut off, too small or too large.
    """
    found = _URI.match(uri)
    if found is None:
        raise InputError(
            f"{name}: an image is a data URI, data:image/png;base64,…; this server fetches no "
            f"addresses; got {uri[:_SHOWN]!r}"
        )
    try:
        content = base64.b64decode(uri[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name}: what follows 'base64,' is not base64") from None
    return decode_bytes(content, mode, name)


def decode_bytes(content: bytes, mode: str = "RGB", name: str = "input") -> Image.Image:
    """The image in a file's bytes.

    Raises:
        InputError: as `decode`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not an image in a format that is read here: {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        said = re.search(r"\d+ pixels", str(error))
        got = f"; got {said[0]}" if said else ""
        raise InputError(f"{name}: an image has at most {MOST_PIXELS} pixels{got}") from None
    except _BROKEN as error:
        raise InputError(f"{name}: the image cannot be read: {error}") from None
    width, height = image.size
    if not LEAST_SIDE <= min(width, height) <= max(width, height) <= MOST_SIDE:
        raise InputError(
            f"{name}: each side of an image has {LEAST_SIDE} to {MOST_SIDE} pixels; got "
            f"{width} x {height}"
        )
    if width * height > MOST_PIXELS:
        raise InputError(
            f"{name}: an image has at most {MOST_PIXELS} pixels; got {width} x {height}"
        )
    try:
        image.load()
        return _in_bytes(_upright(image)).convert(mode)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: the image cannot be read: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Not by ImageOps.exif_transpose: that writes all of EXIF anew, and fails on damaged fields."""
    turn = _UPRIGHT.get(image.getexif().get(Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _in_bytes(image: Image.Image) -> Image.Image:
    """Of 16 bits a pixel the upper 8: Pillow's own conversion takes all above 255 for white."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
