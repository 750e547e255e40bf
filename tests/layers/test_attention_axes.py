"""`MultiHeadAttention(attention_axes=...)` against Keras's own layer, and against one axis."""

import keras
import numpy as np
import pytest
from support import oracle
from support.helpers import FORMATS, assert_survives, relative_error, to_numpy, twins

from keras_ssattn import layers
from keras_ssattn.layers import MultiHeadAttention

# attention_axes, the shape of the query and that of the value
CASES = {  # all of 4 rows, 6 queries and 4 keys, so that JAX compiles most of it once
    "last of two": (2, (2, 2, 6, 5), (2, 2, 4, 7)),
    "first of two": (1, (2, 6, 2, 5), (2, 4, 2, 7)),
    "from the end": (-2, (2, 2, 6, 5), (2, 2, 4, 7)),
    "two of two": ((1, 2), (4, 2, 3, 5), (4, 2, 2, 7)),
    "two in the other order": ((2, 1), (4, 2, 3, 5), (4, 2, 2, 7)),
    "all": (None, (4, 2, 3, 5), (4, 2, 2, 7)),
    "middle of three": ([2], (2, 1, 6, 2, 5), (2, 1, 4, 2, 7)),
    "ends of three": ((1, 3), (2, 2, 2, 3, 5), (2, 2, 2, 2, 7)),
    "three of three": ((1, 2, 3), (4, 2, 1, 3, 5), (4, 1, 2, 2, 7)),
}
ONE = ("last of two", "first of two", "middle of three")


# of which each costs JAX some seconds to compile
FEW = ("last of two", "ends of three")


@pytest.fixture(params=FEW if keras.backend.backend() == "jax" else CASES)
def case(request):
    return CASES[request.param]


def inputs_of(case, rng):
    return [rng.normal(size=shape).astype("float32") for shape in case[1:]]


def parts(case):
    """The batch and other axes, the attended ones of the query, and those of the keys."""
    axes, query, value = case
    rank = len(query)
    axes = range(1, rank - 1) if axes is None else axes
    axes = [a % rank for a in ([axes] if isinstance(axes, int) else axes)]
    others = [query[i] for i in range(rank - 1) if i not in axes]
    return tuple(others), tuple(query[i] for i in axes), tuple(value[i] for i in axes)


def some(shape, rng):
    """A mask that leaves each query its first key."""
    mask = rng.random(shape) < 0.6
    mask.reshape(shape[0], -1)[:, 0] = True
    return mask


def scores_mask(case, rng):
    """A mask of batch, other axes, query and keys, in which each query sees a key."""
    others, queries, keys = parts(case)
    mask = rng.random((*others, *queries, np.prod(keys))) < 0.6
    mask[..., 0] = True
    return mask.reshape(*others, *queries, *keys)


def pair(case):
    axes, query_shape, value_shape = case
    theirs = keras.layers.MultiHeadAttention(2, 3, attention_axes=axes)
    ours = MultiHeadAttention(2, 3, normalizer="softmax", attention_axes=axes)
    return twins(theirs, ours, query_shape, value_shape)


def attend(layer, inputs, **options):
    return [to_numpy(x) for x in layer(*inputs, return_attention_scores=True, **options)]


def fold(x, axes):
    """`[B, ..., E]` as `[B', T, E]`."""
    others = [i for i in range(x.ndim - 1) if i not in axes]
    sizes = np.prod([x.shape[i] for i in others]), np.prod([x.shape[i] for i in axes])
    return x.transpose(*others, *axes, x.ndim - 1).reshape(*sizes, x.shape[-1])


@pytest.mark.parametrize("masked", [False, True])
def test_equals_keras(case, masked, backend, rng):
    if backend == "tensorflow" and len(case[1]) == 5 and len(parts(case)[0]) == 3:
        pytest.skip("Keras's layer fails: softmax takes 5 axes at most on TensorFlow")
    if keras.version().startswith("3.9.") and isinstance(case[0], int) and case[0] < 0:
        pytest.skip("Keras's layer fails: in 3.9 it takes no axes from the end")
    inputs, (theirs, ours) = inputs_of(case, rng), pair(case)
    options = {"attention_mask": scores_mask(case, rng)} if masked else {}
    found, scores = attend(ours, inputs, **options)
    expected, their_scores = attend(theirs, inputs, **options)
    others, queries, keys = parts(case)
    assert scores.shape == (*others, 2, *queries, *keys)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(scores, their_scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_numpy(ours(*inputs, **options)), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["last of two", "two of two"])
def test_a_mask_may_lack_leading_axes_as_in_keras(name, rng):
    case = CASES[name]
    inputs, (theirs, ours) = inputs_of(case, rng), pair(case)
    full = scores_mask(case, rng)
    attended = sum(len(x) for x in parts(case)[1:])
    for lead in range(full.ndim - attended):
        mask = full.reshape(-1, *full.shape[-attended:])[0]
        mask = np.broadcast_to(mask, (*full.shape[:lead], *mask.shape))
        found, expected = (attend(x, inputs, attention_mask=mask) for x in (ours, theirs))
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-6)
    by_head = rng.random((*full.shape[:-attended], 2, *full.shape[-attended:])) < 0.6
    _, scores = attend(ours, inputs, attention_mask=by_head)
    assert (scores[~by_head] == 0).all()
    assert (scores[by_head] > 0).all()


def test_masks_of_padding_are_masks_of_scores(case, rng):
    axes, query_shape, value_shape = case
    inputs, (_, ours) = inputs_of(case, rng), pair(case)
    query_mask, value_mask = some(query_shape[:-1], rng), some(value_shape[:-1], rng)
    key_mask = some(value_shape[:-1], rng)
    others, queries, keys = parts(case)
    rank = len(query_shape)
    axes = range(1, rank - 1) if axes is None else axes
    axes = [a % rank for a in ([axes] if isinstance(axes, int) else axes)]
    rows = fold(query_mask[..., None], axes).reshape(*others, *queries, *(1 for _ in keys))
    columns = fold((value_mask & key_mask)[..., None], axes)
    columns = columns.reshape(*others, *(1 for _ in queries), *keys)
    masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
    found = attend(ours, [*inputs, inputs[1]], **masks)
    expected = attend(ours, inputs, attention_mask=np.broadcast_to(
        rows & columns, (*others, *queries, *keys)))  # fmt: skip
    for a, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ONE)
def test_masks_of_values_with_one_axis_equal_keras(name, rng):
    case = CASES[name]
    inputs, (theirs, ours) = inputs_of(case, rng), pair(case)
    if name != "last of two":  # Keras takes the axis before the features for that of the keys
        axis = 2 if name == "middle of three" else 1
        mask = some((case[2][0], case[2][axis]), rng)  # [B, S]
        shape = [1] * (len(case[2]) - 1)
        shape[0], shape[axis] = mask.shape
        whole = np.broadcast_to(mask.reshape(shape), case[2][:-1])
        found, expected = (attend(ours, inputs, value_mask=m) for m in (mask, whole))
    else:
        mask = some(case[2][:-1], rng)
        mask[..., 0] = True
        found, expected = (attend(x, inputs, value_mask=mask) for x in (ours, theirs))
    for a, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-6)


def test_attached_masks_are_honored_and_the_querys_passed_on(rng):
    case = CASES["two of two"]
    query, value = inputs_of(case, rng)
    query[0, 0, 1], value[0, 1], value[1, 1, 0] = 0, 0, 0
    _, ours = pair(case)
    attached = [keras.layers.Masking()(keras.ops.convert_to_tensor(x)) for x in (query, value)]
    found = ours(*attached)
    masks = {"query_mask": query.any(-1), "value_mask": value.any(-1)}
    np.testing.assert_array_equal(to_numpy(found._keras_mask), masks["query_mask"])
    expected = to_numpy(ours(query, value, **masks))
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-6, atol=1e-6)
    assert relative_error(to_numpy(ours(query, value)), expected) > 1e-3


@pytest.mark.parametrize("name", ONE[:2])
def test_causality_windows_and_rotation_are_those_of_the_axis(name, rng):
    """As if each row of the other axes were a sequence of the batch."""
    axis, shape, _ = CASES[name]
    axis = axis[0] if isinstance(axis, list) else axis
    x = rng.normal(size=shape).astype("float32")
    options = {"sliding_window": 2, "rotary": layers.RotaryEmbedding()}
    axes = MultiHeadAttention(2, 4, attention_axes=axis, **options)
    plain = MultiHeadAttention(2, 4, **options)
    rows = fold(x, [axis])
    axes.build(shape, shape)
    plain.build(rows.shape, rows.shape)
    plain.set_weights(axes.get_weights())
    found, scores = attend(axes, (x, x), use_causal_mask=True)
    expected, expected_scores = attend(plain, (rows, rows), use_causal_mask=True)
    np.testing.assert_allclose(fold(found, [axis]), expected, rtol=1e-5, atol=1e-6)
    scores = scores.reshape(expected_scores.shape)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)
    seen = oracle.visible(*scores.shape[2:], causal=True, window=2)
    assert ((scores > 0) == seen).all()


def test_n_is_the_number_of_visible_keys_over_all_attended_axes(case, rng):
    axes, *shapes = case
    inputs, mask = inputs_of(case, rng), scores_mask(case, rng)
    soft = MultiHeadAttention(2, 3, normalizer="softmax", attention_axes=axes)
    scaled = MultiHeadAttention(2, 3, normalizer=layers.SSMax(init_s=0.7), attention_axes=axes)
    twins(soft, scaled, *shapes)
    _, logits = attend(soft, inputs)
    _, found = attend(scaled, inputs, attention_mask=mask)
    others, queries, keys = parts(case)
    rows = (*others, 2, *queries, np.prod(keys))
    seen = np.expand_dims(mask, len(others)).repeat(2, len(others)).reshape(rows)
    n = seen.sum(-1, keepdims=True)
    assert n.min() < n.max()
    logits = np.log(logits.astype("float64").reshape(rows))  # but for a constant in each row
    expected = oracle.normalize("ssmax", logits, seen, s=0.7, n=n)
    np.testing.assert_allclose(found.reshape(rows), expected, rtol=2e-5, atol=1e-6)


def test_symbolic_shapes_are_the_eager_ones(case, rng):
    axes, *shapes = case
    layer = MultiHeadAttention(2, 3, attention_axes=axes, output_shape=(3, 2))
    eager = layer(*inputs_of(case, rng), return_attention_scores=True)
    for unknown in (False, True):
        symbols = [
            keras.Input((*(None if unknown else size for size in s[1:-1]), s[-1])) for s in shapes
        ]
        spec = layer(*symbols, return_attention_scores=True)
        for found, expected in zip(spec, eager, strict=True):
            assert len(found.shape) == len(expected.shape)
            known = zip(found.shape[1:], expected.shape[1:], strict=True)
            assert all(a == b or (unknown and a is None) for a, b in known)
    assert layer.compute_output_shape(*shapes) == tuple(eager[0].shape)
    assert layer.compute_output_shape(*((None, *s[1:]) for s in shapes))[0] is None


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("name", ["first of two", "ends of three"])
def test_survives_saving(name, ending, tmp_path, rng):
    axes, shape, _ = CASES[name]

    def make():
        inputs = keras.Input(shape[1:])
        return keras.Model(inputs, MultiHeadAttention(2, 3, attention_axes=axes)(inputs, inputs))

    x = rng.normal(size=shape).astype("float32")
    assert_survives(make, tmp_path / f"model{ending}", x)


def test_config_keeps_the_axes():
    config = MultiHeadAttention(2, 3, attention_axes=np.int64(-2)).get_config()
    assert config["attention_axes"] == (-2,)
    assert type(config["attention_axes"][0]) is int
    assert MultiHeadAttention(2, 3, attention_axes=[1, 3]).get_config()["attention_axes"] == (1, 3)
    assert MultiHeadAttention(2, 3).get_config()["attention_axes"] is None


def test_each_row_of_the_other_axes_has_its_segments(rng):
    """Of one row of segments `[B, T]` for all rows of the other axes."""
    x = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    ids = np.array([[0, 0, 1, 1], [0, 1, 1, 2]])
    layer = MultiHeadAttention(2, 3, attention_axes=2)
    mask = np.broadcast_to((ids[:, :, None] == ids[:, None])[:, None], (2, 3, 4, 4))
    expected = attend(layer, (x, x), attention_mask=mask)
    found = attend(layer, (x, x), segment_ids=ids)
    for a, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_a_cache_has_a_row_for_each_row_of_the_other_axes(rng):
    x = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    layer = MultiHeadAttention(2, 3, attention_axes=2)
    expected = to_numpy(layer(x, x, use_causal_mask=True))
    cache, found = layer.make_cache(6, 4), []
    for i in (0, 2):
        part = x[:, :, i : i + 2]
        y, cache = layer(part, part, use_causal_mask=True, cache=cache, cache_index=i)
        found.append(to_numpy(y))
    np.testing.assert_allclose(np.concatenate(found, 2), expected, rtol=1e-5, atol=1e-6)


F = np.zeros((2, 3, 4, 5), "float32")


def call(axes=None, inputs=(F, F), call_options=None, **options):
    layer = MultiHeadAttention(2, 4, attention_axes=axes, **options)
    return lambda: layer(*inputs, **(call_options or {}))


AXES = "`attention_axes` must be distinct axes of the inputs between the first"
ERRORS = {
    "batch": (call(0), AXES + r".*\(0,\).*rank 4"),
    "features": (call(3), AXES),
    "features from the end": (call(-1), AXES),
    "out of range": (call(7), AXES + r".*\(7,\)"),
    "far below": (call(-5), AXES),
    "twice": (call((1, 1)), AXES + r".*\(1, 1\)"),
    "twice from both ends": (call((2, -2)), AXES),
    "rotary": (
        call((1, 2), rotary=layers.RotaryEmbedding()),
        r"`rotary` needs one attended axis.*\(1, 2\)",
    ),
    "window": (call(sliding_window=3), "`sliding_window` needs one attended axis"),
    "causal": (
        call((1, 2), call_options={"use_causal_mask": True}),
        r"`use_causal_mask` needs one attended axis.*\(1, 2\)",
    ),
    "ranks": (call(1, (F, F[0])), r"`key` must have shape.*\(3, 4, 5\)"),
    "other axes": (
        call(1, (F, F[:, :, :2])),
        r"same of all axes that are not attended over.*\(2, 3, 4, 5\).*\(2, 3, 2, 5\)",
    ),
    "keys": (call(2, (F, F, F[:, :2])), "`value` and `key` must be equal in all sizes"),
    "mask of padding": (
        call((1, 2), call_options={"value_mask": np.ones((2, 3), bool)}),
        r"masks and segments must have the axes of.*\(2, 3\).*rank 4",
    ),
    "mask of padding of another size": (
        call((1, 2), call_options={"value_mask": np.ones((2, 3, 5), bool)}),
        "`value_mask` must",
    ),
    "mask of scores of another rank": (
        call((1, 2), call_options={"attention_mask": np.ones((3, 4), bool)}),
        "`attention_mask` must have rank 4 or 5 or 6",
    ),
    "mask of scores of another size": (
        call(2, call_options={"attention_mask": np.ones((2, 3, 4, 3), bool)}),
        r"`attention_mask` must be broadcastable to \[B, other axes, H",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    function, match = ERRORS[name]
    with pytest.raises(ValueError, match=match):
        function()


@pytest.mark.parametrize("axes", ["1", 1.0, (), (1, "2"), True, [None]])
def test_axes_that_are_no_integers_are_refused(axes):
    with pytest.raises(ValueError, match="`attention_axes` must be an integer, integers, or None"):
        MultiHeadAttention(2, 4, attention_axes=axes)
