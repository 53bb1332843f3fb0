"""One model, one set of prompts, eight ways of computing them: every way must give the same tokens (fp32, greedy).

    python -m benchmarks.identity [--quick] [--model FOLDER] [--prompts N] [--tokens N] [--json FILE]

Alone, batched, in chunks, preempted and recomputed, from remembered pages, with draft trees, over 2 ranks, and
through HTTP. A way that does not do what its name says (no text was preempted, no page was remembered, no draft was
right) is an error, and so is a token that differs. Without a folder the model has random weights.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from benchmarks.inference import Prompts, complete, greedy
from benchmarks.ranks import two_ranks
from benchmarks.serving import SMALL, TIMEOUT_SEC, TINY, request, serving
from conf.serving import EngineConfig
from data.tokenize import train_tokenizer
from inference.engine import Engine
from inference.evaluation.needles import FILLER
from inference.generation import Generation
from models.decoder import Decoder
from models.hf import save_hf

WORDS = (*FILLER, "two", "people", "walked", "home", "along", "river", "before", "night")
PLAIN = EngineConfig(prefix_cache=False, kv_tokens=16384)
AT_ONCE = 8


def make_prompts(engine: Engine, count: int) -> Prompts:
    """Texts of 4 to some 300 words; a third of them begin alike."""
    generator = random.Random(0)
    start = " ".join(generator.choice(WORDS) for _ in range(120))
    found = []
    for index in range(count):
        words = " ".join(generator.choice(WORDS) for _ in range(generator.choice((4, 10, 30, 80, 180))))
        found.append(engine.encode(f"{start} {words}" if index % 3 == 0 else f"Question {index}: {words}"))
    return found


class Ways:
    """Each method is one way: the tokens of every prompt's output."""

    def __init__(self, folder: Path, count: int, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        self.engine = Engine(folder, PLAIN, AT_ONCE)
        self.prompts = make_prompts(self.engine, count)
        self.expected: Prompts = []

    def _all(self, **settings: object) -> tuple[Prompts, Engine]:
        engine = Engine(self.folder, EngineConfig(**{**vars(PLAIN), **settings}), AT_ONCE)
        return complete(engine, self.prompts, greedy(self.tokens)), engine

    def alone(self) -> Prompts:
        self.expected = [complete(self.engine, [prompt], greedy(self.tokens))[0] for prompt in self.prompts]
        return self.expected

    def batched(self) -> Prompts:
        return complete(self.engine, self.prompts, greedy(self.tokens))

    def chunked(self) -> Prompts:
        return self._all(step_tokens=48, mixed_tokens=7, mixed_slowdown=0.0)[0]

    def preempted(self) -> Prompts:
        longest = max(map(len, self.prompts)) + self.tokens
        found, engine = self._all(kv_tokens=longest + 64)
        assert engine.stats.preemptions > 0, "nothing was preempted"
        print(f"  {engine.stats.preemptions} preemptions")
        return found

    def remembered(self) -> Prompts:
        first, engine = self._all(prefix_cache=True, kv_tokens=65536)
        before = engine.stats.prefix_hit_tokens
        again = complete(engine, self.prompts, greedy(self.tokens))
        hits, full = engine.stats.prefix_hit_tokens - before, sum((len(p) - 1) // 16 * 16 for p in self.prompts)
        assert hits >= 0.9 * full, f"{hits} tokens came from remembered pages, of {full}"
        assert first == again, "the second time gave other tokens"
        return again

    def draft_trees(self) -> Prompts:
        """Trees whose right branch, where there is one, is never the first; 1 to 3 levels."""
        engine, outputs = self.engine, {tuple(p): out for p, out in zip(self.prompts, self.expected, strict=True)}

        def tree(text: Generation, room: int) -> tuple[list[int], list[int]]:
            done = text.completion_tokens
            tokens, parents, above = [], [], 0
            for token in outputs[tuple(text.tokens[: text.prompt_tokens])][done : done + min(room, 1 + done % 3)]:
                tokens += [(token + 1) % engine.spec.vocab_size, token]
                parents += [above, above]
                above = len(tokens)
            return tokens, parents

        engine.scheduler.draft, before = tree, engine.stats.steps
        found = [complete(engine, [prompt], greedy(self.tokens))[0] for prompt in self.prompts]
        engine.scheduler.draft, steps = None, engine.stats.steps - before
        assert steps < 0.7 * len(found) * self.tokens, f"{steps} passes: drafts were not taken"
        print(f"  {steps} passes for {len(found) * self.tokens} tokens")
        return found

    def two_ranks(self) -> Prompts:
        with two_ranks(self.folder, PLAIN, AT_ONCE) as engine:
            return complete(engine, self.prompts, greedy(self.tokens))

    def http(self) -> list[list[str]]:
        """The tokens' texts: what the API says of them."""

        async def all_of(url: str) -> list[list[str]]:
            room = asyncio.Semaphore(AT_ONCE)
            async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SEC) as client:

                async def ask(prompt: list[int]) -> list[str]:
                    async with room:
                        answer = await client.post("/v1/completions", json=request(prompt, self.tokens, logprobs=0))
                    return answer.raise_for_status().json()["choices"][0]["logprobs"]["tokens"]

                return await asyncio.gather(*map(ask, self.prompts))

        with serving(self.folder) as url:
            return asyncio.run(all_of(url))

    def told(self, tokens: list[int]) -> list[str]:
        return [self.engine.tokenizer.decode([token]) for token in tokens]


def run(folder: Path, count: int, tokens: int) -> list[dict[str, object]]:
    """Every way, compared with the first; raises AssertionError where one differs."""
    ways = Ways(folder, count, tokens)
    found: list[dict[str, object]] = []
    names: list[Callable[[], list]] = [
        ways.alone,
        ways.batched,
        ways.chunked,
        ways.preempted,
        ways.remembered,
        ways.draft_trees,
        ways.two_ranks,
        ways.http,
    ]
    for way in names:
        start, name = time.monotonic(), way.__name__
        outputs = way()
        expected = [ways.told(out) for out in ways.expected] if name == "http" else ways.expected
        wrong = [index for index, pair in enumerate(zip(outputs, expected, strict=True)) if pair[0] != pair[1]]
        said = outputs if name == "http" else [ways.told(out) for out in outputs]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        seconds = time.monotonic() - start
        print(
            f"{name:<12} {len(outputs)} texts, {sum(map(len, outputs))} tokens, {digest}, {seconds:.0f} s", flush=True
        )
        assert not wrong, f"{name}: texts {wrong} differ from those computed alone"
        found.append({"way": name, "texts": len(outputs), "tokens": sum(map(len, outputs)), "sha256": digest})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 6 prompts, 12 tokens")
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if options.model is None:
            train_tokenizer([" ".join(WORDS) * 50], 290, Path(scratch) / "tokenizer")
            save_hf(Decoder(TINY if options.quick else SMALL).initialise(0), folder, Path(scratch) / "tokenizer")
        count, tokens = (6, 12) if options.quick else (options.prompts, options.tokens)
        found = run(folder, count, tokens)
    print(f"{len(found)} ways, all tokens equal; load average {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
