"""Let the pretrained model write its own training text, from prompts.

A student is then trained on what its teacher would say, not on what people happened to write.
PROMPTS is a .txt file (one prompt a line) or a .jsonl file (`{"messages"}`, `{"prompt"}` or
`{"text"}`). A model with a chat template answers each prompt as a user's message and
`{"messages"}` lines come out; another one continues it, and `{"text"}` lines come out. Prompts
are taken in turn, again and again, until TOKENS tokens are written.

Whole lines are appended to FILE.jsonl.part, which becomes FILE.jsonl when it is done. Started
again, the command goes on after the last whole line. Each answer is drawn from a seed of its own,
so a prompt's next visit gives another text.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from elastiformer import DENSE, Chunk, ElasticModel
from elastiformer.sampling import Draw, Sampling, sample
from training.data import are_messages, seed_of, tokenizer_of
from training.files import DataError, sync_folder
from training.options import real, whole
from training.progress import bar

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is asked: a conversation, or a text to continue."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    def record(self, answer: str) -> dict[str, object]:
        """The training line that this prompt and its answer make."""
        if self.messages:
            turn = {"role": "assistant", "content": answer}
            return {"messages": [*self.messages, turn]}
        return {"text": self.text + answer}


@dataclass(frozen=True, slots=True)
class Style:
    """How answers are drawn; temperature 0 takes the likeliest token always."""

    temperature: float
    top_p: float
    seed: int
    most_new: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="folder, Hub id or embedded name")
    parser.add_argument("--prompts", type=Path, required=True, help=".txt or .jsonl")
    parser.add_argument("--tokens", type=whole(1), required=True, help="answer tokens to write")
    parser.add_argument("--out", type=Path, required=True, help="FILE.jsonl")
    parser.add_argument("--temperature", type=real(least=0), default=1.0, help="0: the likeliest")
    parser.add_argument(
        "--top-p", type=real(above=0, most=1), default=0.95, help="share of the likeliest"
    )
    parser.add_argument(
        "--max-new", type=whole(1), default=256, help="tokens of one answer, at most"
    )
    parser.add_argument("--batch", type=whole(1), default=8, help="answers written at once")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the base"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.out.exists():
        raise DataError(f"{args.out}: exists already; remove it or choose another --out")
    model = ElasticModel.load(args.base, dtype=args.dtype)
    prompts = read_prompts(args.prompts, bool(tokenizer_of(model).chat_template))
    check_room(model, prompts)
    style = Style(args.temperature, args.top_p, args.seed, args.max_new)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    lines, tokens = resume(part, model, prompts)
    with (
        part.open("a", encoding="utf-8") as file,
        bar("synthesize", args.tokens, done=tokens, unit="tok") as shown,
    ):
        while tokens < args.tokens:
            turn = range(lines, lines + args.batch)
            asked = [prompts[line % len(prompts)] for line in turn]
            for prompt, answer in zip(asked, answers(model, asked, style, lines), strict=True):
                file.write(json.dumps(prompt.record(answer), ensure_ascii=False) + "\n")
                count = answer_tokens(model, answer)
                lines, tokens = lines + 1, tokens + count
                shown.update(count)
            file.flush()
            os.fsync(file.fileno())
    part.rename(args.out)
    sync_folder(args.out.parent)
    return {
        "out": str(args.out),
        "lines": lines,
        "tokens": tokens,
        "prompts": len(prompts),
        "base": model.identity.id,
        "seed": args.seed,
    }


def check_room(model: ElasticModel, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that leave no room for an answer, before any is written.

    Raises:
        DataError: naming the first of them.
    """
    for number, prompt in enumerate(prompts, start=1):
        tokens = len(prompt_ids(model, prompt))
        if tokens >= model.context:
            raise DataError(
                f"prompt {number} of {len(prompts)}: {tokens} tokens leave no room in a context "
                f"of {model.context}"
            )


def read_prompts(path: Path, chat: bool) -> list[Prompt]:
    """The prompts of a file; `chat`: the model has a template, so a plain line is a message.

    Raises:
        DataError: naming the file, and the line, that is missing, empty or malformed.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: a prompts file ends in .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    prompts = [
        _prompt(line, f"{path}, line {number}", path.suffix == ".jsonl", chat)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{path}: holds no prompt")
    return prompts


def _prompt(line: str, where: str, is_json: bool, chat: bool) -> Prompt:
    text: object = line
    if is_json:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: an object is expected; got {line:.60}")
        if "messages" in record:
            return _conversation(record["messages"], where, chat)
        text = record.get("prompt", record.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "messages", "prompt" or "text" is expected; got {line:.60}')
    if chat:
        return Prompt(messages=({"role": "user", "content": text},))
    return Prompt(text=text)


def _conversation(messages: object, where: str, chat: bool) -> Prompt:
    if not chat:
        raise DataError(f'{where}: "messages", but this base model has no chat template')
    if not are_messages(messages):
        raise DataError(f'{where}: "messages" is a list of {{"role", "content"}}, both text')
    turns: list[Message] = [dict(each) for each in messages]
    # A whole conversation is a prompt too: its last answer is written anew.
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{where}: nobody asks anything in this conversation")
    return Prompt(messages=tuple(turns))


@dataclass(slots=True, eq=False)
class _Writing:
    """An answer in the making: what the model reads next, and what it has written."""

    sequence: Any
    draw: Draw
    following: list[int]
    most: int
    written: list[int] = field(default_factory=list)


@torch.inference_mode()
def answers(model: ElasticModel, prompts: Sequence[Prompt], style: Style, first: int) -> list[str]:
    """Each prompt's answer by the pretrained model, all written side by side.

    Args:
        first: the number of the first answer; each is drawn from the seed of its own number.
    """
    ends = _ends(model)
    all_of_them = [
        _begin(model, prompt, style, first + place) for place, prompt in enumerate(prompts)
    ]
    running = all_of_them
    while running:
        logits = model.step([Chunk(each.sequence, each.following) for each in running])
        last_RV = torch.stack([of_one[-1] for of_one in logits])
        for each, sampled in zip(
            running, sample(last_RV, [each.draw for each in running]), strict=True
        ):
            each.following = [sampled.token]
            if sampled.token not in ends:
                each.written.append(sampled.token)
            if sampled.token in ends or len(each.written) == each.most:
                each.sequence.release()
                each.most = 0
        running = [each for each in running if each.most]
    decode = tokenizer_of(model).decode
    return [str(decode(each.written, skip_special_tokens=True)) for each in all_of_them]


def _begin(model: ElasticModel, prompt: Prompt, style: Style, number: int) -> _Writing:
    ids = prompt_ids(model, prompt)
    most = min(style.most_new, model.context - len(ids))
    assert most >= 1, "a prompt that check_room has not seen"
    sampling = Sampling(
        temperature=style.temperature,
        top_p=style.top_p,
        seed=seed_of("answer", style.seed, number),
    )
    sequence = model.sequence(DENSE, len(ids), len(ids) + most)
    return _Writing(sequence, Draw(sampling, sampling.generator()), ids, most)


def prompt_ids(model: ElasticModel, prompt: Prompt) -> list[int]:
    tokenizer = tokenizer_of(model)
    if not prompt.messages:
        ids: list[int] = tokenizer(prompt.text, verbose=False)["input_ids"]
        return ids
    text = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def answer_tokens(model: ElasticModel, answer: str) -> int:
    """The tokens that an answer adds, its end included: the same now and when read back."""
    return len(tokenizer_of(model)(answer, add_special_tokens=False)["input_ids"]) + 1


def _ends(model: ElasticModel) -> set[int]:
    config: Any = model.base.generation_config
    known = [config.eos_token_id, tokenizer_of(model).eos_token_id]
    flat = [each for some in known for each in (some if isinstance(some, list) else [some])]
    return {each for each in flat if each is not None}


def resume(part: Path, model: ElasticModel, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """The lines and answer tokens written before; half a line, of a killed run, is cut off.

    Raises:
        DataError: when the lines do not belong to these prompts.
    """
    if not part.exists():
        return 0, 0
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(part, len(whole))
    tokens = 0
    lines = whole.decode().split("\n")[:-1]
    for number, line in enumerate(lines):
        record = json.loads(line)
        prompt = prompts[number % len(prompts)]
        answer = (
            record["messages"][-1]["content"]
            if "messages" in record
            else record["text"].removeprefix(prompt.text)
        )
        if record != prompt.record(answer):
            raise DataError(
                f"{part}, line {number + 1}: written for another prompt; remove the file to begin "
                "anew"
            )
        tokens += answer_tokens(model, answer)
    return len(lines), tokens
