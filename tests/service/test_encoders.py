"""Encoders behind the server: what Transformers' pipelines say, at any capacity, in any company."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from openai import OpenAI
from transformers import pipeline

from elastiformer.encoder import ElasticEncoder
from elastiformer.tasks import Task
from service.metrics import Metrics
from service.served import load, load_model
from service.settings import TASKS, ModelSpec, Settings
from tests.service.conftest import (
    PATIENCE_SECONDS,
    House,
    build,
    elastic_model,
    in_house,
    soon,
)
from tests.service.encoders import content, of_images, of_text, picture, routed, uri, visit
from tests.tiny_encoders import (
    LABELS,
    PATCH,
    TEXT_FAMILIES,
    TEXT_TOKENS,
    WIDTH,
    save_tiny_encoder,
    tiny_encoder,
    tiny_whole,
)

TEXTS = ["a good film", "it was not very dull and the days", "bad", "my long bright film is one"]
CLOSE = {"abs": 1e-5, "rel": 1e-4}


# What the pipelines say.


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_classify_and_predict_say_what_the_text_pipeline_says(family, problem):
    changes = {"problem_type": problem}
    if problem == "regression":
        changes["id2label"] = {0: "rating"}
    model = of_text(family=family, **changes)
    said = pipeline("text-classification", model=model.base, tokenizer=model.tokenizer)
    expected = [{e["label"]: e["score"] for e in said(text, top_k=None)} for text in TEXTS]

    async def talk(house: House) -> None:
        answer = (await house.post("/v1/classify", input=TEXTS)).json()
        predicted = (await house.post("/predict", inputs=TEXTS)).json()
        one = (await house.post("/classify", input=TEXTS[0])).json()
        raw = (await house.post("/predict", inputs=TEXTS[0], raw_scores=True)).json()
        with torch.inference_mode():
            logits = model.base(**model.tokenizer(TEXTS[0], return_tensors="pt")).logits[0]
        for entry, scores, listed in zip(answer["data"], expected, predicted, strict=True):
            got = dict(zip(entry["labels"], entry["probs"], strict=True))
            assert got == pytest.approx(scores, **CLOSE)
            assert entry["label"] == max(scores, key=scores.get)
            assert entry["num_classes"] == len(scores)
            assert {each["label"]: each["score"] for each in listed} == pytest.approx(
                scores, **CLOSE
            )
            assert listed[0]["score"] == max(each["score"] for each in listed)
        assert one["data"][0]["probs"] == pytest.approx(answer["data"][0]["probs"], **CLOSE)
        assert sorted(each["score"] for each in raw) == pytest.approx(
            sorted(logits.tolist()), **CLOSE
        )
        tokens = sum(len(model.tokenizer(text).input_ids) for text in TEXTS)
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == tokens
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["elasti"]["capacity_applied"] == 1.0

    visit(model, talk)


def test_pairs_are_read_as_the_pipeline_reads_them():
    model = of_text()
    said = pipeline("text-classification", model=model.base, tokenizer=model.tokenizer)
    pair = {"text": "a good film", "text_pair": "it was dull"}
    (expected,) = said([pair], top_k=None)

    async def talk(house: House) -> None:
        answer = (await house.post("/v1/classify", input=[pair, TEXTS[0]])).json()
        alone = (await house.post("/v1/classify", input=pair)).json()
        for entry in (answer["data"][0], alone["data"][0]):
            got = dict(zip(entry["labels"], entry["probs"], strict=True))
            assert got == pytest.approx({e["label"]: e["score"] for e in expected}, **CLOSE)

    visit(model, talk)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokens_are_labelled_as_the_pipeline_labels_them(family):
    names = {place: "O" if place == 2 else f"B-{place}" for place in range(LABELS)}
    model = of_text("token-classification", family, id2label=names)
    said = pipeline("token-classification", model=model.base, tokenizer=model.tokenizer)
    expected = [said(text) for text in TEXTS]

    async def talk(house: House) -> None:
        predicted = (await house.post("/predict", inputs=TEXTS)).json()
        answer = (await house.post("/v1/classify", input=TEXTS)).json()
        for text, got, wanted, entry in zip(
            TEXTS, predicted, expected, answer["data"], strict=True
        ):
            assert len(entry["tokens"]) == len(text.split())
            assert [text[t["start"] : t["end"]] for t in entry["tokens"]] == text.split()
            assert [{**each, "score": 0} for each in got] == [
                {**each, "score": 0} for each in wanted
            ]
            assert [each["score"] for each in got] == pytest.approx(
                [float(each["score"]) for each in wanted], **CLOSE
            )

    visit(model, talk)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip", "siglip"])
def test_images_are_classified_as_the_pipeline_classifies_them(family):
    model = of_images(family)
    images = [picture(1), picture(2, 20, 20), picture(3, 64, 17)]
    said = pipeline("image-classification", model=model.base, image_processor=model.images)
    expected = [{e["label"]: e["score"] for e in said(image, top_k=LABELS)} for image in images]

    async def talk(house: House) -> None:
        given = [{"image": uri(content(image))} for image in images]
        answer = (await house.post("/v1/classify", input=given)).json()
        predicted = (await house.post("/predict", inputs=given[0])).json()
        for entry, scores in zip(answer["data"], expected, strict=True):
            got = dict(zip(entry["labels"], entry["probs"], strict=True))
            assert got == pytest.approx(scores, **CLOSE)
        assert {e["label"]: e["score"] for e in predicted} == pytest.approx(expected[0], **CLOSE)
        assert answer["usage"]["prompt_tokens"] == 3 * model.context

    visit(model, talk)


@pytest.mark.parametrize("side", [12, 28])
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_a_processor_of_another_size_than_its_model_is_served_with_interpolated_positions(
    family, side
):
    model, image = of_images(family, side=side), picture(2)
    pixels = model.images(images=image, return_tensors="pt").pixel_values
    told = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        expected = model.base(pixels, **told).logits[0].softmax(-1)

    async def talk(house: House) -> None:
        answer = (await house.post("/v1/classify", input={"image": uri(content(image))})).json()
        assert answer["data"][0]["probs"] == pytest.approx(expected.tolist(), **CLOSE)
        assert answer["usage"]["prompt_tokens"] == 1 + (side // PATCH) ** 2

    visit(model, talk)


def test_embeddings_are_the_pooled_features_of_the_pipeline_as_the_folder_says(tmp_path):
    said = None
    for pooling in ("mean", "cls"):
        folder = save_tiny_encoder(tmp_path / pooling, tiny_encoder("bert", "features"), pooling)
        model = load_model(ModelSpec("tiny", str(folder)), Settings(dtype="float32"))
        assert isinstance(model, ElasticEncoder) and model.task == "features"
        said = pipeline("feature-extraction", model=str(folder), dtype=torch.float32)
        rows = [torch.tensor(said(text)[0]) for text in TEXTS]
        pooled = [each.mean(0) if pooling == "mean" else each[0] for each in rows]
        expected = [each / each.norm() for each in pooled]

        async def talk(house: House, model=model, expected=expected) -> None:
            answer = (await house.post("/v1/embeddings", input=TEXTS)).json()
            assert answer["object"] == "list"
            for entry, vector in zip(answer["data"], expected, strict=True):
                assert entry["object"] == "embedding"
                assert entry["embedding"] == pytest.approx(vector.tolist(), **CLOSE)
            ids = model.tokenizer(TEXTS).input_ids
            by_ids = (await house.post("/v1/embeddings", input=ids)).json()
            first = (await house.post("/v1/embeddings", input=ids[0])).json()
            assert by_ids["data"] == answer["data"]
            assert first["data"][0]["embedding"] == pytest.approx(expected[0].tolist(), **CLOSE)

        visit(model, talk)


def test_image_features_are_those_of_the_class_token():
    model = of_images(task="features")
    image = picture(5)
    with torch.inference_mode():
        given = model.images(images=image, return_tensors="pt")
        expected = model.base(**given).last_hidden_state[0, 0]

    async def talk(house: House) -> None:
        answer = (await house.post("/v1/embeddings", input={"image": uri(content(image))})).json()
        assert answer["data"][0]["embedding"] == pytest.approx(expected.tolist(), **CLOSE)

    visit(model, talk)


@pytest.mark.parametrize("family", ["clip", "siglip", "vit-mae"])
def test_a_folder_that_holds_more_serves_the_features_of_its_tower(tmp_path, family):
    """What CLIP and SigLIP compare with texts; of a masked autoencoder the mean of all patches."""
    whole = tiny_whole(family)
    folder = save_tiny_encoder(tmp_path / family, whole)
    model = load_model(ModelSpec("tiny", str(folder)), Settings(dtype="float32"))
    assert isinstance(model, ElasticEncoder) and model.task == "features"
    images = [picture(6), picture(7, 20, 20)]
    pixels = model.images(images=images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        if family == "vit-mae":
            whole.config.mask_ratio = 0.0
            expected = whole.vit(pixels).last_hidden_state.mean(1)
        else:
            expected = whole.get_image_features(pixels).pooler_output

    async def talk(house: House) -> None:
        given = [{"image": uri(content(image))} for image in images]
        answer = (await house.post("/v1/embeddings", input=given)).json()
        for entry, vector in zip(answer["data"], expected, strict=True):
            assert entry["embedding"] == pytest.approx(vector.tolist(), **CLOSE)
        refused = await house.post("/v1/embeddings", input="a good film")
        assert refused.status_code == 400
        assert answer["usage"]["prompt_tokens"] == 2 * model.context

    visit(model, talk)


def test_the_openai_client_gets_its_embeddings(street):
    """It asks for base64 and reads it as float32, without being told."""
    model = of_text("features")
    app = build(models={"tiny": model})
    client = OpenAI(base_url=f"{street(app)}/v1", api_key="none")
    by_default = client.embeddings.create(model="tiny", input=TEXTS)
    as_floats = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for one, other in zip(by_default.data, as_floats.data, strict=True):
        assert len(one.embedding) == WIDTH
        assert one.embedding == pytest.approx(other.embedding, **CLOSE)
    assert by_default.usage.total_tokens == as_floats.usage.prompt_tokens
    assert by_default.elasti["capacity_spent"] == 1.0


# Mixed capacities, usage and metrics.


@pytest.mark.parametrize(("task", "family"), [(None, "bert"), ("features", "bert"), (None, "vit")])
def test_requests_of_any_capacity_run_together_and_are_as_they_are_alone(task, family):
    model = routed(task, family)
    images = model.encoder.reads_images
    given = [{"image": uri(content(picture(n)))} for n in range(6)] if images else TEXTS + TEXTS[:2]
    path = "/v1/embeddings" if task == "features" else "/v1/classify"
    asked = [1.0, 0.5, 0.7, {"heads": 0.5, "mlp_tokens": 0.5}, {"prompt": 0.5, "output": 1.0}, 0.6]
    key = "embedding" if task == "features" else "probs"

    async def talk(house: House) -> None:
        pairs = list(zip(given, asked, strict=True))
        alone = [(await house.post(path, input=g, capacity=c)).json() for g, c in pairs]
        steps: list[int] = []
        step, all_there = model.step, threading.Event()

        def noted(chunks):
            assert all_there.wait(PATIENCE_SECONDS)
            steps.append(len(chunks))
            return step(chunks)

        model.step = noted
        asking = [asyncio.create_task(house.post(path, input=g, capacity=c)) for g, c in pairs * 3]
        await soon(lambda: len(house.engine._ledger.requests) == len(asking))
        all_there.set()
        together = await asyncio.gather(*asking)
        assert max(steps) > 1  # they did share steps
        for answer, one in zip(together, alone * 3, strict=True):
            body = answer.json()
            assert body["data"][0][key] == pytest.approx(one["data"][0][key], **CLOSE)
            assert body["usage"] == one["usage"]
            spent = body["elasti"]["capacity_spent"]
            assert answer.headers["X-Elasti-Capacity-Spent"] == f"{spent:.4f}"
        half, whole = alone[1]["usage"]["compute"], alone[0]["usage"]["compute"]
        assert half["block_flops"] < 0.75 * half["dense_block_flops"]
        assert half["tokens_skipped"]["mlp_tokens"] or half["heads_skipped"]
        assert set(whole["tokens_skipped"].values()) == {0}

    visit(model, talk)


def test_what_encoders_spend_is_in_the_metrics():
    model = routed()

    async def talk(house: House) -> None:
        compute = []
        for capacity in (1.0, 0.6):
            answer = await house.post("/v1/classify", input=TEXTS, capacity=capacity)
            compute.append(answer.json()["usage"]["compute"])
        await house.until_idle()
        assert house.value("elasti_request_success_total", finished_reason="stop") == 8
        assert house.value("elasti_flops_total") == sum(each["flops"] for each in compute)
        skipped = house.value("elasti_router_tokens_skipped_total", unit="mlp_tokens")
        assert skipped == compute[1]["tokens_skipped"]["mlp_tokens"]
        assert house.value("elasti_prompt_tokens_total") > 0
        assert house.value("elasti_generation_tokens_total") == 0

    visit(model, talk)


def test_an_item_longer_than_a_step_runs_alone_and_whole():
    model = of_text()

    async def talk(house: House) -> None:
        texts = [" ".join(["good"] * n) for n in (40, 2, 30, 3)]
        answer = (await house.post("/v1/classify", input=texts)).json()
        one = (await house.post("/v1/classify", input=texts[0])).json()
        assert answer["data"][0]["probs"] == pytest.approx(one["data"][0]["probs"], **CLOSE)
        assert len(answer["data"]) == 4

    visit(model, talk, max_step_tokens=16)


def test_a_model_is_described_with_its_task_and_labels():
    async def talk(house: House) -> None:
        data = (await house.client.get("/v1/models")).json()["data"]
        (own,) = [each for each in data if each["id"] == "tiny"]
        assert own["meta"]["task"] == "text-classification"
        assert own["meta"]["labels"] == [f"label {place}" for place in range(LABELS)]
        assert own["max_model_len"] == TEXT_TOKENS
        assert {"tiny@0.9", "tiny@0.5"} <= {each["id"] for each in data}
        version = (await house.client.get("/version")).json()
        assert version["models"]["tiny"]["attention"] == "sdpa, both ways"

    visit(routed(), talk)


# Refusals.


def test_texts_and_fields_that_do_not_fit_are_refused_with_the_bound():
    long = " ".join(["good"] * 100)
    classifier, features = of_text(), of_text("features")

    async def talk(house: House) -> None:
        async def refused(path: str, told: str, param: str | None = None, **body) -> None:
            answer = await house.post(path, **body)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert told in error["message"], error["message"]
            assert param is None or error["param"] == param

        for path, field, model in (
            ("/v1/classify", "input", "tiny"),
            ("/predict", "inputs", "tiny"),
            ("/v1/embeddings", "input", "vectors"),
        ):
            told = f"{field}: 102 tokens are more than the {TEXT_TOKENS} that this model takes"
            await refused(path, told, model=model, **{field: long})
            cut = await house.post(path, model=model, truncate=True, **{field: long})
            assert cut.status_code == 200, cut.text
            told = f"{field}: 257 sequences in one request; at most 256 may wait"
            await refused(path, told, field, model=model, **{field: ["a"] * 257})
        image = {"image": uri(content(picture()))}
        await refused("/v1/classify", "input: this model reads text only", input=image)
        await refused("/v1/classify", "has labels of its own", "labels", input="a", labels=["x"])
        await refused("/v1/classify", "no calibration, so only 1.0", input="a", capacity=0.5)
        await refused("/v1/classify", "/v1/embeddings", "model", model="vectors", input="a")
        await refused("/v1/embeddings", "gives no features", "model", input="a")
        await refused("/v1/embeddings", "gives no features", "model", model="writer", input="a")
        await refused("/v1/completions", "writes no text", "model", prompt="a")
        chat = [{"role": "user", "content": "a"}]
        await refused("/v1/chat/completions", "writes no text", "model", messages=chat)
        pair = {"text": "a", "text_pair": "b"}
        await refused(
            "/v1/classify", "reads no pairs", model="writer", input=[pair], labels=["x", "y"]
        )
        vectors = {"model": "vectors"}
        await refused(
            "/v1/embeddings", "24 and no other", "dimensions", input="a", dimensions=8, **vectors
        )
        await refused("/v1/embeddings", "outside the vocabulary", input=[1, 99_999], **vectors)
        await refused(
            "/v1/embeddings", "encoding_format", input="a", encoding_format="int8", **vectors
        )
        await refused("/v1/embeddings", "input", "input", input=[], **vectors)
        same = await house.post("/v1/embeddings", input="a", dimensions=WIDTH, **vectors)
        assert same.status_code == 200
        docs = (await house.client.get("/openapi.json")).json()
        assert "/v1/embeddings" in docs["paths"]

    in_house(talk, models={"tiny": classifier, "vectors": features, "writer": elastic_model()})


def test_an_output_that_is_no_number_fails_its_request_alone():
    model = routed()

    async def talk(house: House) -> None:
        real = model.step

        def poisoned(chunks):
            outputs = real(chunks)
            return [
                o * torch.nan if len(c.ids) == 3 else o
                for c, o in zip(chunks, outputs, strict=True)
            ]

        model.step = poisoned
        bad, good = await asyncio.gather(
            house.post("/v1/classify", input=["a good film", "bad"]),
            house.post("/v1/classify", input="a good film"),
        )
        assert bad.status_code == 500 and "not finite" in bad.json()["error"]["message"]
        assert good.status_code == 200
        await house.until_idle()

    visit(model, talk)


# From folders.


def test_a_folder_is_served_for_the_task_that_its_config_names(tmp_path):
    folder = save_tiny_encoder(tmp_path / "labels", tiny_encoder("roberta"))
    pictures = save_tiny_encoder(tmp_path / "pictures", tiny_encoder("vit"))
    told: list[str] = []
    settings = Settings(models=f"a={folder};b={folder},task=features;c={pictures}", dtype="float32")
    catalogue = load(settings, Metrics(), told.append)
    assert [served.task for served in catalogue] == [
        "text-classification",
        "features",
        "image-classification",
    ]
    assert any("attention by sdpa, both ways" in line for line in told)


def test_the_tasks_of_the_settings_are_those_of_the_library():
    assert {task.value for task in Task} < set(TASKS)
    for task in Task:
        assert ModelSpec.parse(f"a=b,task={task}").task == task
    with pytest.raises(ValueError, match="task is one of"):
        ModelSpec.parse("a=b,task=poetry")
