"""Files and folders that nobody should trust: refused with a clear error, or read exactly."""

import json
import shutil

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from support import TESTS

from keras_ssattn.checkpoints.safetensors import ToStore, read_header, write_file
from keras_ssattn.models import CausalLM

LLAMA = TESTS / "data" / "huggingface" / "llama2"
ARRAYS = {
    "a": np.arange(6, dtype="float32").reshape(2, 3),
    "b": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "c": np.array(3, "int64"),
    "d": np.zeros((0, 4), "float16"),
    "e": np.array([[0.5], [448.0]], ml_dtypes.float8_e4m3fn),
}


def write(path, arrays=ARRAYS):
    write_file(path, {k: ToStore(v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()})
    return path


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_is_written_is_read(tmp_path):
    found = read_header(write(tmp_path / "x.safetensors"))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)
    np.testing.assert_array_equal(found["a"].read(1, 2), ARRAYS["a"][1:2])
    assert not list(tmp_path.glob("*.partial"))


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = [
    ({"x": entry()}, b"", "must end with its last tensor.*8 bytes|download interrupted"),
    ({"x": entry()}, bytes(9), "must end with its last tensor"),
    ({"x": entry(), "y": entry()}, bytes(8), "one behind the other.*'y' from byte 0, where 8"),
    ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "'y' from byte 12, where 8"),
    ({"x": entry(offsets=(8, 16))}, bytes(16), "'x' from byte 8, where 0"),
    ({"x": entry(offsets=(8, 0))}, bytes(8), "as far apart as it is large.*8, 0"),
    ({"x": entry(offsets=(-8, 0))}, bytes(8), "as far apart as it is large"),
    ({"x": entry(shape=(3,))}, bytes(8), "as far apart as it is large.*shape .3."),
    ({"x": entry(shape=(-1, -2))}, bytes(8), "as far apart as it is large"),
    ({"x": entry(shape=(2**62, 4))}, bytes(8), "as far apart as it is large"),
    ({"x": entry(shape=(10**30,), offsets=(0, 4 * 10**30))}, bytes(8), "must end with its last"),
    ({"x": entry(shape=(2.0,))}, bytes(8), "as far apart as it is large"),
    ({"x": entry(shape=(True, 2))}, bytes(8), "as far apart as it is large"),
    ({"x": entry(dtype="F4")}, bytes(8), "must hold tensors of the dtypes.*'x' with dtype 'F4'"),
    ({"x": entry(dtype=["F32"])}, bytes(8), "must hold tensors of the dtypes"),
    ({"x": 3}, bytes(8), "must hold tensors of the dtypes.*None"),
    ({"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, bytes(8), "as far apart"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, bytes(8), "as far apart"),
    (b"[]", b"", "must be a JSON object. Received: a list"),
    (b"{", b"", "must be valid JSON"),
    (b'{"x": 1, "x": 2}', b"", "'x' occurs twice"),
    (b"\xff\xfe", b"", "must be valid JSON"),
    (b'{"x":' + b"[" * 200_000, b"", "must be valid JSON"),
    (b'{"x": ' + b"9" * 5000 + b"}", b"", "must be valid JSON"),
]


@pytest.mark.parametrize(("header", "data", "message"), HOSTILE)
def test_hostile_headers(header, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_header(with_header(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("start", [b"", b"\0\0\0", (2**63).to_bytes(8, "little"), bytes([9] * 8)])
def test_hostile_lengths_of_headers(start, tmp_path):
    (tmp_path / "x").write_bytes(start)
    with pytest.raises(ValueError, match="must start with the length of its header"):
        read_header(tmp_path / "x")


def test_a_header_may_not_be_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_ssattn.checkpoints.safetensors.LARGEST_HEADER", 10)
    with pytest.raises(ValueError, match="must start with the length of its header"):
        read_header(write(tmp_path / "x"))


@hypothesis.given(st.data())
@hypothesis.settings(
    max_examples=400, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_file_with_other_bytes_is_refused_or_read(tmp_path, data):
    """Nothing but `ValueError` comes of it, and no tensor leaves the file."""
    path = write(tmp_path / "x")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        at = data.draw(st.integers(0, len(content) - 1))
        if kind == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        elif at > 1:
            del content[at:]
    path.write_bytes(content)
    try:
        found = read_header(path)
    except ValueError:
        return
    for tensor in found.values():
        assert tensor.read().nbytes <= len(content)
        assert tensor.start + tensor.read().nbytes <= len(content)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = write(tmp_path / "x")
    found = read_header(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="has become shorter"):
        found["e"].read()


# Folders


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(LLAMA, tmp_path / "model")
    return tmp_path / "model"


def index(folder, weight_map):
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def refuses(folder, message):
    with pytest.raises(ValueError, match=message):
        CausalLM.from_huggingface(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "x.bin", "x.safetensors\0", 5, None, ["x.safetensors"],
     "a" * 5000 + ".safetensors"],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder(name, folder):
    index(folder, {"x": name})
    refuses(folder, "must name safetensors files of its own folder")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "must have a `weight_map`. Received: {}"),
        ("{}", "must have a `weight_map`. Received: None"),
        ("{", "index.json must be valid JSON"),
        ({"x": "y.safetensors"}, "must have model.safetensors or .*Received: both"),
        ({"x": "model.safetensors"}, "must hold 'x', as the index says"),
        ({"x": "model.safetensors", "y": "y.safetensors"}, "all files of its index.*no y.safe"),
    ],
)
def test_an_index_that_does_not_fit(weight_map, message, folder):
    index(folder, weight_map)
    refuses(folder, message)


def test_a_tensor_in_two_files(folder):
    shutil.copy(folder / "model.safetensors", folder / "y.safetensors")
    name = "model.norm.weight"
    index(folder, {name: "model.safetensors", "y": "y.safetensors"})
    refuses(folder, "must have each tensor once. Received: .* twice")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "Received: pytorch_model.bin, a pickle, which may run any program"),
        (["consolidated.00.pth"], "Received: consolidated.00.pth, a pickle"),
        (["consolidated.safetensors"], "consolidated.safetensors, in Mistral's own layout"),
        ([], "must have model.safetensors or model.safetensors.index.json. Received: neither"),
    ],
)
def test_folders_without_safetensors(files, message, folder):
    (folder / "model.safetensors").unlink()
    for file in files:
        (folder / file).write_bytes(b"")
    refuses(folder, message)


def test_folders_in_another_layout(tmp_path):
    refuses(tmp_path, "`folder` must be a folder with a config.json")
    (tmp_path / "params.json").write_text("{}")
    refuses(tmp_path, "must be in Hugging Face's layout.*params.json")


def test_a_file_that_is_cut_short_is_refused_before_a_model_is_made(folder, monkeypatch):
    monkeypatch.setattr(CausalLM, "__init__", lambda *_, **__: pytest.fail("made"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuses(folder, "must end with its last tensor.*Was its download interrupted")


def test_sizes_that_the_files_do_not_have_are_refused_before_a_model_is_made(folder, monkeypatch):
    monkeypatch.setattr(CausalLM, "__init__", lambda *_, **__: pytest.fail("made"))
    config = json.loads((folder / "config.json").read_text())
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        text = json.dumps({**config, name: 10**9})
        (folder / "config.json").write_text(text)
        refuses(folder, "must have shape")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**12}))
    refuses(folder, "'num_hidden_layers' must be those of the files")
