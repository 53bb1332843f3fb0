import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conf.errors import DataError
from inference.chat import ChatTemplate
from tests.unit.inference.builders import edit_json

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": 'be "brief" \u20ac'},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
]
TEMPLATE = """{%- for message in messages %}
    {%- if loop.first and message['role'] == 'system' %}
        {{- bos_token + message['content'] | tojson + '\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\n' + message['content'] | trim + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def test_the_plain_default(folder: Path):
    template = ChatTemplate(folder)
    assert template.render(MESSAGES[1:]) == "user: hello\nassistant: hi\nuser: bye\nassistant:"
    assert "\nuser:" in template.stops
    assert not template.has_special_tokens


@pytest.mark.parametrize("place", ["file", "config", "named"])
def test_a_template_gives_what_transformers_gives(folder: Path, place: str):
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE if place == "config" else named)
    template = ChatTemplate(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert template.render(MESSAGES) == expected
    assert template.stops == ()
    assert template.has_special_tokens


def test_a_template_may_refuse(folder: Path):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        ChatTemplate(folder).render(MESSAGES)


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_a_template_stays_in_the_sandbox(folder: Path, attack: str):
    (folder / "chat_template.jinja").write_text(attack)
    with pytest.raises(DataError, match="messages"):
        ChatTemplate(folder).render(MESSAGES)


def test_a_template_that_is_none(folder: Path):
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="template"):
        ChatTemplate(folder)
