"""Promises of completions and chat: the contract's shapes, and the model's own text."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch

from elastiformer import Phase, Step
from tests.service.conftest import elastic_model, in_house
from tests.tiny import LAYERS, TURN_END, VOCAB, tiny

PROMPT = "Once upon a time"
CAPACITIES = [1.0, 0.8, 0.6, {"heads": 0.75}, {"prompt": 0.6, "output": 0.9}]


def events(text):
    """The chunks of a stream, which must end as OpenAI's do."""
    *lines, last = [line for line in text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_greedy_text_at_full_capacity_is_that_of_transformers():
    model, base = elastic_model(), tiny()
    ids = torch.tensor([model.tokenizer.encode(PROMPT)])
    written = base.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    expected = model.tokenizer.decode(written, skip_special_tokens=True)

    async def visit(house):
        answer = await house.complete(PROMPT, max_tokens=40, temperature=0, capacity=1.0)
        assert answer["choices"][0]["text"] == expected
        ended = "stop" if written[-1] == TURN_END else "length"
        assert answer["choices"][0]["finish_reason"] == ended

    in_house(visit, models={"tiny": model})


def test_a_completion_has_the_shape_of_the_contract():
    async def visit(house):
        reply = await house.post(
            "/v1/completions", prompt=PROMPT, max_tokens=150, temperature=0, capacity=0.6,
            ignore_eos=True,
        )  # fmt: skip
        answer = reply.json()

        assert answer["object"] == "text_completion" and answer["model"] == "tiny"
        assert answer["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
        usage, elasti = answer["usage"], answer["elasti"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == 166
        compute = usage["compute"]
        counts = [value for value in compute.values() if not isinstance(value, dict)]
        assert all(isinstance(count, int) for count in counts)
        assert 0 < compute["flops"] < compute["dense_flops"]
        assert compute["parameters_used"] < compute["dense_parameters"]
        assert compute["tokens_skipped"]["attention_tokens"] > 0
        assert elasti["capacity_requested"] == elasti["capacity_applied"] == 0.6
        assert elasti["capacity_spent"] == compute["block_flops"] / compute["dense_block_flops"]
        assert elasti["capacity_spent"] == pytest.approx(0.6, abs=0.02)
        assert elasti["limited_by"] is None
        assert 0 <= elasti["queue_ms"] <= elasti["time_to_first_token_ms"] <= elasti["total_ms"]
        spent = float(reply.headers["X-Elasti-Capacity-Spent"])
        assert spent == pytest.approx(elasti["capacity_spent"], abs=1e-4)

    in_house(visit)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_stream_adds_up_to_the_whole_answer(capacity, apart):
    async def visit(house):
        body = {
            "prompt": [PROMPT, "In the beginning"],
            "n": 2,
            "max_tokens": 12,
            "seed": 7,
            "capacity": capacity,
            "logprobs": 2,
        }
        whole = await house.complete(**body)
        reply = await house.post(
            "/v1/completions", **body, stream=True, stream_options={"include_usage": apart}
        )
        chunks = events(reply.text)

        for choice in whole["choices"]:
            mine = [
                each
                for chunk in chunks
                for each in chunk["choices"]
                if each["index"] == choice["index"]
            ]
            assert "".join(each["text"] for each in mine) == choice["text"]
            assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [
                choice["finish_reason"]
            ]
            for name in ("tokens", "text_offset"):
                streamed = [value for each in mine for value in each["logprobs"][name]]
                assert streamed == choice["logprobs"][name]
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-1]["elasti"]["capacity_applied"] == whole["elasti"]["capacity_applied"]
        assert (chunks[-1]["choices"] == []) == apart
        assert [chunk.get("usage") for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)

    in_house(visit, prefix_cache=False)  # else the second answer's prompts cost nothing


def test_a_chat_stream_tells_who_speaks_then_what_then_why_it_ends():
    async def visit(house):
        messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        body = {"messages": messages, "max_completion_tokens": 9, "temperature": 0}
        whole = (await house.post("/v1/chat/completions", **body)).json()
        reply = await house.post(
            "/v1/chat/completions", **body, stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )  # fmt: skip
        chunks = events(reply.text)

        assert reply.headers["content-type"].startswith("text/event-stream")
        assert whole["object"] == "chat.completion"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == whole["choices"][0]["message"]["content"]
        assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == whole["usage"]["completion_tokens"]
        assert chunks[-1]["usage"] == whole["usage"]

    in_house(visit)


def test_echo_with_logprobs_scores_the_prompt_as_the_pretrained_model_does():
    model, base = elastic_model(), tiny()
    ids = [72, 101, 108, 108, 111, 33, 10]
    with torch.inference_mode():
        logprobs = base(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
    expected = [logprobs[place, token].item() for place, token in enumerate(ids[1:])]

    async def visit(house):
        for most in (0, 1):
            answer = await house.complete(ids, max_tokens=most, echo=True, logprobs=1)
            listed = answer["choices"][0]["logprobs"]
            assert len(listed["tokens"]) == len(ids) + most
            assert listed["token_logprobs"][0] is None and listed["top_logprobs"][0] is None
            assert listed["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            best = [max(top.values()) for top in listed["top_logprobs"][1 : len(ids)]]
            assert best == pytest.approx(logprobs[:-1].amax(-1).tolist(), abs=1e-4)
            assert answer["usage"]["completion_tokens"] == most

    # A small budget cuts the prompt into chunks; scores must not notice.
    in_house(visit, models={"tiny": model}, max_step_tokens=3)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_count_characters_of_the_text(stream):
    prompt = "é🦊a" * 3

    async def visit(house):
        body = {"max_tokens": 6, "echo": True, "logprobs": 0, "ignore_eos": True, "seed": 1}
        reply = await house.post("/v1/completions", prompt=prompt, stream=stream, **body)
        parts = events(reply.text) if stream else [reply.json()]
        choices = [choice for part in parts for choice in part["choices"]]
        text = "".join(choice["text"] for choice in choices)
        listed = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        offsets = [offset for each in listed for offset in each["text_offset"]]
        tokens = [token for each in listed for token in each["tokens"]]

        begins = [0, 0, *[1] * 4, 2]
        assert offsets[: 7 * 3] == [3 * part + at for part in range(3) for at in begins]
        assert len(offsets) == 7 * 3 + 6 and text.startswith(prompt)
        assert offsets == sorted(offsets) and offsets[7 * 3] == len(prompt)
        assert offsets[-1] <= len(text)
        assert all(text[at] == "a" for at, token in zip(offsets, tokens, strict=True)
                   if token == "a")  # fmt: skip

    in_house(visit)


def test_echo_alone_gives_the_prompt_back():
    async def visit(house):
        answer = await house.complete(PROMPT, max_tokens=0, echo=True)
        assert answer["choices"][0]["text"] == PROMPT
        reply = await house.post(
            "/v1/completions", prompt=PROMPT, max_tokens=0, echo=True, stream=True
        )
        chunks = events(reply.text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    in_house(visit)


def test_a_stop_string_ends_the_answer_and_is_left_out_of_it():
    async def visit(house):
        body = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
        text = (await house.complete(PROMPT, **body))["choices"][0]["text"]
        stop = text[4:6]
        for stops in (stop, ["never seen", stop]):
            answer = await house.complete(PROMPT, stop=stops, **body)
            assert answer["choices"][0]["text"] == text[: text.index(stop)]
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] < 40

    in_house(visit)


def test_ignoring_the_end_and_least_tokens_are_honoured():
    async def visit(house):
        answer = await house.complete(PROMPT, max_tokens=200, ignore_eos=True, temperature=2.0)
        assert answer["usage"]["completion_tokens"] == 200
        answer = await house.complete(PROMPT, max_tokens=60, min_tokens=60, temperature=2.0)
        assert answer["usage"]["completion_tokens"] == 60

    in_house(visit)


def test_a_seed_draws_the_same_text_alone_and_among_others():
    async def visit(house):
        body = {"max_tokens": 20, "seed": 11, "temperature": 1.0, "ignore_eos": True}
        alone = await house.complete(PROMPT, **body)

        mixed = await asyncio.gather(
            *(
                house.complete("x" * (3 + 5 * place), capacity=capacity, **body)
                for place, capacity in enumerate(CAPACITIES)
            ),
            house.complete(PROMPT, **body),
        )
        assert mixed[-1]["choices"][0]["text"] == alone["choices"][0]["text"]
        several = await house.complete(PROMPT, n=3, **body)
        texts = [choice["text"] for choice in several["choices"]]
        assert texts[0] == alone["choices"][0]["text"] and len(set(texts)) == 3

    in_house(visit)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_batch_mates_and_chunks_do_not_change_an_answer(capacity):
    body = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "capacity": capacity}
    found = {}

    async def alone(house):
        found["alone"] = await house.complete(PROMPT * 4, **body)

    async def among_others(house):
        crowd = [
            house.complete("y" * (1 + 9 * place), **body | {"capacity": other})
            for place, other in enumerate(CAPACITIES)
        ]
        found["mixed"] = (await asyncio.gather(*crowd, house.complete(PROMPT * 4, **body)))[-1]

    in_house(alone)
    in_house(among_others, max_step_tokens=13, max_running=4)
    assert found["mixed"]["choices"] == found["alone"]["choices"]
    # FLOPs of attention depend on how a prompt is cut up; what was decided does not.
    for name in ("parameters_used", "tokens_skipped", "heads_skipped", "experts_skipped"):
        mixed, alone = (found[way]["usage"]["compute"][name] for way in ("mixed", "alone"))
        assert mixed == alone


@pytest.mark.parametrize(
    ("tokens", "step_tokens", "capacities"),
    [
        *((tokens, 512, (0.9, 0.85)) for tokens in (130, 700, 1500)),
        (1500, 2048, (0.9,)),
        (400, 13, (0.85, 0.65)),
        (400, 64, (0.85, 0.65)),
        (400, 79, (0.65,)),
    ],
)
def test_a_scored_text_of_any_length_spends_what_was_asked(tokens, step_tokens, capacities):
    """Attention is whole and grows with the text, and channels make up for it."""
    context = 512 if tokens < 512 else 2048
    model = elastic_model(max_position_embeddings=context, intermediate_size=1120)
    sites, layers = ("mlp_in", "mlp_out", "attention_in", "attention_out"), range(LAYERS)
    path = tuple(Step(at, site, share) for share in (0.25, 0.1) for site in sites for at in layers)
    known = model.adapter.calibration
    model.adapter.calibration = replace(known, paths=dict.fromkeys(Phase, path))
    model.attach(model.adapter)

    async def visit(house):
        ids = [place * 7 % VOCAB for place in range(tokens)]
        scored = {"echo": True, "logprobs": 0, "max_tokens": 0}
        for capacity in capacities:
            answer = await house.complete(ids, **scored, capacity=capacity)
            assert answer["elasti"]["capacity_spent"] == pytest.approx(capacity, abs=0.02)

    in_house(visit, models={"tiny": model}, max_step_tokens=step_tokens)
