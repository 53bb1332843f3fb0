import json
import re

import pytest

from conf.errors import ConfigError
from inference.engine import Engine
from inference.params import Grammar, SamplingParams
from tests.unit.inference.builders import run

SCHEMA = {
    "type": "object",
    "properties": {"cat": {"type": "string", "maxLength": 4}, "on": {"enum": ["mat", "log"]}},
    "required": ["cat", "on"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_finished_output_follows_its_schema(engine: Engine, seed: int):
    _, text, reason = run(
        engine, [1, 2], temperature=1.0, top_k=8, seed=seed, max_tokens=600, grammar=Grammar.of_schema(SCHEMA)
    )
    assert reason == "stop"
    found = json.loads(text)
    assert set(found) == {"cat", "on"}
    assert found["on"] in ("mat", "log")
    assert len(found["cat"]) <= 4


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_finished_output_matches_its_expression(engine: Engine, temperature: float):
    pattern = "(cat|dog){2,5}-[0-9]{3}"
    _, text, reason = run(engine, [1], temperature=temperature, seed=1, grammar=Grammar("regex", pattern))
    assert reason == "stop"
    assert re.fullmatch(pattern, text)


def test_a_constrained_text_leaves_the_others_alone(engine: Engine):
    free = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    alone = run(engine, [1, 2, 3], max_tokens=12, ignore_eos=True)[0]
    bound = SamplingParams(max_tokens=12, temperature=0.0, grammar=Grammar("regex", "[a-z]{20}"))
    generations = [engine.start([1, 2, 3], params) for params in (bound, free, bound)]
    for generation in generations:
        engine.submit(generation)
    while engine.busy:
        engine.step()
    texts = [generation.tokens[3:] for generation in generations]
    assert texts[1] == alone
    assert texts[0] == texts[2] != alone


@pytest.mark.parametrize(
    "grammar", [Grammar("regex", "("), Grammar("json", "{"), Grammar("json", '{"type": "nothing"}')], ids=str
)
def test_grammars_that_cannot_be_read(engine: Engine, grammar: Grammar):
    with pytest.raises(ConfigError, match="response_format"):
        engine.start([1], SamplingParams(grammar=grammar))
