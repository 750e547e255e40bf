"""Configs, `.keras` files, files of weights, and checkpoints that do not fit."""

import inspect
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from scripts.cases import (
    FEATURES,
    NORMALIZERS,
    TIME,
    attention_model,
    randomize,
    sequence_model,
    sequences,
)

from keras_ssattn import layers
from keras_ssattn.layers import (
    FeedForward,
    LastTimestep,
    LengthScale,
    LogLengthScale,
    MeanPool,
    MultiHeadAttention,
    PositionTemperature,
    QueryAwareScale,
    QwenLogScale,
    RectifiedSoftpick,
    RotaryEmbedding,
    Softmax,
    Softpick,
    SSMax,
    TransformerBlock,
)

to_numpy = keras.ops.convert_to_numpy


def predict(model, *inputs):
    """The output in inference mode as float32; `model.predict` without compiling a function."""
    return to_numpy(keras.ops.cast(model(*inputs, training=False), "float32"))


# The contract of a layer: constructor, config, build, shapes

X = sequences(3)
CONTEXT = sequences(3, 5, 11)
N = np.arange(21, dtype="int32").reshape(3, 1, TIME)
HEADS = sequences(3, TIME, 2 * 6).reshape(3, TIME, 2, 6)

# class: (required arguments, other arguments, inputs)
LAYERS = {
    FeedForward: (
        dict(inner_size=5),
        dict(gated=True, activation="relu", use_bias=False),
        (X,),
    ),
    LastTimestep: ({}, {}, (X,)),
    LengthScale: ({}, dict(num_heads=2), (N,)),
    LogLengthScale: (
        {},
        dict(init_s="auto", use_bias=True, train_length=11, num_heads=2),
        (N,),
    ),
    MeanPool: ({}, {}, (X,)),
    MultiHeadAttention: (
        dict(num_heads=4, key_dim=3),
        dict(
            value_dim=5,
            num_kv_heads=2,
            normalizer=SSMax(init_s=0.4, use_bias=True),
            dropout=0.2,
            use_bias=False,
            output_shape=(2, 3),
            sliding_window=4,
            rotary=RotaryEmbedding(fraction=0.7),
            qk_norm=True,
            kernel_initializer="he_normal",
            bias_initializer="ones",
            kernel_regularizer="l2",
            bias_regularizer="l1",
            kernel_constraint="max_norm",
            bias_constraint="non_neg",
            seed=5,
        ),
        (X, CONTEXT),
    ),
    PositionTemperature: (
        {},
        dict(beta=0.2, original_length=4, first_position=1, num_heads=2),
        (N,),
    ),
    QueryAwareScale: ({}, dict(hidden_size=5, num_heads=2), (N, HEADS)),
    QwenLogScale: (dict(train_length=4), dict(num_heads=2), (N,)),
    RectifiedSoftpick: (
        {},
        dict(axis=(1, 2), epsilon=1e-3, length_scale=LogLengthScale(init_s=0.3)),
        (X,),
    ),
    RotaryEmbedding: (
        {},
        dict(
            theta=500.0,
            fraction=0.7,
            scaling=dict(type="yarn", factor=4, original_length=16),
        ),
        (HEADS,),
    ),
    Softmax: ({}, dict(axis=1, length_scale=LogLengthScale(use_bias=True)), (X,)),
    Softpick: ({}, dict(axis=-2, length_scale=LogLengthScale(init_s=0.3)), (X,)),
    SSMax: (
        {},
        dict(init_s="auto", use_bias=True, train_length=11, num_heads=3, axis=-1),
        (X,),
    ),
    TransformerBlock: (
        dict(num_heads=2),
        dict(
            key_dim=5,
            num_kv_heads=1,
            normalizer=Softpick(length_scale=LogLengthScale()),
            causal=True,
            cross_attention=True,
            sliding_window=4,
            rotary=RotaryEmbedding(theta=500.0),
            qk_norm=True,
            ffn_type="gated",
            ffn_expansion=1.5,
            activation="relu",
            norm="rms_norm",
            norm_position="post",
            dropout=0.2,
            use_bias=False,
        ),
        (X, CONTEXT),
    ),
}

CASES = [
    pytest.param(cls, {**required, **more}, inputs, id=f"{cls.__name__}-{label}")
    for cls, (required, other, inputs) in LAYERS.items()
    for label, more in (("defaults", {}), ("options", other))[: 2 if other else 1]
]


def call(layer, inputs):
    """Calls a layer with as many inputs as it takes."""
    takes_two = isinstance(layer, (MultiHeadAttention, QueryAwareScale)) or (
        isinstance(layer, TransformerBlock) and layer.cross_attention
    )
    return layer(*inputs[: 2 if takes_two else 1])


def test_every_public_layer_is_in_the_table():
    assert {cls.__name__ for cls in LAYERS} == set(layers.__all__) - {"Normalizer"}  # a base class


@pytest.mark.parametrize("cls", LAYERS)
def test_table_names_every_constructor_argument(cls):
    required, other, _ = LAYERS[cls]
    names = set(inspect.signature(cls).parameters) - {"args", "kwargs"}
    assert {*required, *other} == names - ({"formula"} if cls is SSMax else set())


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_config_round_trip(cls, arguments, inputs):
    layer = cls(**arguments, name="some_name", trainable=False)
    config = layer.get_config()
    assert set(inspect.signature(cls).parameters) - {"args", "kwargs"} <= set(config)
    json.dumps(config)
    again = cls.from_config(config)
    assert again.get_config() == config
    assert (again.name, again.trainable) == ("some_name", False)
    assert dir(again) == dir(layer)


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_config_holds_the_arguments(cls, arguments, inputs):
    config = cls(**arguments).get_config()
    plain = {k: v for k, v in arguments.items() if isinstance(v, (int, float))}
    assert {k: config[k] for k in plain} == plain
    for name, value in arguments.items():
        if isinstance(value, keras.Layer):
            options = {k: v for k, v in value.get_config().items() if k not in ("name", "dtype")}
            kept = config[name]["config"]
            assert config[name]["class_name"] == type(value).__name__
            heads = {"num_heads": arguments.get("num_heads")} if "num_heads" in kept else {}
            # the layer in an attention layer has one parameter per head
            assert {**{k: kept[k] for k in options}, **heads} == {**options, **heads}


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_serialization_through_keras_saving(cls, arguments, inputs):
    layer = cls(**arguments)
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert serialized["registered_name"] == f"keras_ssattn>{cls.__name__}"
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is cls
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_build_from_config_makes_the_same_layer(cls, arguments, inputs):
    layer = cls(**arguments)
    call(layer, inputs)
    again = cls.from_config(layer.get_config())
    again.build_from_config(layer.get_build_config())
    assert again.built
    assert [w.path for w in again.weights] == [w.path for w in layer.weights]
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]
    randomize(again)
    layer.set_weights(again.get_weights())
    np.testing.assert_array_equal(to_numpy(call(again, inputs)), to_numpy(call(layer, inputs)))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_symbolic_output_is_the_eager_one(cls, arguments, inputs, policy):
    layer = cls(**arguments, dtype=policy)
    symbolic = [
        keras.Input((None, *x.shape[2:]), dtype=str(x.dtype)) if x.ndim > 2 else x for x in inputs
    ]
    if isinstance(layer, LengthScale):
        symbolic[0] = keras.Input((1, None), dtype="int32")
    spec = call(layer, symbolic)
    y = call(layer, inputs)
    assert spec.dtype == keras.utils.standardize_dtype(y.dtype)
    assert len(spec.shape) == len(y.shape)
    assert all(a in (None, b) for a, b in zip(spec.shape, y.shape, strict=True))
    assert spec.shape[-1] in (y.shape[-1], None)


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_compute_output_shape(cls, arguments, inputs):
    layer = cls(**arguments)
    y = call(layer, inputs)
    takes_two = isinstance(layer, (MultiHeadAttention, QueryAwareScale))
    shapes = [x.shape for x in inputs][: 2 if takes_two else 1]
    assert tuple(layer.compute_output_shape(*shapes)) == tuple(y.shape)


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_supports_masking_and_keeps_or_drops_the_mask(cls, arguments, inputs):
    layer = cls(**arguments)
    if isinstance(layer, LengthScale):
        assert not layer.supports_masking
        return
    assert layer.supports_masking
    mask = np.ones((3, TIME), bool)
    kept = layer.compute_mask(inputs[0], mask)
    assert kept is (None if cls in (LastTimestep, MeanPool) else mask)


# Files

FORMATS = [".keras", ".weights.h5"]


def reload(model, path, make):
    """Saves a model and loads it, into a new `make()` where the file has weights only."""
    if path.name.endswith(".keras"):
        model.save(path)
        return keras.saving.load_model(path)
    model.save_weights(path)
    fresh = make()
    fresh.load_weights(path)
    return fresh


def assert_survives(make, path, x, change=randomize):
    model = change(make())
    loaded = reload(model, path, make)
    assert type(loaded) is type(model)
    assert [w.shape for w in loaded.weights] == [w.shape for w in model.weights]
    np.testing.assert_allclose(predict(loaded, x), predict(model, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_attention_survives_saving(normalizer, ending, tmp_path):
    assert_survives(lambda: attention_model(normalizer), tmp_path / f"model{ending}", X)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("normalizer", ["ssmax_bias", "softpick_scaled"])
def test_sequence_model_survives_saving(normalizer, ending, tmp_path):
    assert_survives(lambda: sequence_model(normalizer), tmp_path / f"model{ending}", X)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "cls",
    [c for c in LAYERS if not issubclass(c, (LengthScale, RotaryEmbedding))],
    ids=lambda c: c.__name__,
)
def test_layer_with_every_option_survives_saving(cls, ending, tmp_path):
    required, other, _ = LAYERS[cls]
    x = np.concatenate([X, sequences(3, TIME, 11, seed=9)], axis=-1)

    def make():
        inputs = keras.Input((TIME, FEATURES + 11))
        parts = inputs[..., :FEATURES], inputs[..., FEATURES:]
        return keras.Model(inputs, call(cls(**required, **other, name="part"), parts))

    assert_survives(make, tmp_path / f"model{ending}", x)


@keras.saving.register_keras_serializable("keras_ssattn_tests")
class Subclassed(keras.Model):
    """A user's model whose `build` is Keras's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.masking = keras.layers.Masking()
        self.block = TransformerBlock(2, normalizer=SSMax(use_bias=True), causal=True)
        self.core = sequence_model("softpick_scaled")
        self.head = keras.layers.Dense(3)

    def call(self, inputs, training=None):
        x = self.block(self.masking(inputs), training=training)
        return self.head(self.core(x, training=training))


def subclassed():
    model = Subclassed()
    model(X)
    return model


def functional():
    inputs = keras.Input((TIME, FEATURES))
    x = keras.layers.Masking()(inputs)
    x = TransformerBlock(2, normalizer="rectified_softpick", name="block")(x)
    return keras.Model(inputs, keras.layers.Dense(3)(sequence_model("ssmax_bias")(x)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            keras.layers.Masking(),
            sequence_model("ssmax_bias"),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("make", [functional, sequential, subclassed])
def test_models_of_the_user_survive_saving(make, ending, tmp_path):
    x = X.copy()
    x[1, 3:] = 0.0
    assert_survives(make, tmp_path / f"model{ending}", x)


def test_mixed_precision_model_survives_saving(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = randomize(sequence_model("ssmax_bias"))
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {w.dtype for w in loaded.weights} == {"float32"}
    assert keras.utils.standardize_dtype(loaded(X).dtype) == "bfloat16"
    np.testing.assert_array_equal(predict(loaded, X), predict(model, X))


def test_training_continues_from_a_file(tmp_path):
    y = sequences(3, seed=4)
    options = dict(epochs=1, shuffle=False, verbose=0)
    model = attention_model("ssmax_bias")
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(X, y, **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.fit(X, y, **options).history["loss"]
    np.testing.assert_allclose(loaded.fit(X, y, **options).history["loss"], expected, rtol=1e-6)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["ssmax", "attention", "block", "feed_forward"])
def test_frozen_layer_is_frozen_when_loaded_and_can_be_thawed(frozen, tmp_path):
    inputs = keras.Input((TIME, FEATURES))
    outputs = {
        "ssmax": lambda x: SSMax(use_bias=True)(x),
        "attention": lambda x: MultiHeadAttention(2, 3)(x, x),
        "block": lambda x: TransformerBlock(2)(x),
        "feed_forward": lambda x: FeedForward(5)(x),
    }[frozen](inputs)
    model = keras.Model(inputs, outputs)
    paths = {w.path for w in model.trainable_weights}
    model.layers[-1].trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.trainable_weights == []
    loaded.layers[-1].trainable = True
    assert {w.path for w in loaded.trainable_weights} == paths


# Checkpoints that do not fit

UNFIT = [
    pytest.param(saved, loaded, f"expected {wanted} variables, but received {got} variables",
                 id=f"{saved}-{loaded}")
    for saved, got, loaded, wanted in [
        ("softmax", 0, "ssmax", 1),
        ("ssmax", 1, "softmax", 0),
        ("softpick", 0, "softpick_scaled", 1),
        ("softpick_scaled", 1, "softpick", 0),
        ("rectified_softpick", 0, "ssmax_bias", 2),
        ("ssmax_bias", 2, "rectified_softpick", 0),
        ("ssmax", 1, "ssmax_bias", 2),
        ("ssmax_bias", 2, "ssmax", 1),
    ]
]  # fmt: skip


def save(model, path):
    model.save(path) if path.suffix == ".keras" else model.save_weights(path)
    return path


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_weights_with_s_or_b_too_many_or_too_few_do_not_load(
    saved, loaded, message, ending, tmp_path
):
    path = save(attention_model(saved), tmp_path / f"model{ending}")
    with pytest.raises(ValueError, match=message):
        attention_model(loaded).load_weights(path)


@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_keras_file_with_s_or_b_too_many_or_too_few_does_not_load(saved, loaded, message, tmp_path):
    weights = save(sequence_model(saved, name="core"), tmp_path / "weights.keras")
    config = save(sequence_model(loaded, name="core"), tmp_path / "config.keras")
    with (
        zipfile.ZipFile(weights) as has_weights,
        zipfile.ZipFile(config) as has_config,
        zipfile.ZipFile(tmp_path / "both.keras", "w") as both,
    ):
        both.writestr("config.json", has_config.read("config.json"))
        both.writestr("metadata.json", has_config.read("metadata.json"))
        both.writestr("model.weights.h5", has_weights.read("model.weights.h5"))
    with pytest.raises(ValueError, match=message):
        keras.saving.load_model(tmp_path / "both.keras")


@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_set_weights_with_s_or_b_too_many_or_too_few(saved, loaded, message):
    weights = attention_model(saved).get_weights()
    model = attention_model(loaded)
    with pytest.raises(
        ValueError, match=f"list of length {len(weights)}.*expecting {len(model.weights)} weights"
    ):
        model.set_weights(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "key_norm"),
        ({"ffn_type": "gated", "ffn_expansion": 4}, "gate"),
        ({"cross_attention": True}, "context_attention_norm"),
    ],
    ids=["qk_norm", "gate", "cross_attention"],
)
def test_weights_of_parts_that_the_model_lacks_do_not_load(options, message, tmp_path):
    def model(**options):
        x = keras.Input((TIME, FEATURES))
        arguments = (x, x) if "cross_attention" in options else (x,)
        return keras.Model(x, TransformerBlock(2, **options)(*arguments))

    path = save(model(**options), tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=f"(?s)name={message}.*expected 0 variables"):
        model().load_weights(path)
    path = save(model(), tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="variables, but received 0 variables"):
        model(**options).load_weights(path)


def test_file_whose_s_was_removed_does_not_load(tmp_path):
    path = save(attention_model("ssmax"), tmp_path / "model.weights.h5")
    with h5py.File(path, "r+") as file:
        (name,) = [name for name in walk(file) if "length_scale" in name]
        del file[name]
    with pytest.raises(ValueError, match="expected 1 variables, but received 0 variables"):
        attention_model("ssmax").load_weights(path)


def walk(file):
    """The paths of the arrays in an HDF5 file."""
    names = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


# Weights of Keras's own attention


def keras_attention_model(value_dim=None, **options):
    inputs = keras.Input((TIME, FEATURES))
    attention = keras.layers.MultiHeadAttention(2, 3, value_dim, name="attention", **options)
    return keras.Model(inputs, attention(inputs, inputs, use_causal_mask=True))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "options", [{}, {"use_bias": False}, {"output_shape": (4, 5)}, {"value_dim": 3}], ids=str
)
def test_weights_of_keras_attention_load(options, ending, tmp_path):
    theirs = randomize(keras_attention_model(**options))
    path = save(theirs, tmp_path / f"model{ending}")
    ours = attention_model("softmax", **options)
    ours.load_weights(path)
    np.testing.assert_allclose(predict(ours, X), predict(theirs, X), rtol=1e-5, atol=1e-6)


def test_weights_of_keras_attention_do_not_load_without_s(tmp_path):
    path = save(keras_attention_model(), tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="expected 1 variables, but received 0 variables"):
        attention_model("ssmax").load_weights(path)


# Quantized models and LoRA


def gated_block():
    inputs = keras.Input((TIME, FEATURES))
    return keras.Model(inputs, TransformerBlock(2, ffn_type="gated", name="block")(inputs))


def quantized(model):
    randomize(model).quantize("int8")
    return model


def block_in_sequential():
    return keras.Sequential(
        [keras.Input((TIME, FEATURES)), TransformerBlock(2, qk_norm=True), keras.layers.Dense(3)]
    )


@keras.saving.register_keras_serializable("keras_ssattn_tests")
class AroundBlock(keras.Model):
    """A user's model that is given its layer, which keeps its policies in its config."""

    def __init__(self, block, **kwargs):
        super().__init__(**kwargs)
        self.block = block

    def call(self, inputs):
        return self.block(inputs)

    def get_config(self):
        block = keras.saving.serialize_keras_object(self.block)
        return {**super().get_config(), "block": block}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("block")), **config)


def around_block():
    model = AroundBlock(TransformerBlock(2))
    model(X)
    return model


QUANTIZED = {
    "attention": lambda: attention_model("ssmax_bias"),
    "sequence": lambda: sequence_model("softpick_scaled"),
    "functional": functional,
    "block_in_sequential": block_in_sequential,
    "around_block": around_block,
}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("model", QUANTIZED)
def test_quantized_model_survives_saving(model, tmp_path):
    make = QUANTIZED[model]
    assert_survives(make, tmp_path / "model.keras", X, change=quantized)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    kernels = [w for w in loaded.weights if w.name == "kernel"]
    assert {w.dtype for w in kernels} == {"int8"}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_weights_of_a_quantized_model_survive_saving(tmp_path):
    model = quantized(sequence_model("ssmax_bias"))
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = sequence_model("ssmax_bias")
    fresh.quantize("int8")
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(predict(fresh, X), predict(model, X))


@pytest.mark.parametrize("ending", FORMATS)
def test_lora_is_merged_in_the_file(ending, tmp_path):
    def adapted(model):
        for projection in model.get_layer("block").projections():
            projection.enable_lora(rank=2)
        return randomize(model)

    model = adapted(gated_block())
    loaded = reload(model, tmp_path / f"model{ending}", gated_block)
    assert not [w for w in loaded.weights if "lora" in w.name]
    np.testing.assert_allclose(predict(loaded, X), predict(model, X), rtol=1e-5, atol=1e-5)
