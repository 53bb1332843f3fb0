"""Orders of documents by relatedness: one file each, all functions of neighbour lists (and vectors)."""

from collections.abc import Callable

from data.orders import algorithm1, matching, reference
from data.orders import random as random_order
from data.orders.graph import Array, Lists

# (neighbour lists, vectors of given documents) -> all documents in order
Order = Callable[[Lists, Callable[[Array], Array]], Array]
ORDERS: dict[str, Order] = {
    "random": lambda lists, vectors: random_order.order(len(lists)),
    "reference": lambda lists, vectors: reference.order(lists),
    "algorithm1": lambda lists, vectors: algorithm1.order(lists),
    "matching": matching.order,
}
