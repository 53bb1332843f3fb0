"""Slow, readable orders: one step after another, in plain Python."""

from collections.abc import Sequence

Rows = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]]


def reference_chains(neighbours: Rows) -> list[list[int]]:
    """The chains of the public code: greedy first unseen of nine, at most 21 documents (the first chain 22)."""
    unseen = set(range(len(neighbours)))
    current = unseen.pop() if unseen else -1  # a set of small integers pops the lowest
    chains, length = [[current]] if current >= 0 else [], 0
    while unseen:
        found = next((x for x in neighbours[current][:9] if x in unseen), None)
        if found is None or length >= 21:
            current = unseen.pop()
            chains.append([current])
            length = 1
        else:
            unseen.remove(found)
            chains[-1].append(found)
            current, length = found, length + 1
    return chains


def reference_order(neighbours: Rows) -> list[int]:
    """The chains, those of fewer than 21 documents dissolved into the others; what fits nowhere comes last."""
    lists = dict(enumerate(reference_chains(neighbours)))
    chain_of = {doc: chain for chain, docs in lists.items() for doc in docs}
    last = []
    for chain in list(lists):
        if len(lists[chain]) >= 21:
            continue
        for doc in lists.pop(chain):
            found = next((x for x in neighbours[doc][:9] if chain_of.get(x, chain) != chain), None)
            if found is None:
                del chain_of[doc]
                last.append(doc)
            else:
                chain_of[doc] = chain_of[found]
                docs = lists[chain_of[found]]
                docs.insert(docs.index(found), doc)
    return [doc for docs in lists.values() for doc in docs] + last


def undirected(neighbours: Rows, weights: Weights) -> list[dict[int, float]]:
    """Each document's neighbours and the larger of the two similarities; self loops and missing ones left out."""
    edges: list[dict[int, float]] = [{} for _ in neighbours]
    for i, (row, values) in enumerate(zip(neighbours, weights, strict=True)):
        for j, weight in zip(row, values, strict=True):
            if 0 <= j < len(edges) and j != i and weight == weight:
                edges[i][j] = edges[j][i] = max(weight, edges[i].get(j, -2.0))
    return edges


def algorithm1(edges: list[dict[int, float]]) -> list[int]:
    """Algorithm 1, with the ties of ``data.orders.algorithm1``, in quadratic time."""
    unvisited = set(range(len(edges)))
    changed = {i: -i for i in unvisited}  # when its degree fell last; at first lower numbers are later
    clock, path = 0, []
    while unvisited:
        node: int | None = min(unvisited, key=lambda x: (len(unvisited & edges[x].keys()), -changed[x]))
        while node is not None:
            path.append(node)
            unvisited.remove(node)
            left = sorted(unvisited & edges[node].keys(), key=lambda x: (-edges[path[-1]][x], x))
            for other in left:
                clock += 1
                changed[other] = clock
            node = left[0] if left else None
    return path


def matching_links(edges: list[dict[int, float]]) -> list[set[int]]:
    """Recursive matching of fragments: in each level the edges by weight, each fragment joined once at most."""
    pairs = sorted((-w, i, j) for i, row in enumerate(edges) for j, w in row.items() if i < j)
    links: list[set[int]] = [set() for _ in edges]
    fragment = list(range(len(edges)))
    while True:
        joined: set[int] = set()
        for _, i, j in pairs:
            free = len(links[i]) < 2 and len(links[j]) < 2 and fragment[i] != fragment[j]
            if free and not joined & {fragment[i], fragment[j]}:
                joined |= {fragment[i], fragment[j]}
                links[i].add(j)
                links[j].add(i)
        if not joined:
            return links
        for start in range(len(edges)):  # relabel: every document takes the lowest number of its fragment
            stack, members = [start], {start}
            while stack:
                new = links[stack.pop()] - members
                members |= new
                stack += new
            fragment[start] = min(members)
