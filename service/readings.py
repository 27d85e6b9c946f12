"""Answers of encoders: labels with their probabilities, tokens with theirs, embeddings.

What becomes of a head's outputs is what Transformers' pipelines make of them: nothing for a
regression, a sigmoid for several labels at once or for one alone, else a softmax.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from elastiformer.encoder import ElasticEncoder
from elastiformer.tasks import Task
from service.answers import Answer, Json, head_json
from service.items import PlacedItems

OUTSIDE = "O"  # the label of tokens that belong to nothing; the pipeline leaves them out


def scores_of(encoder: ElasticEncoder, outputs: Tensor) -> Tensor:
    """Probabilities, or the numbers themselves of a regression."""
    config: Any = encoder.config
    if encoder.task == Task.TOKEN_CLASSIFICATION:
        return outputs.softmax(-1)
    if config.problem_type == "regression" and encoder.task == Task.TEXT_CLASSIFICATION:
        return outputs
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return outputs.sigmoid()
    return outputs.softmax(-1)


def reading_json(placed: PlacedItems, answer: Answer) -> Json:
    """`/v1/classify` by a head: per item the likeliest label and the score of each."""
    labels = list(placed.encoder.labels)
    data: list[Json] = []
    for index, choice in enumerate(answer.choices):
        scores = scores_of(placed.encoder, _outputs(choice.outputs))
        head: Json = {"index": index, "num_classes": len(labels), "labels": labels}
        if placed.encoder.task == Task.TOKEN_CLASSIFICATION:
            data.append(head | {"tokens": _tokens(placed, index, scores, raw=None)})
        else:
            probs = scores.tolist()
            data.append(head | {"label": labels[probs.index(max(probs))], "probs": probs})
    return {**head_json("classify", "list", placed.name), "data": data}


def read_predictions(placed: PlacedItems, answer: Answer, raw: bool) -> list[list[Json]]:
    """`/predict` by a head: per item all labels, the likeliest first, or its labelled tokens."""
    predictions = []
    for index, choice in enumerate(answer.choices):
        outputs = _outputs(choice.outputs)
        scores = scores_of(placed.encoder, outputs)
        if placed.encoder.task == Task.TOKEN_CLASSIFICATION:
            tokens = _tokens(placed, index, scores, raw=outputs if raw else None)
            predictions.append(
                [
                    {
                        "entity": token["label"],
                        "score": token["score"],
                        "index": token["token"],
                        "word": token["word"],
                        "start": token["start"],
                        "end": token["end"],
                    }
                    for token in tokens
                    if token["label"] != OUTSIDE
                ]
            )
            continue
        values = (outputs if raw else scores).tolist()
        pairs = sorted(zip(placed.encoder.labels, values, strict=True), key=lambda pair: -pair[1])
        predictions.append([{"label": label, "score": value} for label, value in pairs])
    return predictions


def embeddings_json(placed: PlacedItems, answer: Answer, encoding: str) -> Json:
    """`/v1/embeddings`, in OpenAI's shape; base64 is of little-endian float32."""
    data = []
    for index, choice in enumerate(answer.choices):
        numbers = _outputs(choice.outputs)
        embedding: object = numbers.tolist()
        if encoding == "base64":
            raw = numbers.to(torch.float32).numpy().astype("<f4").tobytes()
            embedding = base64.b64encode(raw).decode()
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    return {**head_json("embd", "list", placed.name), "data": data}


def _tokens(placed: PlacedItems, index: int, scores: Tensor, raw: Tensor | None) -> list[Json]:
    """The tokens of a text, special ones left out, each with its likeliest label."""
    labels, found = placed.encoder.labels, []
    for place in placed.prepared[index].places:
        best = int(scores[place.token].argmax())
        shown = scores if raw is None else raw
        found.append(
            {
                "token": place.token,
                "word": place.word,
                "start": place.start,
                "end": place.end,
                "label": labels[best],
                "score": float(shown[place.token, best]),
            }
        )
    return found


def _outputs(outputs: Tensor | None) -> Tensor:
    assert outputs is not None, "a job that ended well gave its outputs"
    return outputs
