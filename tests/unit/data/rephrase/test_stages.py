"""Rephrasing as stages against a chat server: what is asked, kept, dropped and mixed, and what a kill costs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import DataError, ResourceError
from conf.schema import RunConfig
from data.curate import curate
from data.documents import read_columns
from data.manifest import Manifest
from data.preselect.linear import LinearScorer, save_linear
from data.rephrase.answers import answers, endpoint_generator
from data.rephrase.judge import find_repeats, judge_answers, provenance
from data.rephrase.mix import Row, cut_text, draw_tokens, goals, mix
from data.rephrase.prepare import folder_of, prepare
from data.rephrase.pulse import forget_pulses, read_pulses
from data.rephrase.report import rows_of, write_report
from data.rephrase.store import Store
from data.rephrase.styles import load_styles
from data.shards import open_shards
from data.stages import serial_units
from data.tokenize import load_tokenizer, train_tokenizer
from launch.preflight import load_config
from launch.rephrase import live_line, pack_mix
from tests.helpers.chat_server import Served, chat_server
from tests.helpers.rephrases import ENTRIES, good_answer, rephrase_settings


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config([*rephrase_settings(tmp_path), "rephrase.endpoint=http://127.0.0.1:9/v1"])


def ask(config: RunConfig, served: Served) -> Manifest:
    config.rephrase.endpoint = served.url
    curate(config, serial_units)
    generator = endpoint_generator(config)
    return answers(config, prepare(config, generator.model, "", serial_units), generator, serial_units)


def finish(config: RunConfig, answered: Manifest) -> tuple[Manifest, Manifest, dict[str, str]]:
    judged = judge_answers(config, answered, "", "", serial_units)
    dropped = find_repeats(config, judged, serial_units)
    styles = load_styles(config.rephrase.styles, [])
    made = provenance(endpoint_generator(config), styles, {"temperature": 0.7, "top_p": 0.9})
    return judged, mix(config, judged, dropped, made, serial_units), dropped


def test_the_whole_way_to_packed_windows(config: RunConfig) -> None:
    with chat_server(answer=good_answer) as served:
        answered = ask(config, served)
        judged, mixed, dropped = finish(config, answered)
        prepared = prepare(config, "endpoint:m", "", serial_units)
        packed = pack_mix(config, serial_units)
        stages = {"requests": prepared, "answers": answered, "judged": judged, "mix": mixed}
        page = write_report(config, stages, dropped).read_text()
        assert ask(config, served).reused
    skipped = prepared.figures["skipped"]
    assert (skipped["language"], skipped["too_short"], skipped["code"]) == (1, 1, 1)
    assert curate(config, serial_units).figures["dropped"]["empty"] == 1
    assert set(served.answered.values()) == {1}
    assert sum(served.answered.values()) == prepared.figures["requests"]
    reasons = Counter(reason for _, _, reason in rows_of(config, judged, dropped))
    assert reasons.total() == prepared.figures["requests"]
    assert reasons["accepted"] >= 10
    assert reasons["copied"] >= 1
    tokens = mixed.figures["tokens"]
    assert tokens["real"] == tokens["synthetic"]
    root = Path(config.data.dir)
    tokenizer = load_tokenizer(root / "tokenizer")
    counted, found = Counter[str](), {}
    for part in mixed.figures["parts"]:
        for row in read_columns(root / "mixed" / "curated" / part["file"]).to_pylist():
            kind = "synthetic" if row["source"].startswith("rephrase/") else "real"
            counted[kind] += len(tokenizer.encode(row["text"])) + 1
            found[row["id"]] = row
    assert dict(counted) == tokens
    assert packed.figures["tokens"] == tokens["real"] + tokens["synthetic"]
    by_source = sum(map(Counter, mixed.figures["tokens_by_source"].values()), Counter[str]())
    assert by_source == {"real": tokens["real"], **mixed.figures["tokens_by_style"]}
    assert open_shards(root / "mixed" / "packed-random-64").vocab_size == tokenizer.vocab_size
    made = json.loads(next(row["metadata"] for name, row in found.items() if name.startswith("rephrase/")))
    assert set(made) == {"chunk", "parent", "style", "prompt", "model", "model_name", "sampling", "seed"}
    assert made["chunk"].startswith(made["parent"] + "#")
    assert "accepted" in page
    assert "copied" in page


def test_a_killed_run_goes_on_and_repeats_no_request(config: RunConfig) -> None:
    class Killed(Exception):
        pass

    with chat_server(answer=good_answer) as served, pytest.MonkeyPatch.context() as patch:
        put, done = Store.put, []

        def stop_after_ten(store: Store, answers: dict[str, Any]) -> None:
            put(store, answers)
            done.extend(answers)
            if len(done) >= 10:
                raise Killed

        patch.setattr(Store, "put", stop_after_ten)
        with pytest.raises(Killed):
            ask(config, served)
        patch.undo()
        answered = ask(config, served)
    assert answered.figures["generated"]["cached"] == len(done) >= 10
    assert all(served.attempts[request] == 1 for request in done)
    assert answered.figures["generated"]["answered"] + len(done) == len(served.answered)


def test_a_changed_style_asks_its_own_requests_alone(config: RunConfig, tmp_path: Path) -> None:
    with chat_server(answer=good_answer) as served:
        ask(config, served)
        before = sum(served.attempts.values())
        path = Path(load_styles.__globals__["FOLDER"]) / "qa.yaml"
        (tmp_path / "qa.yaml").write_text(path.read_text().replace("version: 1", "version: 2"))
        config.rephrase.style_files = [str(tmp_path / "qa.yaml")]
        figures = ask(config, served).figures["generated"]
    assert figures["sent"] == sum(served.attempts.values()) - before > 0
    assert figures["cached"] > 0
    assert set(served.attempts.values()) == {1}


def test_a_style_that_judges_otherwise_asks_nothing(config: RunConfig, tmp_path: Path) -> None:
    with chat_server(answer=good_answer) as served:
        before = judge_answers(config, ask(config, served), "", "", serial_units).figures["reasons"]
        path = Path(load_styles.__globals__["FOLDER"]) / "easy.yaml"
        text = path.read_text().replace("length_ratio: [0.4, 2.0]", "length_ratio: [1.9, 2.0]")
        (tmp_path / "easy.yaml").write_text(text)
        config.rephrase.style_files = [str(tmp_path / "easy.yaml")]
        answered = ask(config, served)
        after = judge_answers(config, answered, "", "", serial_units).figures["reasons"]
    assert answered.reused
    assert set(served.attempts.values()) == {1}
    assert after["short"] > before.get("short", 0)


def test_outputs_judged_by_other_limits_are_no_repeats(config: RunConfig) -> None:
    with chat_server(answer=good_answer) as served:
        _, _, once = finish(config, ask(config, served))
        config.rephrase.filters.min_quality = 0.01
        _, _, again = finish(config, ask(config, served))
    assert again == once


def test_no_more_is_generated_than_a_style_may_keep(config: RunConfig, tmp_path: Path) -> None:
    train_tokenizer([entry["source"] for entry in ENTRIES], 400, tmp_path / "tokenizer")
    curate(config, serial_units)
    prepared = prepare(config, "m", str(tmp_path / "tokenizer"), serial_units)
    styles, folder, found = load_styles(config.rephrase.styles, []), folder_of(config, "requests"), []
    for part in prepared.figures["parts"]:
        tokens = read_columns(folder / part["chunks"], ["tokens"])["tokens"].to_pylist()
        for row in read_columns(folder / part["requests"]).to_pylist():
            style = styles[row["style"]]
            most = tokens[row["row"]] * style.length_ratio[1]
            found.append((row["max_tokens"], style.max_tokens))
            assert row["max_tokens"] == style.max_tokens or most <= row["max_tokens"] <= most + 40
    assert any(given < at_most for given, at_most in found)
    assert all(given <= at_most for given, at_most in found)


def test_requests_without_an_answer_are_counted_or_end_the_run(config: RunConfig) -> None:
    def fails(attempt: int, body: dict[str, Any]) -> str | int:
        return 500 if "Tarn Hill" in body["messages"][1]["content"] else "answer"

    with chat_server(fails, good_answer) as served:
        config.rephrase.max_failed = 0.0
        with pytest.raises(ResourceError, match="run the same command again"):
            ask(config, served)
        lost = sum(count for request, count in served.attempts.items() if not served.answered[request])
        config.rephrase.max_failed = 0.5
        answered = ask(config, served)
        judged = judge_answers(config, answered, "", "", serial_units)
    assert judged.figures["reasons"]["no_answer"] == lost // 2  # two attempts each
    assert max(served.answered.values()) == 1


def test_contaminated_and_repeated_outputs_go(config: RunConfig, tmp_path: Path) -> None:
    pair = next(entry for entry in ENTRIES if "medium" in entry)
    (tmp_path / "sets.txt").write_text(pair["medium"])
    config.curation.decontaminate.enabled, config.curation.decontaminate.sets = True, str(tmp_path / "sets.txt")
    config.rephrase.styles, config.rephrase.per_chunk = ["medium"], 1
    config.rephrase.low = config.rephrase.high = 0.0
    with chat_server(answer=good_answer) as served:
        judged, _, dropped = finish(config, ask(config, served))
    reasons = Counter(reason for _, _, reason in rows_of(config, judged, dropped))
    assert reasons["contaminated"] >= 1, reasons


def test_a_scorer_of_preselect_routes_the_styles(config: RunConfig, tmp_path: Path) -> None:
    words = [b"</s>", b"Regular", b"bees", b"Volcanic"]
    save_linear(LinearScorer(words, np.array([0.0, 9.0, 4.0, -9.0, *[0.0] * 50]), 2), tmp_path / "scorer" / "linear")
    config.rephrase.scorer = str(tmp_path / "scorer")
    config.rephrase.low, config.rephrase.high, config.rephrase.per_chunk = 0.1, 0.1, 1
    curate(config, serial_units)
    prepared = prepare(config, "m", "", serial_units)
    folder, suited = folder_of(config, "requests"), load_styles(config.rephrase.styles, [])
    found = {}
    for part in prepared.figures["parts"]:
        texts = dict(zip(*read_columns(folder / part["chunks"], ["chunk", "text"]).to_pydict().values(), strict=True))
        for row in read_columns(folder / part["requests"]).to_pylist():
            found[texts[row["chunk"]]] = row["bucket"]
            assert row["bucket"] in suited[row["style"]].quality
    assert next(bucket for text, bucket in found.items() if text.startswith("Regular")) == "high"
    assert next(bucket for text, bucket in found.items() if text.startswith("Volcanic")) == "low"
    assert set(found.values()) == {"low", "medium", "high"}


def test_all_languages_are_rephrased_where_none_is_named(config: RunConfig) -> None:
    config.rephrase.languages = []
    curate(config, serial_units)
    assert "language" not in prepare(config, "m", "", serial_units).figures["skipped"]


def test_what_a_generator_says_while_it_works(config: RunConfig) -> None:
    with chat_server(answer=good_answer) as served:
        answered = ask(config, served)
    found = read_pulses(folder_of(config, "store"))
    assert 1 <= found["done"] <= answered.figures["generated"]["sent"]
    assert 1 <= found["judged"] <= found["done"]
    assert found["tokens"] > 0
    line = live_line({"done": 20, "tokens": 4000, "judged": 8, "accepted": 2, "retried": 3}, 10.0)
    assert line == "2.0 answers/s, 400 tokens/s, 25% of 8 judged are accepted, 3 attempts repeated"
    forget_pulses(folder_of(config, "store"))
    assert not read_pulses(folder_of(config, "store"))


def test_nothing_to_rephrase_is_said(config: RunConfig) -> None:
    config.rephrase.languages = ["fi"]
    curate(config, serial_units)
    with pytest.raises(DataError, match=r"nothing to rephrase: .*language"):
        prepare(config, "m", "", serial_units)


def test_no_accepted_output_is_said(config: RunConfig) -> None:
    with (
        chat_server(answer=lambda body: "I'm sorry, but I cannot help.") as served,
        pytest.raises(DataError, match="refusal"),
    ):
        finish(config, ask(config, served))


@pytest.mark.parametrize(("share", "real"), [(0.3, "matched"), (0.0, "matched"), (0.5, "all")])
def test_the_share_is_exact(config: RunConfig, share: float, real: str) -> None:
    config.rephrase.share, config.rephrase.real = share, real
    with chat_server(answer=good_answer) as served:
        _, mixed, _ = finish(config, ask(config, served))
    tokens, available = mixed.figures["tokens"], mixed.figures["available"]
    if real == "all":
        assert tokens == available | {"synthetic": min(available.values())}
    else:
        wanted = goals(available["real"], available["synthetic"], share, False)
        assert (tokens["real"], tokens["synthetic"]) == wanted
        assert abs(tokens["synthetic"] - share * sum(tokens.values())) <= 1


def test_styles_are_weighted_exactly(config: RunConfig) -> None:
    config.rephrase.style_weights = {"medium": 1.0, "qa": 3.0}
    config.rephrase.share = 0.05
    with chat_server(answer=good_answer) as served:
        _, mixed, _ = finish(config, ask(config, served))
    by_style, wanted = mixed.figures["tokens_by_style"], mixed.figures["tokens"]["synthetic"]
    assert sum(by_style.values()) == wanted
    assert abs(by_style["qa"] - 0.75 * wanted) <= 1


def test_draws_meet_a_sum_exactly() -> None:
    rows = [Row(0, i, n, str(i)) for i, n in enumerate([5, 9, 3, 4])]
    assert [row.row for row in draw_tokens(rows, 8, lambda row, n: True).whole] == [0, 2]
    found = draw_tokens(rows, 10, lambda row, n: True)
    assert (found.tokens, [row.row for row in found.whole], found.cut) == (10, [0, 2], (rows[1], 2))
    assert draw_tokens(rows, 100, lambda row, n: True).tokens == 21
    assert draw_tokens(rows, 10, lambda row, n: row.row == 3).cut == (rows[3], 2)


def test_a_text_is_cut_to_a_number_of_tokens(tmp_path: Path) -> None:
    text = "The bees of Java dance in the evening, and nobody knows why they do it. Größe, naïve, 東京."
    train_tokenizer([text * 3], 300, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    total = len(tokenizer.encode(text))
    cuts = [cut_text(text, n, tokenizer) for n in range(1, total + 1)]
    found = [(n, cut) for n, cut in enumerate(cuts, 1) if cut is not None]
    assert len(found) >= total * 0.9
    assert all(len(tokenizer.encode(cut)) == n and text.startswith(cut) for n, cut in found)
    assert cut_text(text, 0, tokenizer) is None
    assert cut_text(text, total + 1, tokenizer) is None


def test_folders_are_below_the_data(config: RunConfig) -> None:
    assert folder_of(config, "answers") == Path(config.data.dir) / "rephrase" / "answers"
