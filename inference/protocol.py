"""Request and response types of the OpenAI API, as far as this server speaks it.

Unknown fields are ignored, as other servers of this API do. A known field that asks for something this server does
not do is refused when its value asks for it (``UNSUPPORTED``).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

from conf.errors import ConfigError
from inference.methods import Methods
from inference.params import MAX_LOGPROBS, Grammar, SamplingParams

MAX_N = 16

# field -> values under which it asks for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "prompt_logprobs": (),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
}


def _number(value: Any) -> Any:
    """JSON has numbers of its own: ``true`` is none, nor is ``"1"``; ``1.0`` is an integer there."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]


class Unsupported(Exception):
    """A request for something that this server does not do; ``field`` is the request's key."""

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"{field} = {str(value)[:80]} is not supported by this server; leave the field out")
        self.field = field


class ResponseFormat(BaseModel):
    """The form of the output: OpenAI's three types, and a regular expression."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: dict[str, Any] | None = None
    pattern: str | None = Field(None, max_length=10_000)

    def grammar(self) -> Grammar | None:
        """What the output must match. Raises ConfigError when the type's own field is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar.of_schema({"type": "object"})
        if self.type == "regex" and self.pattern is not None:
            return Grammar("regex", self.pattern)
        if self.type == "json_schema" and self.json_schema is not None and "schema" in self.json_schema:
            return Grammar.of_schema(self.json_schema["schema"])
        missing = "pattern" if self.type == "regex" else "json_schema.schema"
        raise ConfigError("response_format", self.type, f"{missing} is missing", "send it")


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: Integer | None = Field(None, ge=0)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    seed: Integer | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_N)
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=10)
    logit_bias: dict[int, Number] | None = None
    response_format: ResponseFormat | None = None
    stream: StrictBool | None = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: StrictBool | None = False
    timeout: Number | None = Field(None, gt=0, le=3600)  # seconds; what is there by then is the answer
    cache_salt: str | None = Field(None, max_length=256)  # texts of different salts share no cached pages
    kv_policy: str | None = None  # the fields of ``Methods``
    kv_budget: Number | None = None
    prefill: str | None = None
    prefill_budget: Number | None = None
    drafter: str | None = None
    decode_layers: Integer | None = None

    def refuse_unsupported(self) -> None:
        """Raises Unsupported for the first field that asks for something unknown here."""
        for name, value in (self.model_extra or {}).items():
            if name not in UNSUPPORTED or value is None:
                continue
            # 0 == False, but ``logprobs: 0`` asks for log-probabilities
            if not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in UNSUPPORTED[name]
            ):
                raise Unsupported(name, value)

    def sampling(self, max_tokens: int, extra_stops: tuple[str, ...] = ()) -> SamplingParams:
        """The engine's parameters. Raises ConfigError for values that the types let through."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),  # -1 means all tokens in some clients
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=stops + extra_stops,
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self.logit_bias or {},
            logprobs=self.wanted_logprobs,
            prompt_logprobs=self.scores_prompt,
            grammar=None if self.response_format is None else self.response_format.grammar(),
            deadline_sec=self.timeout,
            methods=Methods(**{name: getattr(self, name) for name in Methods.__dataclass_fields__}),
        )

    @property
    def wanted_logprobs(self) -> int | None:
        """How many most probable tokens are to be reported; None: no log-probabilities."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are to be scored too."""
        return False

    @property
    def wanted_tokens(self) -> int | None:
        """What the client asked for; None: the default."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]] = ""
    echo: StrictBool | None = False
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def wanted_logprobs(self) -> int | None:
        """The number itself."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Log-probabilities of an echoed prompt; a request for no token at all is one for the echo."""
        return bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)


class Message(BaseModel):
    """One turn of a chat; further fields reach the template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: StrictBool | None = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def wanted_logprobs(self) -> int | None:
        """``logprobs`` switches them on, ``top_logprobs`` is the number."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """The newer field wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class EmbeddingsRequest(BaseModel):
    """``POST /v1/embeddings``."""

    model: str | None = None
    input: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Integer | None = Field(None, ge=1)


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None  # how many of them were found in the cache


class CompletionChoice(BaseModel):
    """One prompt's text, whole or a piece."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatMessage(BaseModel):
    """The model's turn, or in a stream a piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """The answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatPiece(BaseModel):
    """A piece of the answer to a chat."""

    index: int
    delta: dict[str, str]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Response(BaseModel):
    """A whole answer or one event of a stream."""

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int  # seconds since 1970
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatPiece]
    usage: Usage | None = None
    methods: list[str] | None = None  # lossy ones that were in use


class ModelCard(BaseModel):
    """One entry of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sundog"
    max_model_len: int  # tokens of prompt and output together
