"""Tokens that a language model generates."""

import itertools
import re

import keras
import numpy as np
import pytest
from support.cases import VOCABULARY, randomize, tokens
from support.helpers import to_numpy
from support.language import OPTIONS, PROMPTS, assert_greedy, language_model, make

from keras_ssattn.models import CausalLM, generate, generation, stream
from keras_ssattn.models.generation import sample

# PyTorch has one for the prompts and one for a step.
FUNCTIONS = 2 if keras.backend.backend() == "torch" else 1


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


def test_padding_at_the_end_of_a_prompt_is_left_out():
    model = make("padding")
    padded = np.array([[3, 0, 4, 0, 0], [9, 2, 7, 5, 0]])
    expected = model.generate([[3, 0, 4], [9, 2, 7, 5]], 5)
    np.testing.assert_array_equal(model.generate(padded, 5), expected)
    with pytest.raises(ValueError, match="`prompts` must have a token that is no padding"):
        model.generate([[3], [0, 0]], 5)


@pytest.mark.backend("tensorflow", reason="ragged tensors are TensorFlow's")
def test_ragged_prompts():
    import tensorflow as tf

    model = language_model(num_layers=1)
    expected = model.generate(PROMPTS, 4)
    np.testing.assert_array_equal(model.generate(tf.ragged.constant(PROMPTS), 4), expected)


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
    assert len(model.generators.functions) == FUNCTIONS


def test_functions_of_variables_that_the_model_had_are_let_go():
    model = language_model(num_layers=1)
    model.generate(PROMPTS, 2)
    model.quantize("int8")
    assert_greedy(model, PROMPTS, model.generate(PROMPTS, 2))
    assert len(model.generators.functions) == FUNCTIONS


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
        ({"seed": -1}, ValueError, "`seed` must be 0 or a positive integer or None.*-1"),
        ({"seed": True}, ValueError, "`seed` must be 0 or a positive integer or None.*True"),
        ({"stop_tokens": 5}, TypeError, "`stop_tokens` must be token ids.*stop_tokens=5"),
        ({"stop_tokens": [99]}, ValueError, "`stop_tokens` must be from 0 to 12"),
    ],
)
def test_errors_of_generate(options, error, message):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3, **options}
    with pytest.raises(error, match=message):
        generate(language_model(num_layers=1), **arguments)


def test_a_part_of_a_model_in_fit_generates_once_the_whole_is_synchronized(backend):
    """On JAX the model that is fitted keeps the weights; an error says so."""
    inner, text = language_model(num_layers=1), tokens()
    x = keras.Input((None,), dtype="int32")
    outer, found = keras.Model(x, inner(x)), []

    def generate_in_fit(*_, **__):
        if backend == "jax":
            with pytest.raises(RuntimeError, match=r"`jax_state_sync\(\)` of it first"):
                inner.generate(PROMPTS, 2)
            outer.jax_state_sync()
        found.append(inner.generate(PROMPTS, 2))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    outer.compile(keras.optimizers.SGD(0.1), loss)
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=generate_in_fit)
    outer.fit(text[:, :-1], text[:, 1:], verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(found[-1], inner.generate(PROMPTS, 2))


# Repetitions, several rows for each prompt, and prompts read in parts


def test_repetition_penalty_is_of_tokens_met_so_far():
    model, row, penalty = language_model(), [3, 1, 4, 1, 5], 20.0
    [found] = model.generate([row], 7, repetition_penalty=penalty)
    for token in found:
        logits = to_numpy(model(np.array([row])))[0, -1]
        met = logits[row]
        logits[row] = np.where(met > 0, met / penalty, met * penalty)
        assert token == logits.argmax()
        row = [*row, int(token)]
    assert found.tolist() != model.generate([[3, 1, 4, 1, 5]], 7)[0].tolist()


def test_min_p_leaves_the_tokens_that_are_nearly_as_probable_as_the_likeliest():
    probabilities = np.array([0.5, 0.26, 0.14, 0.1])
    logits = np.log(np.tile(probabilities, (1000, 1))).astype("float32")
    draws = ((np.arange(1000) + 0.5) / 1000).astype("float32")
    logits, draws = (keras.ops.convert_to_tensor(x) for x in (logits, draws))
    found = to_numpy(sample(logits, draws, np.float32(1.0), min_p=np.float32(0.25)))
    counts = np.bincount(found, minlength=4) / 1000
    np.testing.assert_allclose(counts, [*(probabilities[:3] / 0.9), 0.0], atol=2e-3)


def test_several_sequences_of_each_prompt():
    model, options = language_model(), {"temperature": 1.5, "min_p": 0.05, "seed": 3}
    found = model.generate(PROMPTS, 6, num_return_sequences=3, **options)
    assert len(found) == 9
    assert len({tuple(row) for row in found[:3]}) > 1
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    np.testing.assert_array_equal(found, model.generate(repeated, 6, **options))


@pytest.mark.parametrize("options", ["ssmax_bias", "window", "swan", "padding"])
@pytest.mark.parametrize("size", [3, 8, 100])
def test_prompts_read_in_parts_give_the_same(options, size):
    model = make(options)
    expected = model.generate(PROMPTS, 6)
    np.testing.assert_array_equal(model.generate(PROMPTS, 6, prefill_size=size), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5, "temperature": 1}, r"`min_p` must be a number in \(0, 1\].*1.5"),
        ({"min_p": 0.5}, "go with a `temperature` above 0, and so do `min_p`.*min_p=0.5"),
        ({"num_return_sequences": 2}, "go with a `temperature`.*num_return_sequences=2"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a positive integer"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be a positive number.*=0"),
        ({"prefill_size": 0}, "`prefill_size` must be a positive integer or None"),
    ],
)
def test_errors_of_these_options(options, message):
    with pytest.raises(ValueError, match=message):
        language_model(num_layers=1).generate(PROMPTS, 2, **options)


# Tokens as they come


def gather(steps):
    """The new tokens of each row, from those of each step."""
    steps = [*steps]
    assert {(step.dtype, step.shape) for step in steps} == {(np.dtype("int32"), steps[0].shape)}
    return [[int(x) for x in row if x >= 0] for row in np.stack(steps, axis=1)]


STREAMED = {
    "greedy, read in parts": {"prefill_size": 3},
    "drawn": {"temperature": 1.5, "top_k": 9, "top_p": 0.95, "min_p": 0.01, "seed": 3,
              "repetition_penalty": 1.7, "num_return_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize("options", STREAMED)
def test_a_stream_has_the_tokens_of_generate(options):
    model, options = language_model(), STREAMED[options]
    steps = [*model.stream(PROMPTS, 7, **options)]
    expected = model.generate(PROMPTS, 7, **options)
    assert len(steps) == 7
    assert gather(steps) == [row.tolist() for row in expected]


def test_a_stream_of_a_model_with_padding():
    model = make("padding")
    assert_greedy(model, PROMPTS, gather(model.stream(PROMPTS, 6)))


def test_a_stream_ends_with_the_last_row():
    model, options = language_model(num_layers=1), {"temperature": 3.0, "seed": 2}
    free = [row.tolist() for row in model.generate(PROMPTS, 12, **options)]
    cuts = [{len(row) for row in cut(free, stops)} for stops in STOPS]
    stops = STOPS[[len(lengths) > 1 and max(lengths) < 12 for lengths in cuts].index(True)]
    steps = [*model.stream(PROMPTS, 12, stop_tokens=stops, **options)]
    expected = cut(free, stops)
    assert gather(steps) == expected
    assert len(steps) == max(map(len, expected))
    for row, tokens_of_row in zip(expected, np.stack(steps, axis=1), strict=True):
        assert (tokens_of_row[len(row) :] == -1).all()


STOPS = [*itertools.combinations(range(VOCABULARY), 3)]


def cut(rows, stops):
    """The rows up to and with the first of these tokens."""
    ends = [next((i + 1 for i, x in enumerate(row) if x in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.backend("torch", reason="the others run what they have traced")
def test_a_stream_that_is_left_computes_nothing_more(monkeypatch):
    model, calls = language_model(num_layers=1), []
    monkeypatch.setattr(
        model, "next_logits", lambda *a: calls.append(1) or CausalLM.next_logits(model, *a)
    )
    expected = [row.tolist() for row in model.generate(PROMPTS, 3)]
    calls.clear()
    found, steps = [], model.stream(PROMPTS, 50)
    assert not calls
    for step in steps:
        found.append(step)
        if len(found) == 3:
            break
    assert gather(found) == expected
    assert len(calls) == 3
    assert gather(model.stream(PROMPTS, 3)) == expected


def test_streams_may_go_on_side_by_side():
    model = language_model(num_layers=1)
    expected = [model.generate([prompt], 5)[0].tolist() for prompt in PROMPTS]
    streams = [model.stream([prompt], 5) for prompt in PROMPTS]
    found = [np.concatenate(tokens) for tokens in zip(*streams, strict=True)]
    assert gather(found) == expected


def test_a_step_is_compiled_once():
    model, stops = language_model(num_layers=1), [(), [3], [4, 5]]
    for seed, stop_tokens in enumerate(stops):
        options = {"temperature": 1.0 + seed, "seed": seed, "stop_tokens": stop_tokens}
        [*model.stream(PROMPTS, 4, **options)]
    assert len(model.generators.functions) == 2  # one for prompts, one for steps


def test_a_stream_follows_the_seed_of_keras():
    model, found = language_model(num_layers=1), []
    for function in (model.generate, lambda *a, **k: gather(model.stream(*a, **k))):
        keras.utils.set_random_seed(5)
        found.append([list(row) for row in function(PROMPTS, 9, temperature=3.0)])
    assert found[0] == found[1]


def test_errors_of_a_stream_come_at_the_call():
    model = language_model(num_layers=1)
    with pytest.raises(ValueError, match="`prompts` must be from 0 to 12"):
        stream(model, [[99]], 3)
    with pytest.raises(ValueError, match="`top_k` and `top_p` go with a `temperature`"):
        model.stream(PROMPTS, 3, top_k=2)
    with pytest.raises(ValueError, match="`max_new_tokens` must be a positive integer"):
        model.stream(PROMPTS, 0)
    with pytest.raises(TypeError, match="stream.* got an unexpected keyword argument 'top'"):
        model.stream(PROMPTS, 3, top=2)


@pytest.mark.backend("tensorflow", reason="AutoGraph is TensorFlow's")
def test_autograph_has_nothing_to_warn_of(caplog):
    import tensorflow as tf

    tf.get_logger().addHandler(caplog.handler)
    try:
        language_model(num_layers=1).generate(PROMPTS, 1)
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert "AutoGraph" not in caplog.text


# Memory of long prompts


def test_a_prompt_read_in_parts_has_logits_of_its_last_token_alone(monkeypatch):
    model, seen = language_model(num_layers=1), []

    def next_logits(tokens, cache, *args):
        logits, cache = CausalLM.next_logits(model, tokens, cache, *args)
        seen.append((tuple(tokens.shape), tuple(logits.shape)))
        return logits, cache

    monkeypatch.setattr(model, "next_logits", next_logits)
    model.generate([[*range(12)] * 8], 1, prefill_size=16)  # 96 tokens
    assert seen[:6] == [((1, 16), (1, VOCABULARY))] * 6
    assert set(seen[6:]) <= {((1, 1), (1, VOCABULARY))}


@pytest.mark.backend("torch", reason="it runs what others compile, and shows every tensor")
def test_no_tensor_of_a_prompt_read_in_parts_is_of_its_length_squared():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.update(x.numel() for x in tree_leaves(out) if hasattr(x, "numel"))
            return out

    model, length, largest = CausalLM(300, 16, 1, 2, sliding_window=200), 512, {}
    prompt = [np.arange(length) % 300]
    for part in (None, 32):
        sizes = set()
        with Sizes():
            model.generate(prompt, 2, prefill_size=part)
        largest[part] = max(sizes)
    assert largest[None] >= length * length
    # logits of attention of one part, by head; logits of tokens would be 512 x 300
    assert largest[32] <= 2 * 32 * (length + 2)


class OfItsOwn(CausalLM):
    """With caches of its own making."""

    kind = "tuples"

    def make_cache(self, batch_size, length):
        cache = super().make_cache(batch_size, length)
        if self.kind == "dict":
            return {"blocks": cache}
        return tuple(map(tuple, cache)) if self.kind == "tuples" else (*cache, keras.ops.ones(3))

    def next_logits(self, given, cache, cache_index=0, mask=None):
        blocks = cache["blocks"] if self.kind == "dict" else cache[: len(self.blocks)]
        logits, new = super().next_logits(given, blocks, cache_index, mask)
        if self.kind == "dict":
            return logits, {"blocks": new}
        return logits, tuple(map(tuple, new)) if self.kind == "tuples" else (*new, *cache[-1:])


@pytest.mark.parametrize("kind", ["tuples", "more", "dict"])
def test_caches_of_a_model_of_ones_own(kind):
    options = {"vocabulary_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model, reference = OfItsOwn(**options), CausalLM(**options)
    model.kind = kind
    reference.set_weights(model.get_weights())
    expected = reference.generate(PROMPTS, 5)
    np.testing.assert_array_equal(model.generate(PROMPTS, 5), expected)
    np.testing.assert_array_equal(np.stack([*stream(model, PROMPTS, 5)], axis=1), expected)


def compiled(function, inputs):
    """What XLA makes of a function, as text."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function).lower(*inputs).compile().as_text()
    import tensorflow as tf

    traced = tf.function(function, jit_compile=True)
    return traced.experimental_get_compiler_ir(*map(tf.constant, inputs))(stage="optimized_hlo")


@pytest.mark.backend("jax", "tensorflow", reason="XLA can be asked what it made")
@pytest.mark.parametrize(("batch", "num_kv_heads"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_compiled_step_copies_no_cache(batch, num_kv_heads):
    """It writes one position of each cache in place, and that is all that has a cache's size."""
    if keras.backend.backend() == "tensorflow" and 1 in (batch, num_kv_heads):
        pytest.skip("TensorFlow's XLA leaves a reshape to the same shape there, and copies")
    model = CausalLM(VOCABULARY, 32, 2, num_heads=4, num_kv_heads=num_kv_heads)
    plan = generation._plan(model, tokens(batch, 5), 190, 0.0, *[None] * 4, 1, (), None, 0)
    program = compiled(generation._make_decoder(model, plan.choice), plan.inputs())
    body = re.search(r"while\(.*body=(%?[\w.\-]+)", program)[1]
    body = re.search(rf"^{re.escape(body)} \(.*?^}}", program, re.MULTILINE | re.DOTALL)[0]
    made = re.findall(
        r"^ +%?([\w\-]+)[\w.\-]* = f32\[[\d,]*256,8\]\S* (?:copy|fusion|transpose|dynamic)",
        body,
        re.MULTILINE,
    )
    assert len(made) == 4, made
    assert all("dynamic-update-slice" in name for name in made), made
