"""The generator's answers: every request once, whatever is killed on the way, then a table of them by part.

A generator is a unit function that answers the requests of some shards into the store (``Store``); this project's
engine (inference/rephrase.py) and an OpenAI-compatible server (``endpoint_unit``) are such.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf.errors import ResourceError
from conf.schema import RunConfig
from data.documents import read_batches, read_columns, row_writer
from data.manifest import Manifest
from data.rephrase.endpoint import Limits, Request, Tally, answer_all, token_of
from data.rephrase.prepare import folder_of
from data.rephrase.pulse import Pulse
from data.rephrase.store import SHARDS, Answer, Store, shard_of
from data.rephrase.styles import Style, load_styles, style_of
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, unit

ANSWERS = pa.schema(
    [(name, pa.string()) for name in ("request", "chunk", "style", "bucket", "raw", "finish", "error")]
    + [(name, pa.int64()) for name in ("row", "seed", "prompt_tokens", "tokens")]
    + [("seconds", pa.float64()), ("cpu_seconds", pa.float64())]
)
SPENT = ("prompt_tokens", "tokens", "seconds", "cpu_seconds")  # on an answer: seconds in flight, of the engine's CPU
GENERATE = "rephrase: generate"  # the label of the phase that asks
NO_ANSWER = "no_answer"  # of a request that was given up


@dataclass(frozen=True)
class Generator:
    """What answers requests: a unit function, its settings (JSON-like), into how many units its shards are dealt."""

    function: str
    settings: dict[str, Any]
    units: int
    model: str  # identifies it: other answers come from another one
    name: str  # for people


@dataclass(frozen=True)
class Asked:
    """A request that has no answer yet."""

    id: str
    style: Style
    text: str
    seed: int
    max_tokens: int


def endpoint_generator(config: RunConfig) -> Generator:
    """The server of ``rephrase.endpoint``; its model is known by its name."""
    wanted = config.rephrase
    names = ("endpoint", "model", "api_key_env", "slots", "retries", "retry_sec", "timeout_sec", "max_failed")
    settings = {name: getattr(wanted, name) for name in names}
    return Generator("data.rephrase.answers:endpoint_unit", settings, 1, f"endpoint:{wanted.model}", wanted.model)


def answers(
    config: RunConfig,
    prepared: Manifest,
    generator: Generator,
    run_units: RunUnits,
    tokenizer: str = "",
    scorer: str = "",
) -> Manifest:
    """Answers all requests of ``prepared``; ``tokenizer`` and ``scorer`` judge some on the way (``Pulse``).

    Figures: ``parts`` (chunks, answers), ``generated`` (requests ``sent``, ``answered``, ``refused``, ``cached``,
    ``retried`` and ``given_up`` by reason, ``seconds``; of this run alone), and the sums over all answers of what they
    took (``SPENT``). Raises ResourceError where more
    than ``rephrase.max_failed`` of the requests have no answer; those that have one are not sent again.
    """
    wanted, folder = config.rephrase, folder_of(config, "answers")
    styles = load_styles(wanted.styles, wanted.style_files)
    stage = Stage("rephrase_answers", 2, folder, {"model": generator.model}, prepared, keyed=True, store=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = prepared.figures["parts"]
        shared = {
            "requests": str(folder_of(config, "requests")),
            "styles": {name: dataclasses.asdict(style) for name, style in styles.items()},
            "store": str(folder_of(config, "store")),
        }
        shared |= {"tokenizer": tokenizer, "scorer": scorer, "limits": dataclasses.asdict(wanted.filters)}
        sampling = {"temperature": wanted.temperature, "top_p": wanted.top_p}
        count = max(1, min(SHARDS, generator.units))
        dealt = [list(range(index, SHARDS, count)) for index in range(count)]
        work = [{**shared, **sampling, "parts": parts, "shards": s, "generator": generator.settings} for s in dealt]
        generated = run_units(GENERATE, generator.function, stage.units("generate", work))
        work = [{**shared, "requests_file": part["requests"]} for part in parts]
        keys = [[generator.model, prepared.files[part["requests"]]["sha256"]] for part in parts]
        units = stage.units("collect", work, keys)
        results = run_units("rephrase: collect", "data.rephrase.answers:collect_unit", units)
        figures: dict[str, Any] = {
            "parts": [{**part, "answers": result["answers"]} for part, result in zip(parts, results, strict=True)],
            "generated": total(generated),
            **{name: sum(result[name] for result in results) for name in SPENT},
        }
        return figures, collect_files(results)

    return run_stage(stage, body)


def total(results: list[Unit]) -> dict[str, Any]:
    """The sums of what several units of a generator did."""
    sums: dict[str, Any] = {"retried": Counter(), "given_up": Counter()}
    for result in results:
        for name, value in result["tally"].items():
            sums[name] = sums[name] + Counter(value) if isinstance(value, dict) else sums.get(name, 0) + value
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in sums.items()}


def pending(work: Unit, store: Store, tally: Counter[str]) -> Iterator[Asked]:
    """The requests of a generator's shards that the store does not answer; counts ``cached`` and ``asked``."""
    shards, styles = set(work["shards"]), {name: style_of(tree) for name, tree in work["styles"].items()}
    folder = Path(work["requests"])
    for part in work["parts"]:
        rows = [
            row
            for batch in read_batches(folder / part["requests"], None)
            for row in batch.to_pylist()
            if shard_of(row["request"]) in shards
        ]
        known = store.get(row["request"] for row in rows)
        waiting = [row for row in rows if row["request"] not in known]
        tally["cached"] += len(rows) - len(waiting)
        texts = read_columns(folder / part["chunks"], ["text"]).column(0) if waiting else None
        for row in waiting:
            assert texts is not None, "texts are read where a request waits"
            tally["asked"] += 1
            yield Asked(row["request"], styles[row["style"]], texts[row["row"]].as_py(), row["seed"], row["max_tokens"])


@unit
def endpoint_unit(work: Unit) -> Unit:
    """Answers the requests of some shards by a server; the result is its tally."""
    settings = work["generator"]
    names = ("slots", "retries", "retry_sec", "timeout_sec")
    limits = Limits(settings["endpoint"], **{n: settings[n] for n in names}, token=token_of(settings["api_key_env"]))
    counts: Counter[str] = Counter()
    found, pulse, waiting = Tally(), Pulse(work), dict[str, Asked]()
    with Store(work["store"], work["shards"]) as store:

        def bodies() -> Iterator[Request]:
            for asked in pending(work, store, counts):
                waiting[asked.id], found.earlier = asked, counts["cached"]
                yield Request(asked.id, _body(asked, work))
            found.earlier = counts["cached"]

        def put(answers: dict[str, Answer]) -> None:
            store.put(answers)
            for request, answer in answers.items():
                asked = waiting.pop(request)
                pulse.note(asked.text, asked.style, answer, counts["cached"], found.retried.total())

        answer_all(bodies(), limits, put, found)
    tally = {name: getattr(found, name) for name in ("sent", "answered", "refused", "seconds")}
    tally |= {"cached": counts["cached"], "retried": dict(found.retried), "given_up": dict(found.given_up)}
    lost, every = found.given_up.total(), counts["asked"] + counts["cached"]
    if lost > settings["max_failed"] * every:
        value = f"{lost} of {every} without an answer ({', '.join(f'{k} {n}' for k, n in found.given_up.items())})"
        rule = f"at most {settings['max_failed']:.0%} of the requests stay without an answer (rephrase.max_failed)"
        raise ResourceError("rephrase.endpoint", value, rule, "run the same command again: only these are sent again")
    return {"tally": tally, "files": {}}


def _body(asked: Asked, work: Unit) -> dict[str, Any]:
    return {
        "model": work["generator"]["model"],
        "messages": asked.style.messages(asked.text),
        "max_tokens": asked.max_tokens,
        "temperature": work["temperature"],
        "top_p": work["top_p"],
        "seed": asked.seed,
    }


@unit
def collect_unit(work: Unit) -> Unit:
    """The answers to the requests of one part, in their order: a row for each, with an error where there is none."""
    name = f"answers/{Path(work['requests_file']).stem}-{work['key']}.parquet"
    sums: dict[str, float] = dict.fromkeys(SPENT, 0)
    with row_writer(Path(work["folder"]) / name, ANSWERS) as rows, Store(work["store"]) as store:
        for batch in read_batches(Path(work["requests"]) / work["requests_file"], None):
            asked = batch.to_pylist()
            found = store.get(row["request"] for row in asked)
            for row in asked:
                answer = found.get(row["request"], {"error": NO_ANSWER})
                given = {"raw": answer.get("text"), "finish": answer.get("finish"), "error": answer.get("error")}
                counts = {name: answer.get(name, 0) for name in SPENT}
                sums = {name: sums[name] + counts[name] for name in SPENT}
                rows.add({**row, **given, **counts}, len(given["raw"] or ""))
    return {"answers": name, **sums, "files": record_files(work["folder"], [name])}
