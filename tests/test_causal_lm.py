"""The language model, and the tokens that it generates."""

import keras
import numpy as np
import pytest
from helpers import FORMATS, changed, predict, reload, to_numpy, values
from scripts.cases import NORMALIZERS, TRAVELERS, randomize

from keras_ssattn.layers import QueryAwareScale, RotaryEmbedding, Softmax
from keras_ssattn.models import CausalLM, generate
from keras_ssattn.models.generation import sample

VOCABULARY = 13
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


def language_model(**options):
    sizes = {"hidden_size": 12, "num_layers": 2, "num_heads": 2}
    return randomize(CausalLM(VOCABULARY, **{**sizes, **options}))


def tokens(batch=4, time=9, seed=3):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (batch, time))


OPTIONS = {
    **{name: {"normalizer": NORMALIZERS[name]} for name in TRAVELERS},
    "query_aware": {"normalizer": lambda: Softmax(length_scale=QueryAwareScale())},
    "no_positions": {"rotary": None},
    "partial_rotary": {"rotary": lambda: RotaryEmbedding(fraction=0.5, theta=500.0)},
    "window": {"sliding_window": 3},
    "groups": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "plain": {"ffn_type": "standard", "norm": "layer_norm", "use_bias": True},
    "untied": {"tie_embeddings": False},
    "padding": {"padding_id": 0},
}


def make(options):
    options = {k: v() if callable(v) else v for k, v in OPTIONS[options].items()}
    return language_model(num_layers=1, **options)


def assert_greedy(model, prompts, generated):
    """Each new token is the likeliest one after those before it, by one pass without a cache."""
    rows = [[*prompt, *new] for prompt, new in zip(prompts, generated, strict=True)]
    text = np.zeros((len(rows), max(len(row) for row in rows)), "int32")
    for i, row in enumerate(rows):
        text[i, : len(row)] = row
    likeliest = predict(model, text).argmax(-1)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        expected = likeliest[i, len(prompt) - 1 : len(row) - 1]
        assert row[len(prompt) :] == expected.tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_generates_what_the_model_without_a_cache_does(options):
    model = make(options)
    generated = model.generate(PROMPTS, max_new_tokens=6)
    assert [(new.dtype, new.shape) for new in generated] == [("int32", (6,))] * len(PROMPTS)
    assert_greedy(model, PROMPTS, generated)


def test_padding_in_a_prompt_and_among_new_tokens_is_not_seen():
    model = make("padding")
    embeddings = to_numpy(model.token_embedding.embeddings)
    embeddings[0] *= 3.0  # so that the padding is generated, too
    model.token_embedding.set_weights([embeddings])
    prompts = [[3, 0, 4, 0, 5], [9, 2], [0, 0, 7]]
    generated = model.generate(prompts, 8)
    assert 0 in np.concatenate(generated)
    assert_greedy(model, prompts, generated)


def test_generates_with_the_weights_of_the_moment():
    model = language_model()
    before = model.generate(PROMPTS, 8)
    randomize(model, seed=5)
    after = model.generate(PROMPTS, 8)
    assert_greedy(model, PROMPTS, after)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


def test_generates_with_another_theta():
    model = language_model()
    model.generate(PROMPTS, 8)
    for block in model.blocks:
        block.attention.rotary.theta = 20.0
    assert_greedy(model, PROMPTS, model.generate(PROMPTS, 8))


@pytest.mark.parametrize("prompts", [np.array([[1, 2, 3], [4, 5, 6]]), [(1, 2, 3), (4, 5, 6)]])
def test_prompts_of_any_kind(prompts):
    model = language_model()
    expected = model.generate([[1, 2, 3], [4, 5, 6]], 3)
    np.testing.assert_array_equal(model.generate(prompts, 3), expected)
    np.testing.assert_array_equal(
        model.generate(keras.ops.convert_to_tensor(np.array(prompts)), 3), expected
    )


def test_stop_tokens_end_a_row_and_are_kept():
    model = language_model()
    free = [x.tolist() for x in model.generate(PROMPTS, 8)]
    stop = free[0][2]
    stopped = model.generate(PROMPTS, 8, stop_tokens=[stop])
    for row, cut in zip(free, stopped, strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert cut.tolist() == row[:end]


def test_generation_ends_when_every_row_has(monkeypatch):
    model, steps = language_model(), []
    monkeypatch.setattr(
        model, "next_logits", lambda *a: steps.append(1) or CausalLM.next_logits(model, *a)
    )
    model.generate(PROMPTS, 50, stop_tokens=range(VOCABULARY))
    if keras.backend.backend() == "torch":  # the others trace it twice, whatever is run
        assert len(steps) == 1


def test_seed_makes_draws_repeatable():
    model, options = language_model(), {"temperature": 2.0}
    first, same, other = (model.generate(PROMPTS, 20, seed=s, **options) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (np.array(first) != np.array(other)).any()
    assert (first[0] != first[1]).any()  # each row has draws of its own


# Drawing a token


def probabilities(logits, temperature, top_k, top_p):
    """What `sample` should draw from, by a loop in float64."""
    logits = np.asarray(logits, "float64") / temperature
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = np.exp(logits[order] - logits.max())
    weights /= weights.sum()
    result, seen = np.zeros(len(logits)), 0.0
    for i, weight in zip(order, weights, strict=True):
        if top_p is None or seen < top_p:
            result[i] = weight
        seen += weight
    return result / result.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_draws_have_the_probabilities_of_the_oracle(temperature, top_k, top_p, rng):
    logits = rng.normal(size=7).astype("float32")
    draws = (np.arange(20000, dtype="float32") + 0.5) / 20000
    batch = keras.ops.tile(keras.ops.convert_to_tensor(logits)[None], (len(draws), 1))
    found = to_numpy(sample(batch, keras.ops.convert_to_tensor(draws), temperature, top_k, top_p))
    share = np.bincount(found, minlength=7) / len(draws)
    np.testing.assert_allclose(share, probabilities(logits, temperature, top_k, top_p), atol=2e-4)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-24])
def test_a_token_without_weight_is_never_drawn(draw, top_k):
    logits = np.array([[-1e4, 0.3, 0.1, -1e4, 0.2, -1e4]], "float32")
    found = sample(
        keras.ops.convert_to_tensor(logits), keras.ops.convert_to_tensor([draw]), 1.0, top_k
    )
    assert int(found[0]) in (1, 2, 4)


@pytest.mark.parametrize("temperature", [1e-8, 1e-40])
def test_low_temperature_takes_the_likeliest(temperature):
    model = language_model(num_layers=1)
    np.testing.assert_array_equal(
        model.generate(PROMPTS, 4, temperature=temperature, seed=0), model.generate(PROMPTS, 4)
    )


def test_one_compiled_function_serves_every_temperature():
    model = language_model(num_layers=1)
    for temperature, top_p in ((0.5, 0.9), (0.7, 0.8)):
        model.generate(PROMPTS, 2, temperature=temperature, top_p=top_p, seed=0)
    assert len(model.generators.functions) == 1


def test_generates_in_a_callback():
    model, text, found = language_model(num_layers=1), tokens(), []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: found.append(model.generate(PROMPTS, 2))
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.fit(text[:, :-1], text[:, 1:], verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(found[-1], model.generate(PROMPTS, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, ValueError, "`prompts` must have one prompt or more"),
        ({"prompts": [[1], []]}, ValueError, r"`prompts` must be token ids.*shape \(0,\)"),
        ({"prompts": [1, 2]}, ValueError, r"`prompts` must be token ids.*shape \(\)"),
        ({"prompts": [[1.0]]}, TypeError, "`prompts` must be integers.*float64"),
        ({"prompts": [[1, 13]]}, ValueError, "`prompts` must be from 0 to 12.*1 to 13"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be a positive integer"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be a number, 0 or more"),
        ({"temperature": float("nan")}, ValueError, "`temperature` must be a number, 0 or more"),
        ({"top_k": 3}, ValueError, "`top_k` and `top_p` go with a `temperature` above 0"),
        ({"temperature": 1.0, "top_k": 14}, ValueError, "`top_k` must not be more than"),
        ({"temperature": 1.0, "top_k": 0}, ValueError, "`top_k` must be a positive integer"),
        ({"temperature": 1.0, "top_p": 0.0}, ValueError, r"`top_p` must be a number in \(0, 1\]"),
        ({"prompts": 5}, TypeError, "`prompts` must be rows of token ids.*5"),
        ({"prompts": [[1, [2]]]}, TypeError, "`prompts` must be rows of token ids"),
        ({"seed": -1}, ValueError, "`seed` must be an integer, 0 or more, or None.*-1"),
        ({"stop_tokens": [99]}, ValueError, "`stop_tokens` must be from 0 to 12"),
    ],
)
def test_errors_of_generate(options, error, message):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3, **options}
    with pytest.raises(error, match=message):
        generate(language_model(num_layers=1), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 0}, "`vocabulary_size` must be a positive integer"),
        ({"hidden_size": 9}, "`hidden_size` must be a multiple of `num_heads`.*9.*num_heads=2"),
        ({"num_layers": 0}, "`num_layers` must be a positive integer"),
        ({"num_kv_heads": 3}, "`num_kv_heads` must divide `num_heads`"),
        ({"normalizer": "sparsemax"}, "`normalizer` must be"),
        ({"rotary": "rope"}, "`rotary` must be a `RotaryEmbedding` layer"),
        ({"padding_id": 13}, "`padding_id` must be a token.*padding_id=13"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\)"),
        ({"norm": "batch"}, "`norm` must be one of"),
        ({"remat": True, "dropout": 0.1}, "`remat` would draw dropout anew"),
    ],
)
def test_errors_of_the_model(options, message):
    sizes = {"vocabulary_size": 13, "hidden_size": 12, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        CausalLM(**{**sizes, **options})


# Training


def fit(model, x, y, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, **options)
    options = {"batch_size": len(x), "epochs": 3, "shuffle": False, "verbose": 0}
    return model.fit(x, y, **options).history["loss"]


@pytest.mark.parametrize("remat", [False, True])
def test_fit_lowers_the_loss_and_moves_every_weight(remat):
    model, text = language_model(remat=remat, tie_embeddings=False), tokens()
    before = values(model.trainable_weights)
    losses = fit(model, text[:, :-1], text[:, 1:])
    assert losses[-1] < losses[0]
    assert changed(before, values(model.trainable_weights)) == set(before)


def test_remat_changes_nothing_but_memory():
    text, found = tokens(), {}
    for remat in (False, True):
        keras.utils.set_random_seed(3)
        model = language_model(remat=remat)
        losses = fit(model, text[:, :-1], text[:, 1:])
        found[remat] = losses, predict(model, text)
    np.testing.assert_allclose(found[True][0], found[False][0], rtol=1e-5)
    np.testing.assert_allclose(found[True][1], found[False][1], rtol=1e-4, atol=1e-4)


def test_padding_takes_no_part_in_loss_or_attention():
    model, text = language_model(padding_id=0), tokens()
    padded = np.pad(text, ((0, 0), (0, 4)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss)
    short = model.evaluate(text[:, :-1], text[:, 1:], verbose=0)
    targets = np.pad(text[:, 1:], ((0, 0), (0, 4)))
    inputs = np.pad(text[:, :-1], ((0, 0), (0, 4)))
    np.testing.assert_allclose(model.evaluate(inputs, targets, verbose=0), short, rtol=1e-6)
    left = np.pad(text, ((0, 0), (4, 0)))
    expected = predict(model, text)
    np.testing.assert_allclose(predict(model, padded)[:, :9], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predict(model, left)[:, 4:], expected, rtol=1e-4, atol=1e-4)


def test_packed_texts_do_not_see_each_other():
    model, text = language_model(rotary=None), tokens(2, 5)
    packed = np.concatenate([text[:1], text[1:]], axis=1)
    segments = np.repeat([[0, 1]], 5, axis=1)
    found = to_numpy(model(packed, segment_ids=segments))
    np.testing.assert_allclose(found.reshape(2, 5, -1), predict(model, text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_logits_and_weights_in_float32(policy):
    model = language_model(dtype=policy)
    assert keras.utils.standardize_dtype(model(tokens()).dtype) == "float32"
    assert {w.dtype for w in model.trainable_weights} == {"float32"}
    assert [len(x) for x in model.generate(PROMPTS, 3)] == [3, 3, 3]


def test_symbolic_call_and_dynamic_length():
    model = language_model()
    inputs = keras.Input((None,), dtype="int32")
    outer = keras.Model(inputs, model(inputs))
    assert outer.output_shape == (None, None, VOCABULARY)
    for time in (4, 7):
        x = tokens(time=time)
        np.testing.assert_allclose(predict(outer, x), predict(model, x), rtol=1e-5, atol=1e-5)


def test_frozen_model_has_no_trainable_weights():
    model = CausalLM(VOCABULARY, 12, 1, 2, trainable=False)
    assert model.trainable_weights == []
    model.trainable = True
    assert any(w.name == "s" for w in model.trainable_weights)


# Files


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("options", ["ssmax_bias", "partial_rotary", "untied", "padding", "groups"])
def test_survives_saving(options, ending, tmp_path):
    model = make(options)
    loaded = reload(model, tmp_path / f"model{ending}", lambda: make(options))
    np.testing.assert_allclose(predict(loaded, tokens()), predict(model, tokens()), atol=1e-6)
    if ending == ".keras":
        assert loaded.get_config() == model.get_config()


def test_loaded_model_generates_the_same(tmp_path):
    model = language_model()
    loaded = reload(model, tmp_path / "model.keras", language_model)
    np.testing.assert_array_equal(loaded.generate(PROMPTS, 4), model.generate(PROMPTS, 4))


def test_weights_of_a_model_with_more_or_fewer_blocks_are_refused(tmp_path):
    for saved, loaded in ((2, 1), (1, 2)):
        path = tmp_path / f"{saved}.weights.h5"
        language_model(num_layers=saved).save_weights(path)
        with pytest.raises(ValueError, match=f"of {loaded} blocks. Received: num_layers={saved}"):
            language_model(num_layers=loaded).load_weights(path)


def test_theta_set_later_is_saved(tmp_path):
    model = language_model()
    for block in model.blocks:
        block.attention.rotary.theta = 20.0
    loaded = reload(model, tmp_path / "model.keras", language_model)
    assert [block.attention.rotary.theta for block in loaded.blocks] == [20.0, 20.0]
    assert model.blocks[0].get_config()["rotary"]["config"]["theta"] == 20.0
    np.testing.assert_allclose(predict(loaded, tokens()), predict(model, tokens()), atol=1e-6)
    model.blocks[0].attention.rotary.theta = 30.0
    with pytest.raises(ValueError, match="`theta` and `scaling` must be the same in every block"):
        model.get_config()


def test_options_from_numpy_are_saved(tmp_path):
    sizes = {"vocabulary_size": 13, "hidden_size": 12, "num_layers": 1, "num_heads": 2}
    options = {name: np.int64(value) for name, value in sizes.items()}
    options |= {"padding_id": np.int64(0), "dropout": np.float32(0.5), "qk_norm": np.bool_(True)}
    model = CausalLM(**options, ffn_expansion=np.float32(2), sliding_window=np.int32(3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()


def test_clone():
    model = make("ssmax_bias")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(predict(clone, tokens()), predict(model, tokens()))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_the_other_kind_of_head_are_refused(tied, tmp_path):
    path = tmp_path / "model.weights.h5"
    language_model(tie_embeddings=tied).save_weights(path)
    with pytest.raises(ValueError, match="name=projection"):
        language_model(tie_embeddings=not tied).load_weights(path)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model_keeps_its_outputs_and_survives_saving(tied, tmp_path):
    model = language_model(tie_embeddings=tied, hidden_size=32, num_layers=1)
    expected = predict(model, tokens())
    model.generate(PROMPTS, 4)
    model.quantize("int8")
    found = predict(model, tokens())
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.1
    assert_greedy(model, PROMPTS, model.generate(PROMPTS, 4))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(loaded, tokens()), found, rtol=1e-6, atol=1e-6)
