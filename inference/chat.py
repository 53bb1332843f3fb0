"""Chat messages as one prompt.

A model folder brings its own Jinja template (``chat_template.jinja``, or ``chat_template`` in
``tokenizer_config.json``). Without one the prompt is one ``role: content`` line a message and a last ``assistant:``,
and the answer ends where the model begins a line with another role::

    system: You are brief.
    user: Hello
    assistant:
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.errors import DataError
from data.files import read_json

DEFAULT_STOPS = ("\nuser:", "\nsystem:")


class ChatTemplate:
    """The template of a model folder, or the plain default.

    Raises DataError for a template that cannot be parsed.
    """

    def __init__(self, folder: str | Path) -> None:
        config_path = Path(folder) / "tokenizer_config.json"
        config: dict[str, Any] = read_json(config_path) if config_path.is_file() else {}
        source = _source(Path(folder), config)
        self._special = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        self._template = None
        if source is None:
            return
        # The sandbox keeps a template that came with downloaded weights from reaching Python.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(
                f"{folder}: chat template", error, "must be a Jinja template", "correct or remove it"
            ) from error

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings that the format itself needs."""
        return DEFAULT_STOPS if self._template is None else ()

    @property
    def has_special_tokens(self) -> bool:
        """Whether the text holds special tokens, so that none are added when it is encoded."""
        return self._template is not None

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt of a chat whose contents are strings.

        Raises DataError when the template refuses the messages.
        """
        if self._template is None:
            lines = [f"{message['role']}: {message['content']}\n" for message in messages]
            return "".join(lines) + "assistant:"
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **self._special)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            rule = f"the model's chat template refuses them: {error}"
            raise DataError("messages", "", rule, "send the roles in the order that the model expects") from error


def _source(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _token(value: Any) -> str:
    """A special token as tokenizer_config.json stores it: a string or an object with its content."""
    return str(value.get("content", "") if isinstance(value, dict) else value or "")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
