"""Text to training windows: read, tokenised, packed, split, shuffled; seeded and resumable.

`DATA` is a `.txt` file (one document), a `.jsonl` file (one document a line: `{"text"}`,
`{"text", "label"}`, or `{"messages"}` through the model's own chat template), a folder of such
files, or `hub:NAME[:split]` through the package `datasets`.

Nothing random here has a state of its own: the order of an epoch is a function of the seed and
the epoch, so a position is two numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastiformer import ElasticModel
from training.files import DataError

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
LATER = "image data is not supported by this version; give text"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, where they came from, and the hash of what they say."""

    source: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hash_of(self.documents)

    def split(self, held_out: float) -> tuple[Corpus, Corpus]:
        """The training part and the held-out one: a share of the documents, chosen by content.

        A document's side hangs on its text alone, so adding others never moves it. At least one
        document is held out; of a lone document it is the tail.
        """
        assert 0 < held_out < 1, f"a share to hold out is between 0 and 1; got {held_out}"
        held_source = f"{self.source} (held out)"
        if len(self.documents) == 1:
            (only,) = self.documents
            cut = round(len(only) * (1 - held_out))
            return Corpus(self.source, (only[:cut],)), Corpus(held_source, (only[cut:],))
        ranked = sorted((place_of(each), at) for at, each in enumerate(self.documents))
        count = max(1, sum(place < held_out for place, _ in ranked))
        held = {at for _, at in ranked[: min(count, len(ranked) - 1)]}
        train = tuple(each for at, each in enumerate(self.documents) if at not in held)
        return (
            Corpus(self.source, train),
            Corpus(held_source, tuple(self.documents[at] for at in sorted(held))),
        )


def tokenizer_of(model: ElasticModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        DataError: when it has none, so that no text can be read for it.
    """
    if model.tokenizer is None:
        raise DataError(f"{model.identity.id}: has no tokenizer, so it cannot read text")
    return model.tokenizer


def read_corpus(data: str, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read `DATA` in any of its forms.

    Raises:
        DataError: naming the file, and the line, that is missing, empty or malformed.
    """
    documents = tuple(read_documents(data, tokenizer))
    if not documents:
        raise DataError(f"{data}: holds no text")
    return Corpus(data, documents)


def read_documents(
    data: str, tokenizer: PreTrainedTokenizerBase, stream: bool = False
) -> Iterator[str]:
    """The documents of `DATA` in their order, each read when it is asked for.

    Args:
        stream: a Hub data set is not fetched whole first, but as it is read.

    Raises:
        DataError: as `read_corpus`, when the fault is reached.
    """
    if data.startswith("hub:"):
        yield from _read_hub(data, tokenizer, stream)
        return
    path = Path(data)
    if not path.exists():
        raise DataError(f"{data}: no such file or folder (a Hub data set is written hub:NAME)")
    if not path.is_dir():
        yield from _read_file(path, tokenizer)
        return
    inside = sorted(each for each in path.rglob("*") if each.is_file())
    texts = [each for each in inside if each.suffix in (".txt", ".jsonl")]
    if not texts:
        images = any(each.suffix.lower() in IMAGES for each in inside)
        raise DataError(f"{data}: {LATER if images else 'no .txt or .jsonl file inside'}")
    for each in texts:
        yield from _read_file(each, tokenizer)


def _read_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: a data file ends in .txt or .jsonl")
    if path.suffix == ".txt":
        content = _decoded(path.read_bytes(), path, 0).replace("\r\n", "\n").replace("\r", "\n")
        if not content.strip():
            raise DataError(f"{path}: empty")
        yield content
        return
    empty = True
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            empty = False
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg})") from error
            yield _document(record, where, tokenizer)
    if empty:
        raise DataError(f"{path}: empty")


def _lines(path: Path) -> Iterator[str]:
    """One after the other, so that a file may be larger than memory."""
    # By bytes: JSON strings may hold U+2028 and its like, which end no line here.
    with path.open("rb") as file:
        begun = 0
        for line in file:
            yield _decoded(line, path, begun)
            begun += len(line)


def _decoded(content: bytes, path: Path, begun: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {begun + error.start}") from error


def _read_hub(data: str, tokenizer: PreTrainedTokenizerBase, stream: bool) -> Iterator[str]:
    name, _, split = data.removeprefix("hub:").partition(":")
    if not name:
        raise DataError(f"{data}: a Hub data set is written hub:NAME or hub:NAME:split")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{data}: needs the package datasets, which is not installed") from error
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=stream)
    except Exception as error:  # datasets raises of many kinds: each is "not to be had"
        raise DataError(f"{data}: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _document(row, f"{data}, row {number}", tokenizer)


def _document(record: object, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(record, Mapping):
        raise DataError(f'{where}: an object with "text" or "messages"; got {record!r:.60}')
    if "image" in record:
        raise DataError(f"{where}: {LATER}")
    if "messages" in record:
        return _templated(record["messages"], where, tokenizer)
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "text" is a string that is not empty; got {text!r:.60}')
    return text


def _templated(messages: object, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not are_messages(messages):
        raise DataError(f'{where}: "messages" is a list of {{"role", "content"}}, both text')
    if tokenizer.chat_template is None:
        raise DataError(f'{where}: "messages", but this base model has no chat template')
    return str(tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False))


def are_messages(value: object) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether this is a conversation of text: `[{"role", "content"}, …]`, not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, Mapping)
            and isinstance(each.get("role"), str)
            and isinstance(each.get("content"), str)
            for each in value
        )
    )


def hash_of(documents: Iterable[str]) -> str:
    """SHA-256 of texts in their order, whatever file they lie in."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()


def place_of(text: str) -> float:
    """A document's fixed pseudo-random place in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, window: int) -> Tensor:
    """Every token of the corpus, documents parted by the end-of-text token, as [windows, window].

    Where the tokenizer begins a text with a token of its own, so does every window. The tail that
    fills no window is dropped.

    Raises:
        DataError: when the corpus does not fill one window.
    """
    flat = [torch.tensor(tokens_of(each, tokenizer)) for each in corpus.documents]
    ids_N = torch.cat(flat)
    ids_WT = in_windows(ids_N, tokenizer, window)
    if len(ids_WT) == 0:
        raise DataError(f"{corpus.source}: {len(ids_N)} tokens, fewer than a window of {window}")
    return ids_WT


def some_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, count: int, window: int, seed: int
) -> tuple[Tensor, str]:
    """So many windows of `DATA`, [count, window], as the seed orders them; the hash of its text.

    Raises:
        DataError: when it holds fewer.
    """
    corpus = read_corpus(source, tokenizer)
    ids_WT = pack(corpus, tokenizer, window)
    if len(ids_WT) < count:
        raise DataError(
            f"{source}: {len(ids_WT)} windows of {window} tokens; {count} are wanted: give more "
            "text, or ask for fewer or shorter ones"
        )
    return Windows(ids_WT, seed).take(count), corpus.sha256


def tokens_of(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's tokens, with the one that ends a text."""
    ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def in_windows(ids_N: Tensor, tokenizer: PreTrainedTokenizerBase, window: int) -> Tensor:
    """A run of tokens as [windows, window], each begun as the tokenizer begins a text."""
    begins = _begins(tokenizer)
    width = window - len(begins)
    windows = len(ids_N) // width
    ids_WT = ids_N[: windows * width].view(windows, width)
    return torch.cat([torch.tensor(begins, dtype=torch.long).expand(windows, -1), ids_WT], dim=1)


def tokens_in(window: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of text a window holds."""
    return window - len(_begins(tokenizer))


def _begins(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer("", add_special_tokens=True)["input_ids"]
    return [each for each in ids if each == tokenizer.bos_token_id][:1]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands in its data: windows taken of an epoch."""

    epoch: int = 0
    taken: int = 0


class Windows:
    """Windows in a seeded order, epoch after epoch, a batch at a time.

    Every process draws the whole batch and keeps its own rows of it, so what a step sees does not
    hang on how many processes share it.
    """

    def __init__(self, ids_WT: Tensor, seed: int, position: Position | None = None) -> None:
        self.ids_WT = ids_WT
        self.seed = seed
        self.position = position or Position()

    def take(self, rows: int) -> Tensor:
        """The next `rows` windows, over the end of an epoch if need be."""
        chosen: list[Tensor] = []
        epoch, taken = self.position.epoch, self.position.taken
        while rows:
            some = self._order(epoch)[taken : taken + rows]
            chosen.append(some)
            rows -= len(some)
            taken += len(some)
            if taken == len(self.ids_WT):
                epoch, taken = epoch + 1, 0
        self.position = Position(epoch, taken)
        return self.ids_WT[torch.cat(chosen)]

    def state(self) -> list[int]:
        """The position, as a checkpoint keeps it."""
        return list(astuple(self.position))

    def go_on(self, state: Sequence[int]) -> None:
        """From a position that `state` told."""
        self.position = Position(*state)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        return torch.randperm(len(self.ids_WT), generator=generator)


def check_window(option: str, tokens: int, context: int) -> None:
    """Raises DataError for windows that are longer than the model's context."""
    if tokens > context:
        raise DataError(f"{option} {tokens}: the context of this model is {context} tokens")


def two_sets(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    probed: int,
    checked: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Windows to probe with and others to check on, from different documents.

    Raises:
        DataError: one half of the corpus holds fewer than are wanted.
    """
    chosen = []
    for part, wanted in zip(corpus.split(0.5), (probed, checked), strict=True):
        ids_WT = pack(part, tokenizer, window)
        if len(ids_WT) < wanted:
            raise DataError(
                f"{corpus.source}: {len(ids_WT)} windows of {window} tokens in one half of "
                f"it, {wanted} wanted; give more text or a smaller --window"
            )
        chosen.append(Windows(ids_WT, seed).take(wanted))
    return chosen[0], chosen[1]


def seed_of(*parts: str | int) -> int:
    """A seed for one purpose: unrelated to that of any other, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def shard(rows: Iterable[int], rank: int, world: int) -> list[int]:
    """The rows of a batch that belong to one of `world` processes: a contiguous equal share."""
    every = list(rows)
    assert len(every) % world == 0, f"{len(every)} rows do not divide among {world} processes"
    share = len(every) // world
    return every[rank * share : (rank + 1) * share]
