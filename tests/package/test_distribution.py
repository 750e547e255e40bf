"""Training on several devices gives what training on one gives."""

import json
import re

import keras
import numpy as np
import pytest
from support import SCRIPTS
from support.helpers import launch

from keras_ssattn.distribution import layout_map
from keras_ssattn.models import CausalLM


def results(script, kinds, folder):
    for kind in kinds:
        launch(SCRIPTS / script, kind, folder / f"{kind}.json")
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in kinds}


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
