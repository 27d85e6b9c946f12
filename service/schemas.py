"""The HTTP contract: shapes and bounds, no logic.

Fields that are not named here are accepted and ignored, because real clients send them; a field
that is named here and holds something else is refused, never clamped. `null` is as good as not
there. `capacity` is read by knob.py, which knows its forms. Answers are written by answers.py and
errors.py; their classes here are what OpenAPI says about them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator

from elastiformer.sampling import MOST_LOGPROBS

MOST_STOPS, MOST_CHOICES, MOST_LABELS = 4, 128, 256

_SHARE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_UNITS = {
    "type": "object",
    "properties": {
        unit: _SHARE
        for unit in (
            "attention_tokens",
            "mlp_tokens",
            "heads",
            "experts",
            "channels",
            "image_tokens",
        )
    },
    "additionalProperties": False,
    "minProperties": 1,
}
_BY_PHASE = {
    "type": "object",
    "properties": {phase: {"anyOf": [_SHARE, _UNITS]} for phase in ("prompt", "output")},
    "additionalProperties": False,
    "minProperties": 1,
}
CAPACITY_SCHEMA: dict[str, Any] = {
    "anyOf": [_SHARE, {"const": "auto"}, _UNITS, _BY_PHASE, {"type": "null"}],
    "examples": [0.6, "auto", {"heads": 0.75}, {"prompt": 0.5, "output": 0.9}],
}

Stop = Annotated[StrictStr, Field(min_length=1)]
TokenId = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    capacity: Any = Field(
        None,
        json_schema_extra=CAPACITY_SCHEMA,
        description="share of the dense compute to pay, above 0 and at most 1; 'auto'; keep "
        "shares per unit; or one of these for each of prompt and output",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: object) -> object:
        # JSON can spell half of a surrogate pair, which neither a tokenizer nor an answer can hold.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(f"text should be Unicode; \\u{half:x} is no character") from None
        return value


class Knobbed(_Asked):
    """What every request for a named model may say about it."""

    model: Annotated[str, Field(min_length=1)] = Field(
        description="name of a served model; NAME@0.6 sets a capacity as well"
    )
    reasoning_effort: str | None = Field(
        None, description="a capacity through the server's table: low, medium, high"
    )


class StreamOptions(BaseModel):
    """What a stream tells about itself while it runs."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    include_usage: bool | None = Field(
        None, description="end with a chunk of its own for the usage"
    )
    continuous_usage_stats: bool | None = Field(
        None, description="count the tokens so far in every chunk"
    )


class Generation(Knobbed):
    """What completions and chat have in common."""

    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = Field(
        None, description="up to 4 texts that end the answer and are left out of it"
    )
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="answers per prompt")
    min_tokens: int | None = Field(None, ge=0, description="no end before so many tokens")
    ignore_eos: bool | None = Field(None, description="go on to the limit, whatever is written")
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[StrictStr], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="a text, a list of texts, token ids, or a list of lists of token ids")
    max_tokens: int | None = Field(
        None, ge=0, description="most tokens to generate, 16 if not given; 0 only with echo"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="alternatives reported beside each token"
    )
    echo: bool | None = Field(None, description="give the prompt back before the answer")


class ImageUrl(BaseModel):
    """Where an image is: in the address itself, as a data URI, or on a host that is listed."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    url: str


class Part(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    type: str = Field(description="text, or image_url where the model reads images")
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, description="the older name of the next field")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="most tokens of the answer; the server's limit if not given"
    )
    logprobs: bool | None = Field(None, description="report the probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="alternatives beside it; needs logprobs"
    )


class Image(BaseModel):
    """An image, as a data URI, or by its address on a host that is listed."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    image: str


class Pair(BaseModel):
    """Two texts that are read together, or one."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    text: str
    text_pair: str | None = None


Readable = StrictStr | Pair | Image
Readables = Readable | Annotated[list[Readable], Field(min_length=1)]

Label = Annotated[StrictStr, Field(min_length=1)]
Labels = Annotated[list[Label], Field(min_length=1, max_length=MOST_LABELS)]


class ClassifyRequest(Knobbed):
    """`POST /v1/classify`."""

    input: Readables = Field(
        description="a text, {text, text_pair}, {image: data URI}, or a list of these"
    )
    labels: Labels | None = Field(
        None, description="the labels to choose from; a causal model needs them"
    )
    truncate: bool | None = Field(None, description="cut a text that is longer than the context")


class EmbeddingRequest(Knobbed):
    """`POST /v1/embeddings`."""

    input: (
        Readable
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Readable], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="a text, {image: data URI}, token ids, or a list of these")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="the model's own width, or not given")
    truncate: bool | None = Field(None, description="cut a text that is longer than the context")


class PredictRequest(_Asked):
    """`POST /predict`."""

    inputs: Readables
    model: str | None = Field(None, description="name of a served model; the first if not given")
    reasoning_effort: str | None = None
    labels: Labels | None = Field(
        None, description="the labels to choose from; a causal model needs them"
    )
    raw_scores: bool | None = Field(
        None, description="log-likelihoods, or a head's logits, instead of probabilities"
    )
    truncate: bool | None = Field(None, description="cut a text that is longer than the context")


class Compute(BaseModel):
    """What a request spent, counted where it was spent, beside what the dense model would have."""

    flops: int = Field(description="of every matrix product of the request")
    dense_flops: int
    block_flops: int = Field(description="of the transformer blocks, their routers and LoRA")
    dense_block_flops: int
    parameters_used: int = Field(description="parameters touched, once per token")
    dense_parameters: int
    tokens_routed: dict[str, int] = Field(description="decisions by unit: token x layer")
    tokens_skipped: dict[str, int]
    heads_skipped: int
    experts_skipped: int
    channels_skipped: int
    energy_joules: float | None = Field(
        None, description="share of the GPU's energy; absent where it does not count"
    )


class PromptDetails(BaseModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int = Field(description="taken from stored prefixes instead of computed")


class Usage(BaseModel):
    """OpenAI's counts, and the compute behind them."""

    prompt_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens: int
    total_tokens: int
    compute: Compute


class Elasti(BaseModel):
    """Which capacity was asked for, applied and spent, and how long it took."""

    capacity_requested: Any = Field(json_schema_extra=CAPACITY_SCHEMA)
    capacity_applied: Any = Field(json_schema_extra=CAPACITY_SCHEMA)
    capacity_spent: float = Field(description="block_flops / dense_block_flops")
    limited_by: str | None
    queue_ms: float
    time_to_first_token_ms: float | None
    total_ms: float


class Answered(BaseModel):
    """What every answer holds beside OpenAI's own fields, and a stream's last chunk too."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str = Field(description="as the caller wrote it")
    usage: Usage
    elasti: Elasti


class Prediction(BaseModel):
    """A label and its probability, or its log-likelihood with `raw_scores`."""

    label: str
    score: float


class Entity(BaseModel):
    """A token of a text, and the label that a token classifier gives it."""

    entity: str
    score: float
    index: int
    word: str
    start: int
    end: int


class WrongDetail(BaseModel):
    """Inside of an error."""

    message: str = Field(description="the thing, the value and the bound")
    type: str
    param: str | None = Field(description="the field or header it is about")
    code: str | None


class Wrong(BaseModel):
    """OpenAI's error object."""

    error: WrongDetail
