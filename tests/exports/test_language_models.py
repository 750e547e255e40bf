"""`CausalLM` and its decoding step in every runtime, and tokens that a runtime generates."""

import keras
import numpy as np
import pytest
from support.exports import FORMATS, LONG, MARKS, SHORT, assert_same, dynamic, export, outputs

from keras_ssattn.models import CausalLM, DecodingStep

pytestmark = MARKS

VOCABULARY = 17


def make(**options) -> CausalLM:
    sizes = dict(hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1)
    return CausalLM(VOCABULARY, **sizes, **options)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("normalizer", ["ssmax", "rectified_softpick"])
def test_causal_lm(normalizer, form, tmp_path, rng):
    model = make(normalizer=normalizer, padding_id=0)
    run = export(model, tmp_path, form, ["tokens"], **dynamic(form, [("batch", "time")]))
    for sizes in (SHORT, LONG):
        x = rng.integers(1, VOCABULARY, sizes).astype("int32")
        x[0, -2:] = 0
        assert_same(model, run, x)


@pytest.mark.parametrize("form", FORMATS)
def test_a_runtime_generates(form, tmp_path):
    model = make(normalizer="ssmax")
    step = DecodingStep(model)
    signature = step.input_signature(
        num_tokens=1, length=11 if keras.backend.backend() == "jax" else None
    )
    sizes = [("batch", None), ("batch",), *(("batch", "size"),) * (len(signature) - 2)]
    run = export(
        step, tmp_path, form, [x.name for x in signature], input_signature=signature,
        **dynamic(form, sizes),
    )  # fmt: skip
    prompts, count = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], "int32"), 7
    expected = model.generate(prompts, count)
    cache = [np.array(x) for one in model.make_cache(2, 11) for x in one]
    tokens = prompts
    for i in range(prompts.shape[1] + count - 1):
        index = np.full(2, i, "int32")
        inputs = (tokens[:, i : i + 1], index, *cache)
        logits, *cache = arranged(run(*inputs), inputs)
        if i + 1 == tokens.shape[1]:
            chosen = np.argmax(logits, -1).astype("int32")
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
    np.testing.assert_array_equal(tokens[:, prompts.shape[1] :], np.stack(expected))


def arranged(results, inputs) -> list[np.ndarray]:
    """Logits and cache."""
    return outputs(results, [*inputs[1:]])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.backend("tensorflow", "torch", reason="JAX takes each unknown length for another")
def test_a_step_of_several_tokens_each_row_at_its_own_position(form, tmp_path, rng):
    model = make(normalizer="rectified_softpick")
    step = DecodingStep(model)
    cache = [np.array(x) for one in model.make_cache(2, 9) for x in one]
    sizes = [("batch", "time"), ("batch",), *(("batch", "size"),) * len(cache)]
    run = export(
        step, tmp_path, form, [x.name for x in step.input_signature()], **dynamic(form, sizes)
    )
    tokens = rng.integers(1, VOCABULARY, (2, 3)).astype("int32")
    assert_same(step, run, tokens, np.array([2, 6], "int32"), *cache)
