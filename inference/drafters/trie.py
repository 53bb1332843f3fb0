"""Continuations of the prompt and of earlier outputs, counted in a trie (Lookahead, arXiv:2312.12728, section 4)."""

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from inference.drafters.base import Child, Successors
from inference.generation import Generation

BRANCH = 8  # tokens of a continuation
MATCH = 3  # tokens at the end of a text that are looked up, or fewer
TENANTS = 16  # tries of outputs that are kept, by the salt of their texts
TOKENS = 20_000  # of outputs in a tenant's trie; then it begins anew
WIDTH = 4  # guesses at one place


class Node(dict[int, "Node"]):
    """Children by token, and how often it was passed."""

    count: float = 0.0

    def insert(self, tokens: Sequence[int]) -> None:
        """Count a continuation."""
        node = self
        for token in tokens:
            node = node.setdefault(token, Node())
            node.count += 1

    def find(self, tokens: Sequence[int]) -> "Node | None":
        """The node that ``tokens`` lead to."""
        node: Node | None = self
        for token in tokens:
            node = node.get(token)
            if node is None:
                return None
        return node


class Own:
    """The trie of one text, prompt and output, as far as it has been read."""

    def __init__(self) -> None:
        self.root, self.read = Node(), 0
        self._open: dict[int, Node] = {}  # start of an unfinished continuation: its last node

    def update(self, tokens: Sequence[int]) -> None:
        """Read on: what was too short to be a whole continuation is carried on."""
        size = BRANCH + MATCH
        for end in range(self.read, len(tokens)):
            for start in range(max(0, end - size + 1), end + 1):
                node = self.root if start == end else self._open[start]
                self._open[start] = node = node.setdefault(tokens[end], Node())
                node.count += 1
            self._open.pop(end - size + 1, None)
        self.read = len(tokens)


class Trie(Successors):
    """Guesses from the text itself, else from what the same tenant's texts have said before.

    The prompt's continuations are in the text's own trie, which ends with it; only outputs go to the tenant's.
    """

    first_rates: Sequence[float] = (0.6, 0.15, 0.08, 0.05)

    def __init__(self) -> None:
        self._own: WeakKeyDictionary[Generation, Own] = WeakKeyDictionary()
        self._said: OrderedDict[bytes, tuple[Node, int]] = OrderedDict()

    def root(self, generation: Generation) -> Node | None:
        own = self._own.setdefault(generation, Own())
        own.update(generation.tokens)
        tries = [own.root, *([self._said[generation.salt][0]] if generation.salt in self._said else [])]
        for size in range(min(MATCH, len(generation.tokens) - 1), 1, -1):
            for trie in tries:
                if node := trie.find(generation.tokens[-size:]):
                    return node
        return None

    def children(self, state: Node) -> list[Child]:
        best = sorted(state.items(), key=lambda item: -item[1].count)[:WIDTH]
        return [(token, rank, node) for rank, (token, node) in enumerate(best)]

    def forget(self, generation: Generation) -> None:
        output = generation.tokens[generation.prompt_tokens :]
        if self._own.pop(generation, None) is None or len(output) <= MATCH:
            return
        trie, size = self._said.pop(generation.salt, (Node(), 0))
        if size + len(output) > TOKENS:
            trie, size = Node(), 0
        for start in range(len(output)):
            trie.insert(output[start : start + BRANCH + MATCH])
        self._said[generation.salt] = (trie, size + len(output))
        if len(self._said) > TENANTS:
            self._said.popitem(last=False)
