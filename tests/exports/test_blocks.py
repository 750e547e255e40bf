"""A user's model of a block with padding, a window and rotary positions, in every runtime."""

import keras
import numpy as np
import pytest
from support.exports import FORMATS, LONG, MARKS, SHORT, assert_same, dynamic, export, exporting

from keras_ssattn.layers import LastTimestep, MeanPool, RotaryEmbedding, TransformerBlock

pytestmark = MARKS

VOCABULARY = 17
CASES = {
    "ssmax, last": (dict(normalizer="ssmax"), LastTimestep),
    "rectified_softpick, mean": (dict(normalizer="rectified_softpick", qk_norm=True), MeanPool),
    "sink_softmax, window": (dict(normalizer="sink_softmax", sliding_window=7), LastTimestep),
}


def make(options, pool) -> keras.Model:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(VOCABULARY, 8, mask_zero=True)(tokens)
    x = TransformerBlock(2, causal=True, rotary=RotaryEmbedding(), num_kv_heads=1, **options)(x)
    return keras.Model(tokens, pool()(x))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_block(case, form, tmp_path, rng):
    model = make(*CASES[case])
    inputs = [rng.integers(1, VOCABULARY, sizes).astype("int32") for sizes in (SHORT, LONG)]
    for x in inputs:
        x[0, -2:] = x[1, :1] = 0
    model(inputs[0])
    with exporting(form):
        run = export(model, tmp_path, form, ["tokens"], **dynamic(form, [("batch", "time")]))
    for x in inputs:
        assert_same(model, run, x)


@pytest.mark.backend("tensorflow", "jax", reason="PyTorch tells of itself that it exports")
def test_exporting_changes_no_values(rng):
    from keras_ssattn.ops import exporting

    model = make(*CASES["rectified_softpick, mean"])
    x = rng.integers(1, VOCABULARY, SHORT).astype("int32")
    expected = np.array(model(x))
    with exporting():
        np.testing.assert_allclose(np.array(model(x)), expected, rtol=1e-5, atol=1e-6)
