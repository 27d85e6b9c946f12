"""Who learns in a run, and from what: a text model from windows of text, an encoder from items, a
vision-language model from exchanges.

Each comes with a little of its data, by which experts are split. How it learns is loop.py's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from elastiformer import ElasticModel
from elastiformer.encoder import ElasticEncoder
from elastiformer.vlm import ElasticVlm
from elastiformer.vlm_weights import is_vlm
from training.data import Windows, pack, read_corpus, seed_of, tokenizer_of
from training.encoder_calibrate import task_asked
from training.encoder_student import ItemStudent
from training.examples import numbers, read_examples
from training.exchanges import collated, read_exchanges
from training.files import RunError
from training.loop import Text
from training.picture_student import PictureStudent
from training.processes import World
from training.stream import StreamedWindows
from training.student import Student, TextStudent

EXPERT_WINDOWS = 8  # on which neurons that work together are found
HELD_OUT_WINDOWS = 8
EXPERT_EXAMPLES, HELD_OUT_EXAMPLES = 64, 128  # the same of an encoder's data
EXPERT_EXCHANGES = 16  # the same with images


def learner(args: argparse.Namespace, world: World) -> tuple[Student, Text, Any]:
    """Who learns, from what, and a little of it to split experts by."""
    chosen = torch.Generator().manual_seed(seed_of("experts", args.seed))
    task = task_asked(args)
    if args.stream and (task is not None or is_vlm(args.base)):
        raise RunError("--stream: this model's data is read whole; leave the option out")
    if is_vlm(args.base):
        return _picture_student(args, world, chosen)
    if task is not None:
        encoder = ElasticEncoder.load(args.base, dtype=args.dtype, device=world.device, task=task)
        train = read_examples(args.data, encoder, args.seen)
        sha256, held, held_W1 = train.sha256, None, None
        if args.held_out:
            train, held = train.split(args.held_out)
            held_W1 = numbers(len(held.each))[:HELD_OUT_EXAMPLES]
        some = torch.randperm(len(train.each), generator=chosen)[:EXPERT_EXAMPLES]
        items = train.items(some)
        sample = encoder.collate(items)
        # What a plan spends is judged at their mean length.
        args.window = round(sum(len(item.ids) for item in items) / len(items))
        args.batch_tokens = args.batch_items * args.window
        train_W1 = numbers(len(train.each))
        text = Text(sha256, train_W1, held_W1, Windows(train_W1, args.seed))
        return ItemStudent(encoder, train, held), text, sample
    model = ElasticModel.load(args.base, dtype=args.dtype, device=world.device)
    if args.window > model.context:
        raise RunError(f"--window {args.window}: the context of this model is {model.context}")
    text = read_text(args, tokenizer_of(model))
    return TextStudent(model), text, sample_of(text, args.seed)


def sample_of(text: Text, seed: int) -> torch.Tensor:
    """The windows by which experts are split."""
    chosen = torch.Generator().manual_seed(seed_of("experts", seed))
    return text.train_WT[torch.randperm(len(text.train_WT), generator=chosen)[:EXPERT_WINDOWS]]


def _picture_student(
    args: argparse.Namespace, world: World, chosen: torch.Generator
) -> tuple[Student, Text, Any]:
    model = ElasticVlm.load(args.base, dtype=args.dtype, device=world.device)
    train = read_exchanges(args.data, model)
    sha256, held, held_W1 = train.sha256, None, None
    if args.held_out:
        train, held = train.split(args.held_out)
        held_W1 = numbers(len(held.each))[:HELD_OUT_EXAMPLES]
    some = train.at(torch.randperm(len(train.each), generator=chosen)[:EXPERT_EXAMPLES])
    args.window = round(sum(len(each.prompt + each.answer) for each in some) / len(some))
    args.batch_tokens = args.batch_items * args.window
    train_W1 = numbers(len(train.each))
    text = Text(sha256, train_W1, held_W1, Windows(train_W1, args.seed))
    # Experts are split by what the language model does with images and text.
    sample = collated(some[:EXPERT_EXCHANGES], model)
    return PictureStudent(model, train, held, args.image_most), text, sample


def read_text(args: argparse.Namespace, tokenizer: Any) -> Text:
    """The text that the options name: all of it, or as much of a stream as is read at first."""
    if args.stream:
        streamed = StreamedWindows(args.data, tokenizer, args.window, args.seed, args.held_out)
        held_WT = streamed.held_windows(HELD_OUT_WINDOWS) if args.held_out else None
        return Text(streamed.sha256(), streamed.first_block(), held_WT, streamed)
    corpus = read_corpus(args.data, tokenizer)
    if not args.held_out:
        train_WT = pack(corpus, tokenizer, args.window)
        return Text(corpus.sha256, train_WT, None, Windows(train_WT, args.seed))
    train, held = corpus.split(args.held_out)
    train_WT, held_WT = (pack(part, tokenizer, args.window) for part in (train, held))
    order = torch.randperm(
        len(held_WT), generator=torch.Generator().manual_seed(seed_of("held out", args.seed))
    )
    held_WT = held_WT[order[:HELD_OUT_WINDOWS]]
    return Text(corpus.sha256, train_WT, held_WT, Windows(train_WT, args.seed))
