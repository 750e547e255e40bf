"""What a call checks and computes, it checks and computes once."""

import collections
import functools
import sys

import keras
import numpy as np
import pytest
from support.helpers import to_numpy

import keras_ssattn
from keras_ssattn import _checks, layers, models, ops
from keras_ssattn.layers import LogLengthScale, MultiHeadAttention, Normalizer, TransformerBlock
from keras_ssattn.ops import Visibility

TOKENS = np.array([[0, 3, 1, 4], [2, 7, 1, 8]])


# One name for two lengths, T and S; and for what each block has of its own.
OF_SEVERAL = [
    ("check_integer", "a length"),
    ("check_broadcastable", "key"),
    ("check_broadcastable", "value"),
]


class Log:
    """The calls of all checks, and the tensors that each has seen, under the name of the first."""

    def __init__(self):
        self.calls, self.held, self.roots = [], [], {}

    def key(self, x):
        if isinstance(x, (str, int, float, type(None))):
            return x
        if isinstance(x, (tuple, list)):
            return tuple(self.key(y) for y in x)
        if callable(x):
            return getattr(x, "__qualname__", repr(x))
        self.held.append(x)  # so that no other object gets its id
        return "tensor", self.roots.get(id(x), id(x))

    def wrap(self, name, function):
        @functools.wraps(function)
        def check(*args, **kwargs):
            key = (name, *(self.key(x) for x in args), *(self.key(x) for x in kwargs.values()))
            self.calls.append(key)
            result = function(*args, **kwargs)
            if len(args) > 1 and keras.ops.is_tensor(result) and not np.isscalar(args[1]):
                self.held += [result, args[1]]
                if result is not args[1]:
                    self.roots[id(result)] = self.roots.get(id(args[1]), id(args[1]))
            return result

        return check

    def repeated(self):
        counts = collections.Counter(key for key in self.calls if key[:2] not in OF_SEVERAL)
        return [key for key, n in counts.items() if n > 1]


@pytest.fixture
def log(monkeypatch):
    log = Log()
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "keras_ssattn" and m]
    for name, function in list(vars(_checks).items()):
        if name.startswith("check_") or name == "to_int32":
            wrapped = log.wrap(name, function)
            for module in modules:
                if vars(module).get(name) is function:
                    monkeypatch.setattr(module, name, wrapped)
    return log


def masks_checked(log):
    return [key[2] for key in log.calls if key[0] == "check_mask" and key[2] is not None]


def built(layer, *shapes):
    layer.build(*shapes)
    return layer


def x(length=5, features=8):
    return keras.ops.ones((2, length, features))


def padding(length=5):
    return keras.ops.convert_to_tensor(np.arange(length) < np.array([[3], [length]]))


def attention_layer():
    layer = built(MultiHeadAttention(2, 4), (2, 5, 8), (2, 5, 8))
    y, mask = x(), padding()
    return lambda: layer(y, y, query_mask=mask, value_mask=mask, use_causal_mask=True)


def attention_layer_of_other_masks():
    layer = built(MultiHeadAttention(2, 4), (2, 5, 8), (2, 5, 8))
    options = {"query_mask": padding(), "value_mask": padding(), "key_mask": padding()}
    mask = keras.ops.ones((2, 5, 5), "bool")
    return lambda: layer(x(), x(), x(), attention_mask=mask, **options)


def masked_block():
    block = built(TransformerBlock(2, causal=True, rotary=layers.RotaryEmbedding()), (2, 5, 8))
    mask = padding()
    return lambda: block(x(), mask=mask)


def forward_pass():
    model = models.CausalLM(11, 8, 4, 2, padding_id=0)
    tokens = keras.ops.convert_to_tensor(TOKENS)
    return lambda: model(tokens)


def packed_pass():
    model = models.CausalLM(11, 8, 4, 2, padding_id=0, sliding_window=3)
    tokens, ids = (keras.ops.convert_to_tensor(a) for a in (TOKENS, TOKENS > 2))
    ids = keras.ops.cast(ids, "int32")
    return lambda: model(tokens, segment_ids=ids)


def decoding_step(index=4):
    model = models.CausalLM(11, 8, 4, 2, padding_id=0)
    tokens = keras.ops.convert_to_tensor(TOKENS)
    _, cache = model.next_logits(tokens, model.make_cache(2, 8))
    mask = keras.ops.ones((2, 1), "bool")
    return lambda: model.next_logits(tokens[:, :1], cache, index, mask)


def decoding_step_by_row():
    return decoding_step(keras.ops.convert_to_tensor([4, 2], "int32"))


def function():
    y = keras.ops.ones((2, 5, 2, 4))
    options = {"key_mask": padding(), "mask": keras.ops.ones((2, 1, 5, 5), "bool"), "window": 3}
    return lambda: ops.attention(y, y, y, "ssmax", causal=True, query_offset=0, **options)


def function_of_segments():
    y, ids = keras.ops.ones((2, 5, 2, 4)), keras.ops.zeros((2, 5), "int32")
    options = {"segment_ids": ids, "query_offset": keras.ops.zeros(2, "int32")}
    return lambda: ops.attention(y, y, y, "sink_softmax", causal=True, sink=0.5, **options)


CALLS = (
    attention_layer, attention_layer_of_other_masks, masked_block, forward_pass, packed_pass,
    decoding_step, decoding_step_by_row, function, function_of_segments,
)  # fmt: skip


@pytest.mark.parametrize("make", CALLS)
def test_no_check_runs_twice_in_one_call(make, log):
    call = make()
    log.calls.clear()
    call()
    assert log.calls
    assert log.repeated() == []


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (attention_layer, 1),
        (attention_layer_of_other_masks, 4),
        (masked_block, 1),
        (forward_pass, 1),
        (packed_pass, 1),
        (decoding_step, 1),
        (function, 2),
    ],
)
def test_each_mask_is_checked_once(make, count, log):
    call = make()
    log.calls.clear()
    call()
    assert len(masks_checked(log)) == len(set(masks_checked(log))) <= count


def test_the_log_notices_a_check_that_runs_twice(log):
    mask = padding()
    ops.key_count(5, 5, key_mask=mask)
    assert log.repeated() == []
    ops.key_count(5, 5, key_mask=to_numpy(mask))
    ops.key_count(5, 5, key_mask=mask)
    assert ("check_mask", "key_mask") in [key[:2] for key in log.repeated()]


# What blocks share


@pytest.fixture
def computed(monkeypatch):
    """The properties of visibilities that were computed."""
    found = []
    for name in ("count", "dense_mask"):
        original = vars(Visibility)[name].func

        def compute(self, name=name, original=original):
            found.append(name)
            return original(self)

        counted = functools.cached_property(compute)
        counted.__set_name__(Visibility, name)
        monkeypatch.setattr(Visibility, name, counted)
    return found


@pytest.mark.parametrize("implementation", ["auto", "dense", "tiled"])
@pytest.mark.parametrize("make", [forward_pass, packed_pass, decoding_step, decoding_step_by_row])
def test_count_and_mask_are_computed_once_for_all_blocks(
    make, implementation, computed, monkeypatch
):
    model = functools.partial(models.CausalLM, implementation=implementation)
    monkeypatch.setattr(models, "CausalLM", model)
    call = make()
    computed.clear()
    call()
    assert computed.count("count") == 1
    assert computed.count("dense_mask") <= 1


def test_plain_softmax_counts_nothing(computed):
    models.CausalLM(11, 8, 4, 2, normalizer="softmax")(TOKENS)
    assert "count" not in computed


# What is made


@pytest.fixture
def made(monkeypatch):
    """How many objects of a class, or of its subclasses, were made."""
    found = collections.Counter()
    for cls in (LogLengthScale, Normalizer, layers.RotaryEmbedding):
        original = cls.__init__

        def init(self, *args, cls=cls, original=original, **kwargs):
            found[cls] += 1
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    return found


@pytest.mark.parametrize("normalizer", ["ssmax", "softmax", "instance"])
def test_each_block_makes_one_normalizer(normalizer, made):
    if normalizer == "instance":
        normalizer = layers.Softpick(length_scale=LogLengthScale(0.3))
        made.clear()
    keras_ssattn.build(8, hidden_size=8, num_heads=2, num_layers=6, normalizer=normalizer)
    assert made[Normalizer] <= 7
    assert made[LogLengthScale] <= (0 if normalizer == "softmax" else 7)


def test_each_block_of_a_language_model_makes_one_normalizer_and_one_rotary_layer(made):
    models.CausalLM(11, 8, 6, 2)
    assert made[Normalizer] <= 7
    assert made[LogLengthScale] <= 7
    assert made[layers.RotaryEmbedding] <= 7
