"""What encoders learn from: texts, pairs and images, with a label where there is one.

`DATA` is a `.txt` file (a text a line), a `.jsonl` file (`{"text"}`, `{"text", "text_pair"}` or
`{"image"}`, each with or without `"label"`; an image is a path beside the file, or a data URI), a
folder of such files, a folder of images whose sub-folders are the labels, or `hub:NAME[:split]`.
Texts that are too long are cut. Images are read when they are needed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastiformer.encoder import ElasticEncoder
from elastiformer.encoder_inputs import ImageItems, TextItems
from elastiformer.errors import InputError
from elastiformer.images import decode_bytes
from elastiformer.sequence import Item
from training.data import IMAGES, seed_of
from training.files import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One item, made when it is asked for, and its label's number; None without one."""

    digest: bytes
    label: int | None
    item: Callable[[], Item]


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples, where they came from, and the hash of what they say."""

    source: str
    each: tuple[Example, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(example.digest for example in self.each)).hexdigest()

    def items(self, places: Sequence[int] | Tensor) -> list[Item]:
        return [self.each[int(place)].item() for place in places]

    def shown(self, share: float, model: ElasticEncoder) -> Examples:
        """The same images, of which a masked autoencoder sees a share of the patches.

        Which ones hangs on an image's content alone.

        Raises:
            InputError: the model reads whole images only.
        """

        def thinned(example: Example) -> Example:
            def item() -> Item:
                pixels_CHW = example.item().pixels_CHW
                assert pixels_CHW is not None, "an image without pixels"
                patches = model.encoder.patch_count(*pixels_CHW.shape[1:])
                chance = torch.Generator().manual_seed(seed_of("shown", example.digest.hex()))
                order = torch.randperm(patches, generator=chance).tolist()
                return model.image(pixels_CHW, order[: max(1, int(share * patches))])

            return replace(example, item=item)

        return Examples(self.source, tuple(map(thinned, self.each)))

    def split(self, held_out: float) -> tuple[Examples, Examples]:
        """The training part and the held-out one: a share of the examples, chosen by content.

        An example's side hangs on its content alone, so adding others never moves it. At least one
        is held out, and one is not.
        """
        held = held_places(self.source, [each.digest for each in self.each], held_out)
        train = tuple(each for at, each in enumerate(self.each) if at not in held)
        return (
            Examples(self.source, train),
            Examples(f"{self.source} (held out)", tuple(self.each[at] for at in sorted(held))),
        )


def held_places(source: str, digests: Sequence[bytes], held_out: float) -> set[int]:
    """Which of some examples are held out, by their content."""
    assert 0 < held_out < 1, f"a share to hold out is between 0 and 1; got {held_out}"
    if len(digests) < 2:
        raise DataError(f"{source}: one example cannot be divided in two")
    ranked = sorted(range(len(digests)), key=lambda at: digests[at])
    places = [int.from_bytes(digests[at][:6], "big") / 2**48 for at in ranked]
    count = max(1, sum(place < held_out for place in places))
    return set(ranked[: min(count, len(ranked) - 1)])


def read_examples(data: str, model: ElasticEncoder, seen: float = 1.0) -> Examples:
    """Read `DATA` in any of its forms.

    Args:
        seen: share of an image's patches that a masked autoencoder is shown.

    Raises:
        DataError: naming the file, and the line, that is missing, empty or malformed.
        InputError: patches are hidden from a model that cannot do without.
    """
    each = tuple(_read(data, model))
    if not each:
        raise DataError(f"{data}: holds no example")
    examples = Examples(data, each)
    return examples if seen == 1.0 else examples.shown(seen, model)


def _read(data: str, model: ElasticEncoder) -> Iterator[Example]:
    if data.startswith("hub:"):
        yield from _hub(data, model)
        return
    path = Path(data)
    if not path.exists():
        raise DataError(f"{data}: no such file or folder (a Hub data set is written hub:NAME)")
    if not path.is_dir():
        yield from _file(path, model)
        return
    inside = sorted(each for each in path.rglob("*") if each.is_file())
    pictures = [each for each in inside if each.suffix.lower() in IMAGES]
    if pictures and model.encoder.reads_images:
        for each in pictures:
            label = None if each.parent == path else each.parent.name
            yield _image(each.read_bytes, label, str(each), model)
        return
    files = [each for each in inside if each.suffix in (".txt", ".jsonl")]
    if not files:
        wanted = "image" if model.encoder.reads_images else ".txt or .jsonl file"
        raise DataError(f"{data}: no {wanted} inside")
    for each in files:
        yield from _file(each, model)


def _file(path: Path, model: ElasticEncoder) -> Iterator[Example]:
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: a data file ends in .txt or .jsonl")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if path.suffix == ".txt":
            if model.encoder.reads_images:
                raise DataError(f"{path}: text, and this model reads images")
            yield _text({"text": line}, where, model)
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg})") from error
        yield _record(record, where, path.parent, model)


def _hub(data: str, model: ElasticEncoder) -> Iterator[Example]:
    name, _, split = data.removeprefix("hub:").partition(":")
    if not name:
        raise DataError(f"{data}: a Hub data set is written hub:NAME or hub:NAME:split")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{data}: needs the package datasets, which is not installed") from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises of many kinds: each is "not to be had"
        raise DataError(f"{data}: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{data}, row {number}", Path(), model)


def _record(record: object, where: str, beside: Path, model: ElasticEncoder) -> Example:
    if not isinstance(record, Mapping):
        raise DataError(f'{where}: an object with "text" or "image"; got {record!r:.60}')
    if not model.encoder.reads_images:
        return _text(record, where, model)
    given, label = record.get("image"), record.get("label")
    if isinstance(given, str) and given.startswith("data:"):
        assert isinstance(model.inputs, ImageItems)
        item = partial(lambda inputs, uri: inputs.prepare(uri, where).item, model.inputs, given)
        return Example(_digest(given), _label(label, where, model), item)
    if isinstance(given, str) and (beside / given).is_file():
        return _image((beside / given).read_bytes, label, where, model)
    if given is not None and hasattr(given, "save"):  # an image of Pillow's, as datasets gives it
        into = io.BytesIO()
        given.save(into, "PNG")
        return _image(into.getvalue, label, where, model)
    raise DataError(f'{where}: "image" is a path beside the file or a data URI; got {given!r:.60}')


def _text(record: Mapping[str, Any], where: str, model: ElasticEncoder) -> Example:
    assert isinstance(model.inputs, TextItems), "a model that reads texts"
    text, pair = record.get("text"), record.get("text_pair")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "text" is a string that is not empty; got {text!r:.60}')
    if pair is not None and not isinstance(pair, str):
        raise DataError(f'{where}: "text_pair" is a string; got {pair!r:.60}')
    item = model.inputs.prepare(text, pair, truncate=True).item
    digest = _digest(json.dumps([text, pair]))
    return Example(digest, _label(record.get("label"), where, model), lambda: item)


def _image(read: Callable[[], bytes], label: object, where: str, model: ElasticEncoder) -> Example:
    inputs = model.inputs
    assert isinstance(inputs, ImageItems), "a model that reads images"

    def item() -> Item:
        try:
            return inputs.item(np.array(decode_bytes(read(), inputs.mode)))
        except InputError as error:
            raise DataError(f"{where}: {error}") from error

    return Example(hashlib.sha256(read()).digest(), _label(label, where, model), item)


def _label(label: object, where: str, model: ElasticEncoder) -> int | None:
    """The number of a label that is given by its name or its number."""
    if label is None or model.task == "features":
        return None
    names = model.labels
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    if isinstance(label, str) and label in names:
        return names.index(label)
    raise DataError(
        f'{where}: "label" is one of {", ".join(names[:8])}, or its number; got {label!r:.60}'
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def numbers(count: int) -> Tensor:
    """The numbers of so many examples, [examples, 1]: what a seeded order is drawn over."""
    return torch.arange(count)[:, None]
