"""The embedded vision-language model serves every capacity of its range, whatever is asked."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import elastiformer
from elastiformer.vlm import ElasticVlm
from service.settings import Key
from tests.service.conftest import House, in_house
from tests.training.fashion import sample
from training.canvases import SIDE, compose
from training.corpora import data_uri

NAME = "fashion-vlm"
ADAPTER = Path(elastiformer.__file__).parent / "adapters" / NAME
TEXT = "Which of these words is a colour, and why do you think that it is one: red, or table? "
LONG = TEXT * 7  # some 150 tokens


@cache
def shipped() -> ElasticVlm:
    return ElasticVlm.load(NAME, ADAPTER, dtype="float32")


def image() -> dict:
    canvas = compose(sample(), 0, "heldout", 0)
    address = data_uri(canvas.grey_HW.mul(255).round().byte(), SIDE)
    return {"type": "image_url", "image_url": {"url": address}}


def visit(talk, **options) -> None:
    in_house(talk, models={NAME: shipped()}, cache_tokens=4096, **options)


async def asked(house: House, path: str, **body) -> dict:
    answer = await house.post(path, model=NAME, **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["elasti"])


def said(*parts: dict | str) -> list[dict]:
    content = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return [{"role": "user", "content": content}]


CHAT, TEXTS, LABELS = "/v1/chat/completions", "/v1/completions", "/v1/classify"
KINDS = {
    "an image": (CHAT, {"messages": said(image(), "What is at the top left?")}),
    "an image and a long question": (CHAT, {"messages": said(image(), LONG)}),
    "text": (CHAT, {"messages": said(LONG)}),
    "a completion": (TEXTS, {"prompt": LONG}),
    "labels": (LABELS, {"input": LONG, "labels": ["red", "table"]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [0.5, 0.25])
def test_every_kind_of_request_is_served_at_a_capacity_and_keeps_it(kind, capacity):
    path, body = KINDS[kind]

    async def talk(house: House) -> None:
        length = {} if path == LABELS else {"max_tokens": 3, "temperature": 0}
        told = await asked(house, path, capacity=capacity, **body, **length)
        assert told["capacity_applied"] == capacity and told["limited_by"] is None
        assert told["capacity_spent"] == pytest.approx(capacity, abs=0.02)

    visit(talk, prefix_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ceiling_of_the_server_holds_for_every_kind(kind):
    path, body = KINDS[kind]

    async def talk(house: House) -> None:
        told = await asked(house, path, **body, **({} if path == LABELS else {"max_tokens": 2}))
        assert told["limited_by"] == "server" and told["capacity_applied"] == 0.6
        assert told["capacity_spent"] == pytest.approx(0.6, abs=0.02)

    visit(talk, capacity_ceiling=0.6, prefix_cache=False)


def test_a_keys_ceiling_and_an_effort_hold_for_text_without_images():
    body = {"messages": said(LONG), "max_tokens": 2}

    async def talk(house: House) -> None:
        headers = {"Authorization": "Bearer known"}
        told = await asked(house, CHAT, **body, headers=headers)
        assert told["limited_by"] == "key" and told["capacity_applied"] == 0.6
        told = await asked(house, CHAT, **body, headers=headers, reasoning_effort="low")
        assert told["capacity_applied"] <= 0.6
        assert told["capacity_spent"] == pytest.approx(told["capacity_applied"], abs=0.02)

    visit(talk, keys=(Key("known", ceiling=0.6, key="known"),), prefix_cache=False)
