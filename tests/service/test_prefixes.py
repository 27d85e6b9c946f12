"""Promises of stored prefixes: what begins alike is computed once, counted, and changes nothing."""

import json

import pytest

from tests.service.conftest import Watched, in_house

PROMPT = "The quick brown fox jumps over the lazy dog. " * 2  # 90 tokens, of which 64 can be stored
ASKED = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
# At 0.6 tokens of the prompt leave sub-layers out, which must be known at the end of a prefix.
CAPACITIES = [1.0, 0.6, {"heads": 0.75}, {"prompt": 0.6, "output": 0.9}]


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_prompt_that_begins_alike_is_not_computed_again(capacity):
    asked = ASKED | {"max_tokens": 18}  # of a shorter answer more tokens would have to pay

    async def visit(house):
        first = await house.complete(PROMPT, capacity=capacity, **asked)
        again = await house.complete(PROMPT, capacity=capacity, **asked)
        longer = await house.complete(PROMPT + "And then", capacity=capacity, **asked)

        assert [cached(answer) for answer in (first, again)] == [0, 64]
        # The plans of a number depend on how long a prompt is, and plans must agree too.
        by_length = capacity in (0.6, {"prompt": 0.6, "output": 0.9})
        assert cached(longer) == (0 if by_length else 64)
        assert again["choices"] == first["choices"]
        usages = [answer["usage"] for answer in (first, again)]
        assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"] == 90
        for name in ("flops", "dense_flops", "parameters_used", "dense_parameters"):
            assert 0 < usages[1]["compute"][name] < usages[0]["compute"][name]
        assert house.value("elasti_prefix_cache_queries_total") == 90 + 90 + 98
        assert house.value("elasti_prefix_cache_hits_total") == 64 + cached(longer)

    in_house(visit)


@pytest.mark.parametrize("capacity", CAPACITIES[1:])
def test_what_was_computed_at_one_capacity_is_not_served_to_another(capacity):
    async def visit(house):
        alone = await house.complete(PROMPT, **ASKED)
        for each in (capacity, 1.0):
            answer = await house.complete(PROMPT, capacity=each, **ASKED)
            assert cached(answer) == (0 if each == capacity else 64)
        assert answer["choices"] == alone["choices"]

    in_house(visit)


def test_a_scored_prompt_is_always_computed():
    async def visit(house):
        await house.complete(PROMPT, **ASKED)
        answer = await house.complete(PROMPT, **ASKED | {"max_tokens": 0}, echo=True, logprobs=0)
        assert cached(answer) == 0
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 90

    in_house(visit)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_choices_of_one_prompt_compute_it_once(capacity):
    model = Watched()

    async def visit(house):
        body = ASKED | {"n": 4, "temperature": 1.0, "seed": 3, "capacity": capacity}
        answer = await house.complete(PROMPT, **body)
        assert cached(answer) == 0  # of what is billed, which is the prompt once
        assert answer["usage"]["prompt_tokens"] == 90
        assert sum(map(sum, model.steps)) == 89 + 4 + 4 * 5
        assert house.value("elasti_prefix_cache_hits_total") == 3 * 89

        alone = [
            await house.complete(PROMPT, **body | {"n": 1, "seed": 3}),
            await house.complete(PROMPT, **body),
        ]
        assert alone[0]["choices"][0]["text"] == answer["choices"][0]["text"]
        assert alone[1]["choices"] == answer["choices"] and cached(alone[1]) == 89

    in_house(visit, models={"tiny": model})


def test_a_batch_of_labels_computes_each_text_once_in_few_steps():
    texts = [f"text number {number} " * 5 for number in range(6)]
    labels = ["good", "bad", "neither of the two", "both"]
    found = {}
    for stored in (False, True):
        model = Watched()

        async def visit(house, stored=stored, model=model):
            reply = await house.post("/v1/classify", input=texts, labels=labels, capacity=0.8)
            found[stored] = (reply.json(), model.steps)

        # A step that happens to be slow must not make the next ones shorter.
        long = {"max_decode_delay_seconds": 60.0}
        in_house(visit, models={"tiny": model}, prefix_cache=stored, **long)
    (plain, plain_steps), (shared, shared_steps) = found[False], found[True]
    for one, other in zip(plain["data"], shared["data"], strict=True):
        assert one["label"] == other["label"]
        assert one["probs"] == pytest.approx(other["probs"], abs=1e-5)
    assert plain["usage"]["prompt_tokens"] == shared["usage"]["prompt_tokens"]
    tokens = [sum(map(sum, steps)) for steps in (plain_steps, shared_steps)]
    assert tokens[1] < 0.45 * tokens[0]
    assert len(shared_steps) <= len(plain_steps)


@pytest.mark.parametrize("capacity", [1.0, 0.6, {"mlp_tokens": 0.5, "heads": 0.75}])
@pytest.mark.parametrize("kv", ["complete", "kept"])
def test_each_further_label_runs_no_token_of_the_prompt_but_its_last(capacity, kv):
    labels, found = ["good", "bad", "neither of the two"], {}
    ask = {"input": "a fine text", "capacity": capacity}
    for stored in (False, True):
        model = Watched(kv=kv)

        async def visit(house, stored=stored, model=model):
            reply = await house.post("/v1/classify", labels=labels, **ask)
            found[stored] = (reply.json(), [count for step in model.steps for count in step])

        in_house(visit, models={"tiny": model}, prefix_cache=stored)
    (alone, alone_tokens), (shared, shared_tokens) = found[False], found[True]
    assert shared["data"][0]["probs"] == pytest.approx(alone["data"][0]["probs"], abs=1e-5)
    # A byte is a token, and the one that ends an answer is only scored.
    prompt = sum(alone_tokens) - sum(map(len, labels))
    assert prompt % len(labels) == 0
    prompt //= len(labels)
    assert sum(shared_tokens) == prompt + len(labels[0]) + sum(1 + len(x) for x in labels[1:])


def test_without_the_setting_nothing_is_stored():
    async def visit(house):
        for _ in range(2):
            assert cached(await house.complete(PROMPT, **ASKED)) == 0
        assert house.value("elasti_prefix_cache_queries_total") == 0

    in_house(visit, prefix_cache=False)


def test_a_stream_tells_what_was_stored():
    async def visit(house):
        await house.complete(PROMPT, **ASKED)
        reply = await house.post("/v1/completions", prompt=PROMPT, stream=True, **ASKED)
        last = json.loads(reply.text.split("\n\n")[-3].removeprefix("data: "))
        assert cached(last) == 64

    in_house(visit)
