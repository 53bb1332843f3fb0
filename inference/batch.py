"""Continuation of a file of prompts as a stage: in units that may run anywhere, be killed and go on.

Each line of the input is a JSON object with ``prompt`` (text) or ``messages`` (a chat), and optionally ``id`` and any
sampling field of the HTTP API (``max_tokens``, ``temperature``, ``stop``, ``response_format``, ...). Each line of
``results.jsonl`` answers the line of the same number; a line that cannot be answered has an ``error`` in place of text.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conf.errors import DataError, SundogError
from conf.serving import EngineConfig, GenerateConfig
from data.files import atomic_path, file_digest
from data.manifest import Manifest
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, unit
from inference.chat import ChatTemplate
from inference.engine import Engine
from inference.generation import Generation
from inference.protocol import ChatRequest, CompletionRequest, Unsupported

UNIT_LINES = 64
RESULTS = "results.jsonl"
VERSION = 1


def generate_file(source: Path, folder: Path, settings: GenerateConfig, run_units: RunUnits) -> Manifest:
    """Answer every line of ``source`` into ``folder/results.jsonl``.

    Raises DataError for an input or a model that cannot be read, and as ``run_stage``.
    """
    if not source.is_file():
        raise DataError("--input", str(source), "must be a file of JSON lines", "check the path")
    model = Path(settings.model).absolute()
    files = [model] if model.is_file() else [path for path in sorted(model.glob("*")) if path.is_file()]
    weights = {path.name: file_digest(path) for path in files}
    stage = Stage("generate", VERSION, folder, asdict(settings), inputs=[file_digest(source), weights])

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        shared = {"source": str(source.absolute()), "model": str(model), "settings": asdict(settings)}
        work = [{**shared, **part} for part in _parts(source)]
        results = run_units("generate", "inference.batch:generate_unit", stage.units("generate", work))
        with atomic_path(folder / RESULTS) as path, open(path, "wb") as joined:
            for name in collect_files(results):
                joined.write((folder / name).read_bytes())
        totals = {name: sum(result[name] for result in results) for name in ("lines", "errors", "tokens")}
        return totals, {**collect_files(results), **record_files(folder, [RESULTS])}

    return run_stage(stage, body)


@unit
def generate_unit(work: Unit) -> Unit:
    """Answer some lines; returns {"files", "lines", "errors", "tokens"}."""
    settings = dict(work["settings"])
    engine, chat = _engine(work["model"], json.dumps(settings["engine"], sort_keys=True))
    begun = [_begin(engine, chat, settings, number, line) for number, line in _lines(work)]
    while engine.busy:
        engine.step()
    answers = [_answer(entry, generation) for entry, generation in begun]
    name = f"part-{work['first_line']:09d}.jsonl"
    with atomic_path(Path(work["folder"]) / name) as path, open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    return {
        "files": record_files(work["folder"], [name]),
        "lines": len(answers),
        "errors": sum("error" in answer for answer in answers),
        "tokens": sum(generation.completion_tokens for _, generation in begun if generation is not None),
    }


def _parts(source: Path) -> list[Unit]:
    """Where each unit's lines begin, and how many they are."""
    parts: list[Unit] = []
    offset = number = 0
    with open(source, "rb") as file:
        for number, line in enumerate(file):
            if number % UNIT_LINES == 0:
                parts.append({"offset": offset, "first_line": number, "lines": 0})
            parts[-1]["lines"] += 1
            offset += len(line)
    if not parts:
        raise DataError("--input", str(source), "has no line", "give at least one JSON object")
    return parts


def _lines(work: Unit) -> Iterator[tuple[int, bytes]]:
    with open(work["source"], "rb") as file:
        file.seek(work["offset"])
        for number in range(work["first_line"], work["first_line"] + work["lines"]):
            yield number, file.readline()


@functools.lru_cache(maxsize=1)
def _engine(model: str, settings: str) -> tuple[Engine, ChatTemplate]:
    """One engine a process, for all units that it runs."""
    engine = Engine(model, EngineConfig(**json.loads(settings)))
    return engine, ChatTemplate(engine.folder)


def _begin(
    engine: Engine, chat: ChatTemplate, settings: dict[str, Any], number: int, line: bytes
) -> tuple[dict[str, Any], Generation | None]:
    """(the start of the line's answer, its queued text); an answer with an error has none."""
    entry: dict[str, Any] = {"id": number}
    try:
        content = json.loads(line)
        if not isinstance(content, dict) or ("prompt" in content) == ("messages" in content):
            raise DataError(f"line {number + 1}", "", "an object with prompt or with messages", "correct the line")
        entry["id"] = content.pop("id", number)
        usual = {name: settings[name] for name in ("max_tokens", "temperature", "top_p")}
        # A seed of its own for every line, whichever process it runs in.
        content = {**usual, "seed": settings["seed"] + number, **content}
        if "messages" in content:
            asked = ChatRequest(**content)
            text = chat.render([message.model_dump() for message in asked.messages])
            prompt = engine.encode_template(text) if chat.has_special_tokens else engine.encode(text)
            stops = chat.stops
        else:
            asked = CompletionRequest(**content)
            if not isinstance(asked.prompt, str):
                raise DataError(f"line {number + 1}: prompt", "", "must be a text", "correct the line")
            prompt, stops = engine.encode(asked.prompt), ()
        asked.refuse_unsupported()
        if asked.n not in (None, 1) or getattr(asked, "echo", False):
            raise DataError(f"line {number + 1}", "n or echo", "a line has one answer", "leave the field out")
        generation = engine.start(prompt, asked.sampling(asked.wanted_tokens or 1, stops))
    except (SundogError, Unsupported, ValidationError, ValueError) as error:
        return {**entry, "error": " ".join(str(error).split())[:500]}, None
    engine.submit(generation)
    return entry, generation


def _answer(entry: dict[str, Any], generation: Generation | None) -> dict[str, Any]:
    if generation is None:
        return entry
    text, reason = "", None
    for news in generation.news:
        if isinstance(news, Exception):
            return {**entry, "error": str(news)}
        text, reason = text + news.text, news.finish_reason
    counts = {"prompt_tokens": generation.prompt_tokens, "completion_tokens": generation.completion_tokens}
    return {**entry, "text": text, "finish_reason": reason, **counts}
