"""Runs Keras's own tests of its attention layers, with this package's layer in their place.

KERAS_BACKEND=jax python tests/support/scripts/keras_tests.py

The tests are those that the wheel of Keras 3.15 brings along, of `MultiHeadAttention` and of
`GroupQueryAttention`. What they get is `keras_ssattn.layers.MultiHeadAttention`, as softmax. Some
look up a projection or an option by its private name in Keras's layers: there they find what this
layer has under a public name.

`FAILING` has the tests that fail, by the reason. The script fails if another test does, or if one
of these passes.
"""

import operator
import os
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # beside the tests, in the folder of Keras

import keras
import pytest
from keras.src.layers import attention as keras_attention

import keras_ssattn

NO_OVERRIDE = (
    "test_causal_only_skipped_for_subclass",
    "test_compute_attention_combines_causal_and_explicit_mask_fused_fallback",
    "test_compute_attention_combines_causal_and_explicit_mask_manual_path",
)
FAILING = {
    "MultiHeadAttentionTest": {
        "There is no `_compute_attention` to override: one exchanges the normalizer.": NO_OVERRIDE,
        "A float mask is refused, since an additive one means the opposite.": (
            "test_masking_with_different_shapes",
        ),
        "The error has other words.": (
            "test_invalid_scalar_args_rejected",
            "test_multi_head_attention_output_shape_error",
        ),
    },
    "GroupedQueryAttentionTest": {
        "There is no `_compute_attention` to override: one exchanges the normalizer.": NO_OVERRIDE,
        "Queries and values may have different numbers of features.": (
            "test_shape_mismatch_error_query_value_dim_mismatch",
        ),
    },
}
EXPECTED = {
    f"{cls}.{name}": reason
    for cls, reasons in FAILING.items()
    for reason, names in reasons.items()
    for name in names
}

# Names in Keras's layers, and in this package's.
PRIVATE = {
    "_query_dense": "query_dense",
    "_key_dense": "key_dense",
    "_value_dense": "value_dense",
    "_output_dense": "output_dense",
    "_sliding_window": "sliding_window",
    "_flash_attention": "flash_attention",
}
FILES = ("multi_head_attention_test.py", "grouped_query_attention_test.py")
register = keras.saving.register_keras_serializable("keras_tests")


@register
class MultiHeadAttention(keras_ssattn.layers.MultiHeadAttention):
    """Takes the place of `keras.layers.MultiHeadAttention`."""

    def __init__(self, *args, normalizer="softmax", **kwargs):
        super().__init__(*args, normalizer=normalizer, **kwargs)


for private, public in PRIVATE.items():
    setattr(MultiHeadAttention, private, property(operator.attrgetter(public)))


@register
class GroupedQueryAttention(MultiHeadAttention):
    """Takes the place of `keras.layers.GroupQueryAttention`, whose options have other names."""

    def __init__(self, head_dim, num_query_heads, num_key_value_heads, **kwargs):
        super().__init__(num_query_heads, head_dim, num_kv_heads=num_key_value_heads, **kwargs)

    def get_config(self):
        config = super().get_config()
        for name in ("key_dim", "value_dim", "num_heads", "num_kv_heads"):
            del config[name]
        sizes = {
            "head_dim": self.key_dim,
            "num_query_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
        }
        return {**config, **sizes}


class Outcomes(dict):
    """A pytest plugin that notes how each test ended: passed, failed or skipped."""

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::", 1)[1].replace("::", ".")
        if report.when == "call" or not report.passed:
            self[name] = report.outcome

    def having(self, outcome):
        return {name for name, found in self.items() if found == outcome}


def run():
    keras.src.layers.MultiHeadAttention = MultiHeadAttention
    keras.src.layers.GroupedQueryAttention = GroupedQueryAttention
    folder = Path(keras_attention.__file__).parent
    options = [f"--rootdir={folder}", f"--config-file={os.devnull}", "-pno:cacheprovider"]
    outcomes = Outcomes()
    code = pytest.main(
        [*(str(folder / name) for name in FILES), *options, "-q", "--tb=short", "-Wignore"],
        plugins=[outcomes],
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest could not run the tests: {code!r}")
    return outcomes


if __name__ == "__main__":
    outcomes = run()
    passed, failed, skipped = (outcomes.having(x) for x in ("passed", "failed", "skipped"))
    unexpected, outdated = failed - set(EXPECTED), set(EXPECTED) - failed - skipped
    for name in sorted(failed & set(EXPECTED)):
        print(f"{name} fails, as expected. {EXPECTED[name]}")
    for name in sorted(outdated):
        print(f"{name} is expected to fail, and passes or is gone. {EXPECTED[name]}")
    for name in sorted(unexpected):
        print(f"{name} fails, and is not expected to.")
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    sys.exit(bool(unexpected or outdated or not passed))
