"""The mirror of Edifice: `build` and its neighbors."""

import inspect

import keras
import numpy as np
import pytest
from support import oracle
from support.cases import NAMES, randomize
from support.helpers import relative_error, to_numpy

import keras_ssattn
from keras_ssattn import ops, softpick, ssmax
from keras_ssattn.layers import RotaryEmbedding, SSMax, TransformerBlock


def small(**options):
    return keras_ssattn.build(
        **{"embed_dim": 5, "hidden_size": 12, "num_heads": 3, "num_layers": 2,
           "window_size": 7, **options}
    )  # fmt: skip


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, 7, 5)).astype("float32")


def test_defaults():
    model = keras_ssattn.build(embed_dim=256)
    assert model.input_shape == (None, 60, 256)
    assert model.output_shape == (None, 256)
    assert [layer.name for layer in model.layers] == [
        "state_sequence",
        *[name for i in range(1, 6) for name in (f"ssmax_block_{i}", f"inter_block_dropout_{i}")],
        "ssmax_block_6",
        "final_norm",
        "last_timestep",
    ]
    block = model.get_layer("ssmax_block_3")
    assert block.causal
    assert block.norm_position == "pre"
    assert block.attention.num_heads == 4
    assert block.attention.key_dim == 64
    assert block.feed_forward.inner_size == 1024
    assert block.dropout == model.get_layer("inter_block_dropout_3").rate == 0.1
    # 4 projections, two layer norms and 256 -> 1024 -> 256 a block, one s a head; a last norm
    per_block = 4 * (256 * 256 + 256) + 4 * 256 + (256 * 1024 + 1024) + (1024 * 256 + 256) + 4
    assert model.count_params() == 6 * per_block + 2 * 256


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"sliding_window": 3}, {"sliding_window": 3, "causal": False}],
)
def test_ssmax_starts_as_softmax_over_the_window(options):
    """s log n is 1 on average over the queries; n by the masks of attention."""
    s = to_numpy(small(**options).get_layer("ssmax_block_2").attention.normalizer.s)
    n = ops.key_count(
        7, 7, causal=options.get("causal", True), window=options.get("sliding_window")
    )
    np.testing.assert_allclose(s, 1 / np.mean(np.log(to_numpy(n))), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"window_size": None}, 0.2),  # where the layer starts
        ({"window_size": 1}, 0.2),  # of one key s has no effect
        ({"normalizer": SSMax()}, 0.2),
        ({"normalizer": SSMax(init_s=1.0)}, 1.0),
    ],
)
def test_ssmax_starts_where_it_is_told(options, start):
    s = small(**options).get_layer("ssmax_block_1").attention.normalizer.s
    np.testing.assert_allclose(to_numpy(s), start, rtol=1e-6)


def test_names_of_variables_are_stable():
    paths = [v.path for v in small(num_layers=1).trainable_variables]
    block = "ssmax_block_1/"
    assert sorted(paths) == sorted(
        [
            "input_projection/kernel",
            "input_projection/bias",
            block + "attention/normalizer/length_scale/s",
            *[
                f"{block}attention/{name}/{kind}"
                for name in ("query", "key", "value", "attention_output")
                for kind in ("kernel", "bias")
            ],
            *[
                f"{block}{name}/{kind}"
                for name in ("attention_norm", "feed_forward_norm")
                for kind in ("gamma", "beta")
            ],
            *[
                f"{block}feed_forward/{name}/{kind}"
                for name in ("up", "down")
                for kind in ("kernel", "bias")
            ],
            "final_norm/gamma",
            "final_norm/beta",
        ]
    )


@pytest.mark.parametrize("normalizer", NAMES)
def test_is_the_composition_of_its_layers(normalizer, x):
    model = small(normalizer=normalizer, output_mode="all")
    y = x
    for layer in model.layers[1:]:
        y = layer(y)
    np.testing.assert_allclose(to_numpy(model(x)), to_numpy(y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalizer", NAMES)
def test_causal(normalizer, x):
    model = small(normalizer=normalizer, output_mode="all")
    changed = x.copy()
    changed[:, 4:] += 1.0
    before, after = to_numpy(model(x)), to_numpy(model(changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert relative_error(before[:, 4:], after[:, 4:]) > 1e-3


@pytest.mark.parametrize("normalizer", NAMES)
def test_output_modes(normalizer, x):
    models = {m: small(normalizer=normalizer, output_mode=m)
              for m in ("all", "last_timestep", "mean_pool")}  # fmt: skip
    for model in models.values():
        model.set_weights(models["all"].get_weights())
    steps = to_numpy(models["all"](x))
    np.testing.assert_array_equal(to_numpy(models["last_timestep"](x)), steps[:, -1])
    mean = to_numpy(models["mean_pool"](x))
    np.testing.assert_allclose(mean, steps.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["all", "last_timestep", "mean_pool"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("normalizer", NAMES)
def test_padding_is_invisible(normalizer, side, mode, x):
    model = small(normalizer=normalizer, output_mode=mode, window_size=None)
    kept = np.arange(7) >= 3 if side == "left" else np.arange(7) < 4
    expected = to_numpy(model(x[:, kept]))
    actual = to_numpy(model(x, mask=np.broadcast_to(kept, (3, 7))))
    actual = actual[:, kept] if mode == "all" else actual
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["last_timestep", "mean_pool"])
@pytest.mark.parametrize("normalizer", NAMES)
def test_a_fully_padded_sequence_is_finite(normalizer, mode, x):
    model = small(normalizer=normalizer, output_mode=mode)
    mask = np.array([[True] * 7, [False] * 7, [True] * 7])
    actual = to_numpy(model(x, mask=mask))
    np.testing.assert_array_equal(actual[1], np.zeros(12))
    np.testing.assert_allclose(actual[[0, 2]], to_numpy(model(x))[[0, 2]], rtol=1e-5, atol=1e-6)


def test_no_projection_no_dropout_no_final_norm():
    model = small(embed_dim=12, dropout=0.0, final_norm=False, output_mode="all")
    names = [layer.name for layer in model.layers]
    assert names == ["state_sequence", "ssmax_block_1", "ssmax_block_2"]


def test_normalizer_layer_and_model_name():
    scale = keras_ssattn.LogLengthScale(init_s=0.3)
    model = small(normalizer=keras_ssattn.Softpick(length_scale=scale), name="mine")
    assert model.name == "mine"
    block = model.get_layer("softpick_block_2")
    np.testing.assert_allclose(to_numpy(block.attention.normalizer.length_scale.s), [0.3] * 3)
    assert small(normalizer="softpick").name == "softpick_transformer"


@pytest.mark.parametrize(
    ("options", "sees_order"),
    [
        ({"rotary": "default"}, True),
        ({"rotary": "default", "causal": False, "output_mode": "mean_pool"}, True),
        ({"num_layers": 1}, False),  # the last step sees the others as a set
        ({"causal": False, "output_mode": "mean_pool"}, False),
    ],
)
def test_order_is_seen_with_positions_alone(options, sees_order, x):
    model = randomize(small(**options))
    permuted = x[:, [3, 0, 5, 1, 4, 2, 6]]
    moved = relative_error(to_numpy(model(permuted)), to_numpy(model(x)))
    assert moved > 1e-3 if sees_order else moved < 1e-5


@pytest.mark.parametrize("normalizer", NAMES)
def test_sees_the_future_unless_causal(normalizer, x):
    changed = x.copy()
    changed[:, -1] += 1.0
    for causal in (True, False):
        options = {"rotary": "default", "causal": causal, "output_mode": "all"}
        model = randomize(small(normalizer=normalizer, **options))
        moved = np.abs(to_numpy(model(changed)) - to_numpy(model(x)))[:, :-1].max()
        assert moved == 0.0 if causal else moved > 1e-3


# Every option beyond Edifice's, with another value than its default.
MORE = {
    "causal": False,
    "rotary": RotaryEmbedding(theta=500.0),
    "num_kv_heads": 1,
    "sliding_window": 4,
    "qk_norm": True,
    "use_gate": True,
    "ffn_type": "gated",
    "activation": "relu",
    "norm": "rms_norm",
    "implementation": "dense",
}


def test_more_options_are_those_of_the_block():
    ours = inspect.signature(keras_ssattn.build).parameters
    blocks = inspect.signature(TransformerBlock).parameters
    assert [name for name in ours if name in MORE] == list(MORE)
    for name, given in MORE.items():
        default = ours[name].default
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert default == (True if name == "causal" else blocks[name].default)
        assert given != default


@pytest.mark.parametrize("module", [keras_ssattn, ssmax, softpick])
def test_options_reach_every_block(module):
    model = module.build(
        5, hidden_size=12, num_heads=3, num_layers=3, window_size=7, dropout=0.0, **MORE
    )
    assert module.output_size(hidden_size=12, **MORE) == 12
    blocks = [layer for layer in model.layers if isinstance(layer, TransformerBlock)]
    assert len(blocks) == 3
    for block in blocks:
        config = block.get_config()
        rotary, activation = config.pop("rotary"), config.pop("activation")
        assert rotary["config"]["theta"] == block.attention.rotary.theta == 500.0
        assert keras.activations.get(activation) is keras.activations.relu
        assert config.items() >= {k: v for k, v in MORE.items() if k in config}.items()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible_with_more_options(side, x):
    options = {**MORE, "output_mode": "mean_pool", "window_size": None}
    model = randomize(small(**options))
    kept = np.arange(7) >= 3 if side == "left" else np.arange(7) < 4
    actual = to_numpy(model(x, mask=np.broadcast_to(kept, (3, 7))))
    expected = to_numpy(model(x[:, kept]))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
    padded = x * kept[:, None]  # as `Masking` marks it
    masked = keras.Sequential([keras.Input((None, 5)), keras.layers.Masking(), model])
    np.testing.assert_allclose(to_numpy(masked(padded)), actual, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "offset_rms_norm"])
def test_more_options_are_saved(norm, x, tmp_path):
    options = {**MORE, "norm": norm, "output_mode": "mean_pool", "window_size": None}
    model = randomize(small(**options))
    kept = np.arange(7) < 4
    masked = keras.Sequential([keras.Input((None, 5)), keras.layers.Masking(), model])
    masked.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    inputs = x * kept[:, None]
    np.testing.assert_array_equal(to_numpy(loaded(inputs)), to_numpy(masked(inputs)))
    new = small(**options)
    model.save_weights(tmp_path / "model.weights.h5")
    new.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(to_numpy(new(x)), to_numpy(model(x)))


@pytest.mark.parametrize("module", [ssmax, softpick])
def test_modules_build_their_own(module, x):
    name = module.__name__.rpartition(".")[2]
    model = module.build(embed_dim=5, hidden_size=12, num_heads=3, num_layers=1, window_size=7)
    assert model.layers[2].attention.normalizer.name == "normalizer"
    assert model.layers[2].name == f"{name}_block_1"
    assert model.name == f"{name}_transformer"
    assert module.output_size() == 256
    assert module.output_size(hidden_size=12, num_layers=3) == 12


def test_compute(rng):
    logits = rng.normal(size=(3, 7)).astype("float32")
    expected = oracle.normalize("ssmax", logits, s=0.5, n=100)
    np.testing.assert_allclose(to_numpy(ssmax.compute(logits, 0.5, 100)), expected, rtol=1e-6)
    assert keras_ssattn.compute is ssmax.compute
    shift = to_numpy(ssmax.compute(logits, 0.5, 100, formula="shift"))
    np.testing.assert_allclose(shift, oracle.normalize("softmax", logits), rtol=1e-6)
    expected = oracle.normalize("softpick", logits.T).T
    np.testing.assert_allclose(to_numpy(softpick.compute(logits, axis=0)), expected, rtol=1e-6)


def test_layer(rng):
    logits = rng.normal(size=(3, 7)).astype("float32")
    inputs = keras.Input((7,))
    outputs = [
        ssmax.layer(inputs, name="a", init_s=0.5),
        softpick.layer(inputs, name="b"),
        keras_ssattn.layer(inputs, normalizer="rectified_softpick", name="c", epsilon=0.5),
        keras_ssattn.layer(inputs, name="d"),
    ]
    model = keras.Model(inputs, outputs)
    assert [layer.name for layer in model.layers[1:]] == ["a", "b", "c", "d"]
    expected = [
        oracle.normalize("ssmax", logits, s=0.5),
        oracle.normalize("softpick", logits),
        oracle.normalize("rectified_softpick", logits, epsilon=0.5),
        oracle.normalize("ssmax", logits, s=0.2),
    ]
    for actual, wanted in zip(model(logits), expected, strict=True):
        np.testing.assert_allclose(to_numpy(actual), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (ssmax.build_ssmax_attention, "ssmax_attn"),
        (softpick.build_softpick_attention, "softpick_attn"),
    ],
)  # fmt: skip
def test_build_attention(function, name, x):
    inputs = keras.Input((7, 5))
    model = keras.Model(inputs, function(inputs, hidden_size=12, num_heads=3))
    assert model.output_shape == (None, 7, 12)
    layer = model.get_layer(name)
    assert (layer.num_heads, layer.key_dim) == (3, 4)
    expected = to_numpy(layer(x, x, use_causal_mask=True))
    np.testing.assert_allclose(to_numpy(model(x)), expected, rtol=1e-6, atol=1e-6)
    assert function(inputs, name="other").shape == (None, 7, 256)


ERRORS = [
    (lambda: small(hidden_size=13), ValueError, "`hidden_size` must be a multiple.*13.*3"),
    (lambda: small(embed_dim=0), ValueError, "`embed_dim` must be a positive integer.*0"),
    (lambda: small(num_layers=-1), ValueError, "`num_layers` must be a positive integer.*-1"),
    (lambda: small(window_size=0), ValueError, "`window_size` must be a positive integer or None"),
    (lambda: small(dropout=1.5), ValueError, r"`dropout` must be a number in \[0, 1\).*1.5"),
    (lambda: small(output_mode="first"), ValueError, "`output_mode` must be one of.*'first'"),
    (lambda: small(normalizer="entmax"), ValueError, "`normalizer` must be one of.*'entmax'"),
    (lambda: small(rotary="yarn"), ValueError, "`rotary` must be \"default\", a.*'yarn'"),
    (lambda: small(causal="no"), ValueError, "`causal` must be True or False.*'no'"),
    (lambda: small(causal=None), ValueError, "`causal` must be True or False.*None"),
    (lambda: small(qk_norm="yes"), ValueError, "`qk_norm` must be True or False.*'yes'"),
    (lambda: small(use_gate=2), ValueError, "`use_gate` must be True or False.*2"),
    (lambda: small(final_norm="a"), ValueError, "`final_norm` must be True or False.*'a'"),
    (lambda: small(rotary=True), ValueError, "`rotary` must be.*True"),
    (lambda: small(num_kv_heads=2), ValueError, "`num_kv_heads` must divide.*num_kv_heads=2"),
    (lambda: small(sliding_window=0), ValueError, "`sliding_window` must be a positive.*0"),
    (lambda: small(norm="batch_norm"), ValueError, "`norm` must be one of.*'batch_norm'"),
    (lambda: small(ffn_type="moe"), ValueError, "`ffn_type` must be one of.*'moe'"),
    (lambda: small(activation="gellu"), ValueError, "activation.*gellu"),
    (lambda: small(implementation="flash"), ValueError, "`implementation` must be one.*'flash'"),
    (lambda: small(norm_position="post"), TypeError, "unexpected keyword.*'norm_position'"),
    (lambda: small(num_head=3), TypeError, "unexpected keyword argument 'num_head'"),
    (lambda: ssmax.build(5, window=3), TypeError, "unexpected keyword argument 'window'"),
    (lambda: ssmax.build(5, normalizer="softmax"), TypeError, "multiple values.*'normalizer'"),
    (lambda: softpick.build(5, rope=True), TypeError, "unexpected keyword argument 'rope'"),
    (lambda: ssmax.output_size(heads=3), TypeError, "unexpected keyword argument 'heads'"),
    (lambda: ssmax.output_size(hidden_size=0), ValueError, "`hidden_size` must be a positive"),
    (lambda: keras_ssattn.layer([[1.0]], normalizer="l1"), ValueError, "`normalizer` must.*'l1'"),
    (
        lambda: ssmax.build_ssmax_attention(keras.Input((7, 5)), 10, 4),
        ValueError,
        "`hidden_size` must be a multiple of `num_heads`.*10.*4",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
