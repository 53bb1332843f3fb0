import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import LlamaForCausalLM

from conf.errors import DataError
from data.tokenize import load_tokenizer
from inference import engine as engine_module
from inference.engine import Engine, PromptTooLong
from inference.generate import generate
from inference.sampler import SamplingParams
from tests.unit.inference.builders import edit_json, run

PROMPT = "the cat sat"


def test_greedy_tokens_equal_transformers(engine: Engine, model_folder: Path):
    theirs: Any = LlamaForCausalLM.from_pretrained(model_folder).eval()
    prompt = engine.encode(PROMPT)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens, text, reason = run(engine, prompt, max_tokens=60, ignore_eos=True)
    assert tokens == expected[0, len(prompt) :].tolist()
    assert (text, reason) == (engine.tokenizer.decode(tokens), "length")


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_size_of_prefill_steps_changes_nothing(engine: Engine, chunk: int, monkeypatch: pytest.MonkeyPatch):
    prompt = engine.encode(PROMPT * 3)
    whole = run(engine, prompt, max_tokens=20)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", chunk)
    generation = engine.start(prompt, SamplingParams(max_tokens=1))
    steps = 0
    while not generation.finished:
        generation.step()
        steps += 1
    assert steps == -(-len(prompt) // chunk)
    assert run(engine, prompt, max_tokens=20) == whole


def test_interleaved_generations_equal_separate_ones(engine: Engine):
    requests = [
        (engine.encode(PROMPT), SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)),
        (engine.encode("a dog"), SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)),
        (engine.encode("on the log" * 9), SamplingParams(max_tokens=25, seed=6, top_p=0.9, ignore_eos=True)),
    ]
    alone = [[step.token for step in engine.stream(*request)] for request in requests]
    streams = [engine.stream(*request) for request in requests]
    together: list[list[int]] = [[], [], []]
    for _ in range(30):
        for tokens, stream in zip(together, streams, strict=True):
            if (step := next(stream, None)) is not None:
                tokens.append(step.token)
    assert together == alone


def test_seeded_sampling_is_reproducible(engine: Engine):
    prompt = engine.encode(PROMPT)
    first = run(engine, prompt, temperature=1.0, seed=11, max_tokens=30)
    assert first == run(engine, prompt, temperature=1.0, seed=11, max_tokens=30)
    assert first != run(engine, prompt, temperature=1.0, seed=12, max_tokens=30)


def test_a_stop_string_that_spans_tokens(engine: Engine):
    prompt = engine.encode(PROMPT)
    _, text, _ = run(engine, prompt, max_tokens=40, ignore_eos=True)
    tokens = engine.tokenizer.encode(text)
    assert len(tokens) > 10
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 2]
    stopped_tokens, stopped, reason = run(engine, prompt, max_tokens=40, ignore_eos=True, stop=(stop,))
    assert (stopped, reason) == (text[: text.find(stop)], "stop")
    assert len(stopped_tokens) < 40


def test_max_tokens_and_the_end_of_the_context(engine: Engine):
    assert len(run(engine, engine.encode(PROMPT), max_tokens=1, ignore_eos=True)[0]) == 1
    prompt = (engine.encode(PROMPT) * 1000)[: engine.context - 5]
    for wanted in (None, 100):
        tokens, _, reason = run(engine, prompt, max_tokens=wanted, ignore_eos=True)
        assert (len(tokens), reason) == (5, "length")


def test_every_declared_end_of_sequence_ends_the_text(engine: Engine, model_folder: Path, tmp_path: Path):
    prompt = engine.encode(PROMPT)
    tokens, _, _ = run(engine, prompt, max_tokens=10, ignore_eos=True)
    end = next(token for token in tokens[2:] if token not in tokens[:2])
    folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    edit_json(folder / "generation_config.json", eos_token_id=[0, end])
    other = Engine(folder)
    assert other.eos_ids == {0, end}
    found, text, reason = run(other, prompt, max_tokens=10)
    place = tokens.index(end)
    assert (found, reason) == (tokens[: place + 1], "stop")
    assert text == engine.tokenizer.decode(tokens[:place])


def test_closing_a_stream_frees_its_cache(engine: Engine):
    generation = engine.start(engine.encode(PROMPT), SamplingParams(max_tokens=5))
    generation.step()
    assert generation._cache is not None
    generation.close()
    assert generation.finished
    assert generation._cache is None


def test_prompts_begin_as_the_tokenizer_says(engine: Engine, model_folder: Path, tmp_path: Path):
    assert engine.encode("the") == engine.tokenizer.encode("the")
    assert engine.encode("") == [engine.tokenizer.eos_id]
    assert engine.encode("<|endoftext|>") != [engine.tokenizer.eos_id]
    assert engine.encode_template("<|endoftext|>") == [engine.tokenizer.eos_id]
    folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    fast = load_tokenizer(folder).fast
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    fast.save(str(folder / "tokenizer.json"))
    assert Engine(folder).encode("the") == [0, *engine.tokenizer.encode("the")]


def test_prompts_that_cannot_be_continued(engine: Engine):
    params = SamplingParams()
    with pytest.raises(PromptTooLong, match="context"):
        engine.start([1] * engine.context, params)
    for bad in ([], [-1], [engine.spec.vocab_size]):
        with pytest.raises(DataError, match="prompt"):
            engine.start(bad, params)


def test_a_folder_without_a_tokenizer(model_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer"):
        Engine(folder)


def test_generate_continues_every_prompt(engine: Engine, model_folder: Path):
    prompts = [PROMPT, "a dog", ""]
    texts = ["", "", ""]
    order = []
    for index, piece in generate(model_folder, prompts, SamplingParams(max_tokens=12, temperature=0.0)):
        texts[index] += piece
        order.append(index)
    assert texts == [run(engine, engine.encode(prompt), max_tokens=12)[1] for prompt in prompts]
    assert order == sorted(order)
