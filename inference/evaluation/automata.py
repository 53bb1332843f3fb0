"""Languages learnt in context: strings of a random automaton, and whether the model goes on as it may (In-Context
Language Learning, arXiv:2401.12973, section 3)."""

import random

from conf.evaluate import EvaluateConfig
from inference.engine import Engine
from inference.evaluation.needles import WORDS
from inference.methods import Methods
from inference.params import SamplingParams

STATES, SYMBOLS, EDGES = 5, 8, 3  # an automaton's states, alphabet and most edges out of a state
LENGTH = 12  # symbols of a string
END = "."

Automaton = list[dict[str, int]]  # by state: symbol -> next state


def draw(generator: random.Random, symbols: list[str]) -> Automaton:
    """A random automaton; every state has one to ``EDGES`` ways on."""
    return [
        {symbol: generator.randrange(STATES) for symbol in generator.sample(symbols, generator.randint(1, EDGES))}
        for _ in range(STATES)
    ]


def string(generator: random.Random, automaton: Automaton) -> tuple[list[str], list[set[str]]]:
    """A walk from state 0, and which symbols could have stood at each of its places."""
    state, walked, allowed = 0, [], []
    for _ in range(LENGTH):
        allowed.append(set(automaton[state]))
        walked.append(generator.choice(sorted(automaton[state])))
        state = automaton[state][walked[-1]]
    return walked, allowed


def measure(engine: Engine, config: EvaluateConfig, task: str, methods: Methods) -> dict[str, float]:
    """Share of the places in one more string where the likeliest token begins a symbol that may come; ``chance`` is
    what a guess among the alphabet would reach. A string's first symbol, of a state that all strings share, counts."""
    generator = random.Random(f"{config.seed} automata")
    right = places = 0
    chance = 0.0
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=True, logprobs=1, methods=methods)
    for _ in range(config.samples):
        first = {}
        for word in generator.sample(WORDS, len(WORDS)):  # symbols that differ in their first token
            first.setdefault(engine.encode(" " + word)[-_size(engine, word)], word)
            if len(first) == SYMBOLS:
                break
        begins = {word: token for token, word in first.items()}
        automaton = draw(generator, sorted(begins))
        walks = [string(generator, automaton) for _ in range(config.strings + 1)]
        tokens = engine.encode(" " + " ".join(word for walked, _ in walks[:-1] for word in (*walked, END)))
        judged: dict[int, set[int]] = {}
        for word, allowed in zip(*walks[-1], strict=True):
            judged[len(tokens)] = {begins[symbol] for symbol in allowed}
            tokens += engine.encode(" " + word)[-_size(engine, word) :]
        generation = engine.start(tokens, params)
        engine.submit(generation)
        while engine.busy:
            engine.step()
        for place, good in judged.items():
            right += generation.prompt_logprobs[place - 1].top[0][0] in good
            chance += len(good) / len(begins)
            places += 1
    return {"accuracy": right / places, "chance": chance / places}


def _size(engine: Engine, word: str) -> int:
    """Tokens of a word inside a text, without what the tokenizer puts before one."""
    return len(engine.tokenizer.encode(" " + word))
