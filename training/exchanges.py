"""What vision-language models learn from: an image, what is asked about it, and the answer.

`DATA` is a `.jsonl` file: `{"image", "text"}`, the text being the answer, and mostly a
`"question"`; an image is a path beside the file, or a data URI. Images are read when needed.

Shape letters: B exchanges   T tokens, padded
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastiformer.encoding import padded
from elastiformer.errors import InputError
from elastiformer.imaged import Picture
from elastiformer.inputs import TextInputs
from elastiformer.vlm import ElasticVlm, ImagedBatch
from training.examples import held_places
from training.files import DataError


@dataclass(frozen=True, slots=True)
class Exchange:
    """One image in one prompt, and the tokens of the answer, its end among them."""

    digest: bytes
    prompt: tuple[int, ...]  # with all of the image's tokens
    answer: tuple[int, ...]
    image: str | Path  # a data URI, or a file
    where: str


@dataclass(frozen=True, slots=True)
class Exchanges:
    """Exchanges, where they came from, and the hash of what they say."""

    source: str
    each: tuple[Exchange, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(exchange.digest for exchange in self.each)).hexdigest()

    def at(self, places: Sequence[int] | Tensor) -> list[Exchange]:
        return [self.each[int(place)] for place in places]

    def split(self, held_out: float) -> tuple[Exchanges, Exchanges]:
        """The training part and the held-out one: a share of the images, chosen by content.

        All that is asked about an image is on its side.
        """
        images = sorted({exchange.digest[:32] for exchange in self.each})
        places = held_places(self.source, images, held_out)
        held = {images[place] for place in places}
        parts: list[tuple[Exchange, ...]] = [
            tuple(each for each in self.each if (each.digest[:32] in held) is wanted)
            for wanted in (False, True)
        ]
        return Exchanges(self.source, parts[0]), Exchanges(f"{self.source} (held out)", parts[1])


def read_exchanges(data: str, model: ElasticVlm) -> Exchanges:
    """Read `DATA`.

    Raises:
        DataError: naming the file, and the line, that is missing, empty or malformed.
    """
    path = Path(data)
    if path.suffix != ".jsonl" or not path.is_file():
        raise DataError(f'{data}: a .jsonl file with {{"image", "question", "text"}} is expected')
    each: list[Exchange] = []
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg})") from error
        each.append(exchange_of(record, where, path.parent, model))
    if not each:
        raise DataError(f"{data}: holds no exchange")
    return Exchanges(data, tuple(each))


def exchange_of(record: object, where: str, beside: Path, model: ElasticVlm) -> Exchange:
    """One line of `DATA`.

    Args:
        where: names it in errors.
        beside: the folder that images without an address of their own lie in.

    Raises:
        DataError: it is malformed, or too long for the model.
    """
    if not isinstance(record, Mapping):
        raise DataError(f'{where}: an object with "image" and "text"; got {record!r:.60}')
    said: dict[str, str] = {}
    for name, needed in (("text", True), ("question", False)):
        given = record.get(name)
        if not isinstance(given, str) and (needed or given is not None):
            raise DataError(f'{where}: "{name}" is a string; got {given!r:.60}')
        said[name] = given or ""
    image = record.get("image")
    if not isinstance(image, str):
        raise DataError(f'{where}: "image" is a path beside the file or a data URI; got {image!r}')
    place: str | Path = image
    if not image.startswith("data:"):
        place = beside / image
        if not place.is_file():
            raise DataError(f"{where}: there is no image {place}")
    seen = place.read_bytes() if isinstance(place, Path) else image.encode()
    prompt, answer = _ids(model, said["question"], said["text"], where)
    # The image first: all that is asked about one image begins alike.
    digest = hashlib.sha256(seen).digest() + hashlib.sha256(json.dumps(said).encode()).digest()
    return Exchange(digest, prompt, answer, place, where)


def _ids(
    model: ElasticVlm, question: str, text: str, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise DataError("this model has no tokenizer")
    inputs = TextInputs(tokenizer, model.layout.vocabulary, model.context)
    parts: list[dict[str, str]] = [{"type": "image"}]
    if question:
        parts.append({"type": "text", "text": question})
    try:
        ids = inputs.conversation([{"role": "user", "content": parts}])
    except InputError as error:
        raise DataError(f"{where}: {error}") from error
    if ids.count(model.vlm.image_token) != 1:
        raise DataError(f"{where}: the prompt holds another number of images than one")
    answer = tokenizer.encode(text, add_special_tokens=False)
    prompt = model.pictures.expanded(ids)
    if len(prompt) + len(answer) + 1 > model.context:
        raise DataError(f"{where}: longer than the context of {model.context} tokens")
    return prompt, (*answer, tokenizer.eos_token_id)


def picture_in(exchange: Exchange, model: ElasticVlm) -> Picture:
    """Its image, processed.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if isinstance(exchange.image, Path):
            return model.pictures.read(exchange.image.read_bytes(), exchange.where)
        return model.pictures.picture(exchange.image, exchange.where)
    except InputError as error:
        raise DataError(str(error)) from error


def collated(exchanges: Sequence[Exchange], model: ElasticVlm) -> ImagedBatch:
    """Prompts with their answers; the last prompt token and the answer are of phase output."""
    rows = [each.prompt + each.answer for each in exchanges]
    ids_BT = padded(rows, 0)
    at_T = torch.arange(ids_BT.shape[1])
    count_B1 = torch.tensor([[len(row)] for row in rows])
    first_B1 = torch.tensor([[len(each.prompt) - 1] for each in exchanges])
    mask_BT = at_T < count_B1
    pixels = [picture_in(each, model).pixels_CHW for each in exchanges]
    device = model.device
    return ImagedBatch(
        ids_BT=ids_BT.to(device),
        pixels_NCHW=torch.stack(pixels).to(device, model.dtype),
        mask_BT=mask_BT.to(device),
        output_BT=((at_T >= first_B1) & mask_BT).to(device),
    )


def judged(batch: ImagedBatch) -> Tensor:
    """True where a token is followed by one of the answer: [B, T]."""
    last_BT = batch.mask_BT & ~torch.nn.functional.pad(batch.mask_BT[:, 1:], (0, 1))
    return batch.output_BT & ~last_BT
