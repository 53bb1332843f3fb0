"""Request and response types of the OpenAI API, as far as this server speaks it.

Unknown fields are ignored, as other servers of this API do. A known field that asks for something this server does
not do is refused when its value asks for it (``UNSUPPORTED``).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inference.sampler import SamplingParams

# field -> values under which it asks for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


class Unsupported(Exception):
    """A request for something that this server does not do; ``field`` is the request's key."""

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"{field} = {str(value)[:80]} is not supported by this server; leave the field out")
        self.field = field


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool | None = False

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
            seed=self.seed,
            stop=stops + extra_stops,
            ignore_eos=bool(self.ignore_eos),
        )

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

    prompt: str | list[str] | list[int] | list[list[int]] = ""


class Message(BaseModel):
    """One turn of a chat; further fields reach the template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def wanted_tokens(self) -> int | None:
        """The newer field wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One prompt's text, whole or a piece."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None


class ChatMessage(BaseModel):
    """The model's turn, or in a stream a piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """The answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: str | None = None


class ChatPiece(BaseModel):
    """A piece of the answer to a chat."""

    index: int
    delta: dict[str, str]
    logprobs: None = None
    finish_reason: str | None = None


class Response(BaseModel):
    """A whole answer or one event of a stream."""

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int  # seconds since 1970
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatPiece]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One entry of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sundog"
    max_model_len: int  # tokens of prompt and output together
