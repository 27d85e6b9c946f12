"""Promises about the cache: what can never fit is refused, what must wait waits, nothing dies."""

import asyncio

import pytest

from elastiformer import Calibration, ElasticModel, Phase, Step
from tests.service.conftest import LOWEST, Watched, elastic_model, in_house, soon
from tests.tiny import CONTEXT, LAYERS

ASKED = {"temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "a" * 100, "max_tokens": 100}),
        ("/v1/completions", {"prompt": ["a", "a" * 150], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a" * 150, "max_tokens": 1, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 150}]}),
        ("/v1/classify", {"input": "a" * 150, "labels": ["x", "y"]}),
    ],
)
def test_what_can_never_fit_is_refused_at_once(route, body):
    async def visit(house):
        reply = await house.post(route, **body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["code"] == "invalid_input" and error["param"] == next(iter(body))
        total = house.engine.model.cache.total_blocks
        assert f"blocks of keys and values; the whole cache has {total}" in error["message"]
        assert (await house.complete("a" * 100, max_tokens=28, **ASKED))["usage"]
        listed = (await house.client.get("/v1/models/tiny")).json()
        assert listed["max_model_len"] == 128

    in_house(visit, cache_tokens=128)


def test_a_default_length_and_a_cut_text_are_what_fits():
    async def visit(house):
        chat = {"messages": [{"role": "user", "content": "a" * 40}], **ASKED}
        usage = (await house.post("/v1/chat/completions", **chat)).json()["usage"]
        assert usage["total_tokens"] == 128
        body = {"inputs": "a" * 900, "labels": ["x", "y"], "truncate": True}
        assert (await house.client.post("/predict", json=body)).status_code == 200

    in_house(visit, cache_tokens=128)


def test_a_cache_larger_than_the_context_bounds_nothing():
    async def visit(house):
        listed = (await house.client.get("/v1/models/tiny")).json()
        assert listed["max_model_len"] == CONTEXT
        answer = await house.complete("a" * 500, max_tokens=CONTEXT - 500, **ASKED)
        assert answer["usage"]["total_tokens"] == CONTEXT

    in_house(visit)


def lean_where_short() -> ElasticModel:
    """What is left out is of MLPs alone: over many keys that is too little of the whole."""
    model = elastic_model()
    path = tuple(Step(layer, "mlp_tokens", 0.0) for layer in range(LAYERS))
    paths = dict.fromkeys(Phase, path)
    model.adapter.calibration = Calibration(LOWEST, 96, paths, thresholds={}, measured=())
    model.attach(model.adapter)
    return model


def test_a_capacity_is_refused_for_lengths_that_a_request_can_reach_and_no_others():
    low, more = ASKED | {"capacity": 0.6}, ASKED | {"capacity": 0.75}

    async def visit(house):
        scored = low | {"echo": True, "logprobs": 0, "max_tokens": 0}
        answer = await house.complete("a" * 24, **scored)
        assert answer["elasti"]["capacity_applied"] == 0.6
        assert (await house.complete("a" * 24, max_tokens=3, **low))["usage"]["total_tokens"] == 27
        for body in (scored, low | {"max_tokens": 3}):
            refused = await house.post("/v1/completions", prompt="a" * 400, **body)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "invalid_capacity", refused.text
        # What the server chooses itself is what this capacity reaches.
        messages = [{"role": "user", "content": "a" * 24}]
        chat = await house.post("/v1/chat/completions", messages=messages, **more)
        assert chat.status_code == 200, chat.text
        assert chat.json()["usage"]["total_tokens"] == 128  # those after it have 160 keys
        body = {"inputs": "a" * 900, "labels": ["x", "y"], "truncate": True, "capacity": 0.85}
        cut = await house.client.post("/predict", json=body)
        assert cut.status_code == 200, cut.text

    in_house(visit, models={"tiny": lean_where_short()})


def test_what_must_wait_waits_in_order_and_everything_is_given_back():
    model = Watched()
    order = []

    async def visit(house):
        async def ask(number):
            await house.complete("abc"[number] * 90, max_tokens=20, **ASKED)
            order.append(number)

        asking, requests = [], house.engine._ledger.requests
        with model.held(after=1) as hold:
            for number in range(3):
                asking.append(asyncio.create_task(ask(number)))
                await soon(lambda number=number: len(requests) > number)
            await soon(hold.waits.is_set)
            used = {house.value("elasti_kv_cache_usage_perc")}
        while not all(each.done() for each in asking):
            used.add(house.value("elasti_kv_cache_usage_perc"))
            await asyncio.sleep(0.001)
        assert used - {0.0} == {0.7}  # 110 of 160 tokens, in whole blocks
        await asyncio.gather(*asking)
        assert order == [0, 1, 2]
        assert {len(step) for step in model.steps} == {1}  # two never fitted together
        await house.until_idle()
        assert house.value("elasti_kv_cache_usage_perc") == 0
        assert model.cache.free_blocks == model.cache.total_blocks

    in_house(visit, models={"tiny": model}, cache_tokens=160)


def test_more_requests_fit_where_a_lower_capacity_keeps_less():
    together = {}
    for capacity in (1.0, {"attention_tokens": 0.4}):
        model = Watched(kv="kept")

        async def visit(house, capacity=capacity, model=model):
            body = ASKED | {"max_tokens": 40, "capacity": capacity}
            asked = [asyncio.create_task(house.complete(each * 120, **body)) for each in "abcdef"]
            with model.held():
                await soon(lambda: len(house.engine._ledger.requests) == len(asked))
            await asyncio.gather(*asked)
            together[capacity == 1.0] = max(map(len, model.steps))

        in_house(visit, models={"tiny": model}, cache_tokens=330, prefix_cache=False)
    assert together[True] == 2 and together[False] >= 4


def test_two_models_have_a_cache_each():
    async def visit(house):
        answers = await asyncio.gather(
            *(house.complete("a" * 100, max_tokens=20, model=name, **ASKED) for name in "ab")
        )
        assert all(answer["usage"]["total_tokens"] == 120 for answer in answers)
        for served in house.hall.catalogue:
            assert served.model.cache.free_blocks == served.model.cache.total_blocks

    in_house(visit, models={"a": elastic_model(), "b": elastic_model("gpt2")}, cache_tokens=128)
