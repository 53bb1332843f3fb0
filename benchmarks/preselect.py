"""PreSelect's two expensive passes beside what people run: a Hugging Face loop over documents, and fastText itself.

Losses: our packed ladder and a loop that reads one document at a time by ``transformers`` with the same windows, in the
same process, one thread each; both give the same losses (the largest difference is printed). Scorer: the look-up inside
an annotator over Parquet, beside ``predict`` of fastText on the texts in memory; the probabilities are the same.
CPU seconds, so that a busy machine changes little. What our products and attention alone take is printed too: the
peer's time over it is the most that any reading in fp32 can gain. ``python -m benchmarks.preselect [--quick]``.
"""

import importlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch

from benchmarks.table import Row, alternate, arguments, compare, median_ratio, report
from data import python_docs
from data.annotators import Documents
from data.documents import SCHEMA, Document, parquet_writer, read_batches
from data.preselect.linear import load_linear, prepare, save_linear
from data.preselect.scorer import collapse
from data.steps.preselect import SCORE, Scored
from data.tokenize import load_tokenizer, train_tokenizer
from inference.loss_models import load_loss_model
from inference.losses import score_texts
from inference.windows import WindowRule
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf

WINDOW, STRIDE, ROW_TOKENS = 512, 256, 1024
PRODUCTS = ("torch.mm", "fused.products._onednn", "torch.nn.functional.linear", "inference.loss_models.local_attention")
SIZES = {"0.2M": (64, 2), "0.8M": (128, 3), "4M": (256, 4)}  # dim, layers
# characters of a document: of search-result length, of a paragraph or a few, as long as they come
LENGTHS = {"to 400": (100, 400), "to 2000": (400, 2000), "any": (200, 20_000)}


def corpus(count: int) -> list[str]:
    """Texts of the running Python's documentation, in random order."""
    texts: list[str] = []
    for piece in python_docs.slices(500):
        texts += [d.text for d in python_docs.read(piece) if isinstance(d, Document) and len(d.text) >= 100]
    order = np.random.default_rng(0).permutation(len(texts))[:count]
    return [texts[index] for index in order]


def make_model(folder: Path, texts: list[str], dim: int, layers: int) -> Path:
    """A random decoder of the ladder's kind, as `sundog export` writes it."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer(texts, 4096, tokenizer)
    size = load_tokenizer(tokenizer).vocab_size
    spec = ModelSpec(size, dim, layers, dim // 32, dim // 64, 32, -(-8 * dim // 192) * 64, context=WINDOW, init_std=0.1)
    return save_hf(Decoder(spec).initialise(0), folder / f"{dim}", tokenizer)


def peer_loop(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray[Any, Any]:
    """Bits of each text: one document at a time, windows as ours, the loss that transformers computes."""
    found = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(len(ids), WINDOW + 1 if done == 1 else done + STRIDE)
            start = max(0, end - WINDOW - 1)
            seen = torch.tensor([ids[start:end]])
            labels = seen.clone()
            labels[:, : done - start] = -100
            with torch.no_grad():
                total += model(seen, labels=labels).loss.item() * (end - done)
            done = end
        found.append(total / math.log(2))
    return np.array(found)


def in_products(work: Callable[[], Any]) -> float:
    """CPU seconds that ``work`` spends in matrix products and attention."""
    spent = 0.0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal spent
            start = time.process_time()
            result = function(*args, **options)
            spent += time.process_time() - start
            return result

        return run

    with ExitStack() as stack:
        for name in PRODUCTS:
            module, _, attribute = name.rpartition(".")
            stack.enter_context(patch(name, counted(getattr(importlib.import_module(module), attribute))))
        work()
    return spent


def losses(folder: Path, texts: list[str], quick: bool) -> tuple[list[Row], list[str]]:
    """Every size on every length: CPU seconds of both, and the largest difference in bits a character."""
    import transformers

    rows: list[Row] = []
    worst, bounds = 0.0, []
    for size, (dim, layers) in list(SIZES.items())[: 1 if quick else None]:
        path = make_model(folder, texts, dim, layers)
        ours = load_loss_model(path)
        hf: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        for name, (least, most) in LENGTHS.items():
            fitting = [text[:most] for text in texts if len(text) >= least][: 40 if quick else 150]
            got: dict[str, Any] = {}

            def run_ours(fitting: list[str] = fitting, model: Any = ours, got: dict[str, Any] = got) -> None:
                got["ours"] = score_texts(model, fitting, WindowRule(WINDOW, STRIDE), ROW_TOKENS).bits

            def run_peer(
                fitting: list[str] = fitting, hf: Any = hf, t: Any = tokenizer, got: dict[str, Any] = got
            ) -> None:
                got["peer"] = peer_loop(hf, t, fitting)

            times = alternate({"ours": run_ours, "peer": run_peer}, 1 if quick else 3)
            chars = np.array([len(text) for text in fitting])
            worst = max(worst, float(np.abs((got["ours"] - got["peer"]) / chars).max()))
            cpu = [float(np.median(times[side].cpu)) for side in ("ours", "peer")]
            ratio = median_ratio(times["ours"].cpu, times["peer"].cpu)
            case = f"losses, {size} parameters, {name} characters"
            least = min(in_products(run_ours) for _ in range(3))
            bounds.append(f"{case}: products and attention {least:.3g} s, so {cpu[1] / least:.1f}x at most")
            rows.append(Row(case, "CPU s", cpu[0], cpu[1], "transformers, one document at a time", ratio))
    return rows, [f"losses: largest difference {worst:.1e} bits a character", *bounds]


def scorer(folder: Path, texts: list[str], rounds: int) -> tuple[list[Row], list[str]]:
    """Documents per CPU second: the annotator over a Parquet part, and fastText's predict on prepared lists."""
    import fasttext

    lines = folder / "train.txt"
    lines.write_text(
        "".join(f"__label__{i % 2} {prepare(text)}\n" for i, text in enumerate(texts[::4])), encoding="utf-8"
    )
    model = fasttext.train_supervised(
        str(lines), lr=0.1, dim=100, epoch=1, wordNgrams=2, minn=0, maxn=0, thread=1, verbose=0
    )
    save_linear(collapse(model, 2), folder / "linear")
    part = folder / "part.parquet"
    with parquet_writer(part, SCHEMA) as writer:
        rows = [Document(str(i), text).row() for i, text in enumerate(texts)]
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=256)
    annotator, prepared = Scored(str(folder / "linear")), [prepare(text) for text in texts]
    got: dict[str, Any] = {}

    def run_ours() -> None:
        columns = [annotator.columns(Documents(batch)) for batch in read_batches(part, ["text", "id", "url", "source"])]
        got["ours"] = np.concatenate([column[SCORE] for column in columns])

    def run_peer() -> None:
        labels, values = model.predict(prepared, k=2)
        got["peer"] = np.array([v[list(n).index("__label__1")] for n, v in zip(labels, values, strict=True)])

    load_linear(folder / "linear")
    times = alternate({"ours": run_ours, "peer": run_peer}, rounds)
    rates = [len(texts) / float(np.median(times[side].cpu)) for side in ("ours", "peer")]
    # fastText reports the probability plus 1e-5
    worst = float(np.abs(1 / (1 + np.exp(-got["ours"])) + 1e-5 - got["peer"]).max())
    size = sum(map(len, texts)) / len(texts)
    row = compare("scorer", "documents / CPU s", rates[0], rates[1], "fastText list predict", less_is_better=False)
    return [row], [f"scorer: mean {size:.0f} characters, largest difference {worst:.1e} of probability"]


def main() -> None:
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    texts = corpus(400 if options.quick else 3000)
    with tempfile.TemporaryDirectory() as place:
        found = scorer(Path(place), texts, 1 if options.quick else 5)
        read = losses(Path(place), texts, options.quick)
    load = f"load average {os.getloadavg()[0]:.1f}, 1 thread"
    report([*found[0], *read[0]], options.json, "PreSelect", [*found[1], *read[1], load])


if __name__ == "__main__":
    main()
