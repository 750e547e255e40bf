"""Training, precision, seeds and cloning, through Keras's own API."""

import functools

import keras
import numpy as np
import pytest
from support.cases import (
    FEATURES,
    NORMALIZERS,
    TIME,
    attention_model,
    randomize,
    sequence_model,
    sequences,
)
from support.helpers import changed, predict, to_numpy, train, values

from keras_ssattn.layers import (
    LogLengthScale,
    MultiHeadAttention,
    Softpick,
    SSMax,
    TransformerBlock,
)

# Training


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_one_step_of_fit_moves_every_trainable_weight_and_no_other(normalizer):
    model = attention_model(normalizer, use_bias=False)
    trainable = {weight.path for weight in model.trainable_weights}
    before = values(model.weights)
    train(model, sequences(), sequences(seed=4))
    assert changed(before, values(model.weights)) == trainable


@pytest.mark.parametrize(
    ("normalizer", "learned"),
    [
        ("ssmax", {"s"}),
        ("ssmax_bias", {"s", "b"}),
        ("ssmax_auto", {"s"}),
        ("softpick_scaled", {"s"}),
        ("ssmax_fixed", set()),
        ("ssmax_shift", set()),
        ("softmax", set()),
        ("softpick", set()),
        ("rectified_softpick", set()),
    ],
)
def test_learned_parameters_of_the_normalizer(normalizer, learned):
    attention = attention_model(normalizer).get_layer("attention")
    found = [w for w in attention.trainable_weights if "normalizer" in w.path]
    assert {w.name for w in found} == learned
    assert all(w.shape == (2,) for w in found)


@pytest.mark.parametrize("normalizer", ["ssmax_fixed", "ssmax_shift"])
def test_fixed_s_is_a_non_trainable_weight(normalizer):
    model = attention_model(normalizer)
    assert [w.name for w in model.non_trainable_weights] == ["s"]
    np.testing.assert_array_equal(
        to_numpy(model.non_trainable_weights[0]), np.full(2, 0.2, "float32")
    )


@pytest.mark.parametrize("in_attention", [True, False])
def test_frozen_normalizer_freezes_the_length_scale_it_is_given(in_attention):
    normalizer = Softpick(length_scale=LogLengthScale(), trainable=False)
    inputs = keras.Input((TIME, FEATURES))
    if in_attention:
        model = keras.Model(inputs, MultiHeadAttention(2, 3, normalizer=normalizer)(inputs, inputs))
    else:
        model = keras.Model(inputs, normalizer(inputs))
    assert [w.name for w in model.non_trainable_weights] == ["s"]
    layer = model.layers[-1]
    (layer.normalizer if in_attention else layer).trainable = True
    assert model.non_trainable_weights == []


@pytest.mark.parametrize("copy", ["clone", "config"])
@pytest.mark.parametrize("stand_alone", [True, False])
def test_frozen_model_that_is_copied_can_be_thawed(copy, stand_alone):
    if stand_alone:
        inputs = keras.Input((TIME,))
        model = keras.Model(inputs, SSMax(use_bias=True)(inputs))
    else:
        model = attention_model("ssmax_bias")
    names = [w.name for w in model.trainable_weights]
    model.layers[-1].trainable = False
    model = (
        keras.models.clone_model(model)
        if copy == "clone"
        else keras.Model.from_config(model.get_config())
    )
    assert model.trainable_weights == []
    model.layers[-1].trainable = True
    assert [w.name for w in model.trainable_weights] == names


def regressor(**options):
    core = sequence_model("ssmax_bias", output_mode="mean_pool", **options)
    return keras.Sequential([core, keras.layers.Dense(3, name="head")])


def run_life_cycle(model, **compile_options):
    """What compile, fit, evaluate and predict give, as numbers."""
    x, y = sequences(11), sequences(11)[:, :3].mean(-1)
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], **compile_options)
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    evaluation = model.evaluate(x, y, batch_size=4, verbose=0)
    return history["loss"], evaluation, model.predict(x, batch_size=4, verbose=0)


@pytest.fixture(scope="module")
def eager():
    """Initial weights, and the numbers of an eager run from them."""
    model = regressor()
    weights = model.get_weights()
    return weights, run_life_cycle(model, run_eagerly=True)


@pytest.fixture
def graphs_only(monkeypatch, jit_compile):
    """On PyTorch, `jit_compile=True` traces graphs and guards them, but generates no code for them.

    That takes many minutes, for Keras's own train step alone, and needs a C++ compiler.
    """
    if keras.backend.backend() == "torch" and jit_compile is True:
        if keras.version().startswith("3.9."):
            pytest.skip("torch.compile fails in the losses of Keras 3.9")
        import torch

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.first
@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_fit_evaluate_predict_agree_with_an_eager_run(jit_compile, eager, graphs_only):
    weights, (eager_loss, eager_evaluation, eager_prediction) = eager
    model = regressor()
    model.set_weights(weights)
    loss, evaluation, prediction = run_life_cycle(model, jit_compile=jit_compile)
    assert loss[1] < loss[0]
    np.testing.assert_allclose(loss, eager_loss, rtol=1e-5)
    np.testing.assert_allclose(evaluation, eager_evaluation, rtol=1e-5)
    np.testing.assert_allclose(prediction, eager_prediction, rtol=1e-4, atol=1e-5)


def test_any_batch_and_length_with_window_size_none():
    model = sequence_model(window_size=None, output_mode="mean_pool")
    batches = [(4, 7), (3, 11), (4, 5), (1, 1)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, i):
            batch, time = batches[i]
            return sequences(batch, time), np.ones((batch, 10), "float32")

    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(Batches(), epochs=2, shuffle=False, verbose=0).history["loss"]
    assert losses[1] < losses[0]
    fixed = sequence_model(window_size=11, output_mode="mean_pool")
    fixed.set_weights(model.get_weights())
    x = sequences(3, 11)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), fixed.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


# Precision


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("normalizer", ["ssmax_bias", "softpick_scaled", "rectified_softpick"])
def test_mixed_precision_fit(policy, normalizer):
    keras.config.set_dtype_policy(policy)
    model = attention_model(normalizer, use_bias=False)
    assert {w.dtype for w in model.weights} == {"float32"}
    assert model.output.dtype == policy.removeprefix("mixed_")
    before = values(model.trainable_weights)
    loss = train(model, sequences(), sequences(seed=4), epochs=3)
    assert np.isfinite(loss).all()
    assert changed(before, values(model.trainable_weights)) == set(before)
    assert {w.dtype for w in model.weights} == {"float32"}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("output_mode", ["last_timestep", "all", "mean_pool"])
def test_mixed_precision_agrees_with_float32(policy, output_mode):
    reference = randomize(sequence_model("ssmax_bias", output_mode=output_mode))
    keras.config.set_dtype_policy(policy)
    model = sequence_model("ssmax_bias", output_mode=output_mode)
    model.set_weights(reference.get_weights())
    x = sequences()
    y = model(x)
    assert keras.utils.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    tolerance = {"mixed_bfloat16": 0.1, "mixed_float16": 0.02}[policy]
    np.testing.assert_allclose(predict(model, x), predict(reference, x), atol=tolerance)


def test_mixed_precision_keeps_s_exact():
    # 1.003 is not a bfloat16: n^s would be off by far more than rounding of the logits.
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = SSMax(init_s=1.003)
    layer.build((None, 1000))
    assert float(layer.s) == pytest.approx(1.003, abs=1e-7)
    logits = np.zeros((1, 1000), "float32")
    logits[0, 0] = 1.0
    e = np.exp(1.003 * np.log(1000.0))
    assert float(layer(logits)[0, 0]) == pytest.approx(e / (e + 999), rel=2**-8)


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_pure_half_precision_fit_is_finite(policy):
    keras.config.set_dtype_policy(policy)
    model = attention_model("ssmax_bias")
    assert {w.dtype for w in model.weights} == {policy}
    loss = train(model, sequences(), sequences(seed=4), learning_rate=0.05, epochs=3)
    assert np.isfinite(loss).all()
    assert np.isfinite(predict(model, sequences())).all()


# Seeds


def run_with_dropout(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((TIME, FEATURES))
    x = MultiHeadAttention(2, 3, dropout=0.3, name="attention")(inputs, inputs)
    x = TransformerBlock(2, causal=True, dropout=0.3, name="block")(x)
    model = keras.Model(inputs, x)
    loss = train(model, sequences(), sequences(seed=4), 0.1, batch_size=4, shuffle=True)
    return loss, np.concatenate([w.ravel() for w in model.get_weights()])


def test_set_random_seed_makes_a_run_repeatable():
    loss, weights = run_with_dropout(5)
    same_loss, same_weights = run_with_dropout(5)
    other_loss, _ = run_with_dropout(6)
    assert same_loss == loss
    np.testing.assert_array_equal(same_weights, weights)
    assert other_loss != loss


@pytest.mark.parametrize("part", ["attention", "block"])
def test_dropout_acts_in_training_only(part):
    inputs = keras.Input((TIME, FEATURES))
    if part == "attention":
        outputs = MultiHeadAttention(2, 3, dropout=0.5, seed=3)(inputs, inputs)
    else:
        outputs = TransformerBlock(2, dropout=0.5)(inputs)
    model = keras.Model(inputs, outputs)
    x = sequences()
    np.testing.assert_array_equal(predict(model, x), predict(model, x))
    first, second = (to_numpy(model(x, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-2


# Cloning


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_clone_model(normalizer):
    model = randomize(sequence_model(normalizer))
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    assert clone.get_config() == model.get_config()
    x = sequences()
    assert np.abs(predict(clone, x) - predict(model, x)).max() > 1e-2
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(predict(clone, x), predict(model, x))
