"""How many rows each table of a complementary family has. Pure integers, exact at any cardinality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

Moduli = tuple[int, ...]


def problem(moduli: Sequence[int], n: int, *, coprime: bool) -> str | None:
    """Why tables of so many rows cannot tell n ids apart, or None if they can."""
    if min(moduli) < 1:
        return f"{min(moduli)} is not a number of rows"
    if (product := math.prod(moduli)) < n:
        return f"they tell only {product} ids apart, fewer than the {n} there are: their product must reach {n}"
    for a, b in combinations(moduli, 2):
        if coprime and (divisor := math.gcd(a, b)) > 1:
            return f"{a} and {b} are both divisible by {divisor}: chinese_remainder needs pairwise coprime ones"
    return None


def quotient_remainder(n: int, parts: int, rows: int) -> Moduli:
    """parts - 1 remainders of `rows` each and a quotient of as many as are left: ceil(n / rows^(parts - 1))."""
    return (rows,) * (parts - 1) + (-(-n // rows ** (parts - 1)),)


def chinese_remainder(n: int, parts: int, rows: int) -> Moduli:
    """parts - 1 pairwise coprime moduli from `rows` upwards, and the smallest one more whose product reaches n."""
    moduli: list[int] = []
    for part in range(parts):
        modulus = -(-n // math.prod(moduli)) if part == parts - 1 else max([rows, *moduli])
        while any(math.gcd(modulus, other) > 1 for other in moduli):
            modulus += 1
        moduli.append(modulus)
    return tuple(moduli)


def smallest(n: int, parts: int, family: Callable[[int, int, int], Moduli]) -> tuple[int, Moduli]:
    """(rows of the first table, moduli) with the fewest rows in all; that is where all tables are about equal."""
    root = math.ceil(n ** (1 / parts))
    choices = [(rows, family(n, parts, rows)) for rows in range(max(2, root - 2), root + 3)]
    return min(choices, key=lambda choice: sum(choice[1]))


def within(n: int, parts: int, budget: int, family: Callable[[int, int, int], Moduli]) -> Moduli | None:
    """The family with the fewest collisions per table among those of at most `budget` rows in all; None: there is none.

    The fewer rows the first tables have, the more has the last, and the fewer ids share each of its rows.
    """
    high, moduli = smallest(n, parts, family)
    if sum(moduli) > budget:
        return None
    low = 2
    while low < high:
        middle = (low + high) // 2
        candidate = family(n, parts, middle)
        if sum(candidate) <= budget:
            high, moduli = middle, candidate
        else:
            low = middle + 1
    return moduli
