"""What a cache holds: bytes per token, and how many requests of 1,000 tokens fit, by capacity.

Under an untrained adapter, made in memory, that leaves out tokens of attention and MLP alike in
all layers; once with `kv: complete`, where a token that skips an attention still leaves its keys
and values there, and once with `kv: kept`, where it leaves nothing. Requests are opened in a small
pool until it refuses one; the last of them is then run whole inside the full pool.

Takes the time to run eight such requests: about a minute on two cores with the default model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from benchmarks import machine, models
from benchmarks.results import Goal, Report, Table, write
from benchmarks.runs import feed_prompts
from elastiformer import Capacity, Chunk, ElasticModel
from elastiformer import Sequence as Request
from elastiformer.accounting import KVPolicy
from elastiformer.errors import CacheFull
from training.options import whole
from training.progress import track

CAPACITIES = (1.0, 0.8, 0.65, 0.5)
POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--pool", type=whole(1), default=16000, help="dense tokens the pool holds")
    parser.add_argument("--prompt", type=whole(2), default=968, help="tokens of each prompt")
    parser.add_argument("--tokens", type=whole(1), default=32, help="new tokens of each request")


@dataclass(frozen=True, slots=True)
class Measured:
    """One KV policy at one capacity."""

    kv: str
    capacity: float
    spent: float
    bytes_per_token: float  # of keys and values, all layers
    bytes_ratio: float  # over capacity 1.0
    blocks: int  # that one request reserves
    fit: int  # requests that were open at once when the pool refused one more
    fit_ratio: float
    pool_blocks: int
    leaked_blocks: int  # not free again after all were released


def run(args: argparse.Namespace) -> dict[str, Any]:
    measured: list[Measured] = []
    bare = argparse.Namespace(**vars(args) | {"adapter": models.NO_ADAPTER})
    for kv in POLICIES:
        model = models.load(bare)
        models.check_context(model, args.prompt + args.tokens)
        models.routed_tokens(model, kv)
        model.open_cache(args.pool, prefixes=False)
        for share in track(CAPACITIES, label=f"kv: {kv}"):
            measured.append(_measure(args, model, kv, share, measured))
    return write(_report(args, model, measured), args.out)


def _measure(
    args: argparse.Namespace,
    model: ElasticModel,
    kv: str,
    share: float,
    before: Sequence[Measured],
) -> Measured:
    assert model.cache is not None, "the pool was opened"
    capacity, most = Capacity(share, share), args.prompt + args.tokens
    requests: list[Request] = []
    try:
        while True:
            requests.append(model.sequence(capacity, args.prompt, most))
    except CacheFull:
        pass
    assert requests, "the pool holds at least one request"
    last = requests[-1]
    _run_whole(model, last, models.text_ids(model, most), args.prompt)
    bytes_per_token = last.cache_bytes / last.length
    for request in requests:
        request.release()
    dense = next((each for each in before if each.kv == kv and each.capacity == 1.0), None)
    return Measured(
        kv=kv,
        capacity=share,
        spent=last.usage.capacity_spent,
        bytes_per_token=bytes_per_token,
        bytes_ratio=bytes_per_token / (dense.bytes_per_token if dense else bytes_per_token),
        blocks=model.blocks_for(capacity, args.prompt, most),
        fit=len(requests),
        fit_ratio=len(requests) / (dense.fit if dense else len(requests)),
        pool_blocks=model.cache.total_blocks,
        leaked_blocks=model.cache.total_blocks - model.cache.free_blocks,
    )


def _run_whole(model: ElasticModel, request: Request, ids: list[int], prompt: int) -> None:
    feed_prompts(model, [request], [ids[:prompt]])
    for token in ids[prompt:]:
        model.step([Chunk(request, [token])])


# On paper.


def _report(args: argparse.Namespace, model: ElasticModel, measured: list[Measured]) -> Report:
    rows = [
        [
            f"`{each.kv}`",
            f"{each.capacity:g}",
            f"{each.spent:.3f}",
            f"{each.bytes_per_token:,.0f}",
            f"{each.bytes_ratio:.3f}",
            str(each.blocks),
            str(each.fit),
            f"{each.fit_ratio:.2f}",
            str(each.leaked_blocks),
        ]
        for each in measured
    ]
    columns = (
        "kv",
        "capacity",
        "spent",
        "bytes per token",
        "over 1.0",
        "blocks reserved",
        "requests that fit",
        "over 1.0",
        "blocks leaked",
    )
    half = next(
        (each.bytes_ratio for each in measured if (each.kv, each.capacity) == ("kept", 0.5)), None
    )
    return Report(
        name="cache",
        title=f"What a cache holds: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "pool_tokens": args.pool,
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "capacities": list(CAPACITIES),
        },
        results=[asdict(each) for each in measured],
        tables=[
            Table(
                f"Requests of {args.prompt + args.tokens} tokens in a pool of {args.pool}",
                columns,
                rows,
            )
        ],
        notes=(
            "Bytes are those that a request holds after it ran whole; blocks are what it reserves "
            "when it is opened, so that it can never be left without room."
        ),
        draw=lambda figure: _draw(figure, measured),
        goals=[
            Goal("bytes per token at capacity 0.5, kv: kept, over dense", 0.55, half, at_most=True)
        ],
        size=(9, 4),
    )


def _draw(figure: Any, measured: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for kv, style in zip(POLICIES, ("s--", "o-"), strict=True):
        mine = [each for each in measured if each.kv == kv]
        shares = [each.capacity for each in mine]
        left.plot(shares, [each.bytes_per_token for each in mine], style, label=f"kv: {kv}")
        right.plot(shares, [each.fit for each in mine], style, label=f"kv: {kv}")
    left.set(xlabel="capacity", ylabel="bytes of keys and values per token")
    right.set(xlabel="capacity", ylabel="requests open at once")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
