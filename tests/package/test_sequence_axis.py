"""Attention over devices along time gives what one device gives, in a part of its memory."""

import json

import keras
import numpy as np
import pytest
from support import SCRIPTS
from support.helpers import launch

from keras_ssattn._frameworks import over_devices
from keras_ssattn._keras.heads_layout import HEADS
from keras_ssattn.distribution import layout_map
from keras_ssattn.ops import Visibility
from keras_ssattn.ops._attention.tiled import devices
from keras_ssattn.ops.kernels import Softmax

pytestmark = [
    pytest.mark.first,
    pytest.mark.backend("jax", reason="keras.distribution is for JAX"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("time") / "found.json"
    launch(SCRIPTS / "distribute_time.py", output)
    return json.loads(output.read_text())


def test_results_and_gradients_are_those_of_one_device(found):
    differences = found["differences"]
    assert len(differences) == 14
    assert {k: v for k, v in differences.items() if k != "bfloat16" and not v < 1e-5} == {}
    assert differences["bfloat16"] < 1e-2


def test_a_language_model_trains_and_generates(found):
    assert found["losses"] < 1e-5
    assert found["logits"] < 1e-4
    assert found["tokens"]


def test_second_derivatives_are_right_or_refused(found):
    assert found["second"] < 1e-5
    assert "has no second derivative" in found["refusal"]


def test_windows_ask_only_neighbours(found):
    """Ten keys on each device: of a window of 1 none but its own, of 2 to 11 one neighbour's."""
    assert found["passes"] == [0, 1, 1, 2, 3]


def test_a_device_needs_a_third_of_the_memory(found):
    assert 0.2 < found["peak"] <= 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_axis": "time"}, r"`sequence_axis` must be an axis.*'sequence'.*'time'"),
        ({"sequence_axis": "model"}, r"with `sequence_axis` the mesh must have.*'model'"),
        ({"sequence_axis": "sequence", "model_axis": "batch"}, None),
    ],
)
def test_layout_map_checks_its_axes(options, message):
    names = ("batch", "sequence", "model")
    mesh = keras.distribution.DeviceMesh((1, 1, 1), names, keras.distribution.list_devices()[:1])
    if message is None:
        assert layout_map(mesh, **options)
        return
    with pytest.raises(ValueError, match=message):
        layout_map(mesh, **options)


def test_what_a_ring_cannot_do_is_refused(monkeypatch):
    import jax

    seen = Visibility.of(4, 4, window=2**30 + 1, query_offset=np.array([0, 3], "int32"))
    with pytest.raises(ValueError, match=r"`window` must be at most .*Received: window=1073741825"):
        devices.attention(None, (np.ones((2, 4, 1, 8)),) * 3, Softmax(), seen, layout())
    monkeypatch.delattr(jax, "shard_map")
    with pytest.raises(NotImplementedError, match="`sequence_axis` needs JAX 0.6 or later"):
        over_devices(None, None, [], ())


def layout():
    names = ("batch", "sequence", "model")
    mesh = keras.distribution.DeviceMesh((1, 1, 1), names, keras.distribution.list_devices()[:1])
    return layout_map(mesh, sequence_axis="sequence")[HEADS]
