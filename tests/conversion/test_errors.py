"""What `convert_attention` cannot convert it names, all at once, and leaves nothing half done."""

import re

import keras
import numpy as np
import pytest
from support import custom_layers as custom

from keras_ssattn.layers import MultiHeadAttention, SSMax
from keras_ssattn.models import convert_attention


def model_of(*layers, shape=(5, 6), name="model"):
    x = inputs = keras.Input(shape)
    for layer in layers:
        is_attention = isinstance(layer, (keras.layers.MultiHeadAttention, MultiHeadAttention))
        x = layer(x, x) if is_attention else layer(x)
    return keras.Model(inputs, x, name=name)


def multi_head(cls=keras.layers.MultiHeadAttention, **options):
    return cls(**{"num_heads": 2, "key_dim": 3, "name": "attention", **options})


def quantized():
    model = model_of(multi_head())
    model.quantize("int8")
    return model


def dot_product():
    inputs = keras.Input((5, 6))
    outputs = keras.layers.Attention(name="attention")([inputs, inputs])
    return keras.Model(inputs, outputs, name="model")


REFUSED = {
    "subclass": (lambda: model_of(multi_head(custom.Subclass)), "`Subclass` has a way of its own"),
    "dot_product": (dot_product, "`Attention` has a way of its own"),
    "quantized": (quantized, "quantized to int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named(case):
    make, reason = REFUSED[case]
    model = make()
    expected = re.escape("\n- model/attention: ") + ".*" + re.escape(reason)
    with pytest.raises(
        ValueError, match="`model` must consist of layers that can be converted.*" + expected
    ):
        convert_attention(model, "softmax")


def test_all_of_it_is_named_in_one_error():
    block = custom.Given(multi_head(custom.Subclass, name="inside"), name="block")
    inner = model_of(multi_head(custom.Subclass), name="inner")
    model = model_of(multi_head(), inner, block)
    with pytest.raises(ValueError, match="that can be converted") as error:
        convert_attention(model, "softmax")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == [
        "- model/inner/attention", "- model/block/inside",
    ]  # fmt: skip


def test_a_layer_that_cannot_be_made_again_is_named():
    model = model_of(keras.layers.Dense(6), custom.Secret(multi_head(), name="secret"))
    with pytest.raises(ValueError, match="(?s)model/secret, a `Secret`: .*get_config"):
        convert_attention(model, "softmax")
    assert "__new__" not in vars(keras.layers.MultiHeadAttention)
    assert type(multi_head()) is keras.layers.MultiHeadAttention


def test_a_layer_that_the_configuration_does_not_share_is_named():
    attention = multi_head()
    inputs = keras.Input((5, 6))
    outputs = custom.Given(attention, name="given")(attention(inputs, inputs))
    with pytest.raises(ValueError, match="must share layers only as.*model/attention"):
        convert_attention(keras.Model(inputs, outputs, name="model"), "softmax")


def test_a_layer_whose_weights_do_not_fit_its_copy_is_named():
    layer = custom.InBuild(6, name="block")
    model = model_of(layer)
    layer.units = 1  # of the configuration, not of the weights
    with pytest.raises(ValueError, match="take their weights.*model/block, a `InBuild`"):
        convert_attention(model, "softmax")


@pytest.mark.parametrize(
    "layer", [keras.layers.Dense(3), MultiHeadAttention(2, 3)], ids=["none", "ours"]
)
def test_a_model_without_attention(layer):
    with pytest.raises(ValueError, match="must have a `keras.layers.MultiHeadAttention`.*`model`"):
        convert_attention(model_of(layer), "softmax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, '`train_length` must be an integer of 2 or more.*train_length=None'),
        ({"train_length": 1}, "`train_length` must be.*train_length=1"),
        ({"train_length": 7.5}, "`train_length` must be.*train_length=7.5"),
        ({"train_length": True}, "`train_length` must be.*train_length=True"),
        ({"normalizer": "softmax", "train_length": 9}, "`train_length` goes with.*'softmax'"),
        ({"normalizer": SSMax(), "train_length": 9}, "`train_length` goes with.*SSMax"),
        ({"train_length": 9, "causal": 1}, "`causal` must be True or False.*causal=1"),
        ({"normalizer": "sparsemax"}, "`normalizer` must be one of"),
        ({"normalizer": SSMax(axis=1)}, "`normalizer` must have axis=-1"),
    ],
)  # fmt: skip
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_attention(model_of(multi_head()), **arguments)


@pytest.mark.parametrize(
    "model", [keras.layers.Dense(3), keras.Sequential([keras.layers.Dense(3)]), None]
)
def test_what_is_no_built_model(model):
    with pytest.raises(TypeError, match="`model` must be a `keras.Model` that is built"):
        convert_attention(model, "softmax")


@pytest.mark.parametrize("where", ["embedding", "dense", "attention/query"])
def test_lora_is_named(where):
    dense, attention = keras.layers.Dense(6, name="dense"), multi_head()
    tokens = keras.Input((5,))
    embedding = keras.layers.Embedding(9, 6, name="embedding")
    x = dense(embedding(tokens))
    model = keras.Model(tokens, attention(x, x), name="model")
    layers = {"embedding": embedding, "dense": dense, "attention/query": attention.query_dense}
    layers[where].enable_lora(2)
    with pytest.raises(ValueError, match=f"can be converted.*\n- model/{where}: LoRA is enabled$"):
        convert_attention(model, "softmax")


def test_classes_of_one_name_are_named():
    first, second = (type("Same", (custom.InBuild,), {}) for _ in range(2))
    with pytest.raises(ValueError, match="that files can tell apart.*Same` and .*of them 'Same'"):
        convert_attention(model_of(first(6), second(6)), "softmax")


def test_a_copy_of_another_class_is_named():
    model = model_of(custom.Becomes(6, name="block"))
    with pytest.raises(ValueError, match="makes their class.*model/block, a `Becomes`.*InBuild`"):
        convert_attention(model, "softmax")


def test_a_class_that_cannot_build_itself_is_named():
    model = custom.TwoArguments(name="model")
    model(np.zeros((1, 5, 6), "float32"), np.zeros((1, 7, 6), "float32"))
    with (
        pytest.warns(UserWarning, match="cannot be built automatically"),
        pytest.raises(ValueError, match="model/attention, a .*copy is not built.*needs a `build`"),
    ):
        convert_attention(model, "softmax")


def test_weights_that_no_configuration_makes_are_named():
    model = model_of(multi_head())
    model.extra = keras.layers.Dense(3, name="extra")
    model.extra.build((None, 6))
    if len(model.weights) == 8:
        pytest.skip("this Keras does not count the layer among the model's")
    with pytest.raises(ValueError, match="10 weights, and 8 in a copy.*extra/kernel, extra/bias"):
        convert_attention(model, "softmax")


def test_a_dtype_policy_that_no_configuration_has_is_named():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = model_of(custom.InBuild(6, name="block", dtype="bfloat16"))
    finally:
        keras.config.set_dtype_policy(policy)
    message = r"model/block/\w+, a .*keeps float32 and computes in bfloat16.*of float32 and"
    with pytest.raises(ValueError, match=message):
        convert_attention(model, "softmax")


def test_a_layer_that_no_file_would_bring_back_is_named():
    model = model_of(custom.EmbeddedAttention(name="block"))
    with pytest.raises(ValueError, match="model/block: `EmbeddedAttention`.*could not be loaded"):
        convert_attention(model, "softmax")
