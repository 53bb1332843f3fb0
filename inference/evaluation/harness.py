"""Tasks of lm-evaluation-harness, as YAML files in a folder that says where on this machine their data is."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from conf.evaluate import EvaluateConfig
from inference.engine import Engine
from inference.generation import Generation, Step
from inference.methods import Methods
from inference.params import SamplingParams


def measure(engine: Engine, config: EvaluateConfig, task: str, methods: Methods) -> dict[str, float]:
    """``{"task/metric": value}`` for every task of the folder ``config.harness``.

    Raises ConfigError without the library, DataError for a folder without tasks.
    """
    try:
        library: Any = import_module("lm_eval")
        tasks: Any = import_module("lm_eval.tasks")
    except ImportError as error:
        rule = "harness needs lm-evaluation-harness"
        raise ConfigError("evaluate.tasks", task, rule, "pip install 'sundog[harness]'") from error
    folder = Path(config.harness)
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if not (folder.is_dir() and manager.all_tasks):
        raise DataError("evaluate.harness", str(folder), "must hold tasks as YAML files", "correct the path")
    found = library.simple_evaluate(
        model=adapter(engine, methods),
        tasks=list(manager.all_tasks),
        task_manager=manager,
        limit=config.samples,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        f"{name}/{metric.removesuffix(',none')}": float(value)
        for name, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }


def adapter(engine: Engine, methods: Methods) -> Any:
    """The engine as the library's ``LM``, all requests of one call in the engine at once."""
    base: Any = import_module("lm_eval.api.model").LM

    class Adapter(base):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [_split(engine, *request.args) for request in requests]
            return [(total, greedy) for total, greedy in _scores(engine, pairs, methods)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            totals = []
            for request in requests:
                tokens, room = engine.tokenizer.encode(request.args[0]), engine.context - 1
                start = [engine.tokenizer.eos_id]
                pairs = [(start, tokens[at : at + room]) for at in range(0, len(tokens), room)]
                totals.append(sum(total for total, _ in _scores(engine, pairs, methods)))
            return totals

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts = []
            for context, wanted in (request.args for request in requests):
                stops, most = wanted.get("until") or [], int(wanted.get("max_gen_toks", 256))
                temperature = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
                stop = (stops,) if isinstance(stops, str) else tuple(stops)
                params = SamplingParams(max_tokens=most, temperature=temperature, stop=stop, seed=0, methods=methods)
                texts.append(engine.start(engine.encode(context)[-(engine.context - most) :], params))
            _complete(engine, texts)
            return ["".join(step.text for step in _steps(text)) for text in texts]

    return Adapter()


def _split(engine: Engine, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, where a word is not cut from the space before it."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    start = engine.encode(context) if context else [engine.tokenizer.eos_id]
    whole = engine.encode(context + continuation) if context else start + engine.tokenizer.encode(continuation)
    return whole[: len(start)], whole[len(start) :]


def _scores(engine: Engine, pairs: Sequence[tuple[list[int], list[int]]], methods: Methods) -> list[tuple[float, bool]]:
    """For each continuation the sum of its log-probabilities, and whether every token is the likeliest."""
    params = SamplingParams(max_tokens=0, temperature=0.0, logprobs=1, prompt_logprobs=True, methods=methods)
    texts = [engine.start((start + rest)[-engine.context :], params) for start, rest in pairs]
    _complete(engine, texts)
    found = []
    for text, (_, rest) in zip(texts, pairs, strict=True):
        list(_steps(text))
        entries = text.prompt_logprobs[-len(rest) :]
        found.append((sum(e.value for e in entries), all(e.top[0][0] == e.token for e in entries)))
    return found


def _complete(engine: Engine, texts: Sequence[Generation]) -> None:
    for text in texts:
        engine.submit(text)
    while engine.busy:
        engine.step()


def _steps(text: Generation) -> Iterator[Step]:
    for news in text.news:
        if isinstance(news, Exception):
            raise news
        yield news
