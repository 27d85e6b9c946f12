"""Promises of every refusal: a status, OpenAI's error object, and a server that goes on."""

import asyncio
import json
import re

import pytest

from elastiformer import Capacity, ElasticModel
from service.errors import MOST_CHARACTERS
from service.settings import Key
from tests.service.conftest import Watched, elastic_model, in_house, soon
from tests.tiny import CONTEXT, VOCAB, tiny, tiny_tokenizer

COMPLETION = {"prompt": "Once upon a time", "max_tokens": 3, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
IMAGE_MESSAGE = {"role": "user", "content": [IMAGE]}
LONG_MESSAGE = {"role": "user", "content": "x" * CONTEXT}


def bad(route, param, says, **body):
    return pytest.param(route, param, says, body, id=f"{param}:{says}"[:40])


WRONG = [
    bad("completions", "capacity", "above 0", **COMPLETION, capacity=0),
    bad("completions", "capacity", "at most 1", **COMPLETION, capacity=1.2),
    bad("completions", "capacity", "'fast'", **COMPLETION, capacity="fast"),
    bad("completions", "capacity", 'at most 1, "auto", or', **COMPLETION, capacity="Auto"),
    bad("completions", "capacity", 'at most 1, "auto", or', **COMPLETION, capacity=1.01),
    bad("completions", "model", 'at most 1, "auto", or', **COMPLETION | {"model": "tiny@2"}),
    bad("completions", "capacity", "capacity.prompt: a number above 0 and at most 1, or an",
        **COMPLETION, capacity={"prompt": "auto"}),
    bad("completions", "capacity", "got 'xxx", **COMPLETION, capacity="x" * 9999),
    bad("completions", "capacity", "nan", **COMPLETION, capacity=float("nan")),
    bad("completions", "capacity", "inf", **COMPLETION, capacity=float("inf")),
    bad("completions", "capacity", "True", **COMPLETION, capacity=True),
    bad("completions", "capacity", "unknown unit 'wings'", **COMPLETION, capacity={"wings": 0.5}),
    bad("completions", "capacity", "no unit", **COMPLETION, capacity={}),
    bad("completions", "capacity", "'prompt'", **COMPLETION, capacity={"prompt": 1, "heads": 1}),
    bad("completions", "capacity", "range 0.50 to 1.0", **COMPLETION, capacity=0.2),
    bad("completions", "capacity", "range 0.50 to 1.0", **COMPLETION | {"model": "tiny@0.2"}),
    bad("completions", "model", "'fast'", **COMPLETION | {"model": "tiny@fast"}),
    bad("completions", "reasoning_effort", "'huge'", **COMPLETION, reasoning_effort="huge"),
    bad("completions", "prompt", "no token", prompt=""),
    bad("completions", "prompt", "at least 1", prompt=[]),
    bad("completions", "prompt", str(VOCAB), prompt=[5, VOCAB]),
    bad("completions", "prompt", "greater", prompt=[5, -1]),
    bad("completions", "prompt", str(CONTEXT), prompt="x" * (CONTEXT + 1)),
    bad("completions", "prompt", "no room", prompt="x" * CONTEXT),
    bad("completions", "max_tokens", str(CONTEXT), prompt="abc", max_tokens=CONTEXT),
    bad("completions", "max_tokens", "echo", prompt="abc", max_tokens=0),
    bad("completions", "max_tokens", "greater", prompt="abc", max_tokens=-1),
    bad("completions", "prompt", "\\ud800 is no character", prompt=["a", "\ud800"]),
    bad("completions", "model", "Unicode", **COMPLETION | {"model": "tiny\udfff"}),
    bad("completions", "capacity", "Unicode", **COMPLETION, capacity={"\ud800": 1, "prompt": 1}),
    bad("completions", "temperature", "equal to 2; got 2.1", **COMPLETION, temperature=2.1),
    bad("completions", "temperature", "finite", **COMPLETION, temperature=float("nan")),
    bad("completions", "temperature", "number", **COMPLETION, temperature="hot"),
    bad("completions", "top_p", "greater", **COMPLETION, top_p=0),
    bad("completions", "stop", "at most 4", **COMPLETION, stop=list("abcde")),
    bad("completions", "n", "greater", **COMPLETION, n=0),
    bad("completions", "n", "got 'xxx", **COMPLETION, n="x" * 9999),
    bad("completions", "seed", "less", **COMPLETION, seed=1 << 63),
    bad("completions", "min_tokens", "max_tokens", **COMPLETION, min_tokens=4),
    bad("completions", "logprobs", "less", **COMPLETION, logprobs=21),
    bad("chat/completions", "messages", "at least 1", messages=[]),
    bad("chat/completions", "messages", "role", messages=[{"content": "hi"}]),
    bad("chat/completions", "messages", "text only", messages=[IMAGE_MESSAGE]),
    bad("chat/completions", "messages", "0.text: a part of type 'text' holds a string; got none",
        messages=[{"role": "user", "content": [{"type": "text"}]}]),
    bad("chat/completions", "messages", str(CONTEXT), messages=[LONG_MESSAGE]),
    bad("chat/completions", "max_tokens", str(CONTEXT), **CHAT | {"max_tokens": CONTEXT}),
    bad("chat/completions", "max_completion_tokens", str(CONTEXT), **CHAT,
        max_completion_tokens=CONTEXT),
    bad("chat/completions", "top_logprobs", "logprobs", **CHAT, top_logprobs=2),
    bad("classify", "labels", "causal", input="good"),
    bad("classify", "labels", "twice", input="good", labels=["a", "a"]),
    bad("classify", "input", "text only", input=[{"image": "data:"}], labels=["a", "b"]),
    bad("classify", "input", str(CONTEXT), input="x" * CONTEXT, labels=["a", "b"]),
    bad("classify", "input", "at most 256", input=["x"] * 129, labels=["a", "b"]),
    bad("../predict", "inputs", str(CONTEXT), inputs=["a", "x" * CONTEXT], labels=["a", "b"]),
    bad("../predict", "inputs", "at most 256", inputs=["x"] * 129, labels=["a", "b"]),
]  # fmt: skip


@pytest.mark.parametrize(("route", "param", "says", "body"), WRONG)
def test_a_wrong_value_is_refused_by_name_and_the_server_goes_on(route, param, says, body):
    async def visit(house):
        text = json.dumps({"model": "tiny"} | body)
        reply = await house.client.post(
            f"/v1/{route}", content=text, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert says.lower() in error["message"].lower()
        assert len(error["message"]) <= MOST_CHARACTERS + 1
        assert error["type"] == "invalid_request_error"

        assert (await house.complete(**COMPLETION))["usage"]["completion_tokens"] == 3

    in_house(visit)


@pytest.mark.parametrize(
    ("route", "field", "body"),
    [
        ("completions", "prompt", {"prompt": ["a", "{}"]}),
        ("chat/completions", "messages", {"messages": [{"role": "user", "content": "{}"}]}),
        ("classify", "input", {"input": "{}", "labels": ["a", "b"]}),
        ("classify", "labels", {"input": "a", "labels": ["{}", "b"]}),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(route, field, body, monkeypatch):
    text = "x" * 200_000

    async def visit(house):
        tokenizer, read = house.engine.inputs.tokenizer, []
        encode = tokenizer.encode

        def watched(text, **options):
            read.append(len(text))
            return encode(text, **options)

        monkeypatch.setattr(tokenizer, "encode", watched)
        filled = json.loads(json.dumps(body).replace("{}", text))
        reply = await house.post(f"/v1/{route}", **filled)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["param"] == field and error["code"] == "invalid_input"
        assert re.search(r"text of 200\d+ bytes is more than the context of 512", error["message"])
        assert max(read, default=0) < 1000

        if field == "input":  # what is to be cut has to be read
            reply = await house.post(f"/v1/{route}", **filled, truncate=True)
            assert reply.status_code == 200 and max(read) > len(text)

    in_house(visit)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"model": "tiny"', "\x00", "[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(text):
    async def visit(house):
        reply = await house.client.post(
            "/v1/completions", content=text, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 400
        assert "Traceback" not in reply.text
        error = reply.json()["error"]
        assert error["message"].startswith("the body ") and error["code"] == "invalid_value"
        assert house.value("elasti_admission_rejections_total", reason="invalid") == 1

    in_house(visit)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(stream):
    async def visit(house):
        reply = await house.post("/v1/completions", model="gpt-4", prompt="a", stream=stream)
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
        assert "tiny" in reply.json()["error"]["message"]
        assert (await house.client.get("/v1/models/gpt-4")).status_code == 404
        assert (await house.client.get("/v1/models/tiny@0.123")).status_code == 404
        elsewhere = (await house.client.get("/no/such/route")).json()["error"]["message"]
        assert elsewhere.startswith("GET /no/such/route: not found")
        assert (await house.client.get("/v1/completions")).status_code == 405

    in_house(visit)


def test_unknown_fields_and_nulls_are_accepted():
    async def visit(house):
        answer = await house.complete(
            **COMPLETION, user="me", logit_bias={}, best_of=None, stop=None, capacity=None,
            stream_options={"strange": 1}, guided={"deep": [1, {"x": None}]},
        )  # fmt: skip
        assert answer["elasti"]["capacity_requested"] == 1.0

    in_house(visit)


def test_a_model_without_calibration_or_chat_template_says_so():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    plain = ElasticModel(tiny("gpt2"), tokenizer=tokenizer)

    async def visit(house):
        reply = await house.post("/v1/completions", **COMPLETION, capacity=0.8)
        assert reply.status_code == 400 and "no calibration" in reply.text
        reply = await house.post("/v1/chat/completions", **CHAT)
        assert reply.status_code == 400 and "chat template" in reply.text
        reply = await house.post("/v1/completions", **COMPLETION, capacity={"heads": 0.5})
        assert reply.status_code == 400 and "heads" in reply.text
        assert (await house.complete(**COMPLETION))["elasti"]["capacity_applied"] == 1.0

    in_house(visit, models={"tiny": plain})


def test_a_body_above_the_bound_is_refused_whatever_it_says_of_its_length():
    async def parts():
        for _ in range(50):
            yield b"x" * 100

    async def visit(house):
        json_type = {"content-type": "application/json"}
        for content in (b"x" * 5000, parts()):
            reply = await house.client.post("/v1/completions", content=content, headers=json_type)
            assert reply.status_code == 413
            assert "2000 bytes" in reply.json()["error"]["message"]
        assert house.value("elasti_admission_rejections_total", reason="too_large") == 2
        await house.complete(**COMPLETION)

    in_house(visit, max_body_bytes=2000)


def test_keys_let_in_and_bring_their_default_and_ceiling():
    keys = (
        Key("full", key="secret-a"),
        Key("thrifty", Capacity(0.6, 0.6), 0.8, key="secret-b"),
    )

    async def visit(house):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-a"}):
            reply = await house.post("/v1/completions", **COMPLETION, headers=headers)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "secret" not in reply.text
        for path in ("/health", "/ready", "/version", "/metrics", "/docs", "/"):
            assert (await house.client.get(path)).status_code == 200
        assert (await house.client.get("/v1/models")).status_code == 401

        thrifty = {"authorization": "Bearer secret-b"}
        plain = await house.complete(**COMPLETION, headers=thrifty)
        assert plain["elasti"]["capacity_applied"] == 0.6
        assert plain["elasti"]["limited_by"] is None
        asked = await house.complete(**COMPLETION, capacity=0.9, headers=thrifty)
        assert asked["elasti"]["capacity_requested"] == 0.9
        assert asked["elasti"]["capacity_applied"] == 0.8
        assert asked["elasti"]["limited_by"] == "key"
        assert house.value("elasti_capacity_override_total", reason="key") == 1
        full = await house.complete(**COMPLETION, headers={"authorization": "bearer secret-a"})
        assert full["elasti"]["capacity_applied"] == 1.0

    in_house(visit, keys=keys)


def test_the_pages_load_nothing_from_elsewhere():
    async def visit(house):
        for path in ("/", "/docs"):
            page = (await house.client.get(path)).text
            for place in re.findall(r"""(?:src|href)=["']([^"']+)["']""", page):
                assert not place.startswith(("http:", "https:", "//")), place
                if not place.startswith(("#", "data:")):
                    assert (await house.client.get(place)).status_code == 200, place

    in_house(visit)


def test_a_full_queue_says_so_and_health_still_answers():
    model = Watched()

    async def visit(house):
        long = {"prompt": "a", "max_tokens": 300, "ignore_eos": True}
        scheduler = house.engine._scheduler

        def two_more():
            return [asyncio.create_task(house.post("/v1/completions", **long)) for _ in range(2)]

        with model.held() as hold:
            asked = two_more()
            await soon(lambda: len(house.engine._ledger.requests) == 2)
            hold.let_pass(1)
            await soon(lambda: len(scheduler.running) == 2)
            asked += two_more()
            await soon(lambda: len(scheduler.waiting) == 2)
            refused = [await house.post("/v1/completions", **COMPLETION) for _ in range(3)]
            assert (await house.client.get("/health")).status_code == 200
            assert (await house.client.get("/metrics")).status_code == 200
        assert {(await each).status_code for each in asked} == {200}
        for reply in refused:
            assert reply.status_code == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "queue_full"
        counted = house.value("elasti_admission_rejections_total", reason="queue_full")
        assert counted == len(refused)
        for path, asked, field in (
            ("/v1/completions", COMPLETION, "prompt"),
            ("/v1/chat/completions", CHAT, "messages"),
        ):
            reply = await house.post(path, **asked, n=3)
            assert reply.status_code == 400 and "at most 2" in reply.text
            assert reply.json()["error"]["param"] == field

    in_house(visit, models={"tiny": model}, max_waiting=2, max_running=2)


class Mistaken(Watched):
    """Fails outside of every step, where nobody foresees it."""

    def blocks_for(self, *args, **named):
        raise RuntimeError("a mistake of ours")


def test_an_error_that_nobody_foresaw_is_counted_and_is_no_refusal():
    async def visit(house):
        for asked in ({}, {"stream": True}):
            reply = await house.post("/v1/completions", **COMPLETION, **asked)
            assert reply.status_code == 500
            assert reply.json()["error"]["code"] == "internal_error"
            assert "mistake of ours" not in reply.text
        counted = "elasti_admission_rejections_total"
        assert house.value(counted, reason="internal", model_name="") == 2 == house.value(counted)
        assert house.value("elasti_request_success_total") == 0

    in_house(visit, models={"tiny": Mistaken()})


def test_an_unforeseen_error_in_the_midst_of_a_stream_is_counted(monkeypatch):
    def fail(self, batch):
        raise RuntimeError("a mistake of ours")

    async def visit(house):
        reply = await house.post("/v1/completions", **COMPLETION, stream=True)
        assert reply.status_code == 200 and '"internal_error"' in reply.text
        await house.until_idle()
        assert house.value("elasti_admission_rejections_total", reason="internal") == 1

    monkeypatch.setattr("service.streams._Writer.write", fail)
    in_house(visit)


def test_what_the_model_fails_on_is_counted_once_as_its_ending():
    class Broken(Watched):
        def step(self, chunks):
            raise RuntimeError("this step fails")

    async def visit(house):
        for asked in ({}, {"stream": True}):
            reply = await house.post("/v1/completions", **COMPLETION, **asked)
            assert reply.status_code == 500 and "step_failed" in reply.text
        assert house.value("elasti_request_success_total", finished_reason="error") == 2
        assert house.value("elasti_admission_rejections_total") == 0

    in_house(visit, models={"tiny": Broken()})


def test_a_draining_server_takes_no_new_work_and_finishes_the_old():
    async def visit(house):
        running = asyncio.create_task(
            house.complete("a", max_tokens=100, ignore_eos=True, capacity=0.7)
        )
        while not house.engine._ledger.requests:
            await asyncio.sleep(0)
        house.hall.drain()
        reply = await house.post("/v1/completions", **COMPLETION)
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert (await house.client.get("/ready")).status_code == 503
        assert (await house.client.get("/health")).status_code == 200
        assert (await running)["usage"]["completion_tokens"] == 100

    in_house(visit)


def test_two_models_are_served_side_by_side():
    async def visit(house):
        listed = (await house.client.get("/v1/models")).json()["data"]
        names = [each["id"] for each in listed]
        assert {"tiny", "tiny@0.75", "tiny@0.5", "other"} <= set(names)
        assert "tiny@0.4" not in names  # below what was calibrated
        meta = (await house.client.get("/v1/models/tiny@0.6")).json()["meta"]
        assert meta["task"] == "generate" and "heads" in meta["units"]
        assert meta["capacity"] == {"lowest": 0.5, "highest": 1.0}
        assert meta["calibration"][1] == {"capacity": 0.5, "spent": 0.5, "kl": 0.7}
        answers = await asyncio.gather(
            *(house.complete(**COMPLETION, model=name) for name in ("tiny@0.6", "other") * 3)
        )
        spent = [answer["elasti"]["capacity_applied"] for answer in answers]
        assert spent == [0.6, 1.0] * 3
        assert house.value("elasti_prompt_tokens_total", model_name="other") == 48

    other = ElasticModel(tiny("qwen3"), tokenizer=tiny_tokenizer())
    in_house(visit, models={"tiny": elastic_model(), "other": other})
