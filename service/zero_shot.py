"""Classification by a causal model that was never trained to classify.

The model is shown the text, or the image, and the labels, and each label is scored as its answer.
A label's score is the log-likelihood of all its tokens and of the token that ends the answer, so
that "good" does not win over "good enough" by being its beginning. The scores are not divided by a
label's length: their softmax is the probability that the model answers with exactly this label,
given that it answers with one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastiformer.errors import InputError
from elastiformer.inputs import TextInputs

QUESTION = (
    "Which of these labels fits the text best?\nLabels: {labels}\nText: {text}\n"
    "Answer with the label only."
)
QUESTION_OF_IMAGE = (
    "Which of these labels fits the image best?\nLabels: {labels}\nAnswer with the label only."
)
PLAIN = "Labels: {labels}\nText: {text}\nLabel:"  # for a model without a chat template


Converse = Callable[[str], tuple[int, ...]]  # a question as a prompt for its answer


@dataclass(frozen=True, slots=True)
class Question:
    """One text or image as a prompt, and each label as the tokens of an answer to it."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


def ask(
    inputs: TextInputs,
    ends: Sequence[int],
    text: str,
    labels: Sequence[str],
    cut_to: int | None = None,
    converse: Converse | None = None,
    name: str = "input",
) -> Question:
    """Put a text and its labels before the model.

    Args:
        cut_to: tokens of question and answer together; a longer text is cut. None: it is not.
        converse: how a question is put, if not by the chat template's plain texts.
        name: the field that the text came in.

    Raises:
        InputError: the question does not fit the context, and may not be cut.
    """
    answers = _answers(inputs, ends, labels)
    longest = max(map(len, answers))
    prompt = _prompt(inputs, text, labels, converse, cut_to is not None, name)
    if cut_to is not None and (excess := len(prompt) + longest - cut_to) > 0:
        words = inputs.text(text, special_tokens=False, any_length=True)
        cut = inputs.decode(words[: max(len(words) - excess, 0)])
        prompt = _prompt(inputs, cut, labels, converse, True, name)
    inputs.checked_room(len(prompt), longest, name, name)
    return Question(prompt, answers)


def ask_of_image(
    inputs: TextInputs,
    ends: Sequence[int],
    labels: Sequence[str],
    converse: Converse,
    name: str = "input",
) -> Question:
    """Put labels before a model that is shown an image by `converse`.

    Raises:
        InputError: the question does not fit the context.
    """
    answers = _answers(inputs, ends, labels)
    prompt = converse(QUESTION_OF_IMAGE.format(labels=", ".join(labels)))
    inputs.checked_room(len(prompt), max(map(len, answers)), name, name)
    return Question(prompt, answers)


def probabilities(scores: Sequence[float]) -> list[float]:
    """Softmax."""
    most = max(scores)
    weights = [math.exp(score - most) for score in scores]
    return [weight / sum(weights) for weight in weights]


def _answers(
    inputs: TextInputs, ends: Sequence[int], labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    if doubled := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"labels: each may stand once; twice: {', '.join(doubled)}")
    space = "" if inputs.has_chat_template else " "
    return tuple(
        (*inputs.text(space + label, special_tokens=False, name="labels"), *ends[:1])
        for label in labels
    )


def _prompt(
    inputs: TextInputs,
    text: str,
    labels: Sequence[str],
    converse: Converse | None,
    any_length: bool,
    name: str,
) -> tuple[int, ...]:
    shown = ", ".join(labels)
    if not inputs.has_chat_template:
        plain = PLAIN.format(labels=shown, text=text)
        return inputs.text(plain, any_length=any_length, name=name)
    question = QUESTION.format(labels=shown, text=text)
    if converse is not None:
        return converse(question)
    return inputs.chat([{"role": "user", "content": question}], any_length, name)
