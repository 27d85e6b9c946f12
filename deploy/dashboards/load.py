"""Mixed requests to the embedded models, so that dashboards have something to show.

Every model, every form of capacity, a caller who leaves, and requests that are refused, at random
moments; in the middle third four times as many, which is more than a small host can do. Open loop:
nobody waits for an answer before he asks again.
"""

from __future__ import annotations

import asyncio
import base64
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

PICTURES = Path("docs")
CAPACITIES: tuple[object, ...] = (1.0, 0.9, 0.8, 0.65, 0.5, "auto", "auto", {"prompt": 0.5})
QUESTIONS = (
    "Why is the sky blue?",
    "Tell me how bread is baked, step by step, and what can go wrong with it.",
    "Summarise: the lighthouse stood at the end of the long stone pier, and every evening at dusk "
    "the keeper climbed its two hundred steps to light the lamp.",
)
LEFT = "left"


@dataclass(frozen=True, slots=True)
class Visit:
    """One request, and after how many seconds its caller leaves, if he does."""

    path: str
    body: dict[str, Any]
    limited: bool = False  # sent with the key that has a ceiling
    leaves_after: float | None = None


def visits(draw: random.Random) -> Iterator[Visit]:
    """Requests without end."""
    boot, canvas = (_uri(PICTURES / name) for name in ("boot.png", "canvas.png"))
    shown = {"type": "image_url", "image_url": {"url": canvas}}
    while True:
        capacity = draw.choice(CAPACITIES)
        tokens, kind = draw.randint(8, 48), draw.random()
        text = f"{draw.choice(QUESTIONS)} Think of the number {draw.randint(0, 9999)}."
        asked = {"role": "user", "content": text}  # no two alike: a stored prompt costs nothing
        chat = {"model": "smollm2", "messages": [asked], "max_tokens": tokens}
        if kind < 0.5:
            yield Visit("/v1/chat/completions", chat | {"capacity": capacity})
        elif kind < 0.58:
            yield Visit("/v1/chat/completions", chat | {"capacity": 0.9}, limited=True)
        elif kind < 0.62:
            yield Visit("/v1/chat/completions", chat | {"max_tokens": 200}, leaves_after=0.5)
        elif kind < 0.65:
            yield Visit("/v1/chat/completions", chat | {"capacity": 1.5})
        elif kind < 0.78:
            texts = {"model": "sentiment", "input": [text] * 4}
            yield Visit("/v1/classify", texts | {"capacity": draw.choice((1.0, 0.65, 0.5))})
        elif kind < 0.9:
            image = {"model": "fashion-mnist", "input": {"image": boot}}
            yield Visit("/v1/classify", image | {"capacity": draw.choice((1.0, 0.65, 0.5))})
        else:
            question = {"type": "text", "text": "What is at the top left?"}
            look = {"role": "user", "content": [shown, question]}
            body = {"model": "fashion-vlm", "messages": [look], "max_tokens": 8}
            yield Visit("/v1/chat/completions", body | {"capacity": draw.choice((1.0, 0.5, 0.437))})


async def send(
    server: str, minutes: float, rate: float, keys: tuple[str | None, str | None], seed: int = 0
) -> dict[str, int]:
    """Send for so long, at so many requests a second outside the middle third.

    Args:
        keys: of callers, and of one whose ceiling is below 0.9; None: the server asks for none.

    Returns:
        How many got which status; those who left, under "left".
    """
    draw, seconds = random.Random(seed), 60 * minutes
    seen: Counter[str] = Counter()
    tasks: set[asyncio.Task[None]] = set()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server, timeout=120, limits=limits) as client:
        began = time.monotonic()
        for visit in visits(draw):
            passed = time.monotonic() - began
            if passed >= seconds:
                break
            tasks.add(asyncio.create_task(_one(client, visit, keys[visit.limited], seen)))
            print(f"\r{passed:4.0f} of {seconds:.0f} s, {dict(seen)}", end="", file=sys.stderr)
            now = rate * (4 if seconds / 3 <= passed < 2 * seconds / 3 else 1)
            await asyncio.sleep(draw.expovariate(now))
        await asyncio.gather(*tasks)
    print(file=sys.stderr)
    return dict(seen)


async def _one(
    client: httpx.AsyncClient, visit: Visit, key: str | None, seen: Counter[str]
) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        async with asyncio.timeout(visit.leaves_after):
            answer = await client.post(visit.path, json=visit.body, headers=headers)
    except TimeoutError:
        seen[LEFT] += 1
    except httpx.HTTPError as error:
        seen[type(error).__name__] += 1
    else:
        seen[str(answer.status_code)] += 1


def _uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
