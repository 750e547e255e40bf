"""What a newcomer gets wrong: the message says what to write instead."""

import keras
import pytest
from support.cases import attention_model

import keras_ssattn
from keras_ssattn import CausalLM, MultiHeadAttention, Softpick, SSMax, TransformerBlock


def attention(**options):
    return lambda: MultiHeadAttention(2, 4, **options)


def language(**options):
    return lambda: CausalLM(20, 8, 1, 2, **options)


UNKNOWN = {
    "s": (lambda: SSMax(s=1.0), r"SSMax\(\) got.*'s'. Did you mean 'init_s'\?"),
    "s of softpick": (lambda: Softpick(s=1.0), "Did you mean 'init_s', of `SSMax` or `LogLen"),
    "formula": (lambda: SSMax(formula="shift"), "'formula'. Edifice's formula is.*EdificeSSMax"),
    "causal": (attention(causal=True), "argument of the call: `use_causal_mask=True`"),
    "use_causal_mask": (attention(use_causal_mask=True), "'use_causal_mask'. It is an argument"),
    "use_causal_mask of a block": (
        lambda: TransformerBlock(2, use_causal_mask=True),
        r"TransformerBlock\(\).*'use_causal_mask'. Did you mean 'causal'\?",
    ),
    "num_query_heads": (attention(num_query_heads=2), r"Did you mean 'num_heads'\?"),
    "num_key_value_heads": (attention(num_key_value_heads=1), r"Did you mean 'num_kv_heads'\?"),
    "head_dim": (attention(head_dim=4), r"Did you mean 'key_dim'\?"),
    "a slip": (attention(droput=0.1), r"'droput'. Did you mean 'dropout'\?"),
    "causal language model": (language(causal=True), "'causal'. The model is always causal"),
    "a slip in a model": (language(normaliser="ssmax"), r"Did you mean 'normalizer'\?"),
    "no mesh": (
        lambda: keras_ssattn.distribution.layout_map(None),
        "`device_mesh` must be a `keras.distribution.DeviceMesh`.*device_mesh=None",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_options_that_do_not_exist(case):
    call, match = UNKNOWN[case]
    with pytest.raises(TypeError, match=match):
        call()


VALUES = {
    "a class": (attention(normalizer=SSMax), r"Did you mean an instance, SSMax\(\)\?"),
    "the name of a class": (attention(normalizer="SSMax"), r"'SSMax'. Did you mean 'ssmax'\?"),
    "in a block": (lambda: TransformerBlock(2, normalizer="soft_pick"), "mean 'softpick'"),
    "in a model": (language(normalizer=Softpick), r"Did you mean an instance, Softpick\(\)\?"),
    "in build": (lambda: keras_ssattn.build(8, normalizer="Softmax"), "Did you mean 'softmax'"),
    "Keras's fourth argument": (
        lambda: MultiHeadAttention(2, 4, 4, 0.1),
        "`num_kv_heads`, the fourth argument.*pass `dropout`, Keras's fourth, by name.*=0.1",
    ),
    "Keras's fourth argument of 0": (
        lambda: MultiHeadAttention(2, 4, None, 0.0),
        "pass `dropout`, Keras's fourth, by name.*num_kv_heads=0.0",
    ),
    "a slip": (attention(implementation="Dense"), r"Received.*'Dense'. Did you mean 'dense'\?"),
    "a slip in ops": (
        lambda: keras_ssattn.ops.attention(*[keras.ops.ones((1, 2, 1, 2))] * 3, "SoftMax"),
        r"Did you mean 'softmax'\?",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_do_not_fit(case):
    call, match = VALUES[case]
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("saved", "loaded", "match"),
    [
        ("ssmax", "softmax", 'has no length scale, that of the file another: .*"ssmax"'),
        ("softmax", "ssmax", "has the length scale `LogLengthScale`, that of the file"),
        ("sink_softmax", "softmax", 'is a `Softmax`, that of the file.*"sink_softmax"'),
        ("softmax", "sink_softmax", 'is a `SinkSoftmax`, that of the file.*"sink_softmax"'),
        ("ssmax", "softpick", 'has no length scale, that of the file another: .*"ssmax"'),
    ],
)
def test_weights_of_another_normalizer(saved, loaded, match, tmp_path):
    attention_model(saved).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=f"The normalizer 'attention/.*{match}"):
        attention_model(loaded).load_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("name", ["CausalLM", "convert_attention", "generate", "build"])
def test_models_are_found_in_the_package_itself(name):
    assert getattr(keras_ssattn, name) is getattr(keras_ssattn.models, name)
    assert name in keras_ssattn.__all__
