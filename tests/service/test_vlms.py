"""Chat with images: what Transformers says at capacity 1.0, and image tokens left out below it."""

from __future__ import annotations

import asyncio

import pytest
import torch
from openai import OpenAI
from transformers import LlavaProcessor

from elastiformer import Phase
from elastiformer.vlm import ElasticVlm
from service.served import load_model
from service.settings import ModelSpec, Settings
from service.zero_shot import QUESTION, QUESTION_OF_IMAGE
from tests.elastiformer.test_vlm import elastic
from tests.elastiformer.test_vlm_numbers import calibrated
from tests.service.conftest import House, build, elastic_model
from tests.service.encoders import content, picture, uri, visit
from tests.service.test_images import WRONG_IMAGES
from tests.tiny import TURN_END
from tests.tiny_vlms import (
    IMAGE,
    IMAGE_TOKEN,
    PATCH,
    PATCHES,
    save_tiny_vlm,
    tiny_image_tokenizer,
    tiny_vlm,
    tiny_vlm_processor,
)

NEW = 12
LABELS = ["cat", "catfish", "a bag"]
HALF = {"image_tokens": 0.4}
_MODEL = elastic()
KEPT = round(0.4 * PATCHES)


def shown(*seeds: int, text: str = "What is it?") -> list[dict]:
    """One message of the user: some images, then a text."""
    images = [
        {"type": "image_url", "image_url": {"url": uri(content(picture(seed))), "detail": "low"}}
        for seed in seeds
    ]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


async def chat(house: House, messages: list[dict], **body) -> dict:
    answer = await house.post(
        "/v1/chat/completions",
        messages=messages,
        temperature=0,
        **({"max_completion_tokens": NEW} | body),
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def told(answer: dict) -> str:
    return str(answer["choices"][0]["message"]["content"])


def processed(images: list, text: str) -> dict:
    """What Transformers' own processor makes of a message with images and a text."""
    tokenizer = tiny_image_tokenizer()
    processor = LlavaProcessor(
        tiny_vlm_processor(),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )
    prompt = f"<|im_start|>user\n{IMAGE * len(images)}{text}<|im_end|>\n<|im_start|>assistant\n"
    return processor(images=images or None, text=prompt, return_tensors="pt")


def generated(images: list, text: str) -> tuple[str, int]:
    """What Transformers answers to images and a text, and how long its prompt is."""
    given = processed(images, text)
    with torch.inference_mode():
        made = tiny_vlm().generate(
            **given, max_new_tokens=NEW, do_sample=False, eos_token_id=TURN_END, pad_token_id=0
        )
    length = given["input_ids"].shape[1]
    return tiny_image_tokenizer().decode(made[0, length:], skip_special_tokens=True), length


def likelihoods(images: list, text: str) -> dict[str, float]:
    """By Transformers: how likely each label is as the whole answer, among the labels."""
    model, tokenizer, given = tiny_vlm(), tiny_image_tokenizer(), processed(images, text)
    scores = []
    for label in LABELS:
        answer = [*tokenizer.encode(label, add_special_tokens=False), TURN_END]
        ids = torch.cat([given["input_ids"], torch.tensor([answer])], 1)
        with torch.inference_mode():
            shown = {"pixel_values": given["pixel_values"]} if images else {}
            logits = model(input_ids=ids, **shown).logits[0, -len(answer) - 1 : -1]
        scores.append(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    return dict(zip(LABELS, torch.stack(scores).softmax(0).tolist(), strict=True))


def test_the_openai_client_gets_what_transformers_generates(street):
    expected, tokens = generated([picture(1), picture(2)], "What is it?")
    client = OpenAI(base_url=f"{street(build(models={'tiny': elastic()}))}/v1", api_key="none")
    asked = {"model": "tiny", "messages": shown(1, 2), "temperature": 0, "max_tokens": NEW}
    answer = client.chat.completions.create(**asked)
    parts = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(parts)

    assert answer.choices[0].message.content == expected
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert answer.usage.prompt_tokens == last.usage.prompt_tokens == tokens
    assert answer.usage.compute["tokens_routed"]["image_tokens"] == 0


def test_below_1_image_tokens_are_left_out_and_counted():
    async def talk(house: House) -> None:
        whole = await chat(house, shown(1))
        half = await chat(house, shown(1), capacity=HALF)
        usage, compute = half["usage"], half["usage"]["compute"]
        assert compute["tokens_routed"]["image_tokens"] == PATCHES
        assert compute["tokens_skipped"]["image_tokens"] == PATCHES - KEPT
        assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        assert half["elasti"]["capacity_applied"] == HALF
        assert half["elasti"]["capacity_spent"] < 0.9
        assert compute["block_flops"] < whole["usage"]["compute"]["block_flops"]
        for name, count in (("", PATCHES), ("_skipped", PATCHES - KEPT)):
            series = f"elasti_router_tokens{name}_total"
            assert house.value(series, unit="image_tokens", phase="prompt") == count
            assert house.value(series, unit="image_tokens", phase="output") == 0
        per_request = "elasti_tokens_skipped_per_request_sum"
        assert house.value(per_request, unit="image_tokens") == PATCHES - KEPT

    visit(elastic(), talk)


def test_mates_of_any_capacity_and_stored_beginnings_do_not_change_an_answer():
    asked = [(1, None), (1, HALF), (2, HALF), (1, {"image_tokens": 0.8}), (2, None)]

    async def alone(house: House) -> None:
        for seed, capacity in asked:
            expected.append(told(await chat(house, shown(seed), capacity=capacity)))

    async def together(house: House) -> None:
        answers = await asyncio.gather(
            *(chat(house, shown(seed), capacity=capacity) for seed, capacity in asked)
        )
        assert [told(answer) for answer in answers] == expected
        # Now every beginning is stored, and each is found by its own image and share alone.
        text = "And now? " * 4
        for seed, capacity in asked:
            first = await chat(house, shown(seed, text=text), capacity=capacity)
            again = await chat(house, shown(seed, text=text), capacity=capacity)
            assert told(first) == told(again)
            assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32

    expected: list[str] = []
    visit(elastic(), alone, prefix_cache=False)
    assert len(set(expected)) > 2
    visit(elastic(), together)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_labels_are_chosen_for_images_and_texts_by_what_transformers_says_of_them(prefix_cache):
    shown = ", ".join(LABELS)
    of_image = [picture(4), picture(5)]
    expected = [likelihoods([image], QUESTION_OF_IMAGE.format(labels=shown)) for image in of_image]
    expected.append(likelihoods([], QUESTION.format(labels=shown, text="a fish")))

    async def talk(house: House) -> None:
        given = [*({"image": uri(content(image))} for image in of_image), "a fish"]
        answer = (await house.post("/v1/classify", input=given, labels=LABELS)).json()
        listed = (await house.post("/predict", inputs=given[0], labels=LABELS)).json()
        for entry, scores in zip(answer["data"], expected, strict=True):
            got = dict(zip(entry["labels"], entry["probs"], strict=True))
            assert got == pytest.approx(scores, abs=1e-4)
            assert entry["label"] == max(scores, key=scores.get)
        assert {each["label"]: each["score"] for each in listed} == pytest.approx(
            expected[0], abs=1e-4
        )
        half = (
            await house.post("/v1/classify", input=given[0], labels=LABELS, capacity=HALF)
        ).json()
        compute = half["usage"]["compute"]
        skipped, routed = compute["tokens_skipped"], compute["tokens_routed"]
        assert skipped["image_tokens"] * PATCHES == routed["image_tokens"] * (PATCHES - KEPT) > 0
        prompt = processed([of_image[0]], QUESTION_OF_IMAGE.format(labels=shown))["input_ids"]
        answers = sum(len(label) + 1 for label in LABELS)  # a token each, and their ends
        assert half["usage"]["prompt_tokens"] == prompt.shape[1] + answers
        assert half["data"][0]["probs"] != answer["data"][0]["probs"]

    visit(elastic(), talk, prefix_cache=prefix_cache)


def test_what_no_label_can_be_chosen_for_is_refused_by_name():
    image = {"image": uri(content(picture(1)))}
    cases = [
        ({"input": image}, "labels: 'tiny' is a causal model"),
        ({"input": [image, {"image": "data:,"}], "labels": LABELS}, "input.1: an image is a data"),
        ({"input": image, "labels": [IMAGE, "b"]}, f"input: they hold 1 images, and '{IMAGE}'"),
        ({"input": f"spell {IMAGE}", "labels": LABELS}, "a text must not spell it"),
        ({"input": {"text": "a", "text_pair": "b"}, "labels": LABELS}, "input: this model reads"),
        ({"input": image, "labels": ["x" * 900]}, "context"),
    ]

    async def talk(house: House) -> None:
        for body, told in cases:
            answer = await house.post("/v1/classify", **body)
            error = answer.json()["error"]
            assert answer.status_code == 400 and told in error["message"], answer.text

    visit(_MODEL, talk)


def test_a_ceiling_that_text_cannot_go_down_to_is_lifted_and_the_answer_says_so():
    """An adapter of image tokens alone has nothing to leave out of text, or of what follows."""
    asked = {"messages": shown(text="Long ago. " * 9), "max_completion_tokens": 3}
    bodies = {
        "/v1/chat/completions": asked,
        "/v1/completions": {"prompt": "Long ago. " * 9, "max_tokens": 3},
        "/v1/classify": {"input": "Long ago.", "labels": ["now", "then"]},
    }

    async def talk(house: House) -> None:
        for path, body in bodies.items():
            answer = await house.post(path, **body)
            assert answer.status_code == 200, answer.text
            told = answer.json()["elasti"]
            assert told["limited_by"] == "model" and told["capacity_applied"] > 0.9
            named = await house.post(path, **body, capacity=0.7)
            assert named.status_code == 400
            assert "below the calibrated range" in named.json()["error"]["message"]
            above = await house.post(path, **body, capacity=1.0)
            assert above.status_code == 200 and above.json()["elasti"]["limited_by"] == "model"
        pictures = await chat(house, shown(*range(5)))
        assert pictures["elasti"]["capacity_applied"] == {"prompt": 0.6, "output": 1.0}
        assert pictures["elasti"]["limited_by"] == "model"
        refused = await house.post(
            "/v1/chat/completions", messages=shown(1, 2), capacity={"prompt": 0.6, "output": 0.55}
        )
        assert refused.status_code == 400
        assert "capacity.output" in refused.json()["error"]["message"]
        for low in (0.49, {"prompt": 0.49, "output": 1.0}):
            refused = await house.post(
                "/v1/chat/completions", messages=shown(*range(5)), capacity=low
            )
            assert refused.status_code == 400, refused.text
            told = refused.json()["error"]["message"]
            assert told == "capacity 0.49 is below the calibrated range 0.50 to 1.0"

    visit(calibrated(dict.fromkeys(Phase, ()), 0.5), talk, capacity_ceiling=0.6)


@pytest.mark.parametrize("wrong", WRONG_IMAGES)
def test_an_image_that_cannot_be_read_is_refused_and_harms_nobody(wrong):
    given, reason = WRONG_IMAGES[wrong]

    async def talk(house: House) -> None:
        expected = told(await chat(house, shown(1)))
        messages = shown(1)
        messages[0]["content"].append({"type": "image_url", "image_url": {"url": given}})
        answer = await house.post("/v1/chat/completions", messages=messages)
        error = answer.json()["error"]
        assert answer.status_code == 400 and reason in error["message"]
        assert error["message"].startswith("messages.0.content.2:")
        assert told(await chat(house, shown(1))) == expected

    visit(_MODEL, talk)


def test_what_is_no_image_is_refused_by_name():
    cases = [
        ([{"type": "input_audio"}], "text, image_url; got 'input_audio'"),
        ([{"type": "text"}], "messages.0.content.0.text: a part of type 'text' holds a string"),
        ([{"type": "image_url"}], '{"url": data URI}; got None'),
        ([{"type": "image_url", "image_url": "data:"}], "image_url"),
        ([{"type": "text", "text": f"spell {IMAGE}"}], "must not spell it"),
    ]

    async def talk(house: House) -> None:
        for parts, reason in cases:
            messages = [{"role": "user", "content": parts}]
            answer = await house.post("/v1/chat/completions", messages=messages)
            assert answer.status_code == 400 and reason in answer.json()["error"]["message"]
        answer = await house.post("/v1/completions", prompt=[1, IMAGE_TOKEN, 2])
        assert answer.status_code == 400
        assert "images come with /v1/chat/completions" in answer.json()["error"]["message"]
        answer = await house.post("/v1/completions", prompt=[1, 2], capacity=HALF)
        assert answer.status_code == 200
        long = await house.post("/v1/chat/completions", messages=shown(*range(25)))
        assert long.status_code == 400 and "context" in long.json()["error"]["message"]

    visit(_MODEL, talk)

    async def without(house: House) -> None:
        answer = await house.post("/v1/chat/completions", messages=shown(1))
        assert "this model reads text only" in answer.json()["error"]["message"]
        answer = await house.post("/v1/completions", prompt=[1, 2], capacity=HALF)
        assert "no routers for image_tokens" in answer.json()["error"]["message"]

    visit(elastic_model(), without)


def test_a_folder_is_served_as_what_its_config_says(tmp_path):
    folder = save_tiny_vlm(tmp_path / "tiny", tiny_vlm())
    model = load_model(ModelSpec("tiny", str(folder)), Settings(dtype="float32"))
    assert isinstance(model, ElasticVlm)
    named = ModelSpec.parse(f"tiny={folder},task=image-text-to-text")
    assert isinstance(load_model(named, Settings(dtype="float32")), ElasticVlm)

    async def talk(house: House) -> None:
        meta = (await house.client.get("/v1/models")).json()["data"][0]["meta"]
        assert meta["task"] == "image-text-to-text"
        expected, _ = generated([picture(3)], "Which?")
        assert told(await chat(house, shown(3, text="Which?"))) == expected
        text = await chat(house, [{"role": "user", "content": "No image at all"}])
        assert text["usage"]["completion_tokens"] > 0

    visit(model, talk)
