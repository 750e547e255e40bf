"""Some combinations of crossed parameters, in which each value of each parameter occurs."""

import collections
import math

MOST = 3  # the number of combinations is divided by this, or by the least number of values


def to_leave_out(items):
    """The items that are not run; those of a test whose parameters are not crossed all are."""
    by_test = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            by_test[item.path, item.cls, item.originalname].append(item)
    return [item for group in by_test.values() for item in _left_out(group)]


def _left_out(items):
    names = items[0].callspec.params
    # parameters that are given together have the same numbers: they are one axis
    axes = dict.fromkeys(_numbers([item.callspec.params[name] for item in items]) for name in names)
    axes = [axis for axis in axes if len(set(axis)) > 1]
    sizes = [len(set(axis)) for axis in axes]
    if len(axes) < 2 or math.prod(sizes) != len(items):
        return []
    step = min(*sizes, MOST)
    return [x for x, *at in zip(items, *axes, strict=True) if sum(at) % step]


def _numbers(values):
    """For each value its number among those that differ: each is one object in all items."""
    numbers = {}
    return tuple(numbers.setdefault(id(value), len(numbers)) for value in values)
