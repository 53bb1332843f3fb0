"""Trees from a small draft model, deep where it is sure and wide where it is not (DySpec, arXiv:2410.11744)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Tensor

from conf.errors import ConfigError
from inference.detokenize import Detokenizer
from inference.drafters.base import Draft
from inference.generation import Generation
from inference.model_runner import ModelRunner
from inference.paged_attention import PagedCache
from inference.pages import PagePool
from inference.params import GREEDY, SamplingParams
from inference.scheduler import Span
from models.hf import load_hf

WIDTH = 4  # guesses behind one token
LEAST = 0.05  # estimated chance below which a guess is not looked behind
CHUNK = 512  # tokens that the draft model catches up with in one pass


class DraftModel:
    """A small model of the same vocabulary, with a cache of its own; what it holds of a text ends with the text.

    Raises ConfigError when the vocabularies differ.
    """

    def __init__(self, folder: str | Path, vocab: int, tokens: int, page_tokens: int, pack: bool) -> None:
        model = load_hf(folder).eval()
        if model.spec.vocab_size != vocab:
            rule = f"must have the served model's vocabulary of {vocab} tokens"
            raise ConfigError("engine.draft_model", str(folder), rule, "choose a model of the same family")
        self.runner = ModelRunner(model, "fp32", pack)
        pages = -(-tokens // page_tokens)
        self.cache = PagedCache(model.spec, pages * page_tokens, page_tokens, self.runner.dtype)
        self.pool = PagePool(pages, page_tokens, remember=False)
        self.context = model.spec.context
        self._shadows: WeakKeyDictionary[Generation, Generation] = WeakKeyDictionary()

    def logits(self, generation: Generation, tokens: Sequence[int], parents: Sequence[int]) -> Tensor | None:
        """Logits [1 + tokens, vocabulary] behind the text's last token and each of a tree; None: there is no room."""
        shadow = self._shadows.get(generation)
        if shadow is None:
            text = Detokenizer(lambda _: "")
            shadow = Generation(generation.tokens, SamplingParams(max_tokens=1), 1, text, frozenset())
            self._shadows[generation] = shadow
        shadow.tokens = generation.tokens
        shadow.computed = min(shadow.computed, len(shadow.tokens) - 1)
        if not self._room(shadow, len(shadow.tokens) + len(tokens)):
            return None
        while shadow.pending > CHUNK:
            chunk = shadow.tokens[shadow.computed : shadow.computed + CHUNK]
            self.runner.run([Span(shadow, shadow.computed, chunk)], self.cache)
            shadow.computed += CHUNK
        pending = shadow.tokens[shadow.computed :]
        chain = list(range(-1, len(pending) - 1))
        above = [len(pending) - 1 + parent for parent in parents]
        span = Span(shadow, shadow.computed, [*pending, *tokens], [*chain, *above])
        logits_RV = self.runner.run([span], self.cache).logits[0]
        assert logits_RV is not None
        return logits_RV[len(pending) - 1 :]

    def forget(self, generation: Generation) -> None:
        """Free what is held of a text."""
        shadow = self._shadows.pop(generation, None)
        if shadow is not None:
            self.pool.release(shadow.drop_pages())

    def _room(self, shadow: Generation, length: int) -> bool:
        if length > self.context:
            return False
        while len(shadow.pages) * self.pool.page_tokens < length:
            page = self.pool.take(shadow.pages[-1] if shadow.pages else None)
            if page is None:
                return False
            shadow.add_page(page)
        return True


class DynamicTree:
    """The likeliest paths by the draft model's probabilities, one of its passes for each level of the tree.

    The sampler's own choices decide what is right, so sampled outputs stay those of the seed; a guess is right with the
    probability that the model gives to it, as with the paper's multi-round rejection of distinct guesses.
    """

    first_rates: Sequence[float] = (0.7, 0.3, 0.2, 0.1)

    def __init__(self, model: DraftModel) -> None:
        self.model = model

    def draft(self, generation: Generation, rate: Callable[[int], float], most: int, depth: int) -> Draft:
        """At most ``most`` guesses, ``depth`` deep."""
        draft = Draft()
        frontier: list[tuple[float, int, int, int]] = []  # chance, rank, token, parent
        looked = -1  # last row whose children are in the frontier
        for _ in range(depth):
            logits_RV = self.model.logits(generation, draft.tokens, draft.parents)
            if logits_RV is None:
                break
            temperature = generation.params.temperature
            probabilities = (logits_RV / (temperature if temperature > GREEDY else 1.0)).softmax(1)
            values, ids = probabilities[looked + 1 :].topk(min(WIDTH, probabilities.shape[1]), 1)
            for row, (chances, tokens) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), looked + 1):
                above = draft.chances[row - 1] if row else 1.0
                frontier += [
                    (above * c, rank, token, row) for rank, (c, token) in enumerate(zip(chances, tokens, strict=True))
                ]
            looked = len(draft.tokens)
            frontier.sort(key=lambda item: (-item[0], item[3], item[1]))
            while frontier and len(draft.tokens) < most and (frontier[0][0] > LEAST or not draft.tokens):
                chance, rank, token, row = frontier.pop(0)
                draft.add(token, row, rank, chance)
            if len(draft.tokens) in (most, looked):
                break
        return draft

    def learn(self, generation: Generation, tokens: Sequence[int], path: Sequence[int], logits_RV: Tensor) -> None:
        """Nothing: the draft model reads the text itself."""

    def forget(self, generation: Generation) -> None:
        self.model.forget(generation)
