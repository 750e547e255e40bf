"""The language model: training, precision, files, errors."""

import keras
import numpy as np
import pytest
from keras.src.saving import serialization_lib
from support.cases import VOCABULARY, tokens
from support.helpers import FORMATS, changed, predict, reload, to_numpy, values
from support.language import PROMPTS, assert_greedy, language_model, make

from keras_ssattn.layers import MultiHeadAttention, Softpick
from keras_ssattn.models import CausalLM, layer_pattern
from keras_ssattn.models.presets import CONFIGURATIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 0}, "`vocabulary_size` must be a positive integer"),
        ({"hidden_size": 9}, "`hidden_size` must be a multiple of `num_heads`.*9.*num_heads=2"),
        ({"num_layers": 0}, "`num_layers` must be a positive integer"),
        ({"num_kv_heads": 3}, "`num_kv_heads` must divide `num_heads`"),
        ({"normalizer": "sparsemax"}, "`normalizer` must be"),
        ({"rotary": "rope"}, '`rotary` must be "default", a `RotaryEmbedding` layer'),
        ({"tie_embeddings": "no"}, "`tie_embeddings` must be True or False.*'no'"),
        ({"remat": None}, "`remat` must be True or False.*None"),
        ({"qk_norm": 2}, "`qk_norm` must be True or False.*2"),
        ({"use_gate": "yes"}, "`use_gate` must be True or False.*'yes'"),
        ({"padding_id": 13}, "`padding_id` must be a token.*padding_id=13"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\)"),
        ({"norm": "batch"}, "`norm` must be one of"),
        ({"ffn_expansion": "4"}, "`ffn_expansion` must be a positive number or None.*'4'"),
        ({"ffn_expansion": True}, "`ffn_expansion` must be a positive number or None.*True"),
        ({"remat": True, "dropout": 0.1}, "`remat` would draw dropout anew"),
        ({"key_dim": 0}, "`key_dim` must be a positive integer or None.*key_dim=0"),
        ({"norm_epsilon": 0}, "`norm_epsilon` must be a positive number or None.*norm_epsilon=0"),
        ({"embedding_scale": 0}, "`embedding_scale` must be a positive number.*embedding_scale=0"),
        ({"use_bias": ["q"]}, "`use_bias` must be one of.*'query'.*use_bias='q'"),
        ({"sliding_window": [3, 4]}, "`sliding_window` must have one entry for each.*2 entries"),
        ({"rotary": []}, "`rotary` must have one entry for each layer.*0 entries for 1 layers"),
        ({"normalizer": ["softmax"] * 2}, "`normalizer` must have one entry for each layer"),
    ],
)
def test_errors_of_the_model(options, message):
    sizes = {"vocabulary_size": 13, "hidden_size": 12, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        CausalLM(**{**sizes, **options})


def test_named_configuration_of_the_ssmax_paper(monkeypatch):
    """12 layers, 12 heads, 768, 2048, 162 million parameters; only its number of rows is cut."""
    model = CausalLM.from_name("ssmax_162m", vocabulary_size=13, num_layers=1)
    block = model.blocks[0]
    assert (block.attention.num_heads, block.attention.key_dim) == (12, 64)
    assert block.feed_forward.down.kernel.shape == (2048, 768)
    rows, layers = CONFIGURATIONS["ssmax_162m"]["vocabulary_size"], 12
    per_block = block.count_params()
    head = model.count_params() - per_block - 2 * 13 * 768
    assert rows * 768 * 2 + layers * per_block + head == pytest.approx(162e6, rel=2e-3)


@pytest.mark.parametrize(("name", "millions"), [("bytes_1m", 0.8), ("bytes_11m", 10.7)])
def test_named_configurations_are_of_the_size_that_they_say(name, millions):
    model = CausalLM.from_name(name, normalizer="softpick", padding_id=0)
    assert model.count_params() / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.get_config()["padding_id"] == 0
    assert type(model.blocks[0].attention.normalizer) is Softpick


def test_unknown_name_of_a_configuration():
    with pytest.raises(ValueError, match="`name` must be one of.*ssmax_162m.*Received: name='x'"):
        CausalLM.from_name("x")


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


def test_remat_is_of_every_block_and_changes_no_number(monkeypatch):
    text, found, calls, remat_of_keras = tokens(), {}, [], keras.remat
    text[0, 6:] = 0  # padding, which the loss leaves out
    monkeypatch.setattr(keras, "remat", lambda f: calls.append(f) or remat_of_keras(f))
    for remat in (False, True):
        keras.utils.set_random_seed(3)
        model = language_model(remat=remat, padding_id=0)
        losses = fit(model, text[:, :-1], text[:, 1:])
        found[remat] = losses, predict(model, text)
        assert (len(calls) >= model.num_layers) == remat
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


@pytest.mark.parametrize("ignore_class", [None, 0])
def test_padding_after_a_text_is_a_target_unless_the_loss_ignores_it(ignore_class):
    model, text = language_model(padding_id=0), tokens(1, 5)
    padded = np.pad(text, ((0, 0), (0, 3)))
    options = {"from_logits": True, "ignore_class": ignore_class}
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(**options))
    loss = model.evaluate(padded[:, :-1], padded[:, 1:], verbose=0)
    logits = predict(model, text)[0].astype("float64")
    logits -= np.logaddexp.reduce(logits, -1, keepdims=True)
    losses = -logits[np.arange(5), padded[0, 1:6]]
    expected = losses.mean() if ignore_class is None else losses[:4].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_token_ids_that_come_as_floats_are_not_rounded_to_half():
    model = CausalLM(600, 12, 1, 2, dtype="mixed_bfloat16")
    ids = np.array([[257, 511, 599]])
    inputs = keras.Input((None,))
    outer = keras.Model(inputs, model(inputs))
    expected = predict(model, ids)
    np.testing.assert_array_equal(predict(outer, ids.astype("float32")), expected)
    np.testing.assert_array_equal(predict(model, ids.astype("float32")), expected)


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


NEW = ["wide_heads", "some_biases", "gemma", "gates", "llama3", "swan", "smollm3", "ministral",
       "three_scales"]  # fmt: skip


@pytest.mark.parametrize("options", NEW)
def test_decoding_with_a_cache_gives_the_logits_of_the_full_pass(options):
    model, text = make(options), tokens(2, 9)
    expected, cache = predict(model, text), model.make_cache(2, 9)
    _, cache = model.next_logits(text[:, :4], cache)
    for i in range(4, 9):
        logits, cache = model.next_logits(text[:, i : i + 1], cache, i)
        np.testing.assert_allclose(to_numpy(logits), expected[:, i], rtol=1e-4, atol=1e-4)


def test_embeddings_are_scaled_on_the_way_in_only():
    model, text = language_model(embedding_scale=3.0, tie_embeddings=False), tokens()
    plain = language_model(tie_embeddings=False)
    plain.set_weights(model.get_weights())
    plain.token_embedding.set_weights([3.0 * model.token_embedding.get_weights()[0]])
    np.testing.assert_allclose(predict(model, text), predict(plain, text), rtol=1e-5, atol=1e-5)
    tied, text = language_model(embedding_scale=3.0), tokens()
    hidden = tied.head.final_norm(_hidden(tied, text))
    expected = to_numpy(hidden) @ to_numpy(tied.token_embedding.embeddings).T
    np.testing.assert_allclose(predict(tied, text), expected, rtol=1e-4, atol=1e-5)


def _hidden(model, text):
    x = 3.0 * model.token_embedding(text)
    for block in model.blocks:
        x = block(x)
    return x


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swa", {}, "`name` must be one of.*swan.*Did you mean 'swan'"),
        ("swan", {}, "`sliding_window` must be an integer in the pattern 'swan'.*None"),
        ("smollm3", {"sliding_window": 4}, "`sliding_window` must be None in the pattern"),
        ("swan", {"sliding_window": 4, "every": 0}, "`every` must be a positive integer"),
    ],
)
def test_errors_of_patterns(name, options, message):
    with pytest.raises(ValueError, match=message):
        layer_pattern(name, 4, **options)


def test_patterns():
    swan = layer_pattern("swan", 5, sliding_window=3, every=2, normalizer="ssmax")
    assert swan == {
        "num_layers": 5,
        "normalizer": ["ssmax", "softmax", "ssmax", "softmax", "ssmax"],
        "rotary": [None, "default", None, "default", None],
        "sliding_window": [None, 3, None, 3, None],
    }
    smol = layer_pattern("smollm3", 4, normalizer="softmax")
    assert smol["rotary"] == ["default"] * 3 + [None]
    assert layer_pattern("ministral", 2, sliding_window=3)["rotary"] == ["default"] * 2


# Files


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "options",
    ["ssmax_bias", "partial_rotary", "untied", "padding", "groups", "wide_heads", "some_biases",
     "gemma", "gates", "llama3", "swan", "three_scales"],
)  # fmt: skip
def test_survives_saving(options, ending, tmp_path):
    model = make(options)
    loaded = reload(model, tmp_path / f"model{ending}", lambda: make(options))
    np.testing.assert_allclose(predict(loaded, tokens()), predict(model, tokens()), atol=1e-6)
    if ending == ".keras":
        assert loaded.get_config() == model.get_config()


def test_configs_mark_no_object_by_the_address_of_another_that_is_gone():
    """As while a file is written and read; the layers that only give options are gone at once."""
    marks = []
    with serialization_lib.ObjectSharingScope():
        for options in ["swan", "three_scales"] * 5:
            marks.append(make(options).get_config()["normalizer"])
            layer = MultiHeadAttention(2, 4)
            layer.build((1, 3, 8), (1, 3, 8))
            layer.query_dense.quantize("int8")
            marks.append(layer.get_config()["dtype"])
    assert "shared_object_id" not in str(marks)


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
    model.generate(PROMPTS, 2)
    model.quantize("int8")
    found = predict(model, tokens())
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.1
    assert_greedy(model, PROMPTS, model.generate(PROMPTS, 2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(loaded, tokens()), found, rtol=1e-6, atol=1e-6)
