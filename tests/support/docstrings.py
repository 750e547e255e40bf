"""Examples in docstrings, run."""

import ast
import doctest
import io
import re
import tokenize

import numpy as np

from support.helpers import to_numpy


def failing_examples(module):
    """Runs the examples of a module; returns the failures.

    What an example gives is compared with the output below it, or else with the value in a comment
    behind it, such as `# [0.25, 0.3333]`, to the digits that the comment shows.
    """
    failures = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__):
        globs = dict(vars(module))
        for example in test.examples:
            try:
                if example.want:
                    actual = eval(example.source, globs)
                    wanted = eval(example.want, {})
                    actual = tuple(actual) if isinstance(wanted, tuple) else actual
                    if actual != wanted:
                        failures.append((test.name, example.source, actual, wanted))
                else:
                    run_statement(example.source, globs)
            except Exception as error:
                failures.append((test.name, example.source, error))
    return failures


def run_statement(source, globs):
    """Runs a statement; what an expression gives is compared with the value in its comment."""
    shown = _comment(source)
    if shown is None:
        exec(source, globs)
    else:
        _assert_shown(eval(source, globs), shown)


def _comment(source):
    """The comment at the end of an expression, if it is a value."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    try:
        ast.parse(source, mode="eval")
        ast.literal_eval(comments[-1].lstrip("# "))
    except (IndexError, SyntaxError, ValueError):
        return None
    return comments[-1].lstrip("# ")


def _assert_shown(actual, shown):
    wanted = ast.literal_eval(shown)
    actual = tuple(actual) if isinstance(wanted, tuple) else actual  # TensorFlow's shapes
    wanted = np.asarray(wanted)
    actual = np.asarray(actual if isinstance(actual, (list, tuple, bool)) else to_numpy(actual))
    assert actual.shape == wanted.shape, (actual, shown)
    if wanted.dtype.kind != "f":
        np.testing.assert_array_equal(actual, wanted)
    else:
        digits = max(map(len, re.findall(r"\.(\d*)", shown)))
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=0.501 * 10.0**-digits)
