"""The desk: a checked request becomes an order for one engine.

Here the model is found, the knob is read, the text is tokenised and every limit is made
concrete, so that what goes further knows nothing of HTTP. All of it may raise; nothing of it
waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from elastiformer.errors import InputError
from elastiformer.imaged import ImagedPrompt, Picture
from elastiformer.inputs import TextInputs
from elastiformer.sampling import GREEDY, Sampling
from elastiformer.tasks import Task
from service.errors import BadRequest
from service.items import Given, PlacedItems, place_items, refuse_labels
from service.knob import Asked, Knob, Resolved
from service.orders import Order
from service.outputs import end_tokens
from service.reach import as_run, of_chat, of_texts, within_reach
from service.scheduler import Job
from service.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    Image,
    Pair,
    Part,
    PredictRequest,
    Readable,
)
from service.served import Catalogue, Served
from service.settings import Key
from service.zero_shot import Question, ask, ask_of_image

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what stands in the headers about capacity."""

    key: Key | None = None
    header: str | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """An order, the model it is for, and how its answer is to look."""

    served: Served
    order: Order
    name: str  # as the caller wrote it
    logprobs: int | None = None
    echoes: tuple[tuple[int, ...], ...] = ()  # per prompt, where it is given back
    operation: str = "text_completion"  # as OpenTelemetry calls it


@dataclass(frozen=True, slots=True)
class PlacedLabels:
    """A classification: one order that scores every label of every text."""

    served: Served
    order: Order
    name: str
    labels: tuple[str, ...]
    operation: str = "classify"


@dataclass(frozen=True, slots=True)
class Desk:
    """The catalogue, the server's side of the knob, and its default length."""

    catalogue: Catalogue
    knob: Knob
    default_max_tokens: int

    def completion(self, asked: CompletionRequest, caller: Caller) -> Placed:
        """Raises UnknownModel, CapacityError, InputError, BadRequest."""
        served, resolved = self._writer(asked, caller)
        inputs = served.engine.inputs
        prompts = _prompts(asked, inputs)
        scored = bool(asked.echo) and asked.logprobs is not None
        if served.vlm is not None:
            served.vlm.pictures.refuse_image_tokens(prompts)
            serve = of_texts(served.engine, prompts, asked.max_tokens, scored)
            resolved = within_reach(resolved, serve)
        if asked.max_tokens == 0 and not asked.echo:
            raise BadRequest("max_tokens: 0 is for echo only", "max_tokens")
        most_new = [
            _most_new(
                inputs,
                ids,
                asked.max_tokens,
                COMPLETION_TOKENS,
                partial(served.engine.most_new, resolved.applied, len(ids), scored=scored),
            )
            for ids in prompts
        ]
        order = self._order(asked, resolved, prompts, most_new, asked.logprobs, scored)
        echoes = tuple(prompts) if asked.echo else ()
        order = served.engine.checked(order)
        return Placed(served, order, asked.model, asked.logprobs, echoes)

    def chat(self, asked: ChatRequest, caller: Caller) -> Placed:
        """Raises UnknownModel, CapacityError, InputError, BadRequest."""
        served, resolved = self._writer(asked, caller)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise BadRequest("top_logprobs: it needs logprobs: true", "top_logprobs")
        inputs = served.engine.inputs
        messages = [
            {**message.model_dump(exclude_none=True), "content": _content(message.content)}
            for message in asked.messages
        ]
        pictures: tuple[Picture, ...] = ()
        if served.vlm is not None:
            ids, pictures = served.vlm.pictures.chat(inputs, messages)
        else:
            ids = inputs.chat(messages)
        bound = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        limit = asked.max_completion_tokens or asked.max_tokens
        imaged: ImagedPrompt | None = None
        if served.vlm is not None:
            serve = of_chat(served.engine, served.vlm, ids, pictures, limit)
            resolved = within_reach(resolved, serve)
            if pictures:
                imaged = served.vlm.prompt(resolved.applied, ids, pictures)
                resolved = as_run(resolved, served.vlm)
        run = (imaged.capacity, len(imaged.ids)) if imaged else (resolved.applied, len(ids))
        fitting = partial(served.engine.most_new, *run)
        most_new = _most_new(
            inputs, ids, limit, self.default_max_tokens, fitting, bound, "messages"
        )
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        order = self._order(asked, resolved, [ids], [most_new], logprobs=logprobs, field="messages")
        if imaged is not None:
            order = _imaged(order, imaged)
        order = served.engine.checked(order)
        return Placed(served, order, asked.model, logprobs, operation="chat")

    def classify(self, asked: ClassifyRequest, caller: Caller) -> PlacedLabels | PlacedItems:
        """Raises UnknownModel, CapacityError, InputError, BadRequest."""
        return self._labels(asked, asked.input, "input", caller)

    def predict(self, asked: PredictRequest, caller: Caller) -> PlacedLabels | PlacedItems:
        """Raises UnknownModel, CapacityError, InputError, BadRequest."""
        return self._labels(asked, asked.inputs, "inputs", caller)

    def _labels(
        self,
        asked: ClassifyRequest | PredictRequest,
        given: Readable | list[Readable],
        field: str,
        caller: Caller,
    ) -> PlacedLabels | PlacedItems:
        served, resolved = self._resolve(
            asked.model, asked.capacity, asked.reasoning_effort, caller
        )
        name, truncate = asked.model or served.name, bool(asked.truncate)
        every = given if isinstance(given, list) else [given]
        if served.encoder is not None:
            refuse_labels(served, asked.labels)
            return place_items(served, resolved, name, every, truncate, field)
        if served.vlm is not None and any(not isinstance(each, Image) for each in every):
            resolved = within_reach(resolved, served.engine.longest)
        return _labelled(served, resolved, name, every, field, asked.labels, truncate)

    def embed(self, asked: EmbeddingRequest, caller: Caller) -> PlacedItems:
        """Raises UnknownModel, CapacityError, InputError, BadRequest."""
        served, resolved = self._resolve(
            asked.model, asked.capacity, asked.reasoning_effort, caller
        )
        if served.encoder is None or served.task != Task.FEATURES:
            raise BadRequest(
                f"model: {served.name!r} gives no features: its task is {served.task}", "model"
            )
        width = served.encoder.layout.width
        if asked.dimensions not in (None, width):
            raise BadRequest(
                f"dimensions: this model gives {width} and no other number; got {asked.dimensions}",
                "dimensions",
            )
        given: list[Given] = []
        if not isinstance(asked.input, list):
            given = [asked.input]
        elif isinstance(asked.input[0], int):
            given = [[each for each in asked.input if isinstance(each, int)]]
        else:
            given = [each for each in asked.input if not isinstance(each, int)]
        return place_items(served, resolved, asked.model, given, bool(asked.truncate))

    def ceiling(self, served: Served) -> float:
        """The most capacity that is granted now, where load may limit it."""
        load = self.knob.load_ceiling(served.engine.load.pressure, served.model.lowest)
        return min(self.knob.ceiling, load)

    def _writer(self, asked: Generation, caller: Caller) -> tuple[Served, Resolved]:
        """As `_resolve`, for a model that writes text."""
        served, resolved = self._resolve(
            asked.model, asked.capacity, asked.reasoning_effort, caller
        )
        if served.encoder is not None:
            raise BadRequest(
                f"model: {served.name!r} writes no text: its task is {served.task}", "model"
            )
        return served, resolved

    def _resolve(
        self, name: str | None, capacity: object, effort: str | None, caller: Caller
    ) -> tuple[Served, Resolved]:
        found = self.catalogue.find(name)
        asked = Asked(capacity, found.alias, caller.header, effort)
        served = found.served
        pressure = served.engine.load.pressure
        return served, self.knob.resolve(asked, caller.key, served.model.lowest, pressure)

    def _order(
        self,
        asked: Generation,
        resolved: Resolved,
        prompts: Sequence[tuple[int, ...]],
        most_new: Sequence[int],
        logprobs: int | None,
        scored: bool = False,
        field: str = "prompt",
    ) -> Order:
        choices = asked.n or 1
        jobs = tuple(
            Job(
                number=place * choices + choice,
                prompt=prompt,
                capacity=resolved.applied,
                most_new=most,
                scored=scored,
                billed_tokens=len(prompt) if choice == 0 else 0,
            )
            for place, (prompt, most) in enumerate(zip(prompts, most_new, strict=True))
            for choice in range(choices)
        )
        least_new = asked.min_tokens or 0
        if least_new > max(most_new):
            raise BadRequest(
                f"min_tokens: at most max_tokens, {max(most_new)}; got {least_new}", "min_tokens"
            )
        return Order(
            jobs=jobs,
            resolved=resolved,
            sampling=_sampling(asked, logprobs),
            stops=tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()),
            ignore_eos=bool(asked.ignore_eos),
            least_new=least_new,
            choices=choices,
            field=field,
        )


def _imaged(order: Order, prompt: ImagedPrompt) -> Order:
    """The same order for what runs of its one prompt."""
    return replace(order, jobs=tuple(_of_imaged(job, prompt) for job in order.jobs))


def _of_imaged(job: Job, prompt: ImagedPrompt) -> Job:
    return replace(job, prompt=prompt.ids, capacity=prompt.capacity, imaged=prompt)


def _prompts(asked: CompletionRequest, inputs: TextInputs) -> list[tuple[int, ...]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [inputs.text(prompt)]
    if isinstance(prompt[0], int):
        return [inputs.ids([each for each in prompt if isinstance(each, int)])]
    return [
        inputs.text(each) if isinstance(each, str) else inputs.ids(each)
        for each in prompt
        if not isinstance(each, int)
    ]


def _content(content: str | list[Part] | None) -> object:
    if isinstance(content, list):
        return [part.model_dump(exclude_none=True) for part in content]
    return content


def _most_new(
    inputs: TextInputs,
    ids: Sequence[int],
    asked: int | None,
    default: int,
    fitting: Callable[[int], int],
    bound: str = "max_tokens",
    field: str = "prompt",
) -> int:
    """The asked length, refused if it does not fit; a default is what is `fitting` of it."""
    if asked is not None:
        inputs.checked_room(len(ids), asked, bound, field)
        return asked
    room = inputs.room(len(ids), field)
    if room == 0:
        raise InputError(
            f"{field}: {len(ids)} tokens fill the context of {inputs.context}; "
            "no room for an answer"
        )
    return fitting(min(default, room))


def _sampling(asked: Generation, logprobs: int | None) -> Sampling:
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        if (value := getattr(asked, name)) is not None
    }
    return Sampling(**given, top_k=max(asked.top_k or 0, 0), logprobs=logprobs)


def _labelled(
    served: Served,
    resolved: Resolved,
    name: str,
    given: Sequence[Readable],
    field: str,
    labels: Sequence[str] | None,
    truncate: bool = False,
) -> PlacedLabels:
    if not labels:
        raise BadRequest(
            f"labels: {served.name!r} is a causal model; name the labels to choose from", "labels"
        )
    longest = served.engine.longest(resolved.applied) if truncate else None
    jobs: list[Job] = []
    for place, each in enumerate(given):
        at = f"{field}.{place}" if len(given) > 1 else field
        question, picture = _question(served, each, labels, longest, at)
        asked = [
            _label_job(place * len(labels) + number, question, number, resolved)
            for number in range(len(labels))
        ]
        if picture is not None:
            assert served.vlm is not None, "a picture for a model that reads none"
            imaged = served.vlm.prompt(resolved.applied, question.prompt, [picture])
            asked = [_of_imaged(job, imaged) for job in asked]
        jobs += asked
    order = served.engine.checked(Order(tuple(jobs), resolved, GREEDY, field=field))
    return PlacedLabels(served, order, name, tuple(labels))


def _question(
    served: Served, given: Readable, labels: Sequence[str], longest: int | None, name: str
) -> tuple[Question, Picture | None]:
    """What is asked about a text or an image, and the image as the model sees it."""
    inputs, ends = served.engine.inputs, end_tokens(served.model)
    if isinstance(given, Pair):
        raise InputError(f"{name}: this model reads no pairs; got {{text, text_pair}}")
    if served.vlm is None:
        if isinstance(given, Image):
            raise InputError(f"{name}: this model reads text only; got an image")
        return ask(inputs, ends, given, labels, longest, name=name), None
    pictures = served.vlm.pictures
    if isinstance(given, str):
        any_length = longest is not None
        ids_of = partial(pictures.question, inputs, images=0, any_length=any_length, name=name)
        return ask(inputs, ends, given, labels, longest, ids_of, name), None
    if not inputs.has_chat_template:
        raise InputError(f"{name}: an image needs a chat template, and this model has none")
    picture = pictures.picture(given.image, name)
    ids_of = partial(pictures.question, inputs, images=1, name=name)
    return ask_of_image(inputs, ends, labels, ids_of, name), picture


def _label_job(place: int, question: Question, number: int, resolved: Resolved) -> Job:
    answer = question.answers[number]
    shared = len(question.prompt) if number == 0 else 0
    return Job(
        number=place,
        prompt=question.prompt,
        capacity=resolved.applied,
        most_new=0,
        given=answer,
        billed_tokens=shared + len(answer),
    )
