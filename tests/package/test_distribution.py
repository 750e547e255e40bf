"""Training on several devices gives what training on one gives."""

import json
import re

import keras
import numpy as np
import pytest
from support import SCRIPTS
from support.helpers import launch

from keras_ssattn._keras.heads_layout import heads_layout
from keras_ssattn.distribution import layout_map
from keras_ssattn.layers import (
    AdaptiveLogScale,
    MultiHeadAttention,
    QueryAwareScale,
    SinkSoftmax,
    Softmax,
    SSMax,
)
from keras_ssattn.models import CausalLM


def results(script, kinds, folder):
    for kind in kinds:
        launch(SCRIPTS / script, kind, folder / f"{kind}.json")
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in kinds}


pytestmark = pytest.mark.first


@pytest.fixture(scope="module")
def on_jax(tmp_path_factory):
    kinds = ("single", "data", "model")
    return results("distribute_jax.py", kinds, tmp_path_factory.mktemp("jax"))


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
@pytest.mark.parametrize("kind", ["data", "model"])
def test_keras_distribution_on_jax(kind, on_jax):
    single, parallel = on_jax["single"], on_jax[kind]
    assert single["losses"][-1] < single["losses"][0]
    np.testing.assert_allclose(parallel["losses"], single["losses"], rtol=1e-5)
    np.testing.assert_allclose(parallel["outputs"], single["outputs"], rtol=1e-5, atol=1e-5)


SHARDED = {
    r"attention/(query|key|value)/kernel": 1,
    r"attention/(query|key|value)/bias": 0,
    r"attention/attention_output/kernel": 0,
    r"attention/normalizer/length_scale/[sb]": 0,
    r"feed_forward/up/kernel": 1,
    r"feed_forward/up/bias": 0,
    r"feed_forward/down/kernel": 0,
}


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_layout_map_splits_heads_and_feed_forward_and_nothing_else(on_jax):
    met = set()
    for path, (shape, shard) in on_jax["model"]["shards"].items():
        expected = list(shape)
        for pattern, axis in SHARDED.items():
            if re.search(pattern + "$", path):
                expected[axis] //= 2
                met.add(pattern)
        assert shard == expected, path
    assert met == set(SHARDED)


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_what_an_optimizer_keeps_is_split_as_its_weight(on_jax):
    for path, parts in on_jax["model"]["shards"].items():
        for slot in ("momentum", "velocity"):  # m and v
            assert on_jax["model"]["adam"][f"adam/{path.replace('/', '_')}_{slot}"] == parts


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_devices_add_up_and_send_nothing_else(on_jax):
    assert on_jax["model"]["exchanges"] == ["all-reduce"]


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_a_device_caches_its_own_heads_alone(on_jax):
    assert on_jax["model"]["cached_heads"] == [1]


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
@pytest.mark.parametrize(
    ("change", "variable", "size"),
    [
        ("num_heads", r"block_1/attention/query/kernel`, of shape \(12, 3, 4\)", 3),
        ("num_kv_heads", r"block_1/attention/key/kernel`, of shape \(12, 1, 6\)", 1),
        ("ffn_expansion", r"block_1/feed_forward/gate/kernel`, of shape \(12, 15\)", 15),
        ("vocabulary_size", r"token_embedding/embeddings`, of shape \(9, 12\)", 9),
    ],
)
def test_sizes_that_devices_cannot_share_are_named(change, variable, size, on_jax):
    assert re.fullmatch(
        f"`model/{variable}, must be divisible by the 2 devices of the axis 'model' where it is "
        f"split. Change .*`{change}`.*, or the devices of that axis. Received: a size of {size}",
        on_jax["model"]["errors"][change],
    )


SPLIT = {  # all that has one value per head, per inner feature or per token, and where
    "token_embedding/embeddings": 0,
    **{f"attention/{x}/kernel": 1 for x in ("query", "key", "value", "gate")},
    **{f"attention/{x}/bias": 0 for x in ("query", "key", "value", "gate")},
    "attention/attention_output/kernel": 0,
    **{f"attention/normalizer/{x}": 0 for x in ("sink", "length_scale/s", "length_scale/b")},
    **{
        f"attention/normalizer/length_scale/{x}": 0
        for x in ("beta_kernel", "beta_bias", "gamma_kernel", "gamma_bias", "factor_kernel",
                  "factor_bias")
    },
    **{f"feed_forward/{x}/kernel": 1 for x in ("gate", "up")},
    **{f"feed_forward/{x}/bias": 0 for x in ("gate", "up")},
    "feed_forward/down/kernel": 0,
    "head/projection/kernel": 1,
}  # fmt: skip


def test_nothing_that_heads_inner_features_or_tokens_have_is_left_whole():
    """In a model with every weight; its sizes say which is which."""
    heads, kv_heads, inner, vocabulary = 10, 5, 17, 13
    model = CausalLM(
        vocabulary, 8, 3, heads, kv_heads, key_dim=3, ffn_expansion=inner / 8, use_bias=True,
        use_gate=True, qk_norm=True, tie_embeddings=False,
        normalizer=[
            SSMax(use_bias=True),
            SinkSoftmax(length_scale=AdaptiveLogScale()),
            Softmax(length_scale=QueryAwareScale(hidden_size=11)),
        ],
    )  # fmt: skip
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["cpu:0", "cpu:1"])
    layouts, met = layout_map(mesh), {}
    for variable in model.variables:
        split = [
            i for i, x in enumerate(variable.shape) if x in (heads, kv_heads, inner, vocabulary)
        ]
        layout = layouts[variable.path]
        axes = layout.axes if layout else (None,) * len(variable.shape)
        assert [i for i, axis in enumerate(axes) if axis] == split, variable.path
        assert len(axes) == len(variable.shape)
        if split:
            name = re.sub(r"^causal_lm(_\d+)?/(block_\d/)?", "", variable.path)
            [met[name]] = split
    assert met == SPLIT


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_layout_map_names_a_missing_axis():
    mesh = keras.distribution.DeviceMesh((1,), ("batch",), keras.distribution.list_devices()[:1])
    with pytest.raises(ValueError, match=r"`model_axis` must be an axis.*'batch'.*'model'"):
        layout_map(mesh)


@pytest.mark.backend("tensorflow")
def test_mirrored_strategy_on_tensorflow(tmp_path):
    found = results("distribute_tensorflow.py", ("single", "mirrored"), tmp_path)
    single, mirrored = found["single"], found["mirrored"]
    assert single["losses"][-1] < single["losses"][0]
    np.testing.assert_allclose(mirrored["losses"], single["losses"], rtol=1e-5)
    np.testing.assert_allclose(mirrored["outputs"], single["outputs"], rtol=1e-5, atol=1e-5)


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_a_released_model_is_loaded_in_parts(tmp_path):
    """On four devices: each has its part of every matrix, the embedding and the head too."""
    options = {"num_heads": 4, "normalizer": "softmax", "tie_embeddings": False}
    CausalLM(48, 16, 2, **options).to_huggingface(tmp_path)
    launch(SCRIPTS / "load_distributed.py", tmp_path, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    model = CausalLM.from_huggingface(tmp_path, dtype="float32")
    np.testing.assert_allclose(found["logits"], model(np.arange(3, 20)[None]), rtol=1e-4, atol=1e-5)
    for path, (shape, parts) in found["shards"].items():
        share = 4 if len(shape) > 1 else 1
        assert [np.prod(part) * share for part in parts] == [np.prod(shape)] * 4, path
    assert found["whole"] <= 16


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
@pytest.mark.parametrize("axes", [("model",), (None, "model"), (None, "model", None)])
def test_layouts_of_ones_own_may_be_of_another_rank(axes):
    """Of patterns that match everything, what a layout can do is for Keras to say."""
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel|keras_ssattn.*"] = axes
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    with parallel.scope():
        assert heads_layout() is None
        attention = MultiHeadAttention(2, 4, implementation="tiled")
        x = np.ones((1, 3, 8), "float32")
        assert attention(x, x).shape == (1, 3, 8)
