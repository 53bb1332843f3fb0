import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import LlamaForCausalLM

from conf.errors import DataError
from data.tokenize import load_tokenizer
from inference.engine import Engine, PromptTooLong
from inference.generate import generate
from inference.params import SamplingParams
from models.hf import load_hf
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


def test_closing_a_stream_frees_its_pages(engine: Engine):
    stream = engine.stream(engine.encode(PROMPT), SamplingParams(max_tokens=5))
    next(stream)
    assert engine.pool.used > 0
    stream.close()
    assert engine.pool.used == 0
    assert not engine.busy


def test_embeddings_are_the_mean_state_of_any_chunking(engine: Engine, model_folder: Path):
    prompt = engine.encode(PROMPT * 5)
    model = load_hf(model_folder)
    expected = model.hidden(torch.tensor([prompt]), torch.arange(len(prompt))[None])[0].mean(0)
    for rows in (7, 512):
        engine.scheduler.step_tokens = rows
        generation = engine.start(prompt, SamplingParams(), task="embed")
        engine.submit(generation)
        while engine.busy:
            engine.step()
        assert generation.embedding is not None
        torch.testing.assert_close(generation.embedding, expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_logprobs_of_prompt_and_output_are_the_model_s(engine: Engine, model_folder: Path):
    prompt = engine.encode(PROMPT)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=True)
    generation = engine.start(prompt, params)
    engine.submit(generation)
    while engine.busy:
        engine.step()
    steps = [step for step in generation.news if not isinstance(step, Exception)]
    tokens = generation.tokens
    logits = load_hf(model_folder)(torch.tensor([tokens]), torch.arange(len(tokens))[None])
    assert isinstance(logits, torch.Tensor)
    expected = logits[0].detach().log_softmax(-1)
    found = [*generation.prompt_logprobs, *(step.logprob for step in steps)]
    assert len(found) == len(tokens) - 1
    for place, entry in enumerate(found):
        assert entry is not None
        assert entry.token == tokens[place + 1]
        assert entry.value == pytest.approx(float(expected[place, entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == expected[place].topk(3).indices.tolist()


def test_a_deadline_ends_a_text_with_what_is_there(engine: Engine):
    generation = engine.start(engine.encode(PROMPT), SamplingParams(max_tokens=500, ignore_eos=True, deadline_sec=60))
    engine.submit(generation)
    for _ in range(4):
        engine.step()
    generation.deadline = 0.0
    assert engine.step() == [generation]
    last = generation.news[-1]
    assert not isinstance(last, Exception)
    assert (last.finish_reason, last.token) == ("deadline", -1)
    assert not engine.busy
    assert engine.pool.used == 0


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
