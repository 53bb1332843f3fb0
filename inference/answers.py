"""Response objects of the OpenAI API, whole or piece by piece."""

import base64
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from inference.generation import Generation, Logprob, Step
from inference.protocol import ChatChoice, ChatMessage, ChatPiece, CompletionChoice, Response, Usage

Decode = Callable[[Sequence[int]], str]


class Answer:
    """Builds the response objects of one request, which share an id and a time."""

    def __init__(self, chat: bool, model: str, decode: Decode, methods: Sequence[str] = ()) -> None:
        prefix, self._whole = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._piece = "chat.completion.chunk" if chat else "text_completion"
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self._model, self._chat, self._decode, self._methods = model, chat, decode, list(methods) or None

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chat stream begins with the role."""
        if not self._chat:
            return None
        return self._object(self._piece, [ChatPiece(index=index, delta={"role": "assistant", "content": ""})])

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        """One event of a stream."""
        found = None if step.logprob is None else self._logprobs([step.logprob], 0)
        if not self._chat:
            choice = CompletionChoice(index=index, text=step.text, logprobs=found, finish_reason=step.finish_reason)
            return self._object(self._piece, [choice])
        delta = {"content": step.text} if step.text else {}
        choice = ChatPiece(index=index, delta=delta, logprobs=found, finish_reason=step.finish_reason)
        return self._object(self._piece, [choice])

    def echo(self, index: int, text: str, generation: Generation) -> dict[str, Any]:
        """The prompt as the first event of a completion that repeats it."""
        choice = CompletionChoice(index=index, text=text, logprobs=self._echoed(generation))
        return self._object(self._piece, [choice])

    def last(self, usage: Usage) -> dict[str, Any]:
        """The event that carries the usage and no choices."""
        return self._object(self._piece, [], usage)

    def whole(
        self, echoes: Sequence[str], steps: Sequence[Sequence[Step]], generations: Sequence[Generation], usage: Usage
    ) -> dict[str, Any]:
        """The answer of a request that is not streamed, from all steps of every text."""
        choices: list[Any] = []
        for index, (echo, own, generation) in enumerate(zip(echoes, steps, generations, strict=True)):
            text, reason = echo + "".join(step.text for step in own), own[-1].finish_reason
            logprobs = [step.logprob for step in own if step.logprob is not None]
            found = self._logprobs(logprobs, len(echo)) if generation.params.logprobs is not None else None
            if found is not None and echo and (before := self._echoed(generation)) is not None:
                found = {name: before[name] + values for name, values in found.items()}
            if self._chat:
                message = ChatMessage(role="assistant", content=text)
                choices.append(ChatChoice(index=index, message=message, logprobs=found, finish_reason=reason))
            else:
                choices.append(CompletionChoice(index=index, text=text, logprobs=found, finish_reason=reason))
        return self._object(self._whole, choices, usage)

    def _echoed(self, generation: Generation) -> dict[str, Any] | None:
        """The prompt's log-probabilities; its first token has none."""
        if generation.params.logprobs is None:
            return None
        first = self._decode(generation.tokens[:1])
        rest = self._logprobs(generation.prompt_logprobs, len(first))
        start = {"tokens": [first], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
        return {name: start[name] + values for name, values in rest.items()}

    def _logprobs(self, found: Sequence[Logprob], offset: int) -> dict[str, Any]:
        """In the form of the endpoint; ``offset`` is where the first token's text begins."""
        if self._chat:
            content = []
            for entry in found:
                top = [self._token(token, value) for token, value in entry.top]
                content.append({**self._token(entry.token, entry.value), "top_logprobs": top})
            return {"content": content, "refusal": None}
        texts = [self._decode([entry.token]) for entry in found]
        offsets = [offset + sum(len(text) for text in texts[:place]) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [entry.value for entry in found],
            "top_logprobs": [{self._decode([token]): value for token, value in entry.top} for entry in found],
            "text_offset": offsets,
        }

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = self._decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    def _object(self, kind: Any, choices: list[Any], usage: Usage | None = None) -> dict[str, Any]:
        response = Response(
            id=self._id, object=kind, created=self._created, model=self._model, choices=choices, usage=usage
        )
        response.methods = self._methods
        return response.model_dump(exclude=None if self._methods else {"methods"})


def embeddings(model: str, vectors: Sequence[Sequence[float]], form: str, tokens: int) -> dict[str, Any]:
    """The answer of the embeddings endpoint; ``base64`` is of little-endian fp32."""

    def written(vector: Sequence[float]) -> Any:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector

    data = [
        {"object": "embedding", "index": index, "embedding": written(vector)} for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def usage_of(generations: Sequence[Generation], prompts: int) -> Usage:
    """Token counts; a prompt that several texts share counts once."""
    each = len(generations) // prompts
    prompt = sum(generation.prompt_tokens for generation in generations[::each])
    cached = sum(generation.cached_tokens for generation in generations[::each])
    completion = sum(generation.completion_tokens for generation in generations)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details={"cached_tokens": cached},
    )
