"""The one-page report of a rephrasing: what was accepted and rejected and why, samples side by side, tokens, cost."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from data import page
from data.documents import read_batches, read_columns
from data.files import write_atomic
from data.manifest import Manifest
from data.rephrase.mix import REAL, final_reason
from data.rephrase.prepare import folder_of
from data.stages import Unit

SAMPLE_CHARS = 700
ACCEPTED = "accepted"


def write_report(config: RunConfig, stages: dict[str, Manifest], dropped: dict[str, str]) -> Path:
    """Writes ``{data.dir}/rephrase.html`` from finished stages (requests, answers, judged, mix)."""
    counts, spent, samples = _read(config, stages["judged"], dropped)
    prepared, answered, mixed = (stages[name].figures for name in ("requests", "answers", "mix"))
    model = stages["mix"].config["made"]
    accepted = sum(n for (_, reason), n in counts.items() if reason == ACCEPTED)
    facts = [
        ("documents", f"{prepared['documents']:,}"),
        ("chunks", f"{prepared['chunks']:,}"),
        ("requests", f"{prepared['requests']:,}"),
        ("accepted", f"{accepted:,} ({accepted / max(1, prepared['requests']):.1%})"),
        ("real tokens in the mix", f"{mixed['tokens']['real']:,}"),
        ("synthetic tokens in the mix", f"{mixed['tokens']['synthetic']:,} ({mixed['share']:.2%})"),
    ]
    parts = [
        ("Outputs by reason and style", _reasons(counts)),
        ("Chunks that were not rephrased", _simple(prepared["skipped"], ("reason", "chunks or documents"))),
        ("Tokens by style", _styles(counts, spent, mixed)),
        ("Training tokens in the mix by source", _sources(mixed["tokens_by_source"])),
        ("Generation and its cost", page.table(cost(config, answered, spent))),
        ("Samples", _samples(samples)),
    ]
    subtitle = (
        f"{model['model_name']} ({model['model']}), {config.rephrase.endpoint or 'own engine'}; {stages['mix'].created}"
    )
    path = Path(config.data.dir).expanduser().absolute() / "rephrase.html"
    write_atomic(path, page.page("Rephrasing", subtitle, page.tiles(facts) + page.sections(parts)))
    return path


def rows_of(config: RunConfig, judged: Manifest, dropped: dict[str, str]) -> Iterator[tuple[Unit, str, str]]:
    """Every request: its row, the file of its chunk, why it was rejected or ``accepted``."""
    for part in judged.figures["parts"]:
        for batch in read_batches(folder_of(config, "judged") / part["judged"], None):
            for row in batch.to_pylist():
                yield row, part["chunks"], final_reason(row, dropped) or ACCEPTED


def _read(
    config: RunConfig, judged: Manifest, dropped: dict[str, str]
) -> tuple[Counter[tuple[str, str]], Counter[str], list[tuple[str, str, str, str]]]:
    """Requests by (style, reason); tokens of accepted texts by style; samples (reason, style, source, output)."""
    counts, accepted = Counter[tuple[str, str]](), Counter[str]()
    chosen: dict[tuple[str, str], list[tuple[Unit, str]]] = {}
    for row, chunks, reason in rows_of(config, judged, dropped):
        counts[row["style"], reason] += 1
        accepted[row["style"]] += row["tokens"] if reason == ACCEPTED else 0
        held = chosen.setdefault((reason, row["style"] if reason == ACCEPTED else ""), [])
        if len(held) < config.rephrase.samples:
            held.append((row, chunks))
    wanted = {(chunks, row["chunk"]) for held in chosen.values() for row, chunks in held}
    sources = {}
    for file in sorted({chunks for chunks, _ in wanted}):
        table = read_columns(folder_of(config, "requests") / file, ["chunk", "text"])
        for name, text in zip(table["chunk"].to_pylist(), table["text"].to_pylist(), strict=True):
            if (file, name) in wanted:
                sources[file, name] = text
    order = sorted(chosen, key=lambda key: (key[0] != ACCEPTED, key))
    samples = [
        (reason, row["style"], sources[chunks, row["chunk"]], row["text"])
        for reason, style in order
        for row, chunks in chosen[reason, style]
    ]
    return counts, accepted, samples


def _reasons(counts: Counter[tuple[str, str]]) -> str:
    styles = sorted({style for style, _ in counts})
    reasons = Counter[str]()
    for (_, reason), number in counts.items():
        reasons[reason] += number
    order = sorted(reasons, key=lambda reason: (reason != ACCEPTED, -reasons[reason], reason))
    total = max(1, reasons.total())
    rows = [
        (reason, f"{reasons[reason]:,}", f"{reasons[reason] / total:.1%}", *(f"{counts[s, reason]:,}" for s in styles))
        for reason in order
    ]
    return page.table(rows, ("", "all", "share", *styles))


def _styles(counts: Counter[tuple[str, str]], accepted: Counter[str], mixed: dict[str, Any]) -> str:
    rows = []
    for style in sorted({style for style, _ in counts}):
        asked = sum(number for (name, _), number in counts.items() if name == style)
        kept, used = counts[style, ACCEPTED], mixed["tokens_by_style"].get(style, 0)
        rows.append((style, f"{asked:,}", f"{kept:,}", f"{kept / asked:.1%}", f"{accepted[style]:,}", f"{used:,}"))
    return page.table(rows, ("style", "requests", "accepted", "share", "accepted tokens", "training tokens in the mix"))


def _sources(counts: dict[str, dict[str, int]]) -> str:
    """Tokens of each source: real ones, and those of its rephrases by style."""
    kinds = sorted({kind for found in counts.values() for kind in found}, key=lambda kind: (kind != REAL, kind))
    rows = [(name, *(f"{found.get(kind, 0):,}" for kind in kinds)) for name, found in counts.items()]
    return page.table(rows, ("source", *kinds))


def _simple(counts: dict[str, int], head: tuple[str, str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return page.table([(name, f"{number:,}") for name, number in ordered], head) if counts else ""


def cost(config: RunConfig, answered: dict[str, Any], accepted: Counter[str]) -> list[tuple[str, str]]:
    """What all answers took, in whichever run they came, for each accepted token; then what the last of them sent."""
    wanted, made, kept = config.rephrase, answered["generated"], accepted.total()
    seconds = answered["seconds" if wanted.endpoint else "cpu_seconds"]
    unit = "seconds of slots with a request in flight" if wanted.endpoint else "CPU seconds of the engine"
    each = "for 1,000 accepted tokens"
    rows = [
        ("prompt tokens", f"{answered['prompt_tokens']:,}"),
        ("generated tokens", f"{answered['tokens']:,}"),
        ("generated tokens for an accepted one", f"{answered['tokens'] / kept:.1f}" if kept else "-"),
        (unit, f"{seconds:,.1f}"),
        (f"{unit}, {each}", f"{1000 * seconds / kept:,.2f}" if kept else "-"),
    ]
    price = (answered["prompt_tokens"] * wanted.input_price + answered["tokens"] * wanted.output_price) / 1e6
    if price:
        rows += [
            ("price", f"{price:,.4f}"),
            ("price of a million accepted tokens", f"{price / max(1, kept) * 1e6:,.2f}"),
        ]
    return [
        *rows,
        ("last run that asked: attempts sent", f"{made['sent']:,}"),
        ("requests answered", f"{made['answered']:,}"),
        ("requests refused", f"{made['refused']:,}"),
        ("answers that an earlier run left", f"{made['cached']:,}"),
        ("attempts repeated, by reason", _line(made["retried"])),
        ("requests given up, by last failure", _line(made["given_up"])),
    ]


def _line(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "none"


def _samples(samples: list[tuple[str, str, str, str]]) -> str:
    def short(text: str) -> str:
        return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " ..."

    rows = [(f"{reason}, {style}", short(source), short(text)) for reason, style, source, text in samples]
    return page.table(rows, ("", "source", "output"))
