"""Several answers in a row as one: a list, an assignment to several names, a set of real numbers."""

import sympy

from lockstep.rollout.mathematics.answers import Answer, Named, Region, Several, Words


def joined(items: tuple[Answer, ...], by_or: bool) -> Answer:
    """by_or: `x < 1 or x > 2`, where `x > 1, x < 2` holds at once."""
    if all(isinstance(item, Named) and len(item.names) == 1 for item in items):
        together = _joined_names(items, by_or)
        if together is not None:
            return together
    if all(isinstance(item, Region) and item.name for item in items) and len({item.name for item in items}) == 1:
        return _joined_regions(items, by_or)
    return Several(tuple(part for item in items for part in flat(item)))


def flat(item: Answer) -> tuple[Answer, ...]:
    """`\\pm 3` among others is two of them."""
    return item.items if isinstance(item, Several) and not item.braces and not item.name else (item,)


def _joined_names(items: tuple[Named, ...], by_or: bool) -> Answer | None:
    """Several values of one name, or one of each name; None where a name has several and another one."""
    names, values = [item.names[0] for item in items], [item.items[0] for item in items]
    if len(set(names)) == 1:
        return Several(tuple(values), name=names[0])
    if by_or:
        return Words(f"or: {items}")
    if len(set(names)) < len(names):
        return None
    ordered = sorted(zip(names, values, strict=True), key=lambda pair: pair[0])
    return Named(tuple(name for name, _ in ordered), tuple(value for _, value in ordered))


def _joined_regions(items: tuple[Region, ...], by_or: bool) -> Region:
    both = sympy.Intersection(*(item.numbers for item in items))
    either = sympy.Union(*(item.numbers for item in items))
    return Region(either if by_or or both is sympy.S.EmptySet else both, items[0].name)
