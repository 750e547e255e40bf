"""Examples in docstrings, run."""

import doctest


def failing_examples(module):
    """Runs the examples of a module; returns the failures. Output after `# ` is not compared."""
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
                    exec(example.source, globs)
            except Exception as error:
                failures.append((test.name, example.source, error))
    return failures
