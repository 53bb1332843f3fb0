"""What inference methods keep and save: recall, perplexity and memory of key-value policies; speed of selection, of
blending cached chunks and of drafts.

    python -m benchmarks.methods [--quick] [--json FILE] [--model FOLDER] [--only memory,quality,selection,blend,drafts]

Recall and memory are those of the circuit in ``benchmarks.needle_model``, whose full attention finds everything; sinks
and recency are the control. Quality needs a trained ``--model``: its perplexity on Python's documentation, and its own
needles where full attention finds them. Speeds are CPU time of the process, full attention, full prefill or plain
decoding in turns with the method, one thread; without a folder the model has random weights in the sizes of
SmolLM2-135M.
"""

import argparse
import itertools
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import needle_model
from benchmarks.inference import SMOLLM2, TINY
from benchmarks.table import Row, alternate, compare, median_ratio, report
from conf.evaluate import EvaluateConfig
from conf.serving import EngineConfig
from data import python_docs
from data.documents import Document
from data.tokenize import train_tokenizer
from inference.engine import Engine
from inference.evaluation import evaluate
from inference.evaluation.needles import question
from inference.generation import Generation
from inference.methods import FULL, Methods
from inference.params import SamplingParams
from inference.policies import POLICIES
from models.decoder import Decoder
from models.hf import save_hf

COPIES = "Repeat the list.\n" + "".join(f"{n}. the {n}th item of a list that is long\n" for n in range(1, 9)) + "\n"
PROMPTS = {
    "copy": COPIES + COPIES[: len(COPIES) // 3],
    "story": "Once upon a time there was a small town by the sea, and in it lived",
    "facts": "Question: why is the sky blue? Answer:",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
}


def memory(folder: Path, quick: bool) -> list[Row]:
    """Needles found and pages held at several budgets, each policy beside the control."""
    engine = Engine(folder, EngineConfig(kv_tokens=4096, prefix_cache=False))
    page, samples, length = engine.settings.page_tokens, 4 if quick else 16, 500 if quick else 2000
    rows: list[Row] = []
    for budget in (0.2,) if quick else (0.1, 0.2, 0.5):
        found: dict[str, float] = {}
        for policy in ("sinks_recency", *(name for name in POLICIES if name != "sinks_recency")):
            generator, right, most = random.Random(0), 0, 0.0
            for _ in range(samples):
                prompt, answer = question(generator, length, 20 if quick else 60, 1, True)
                tokens = engine.encode(prompt)
                methods = Methods(kv_policy=policy, kv_budget=budget)
                text = engine.start(
                    tokens, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, methods=methods)
                )
                engine.submit(text)
                while engine.busy:
                    engine.step()
                    most = max(most, engine.pool.used * page / len(tokens))
                right += engine.tokenizer.decode(text.tokens[len(tokens) :]).split()[:1] == answer
            found[policy] = right / samples
            control, case = found["sinks_recency"], f"{policy}, budget {budget:.0%}, {length} words"
            rows.append(
                Row(case, "needles found", found[policy], control, "sinks and recency", found[policy] - control)
            )
            rows.append(compare(case, "share of full cache", most, 1.0, "full attention"))
    return rows


def quality(folder: Path, scratch: Path, quick: bool) -> list[Row]:
    """Perplexity and needles of a trained model under every policy and budget, beside full attention."""
    text = scratch / "text.txt"
    text.write_text(
        "\n\n".join(item.text for item in python_docs.read({"kind": "topics"}) if isinstance(item, Document))
    )
    budgets = (0.2,) if quick else (0.1, 0.2, 0.5)
    policies = [f"{policy}:{budget}" for budget in budgets for policy in POLICIES]
    config = EvaluateConfig(str(folder), tasks=["perplexity", "needle"], lengths=[160], pairs=8, policies=policies)
    config.samples, config.windows = (4, 1) if quick else (25, 4)
    config.text, config.window = str(text), 1024
    config.engine = EngineConfig(kv_tokens=4096, prefix_cache=False)
    found = evaluate(config, print)
    full, rows = found.pop(FULL), []
    for policy, tasks in found.items():
        losses = [math.exp(each["perplexity"]["all"]) for each in (tasks, full)]
        rows.append(compare(policy, "perplexity, 1024 tokens", losses[0], losses[1], "full attention"))
        recalls = [each["needle"]["160"] for each in (tasks, full)]
        difference = recalls[0] - recalls[1]
        rows.append(Row(policy, "needles in 160 words", recalls[0], recalls[1], "full attention", difference))
    return rows


def blend(folder: Path, chunk: int, rounds: int) -> list[Row]:
    """Time to the first token of four cached chunks and a question, 15 % of the chunks computed again."""
    engine = Engine(folder, EngineConfig(kv_tokens=(4 * chunk + 64) * (rounds + 6)))
    generator = torch.Generator().manual_seed(0)
    sizes = (chunk,) * 4 + (32,)
    *chunks, question = (torch.randint(1, engine.spec.vocab_size, (n,), generator=generator).tolist() for n in sizes)
    prompt, salts = [token for part in (*chunks, question) for token in part], itertools.count()

    def tokens_of(prompt: list[int], methods: Methods, salt: bytes = b"", tokens: int = 1) -> list[int]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, methods=methods)
        text = engine.start(prompt, params, salt)
        engine.submit(text)
        while engine.busy:
            engine.step()
        return text.tokens[len(prompt) :]

    def full(tokens: int = 1) -> list[int]:  # a tenant of its own finds nothing in the cache
        return tokens_of(prompt, Methods(), b"%d" % next(salts), tokens)

    for part in chunks:
        tokens_of(part, Methods())
    whole = tokens_of(prompt, Methods(prefill="cache_blend", prefill_budget=1.0), tokens=8)
    assert whole == full(8), "a budget of 100 % gave other tokens"
    blended = Methods(prefill="cache_blend", prefill_budget=0.15)
    times = alternate({"blend": lambda: tokens_of(prompt, blended), "full": full}, rounds)
    seconds = [1000 * statistics.median(times[name].cpu) for name in ("blend", "full")]
    ratio = median_ratio(times["blend"].cpu, times["full"].cpu)
    return [
        Row(f"first token, 4 cached chunks of {chunk}, 15 %", "CPU ms", seconds[0], seconds[1], "full prefill", ratio)
    ]


def selection(folder: Path, length: int, tokens: int) -> list[Row]:
    """Seconds of a decoded token behind a long text: both texts are there, and take turns."""
    engine = Engine(folder, EngineConfig(kv_tokens=2 * (length + 8 * tokens), prefix_cache=False))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, engine.spec.vocab_size, (length,), generator=generator).tolist()
    texts: dict[str, Generation] = {}
    for name, methods in {
        "token_select": Methods(kv_policy="token_select", kv_budget=0.15),
        "full": Methods(kv_policy="full"),
    }.items():
        params = SamplingParams(max_tokens=8 * tokens, temperature=0.0, ignore_eos=True, methods=methods)
        texts[name] = engine.start(prompt, params)
        engine.scheduler.running.clear()
        engine.submit(texts[name])
        while texts[name].prefilling:
            engine.step()

    def steps(name: str) -> None:
        engine.scheduler.running[:] = [texts[name]]
        for _ in range(tokens):
            engine.step()

    times = alternate({name: lambda name=name: steps(name) for name in texts}, 3)
    seconds = [statistics.median(times[name].cpu) / tokens * 1000 for name in texts]
    ratio = median_ratio(times["token_select"].cpu, times["full"].cpu)
    case = f"decode behind {length} tokens, 15 %"
    return [Row(case, "CPU ms/token", seconds[0], seconds[1], "full attention", ratio)]


def drafts(folder: Path, tokens: int, drafters: Sequence[str]) -> list[Row]:
    """Tokens a second with each drafter beside none, after checking that they are the same tokens."""
    engine = Engine(folder, EngineConfig(kv_tokens=4096, prefix_cache=False, draft_tokens=6))
    rows, salts = [], itertools.count()
    for name, text in PROMPTS.items():
        prompt = engine.encode(text)

        def run(drafter: str, prompt: list[int] = prompt) -> list[int]:
            methods = Methods(drafter=drafter)
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, methods=methods)
            generation = engine.start(prompt, params, b"%d" % next(salts))  # a tenant whose outputs nobody remembers
            engine.submit(generation)
            while engine.busy:
                engine.step()
            return generation.tokens[len(prompt) :]

        ways = [*drafters, "none"]
        said = {way: run(way) for way in ways}
        wrong = [way for way in ways if said[way] != said["none"]]
        assert not wrong, f"{name}: {', '.join(wrong)} gave other tokens than plain decoding"
        times = alternate({way: lambda way=way: run(way) for way in ways}, 3)
        for way in drafters:
            rates = [tokens / statistics.median(times[each].cpu) for each in (way, "none")]
            ratio = median_ratio(times[way].cpu, times["none"].cpu)
            rows.append(Row(f"{name}, {way}", "tokens/CPU s", rates[0], rates[1], "plain decoding", ratio))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", default="memory,quality,selection,blend,drafts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, quick, load = time.monotonic(), options.quick, os.getloadavg()[0]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if options.model is None:
            train_tokenizer([*PROMPTS.values()], 300, Path(scratch) / "tokenizer")
            model = Decoder(TINY if quick else SMOLLM2).initialise(0)
            save_hf(model, folder, Path(scratch) / "tokenizer")
        only = options.only.split(",")
        if "memory" in only:
            rows += memory(needle_model.write(Path(scratch) / "needles"), quick)
        if "quality" in only and options.model is not None:
            rows += quality(folder, Path(scratch), quick)
        if "blend" in only:
            rows += blend(folder, 48 if quick else 512, 1 if quick else 5)
        if "selection" in only:
            rows += selection(folder, 400 if quick else 8000, 2 if quick else 8)
        if "drafts" in only:
            rows += drafts(folder, 16 if quick else 64, ("ngram", "trie", "token_recycling"))
    notes = ["needles: ratio is the difference", f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"]
    report(rows, options.json, f"inference methods, {time.monotonic() - start:.0f} s", notes)


if __name__ == "__main__":
    main()
