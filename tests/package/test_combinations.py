"""The combinations that TensorFlow and JAX run have every value of every parameter."""

import itertools
from types import SimpleNamespace

import pytest
from support.combinations import to_leave_out


def items_of(params):
    callspec = [SimpleNamespace(params=x) for x in params]
    return [SimpleNamespace(path="t", cls=None, originalname="t", callspec=x) for x in callspec]


@pytest.mark.parametrize("sizes", [(5, 15), (2, 3, 4), (3, 3), (2, 2, 2, 2)], ids=str)
def test_each_value_occurs(sizes):
    axes = [[object() for _ in range(size)] for size in sizes]
    names = "abcd"[: len(sizes)]
    items = items_of(dict(zip(names, x, strict=True)) for x in itertools.product(*axes))
    left_out = to_leave_out(items)
    run = [x.callspec.params for x in items if x not in left_out]
    assert len(run) == len(items) / min(*sizes, 3)
    for name, values in zip(names, axes, strict=True):
        assert {id(x[name]) for x in run} == {id(x) for x in values}


@pytest.mark.parametrize("params", [
    [{"a": i} for i in range(6)],
    [{"a": i, "b": -i} for i in range(6)],  # given together
    [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}],  # not all of them
])  # fmt: skip
def test_what_is_not_crossed_is_run(params):
    assert to_leave_out(items_of(params)) == []
