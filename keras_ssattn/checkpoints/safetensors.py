"""Files of tensors: the length of a header in 8 bytes, the header in JSON, then raw numbers.

`numpy` and `ml_dtypes`, which Keras brings, read every dtype of such a file, 8-bit floats too,
and rows of a tensor without the rest of it. The files are not trusted: what a header says is
checked against the size of the file before anything is read.

Reference: the format's description at github.com/huggingface/safetensors.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from keras_ssattn._typing import Config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("float16"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"),
    "U32": np.dtype("uint32"),
    "U16": np.dtype("uint16"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: of the file.
        dtype: of its numbers.
        shape: its sizes.
        start: of its numbers in the file, in bytes.
    """

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, first: int = 0, end: int | None = None) -> np.ndarray:
        """The tensor, or its rows from `first` to `end`, as a new array."""
        rows = self.shape[0] if self.shape else 1
        end, row = rows if end is None else end, math.prod(self.shape[1:])
        start = self.start + first * row * self.dtype.itemsize
        numbers = np.fromfile(self.path, self.dtype, (end - first) * row, offset=start)
        if numbers.size != (end - first) * row:
            raise ValueError(f"{self.path} has become shorter while it was read.")
        return numbers.reshape((end - first, *self.shape[1:]) if self.shape else ())


def load_json(text: str | bytes, where: object) -> Config:
    """An object of JSON in which each name occurs once, or raises."""

    def once(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} occurs twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be valid JSON. Received: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object. Received: a {type(found).__name__}")
    return found


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        ValueError: for a file that is cut short, or whose header contradicts itself or the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} must start with the length of its header, which must lie in the file. "
                f"Received: a header of {length} bytes in a file of {size}"
            )
        text = file.read(length)
    header = load_json(text, f"the header of {path}")
    header.pop("__metadata__", None)
    data = 8 + length
    found, spans = {}, []
    for name, entry in header.items():
        found[name], begin, end = _check_entry(path, name, entry, data)
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise ValueError(
                f"{path} must hold its tensors one behind the other. Received: {name!r} from byte "
                f"{begin}, where {expected} was expected"
            )
        expected = end
    if data + expected != size:
        raise ValueError(
            f"{path} must end with its last tensor. Received: a file of {size} bytes, whose header "
            f"speaks of {data + expected}. Was its download interrupted?"
        )
    return found


def _check_entry(
    path: pathlib.Path, name: str, entry: object, data: int
) -> tuple[Stored, int, int]:
    """A tensor as the header describes it, and where it begins and ends, or raises."""

    def is_size(x: object) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    known: Config = entry if isinstance(entry, dict) else {}
    dtype: Any = known.get("dtype")
    shape: Any = known.get("shape")
    offsets: Any = known.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{path} must hold tensors of the dtypes {tuple(DTYPES)}. Received: {name!r} with "
            f"dtype {dtype!r}"
        )
    fits = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(is_size(x) for x in (*shape, *offsets))
        and offsets[1] - offsets[0] == math.prod(shape) * DTYPES[dtype].itemsize
    )
    if not fits:
        raise ValueError(
            f"{path} must give each tensor a shape, and offsets that are as far apart as it is "
            f"large. Received: {name!r} with shape {shape}, dtype {dtype}, offsets {offsets}"
        )
    begin, end = offsets
    return Stored(path, DTYPES[dtype], tuple(shape), data + begin), begin, end


@dataclasses.dataclass(frozen=True)
class ToStore:
    """A tensor that is to be written: its dtype, its sizes, and the function that gives it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: pathlib.Path, tensors: dict[str, ToStore]) -> None:
    """Writes a file in the order of the reference implementation; it appears once complete."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: Config = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + tensors[name].bytes
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(tensors[name].get(), tensors[name].dtype)
            file.write(array.reshape(-1).view("uint8").data)
    os.replace(partial, path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears once complete; what a link points to stays as it is."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_folder(folder: pathlib.Path, tensors: dict[str, ToStore], largest: float) -> set[str]:
    """Writes tensors to one file, or to several of at most `largest` bytes and an index.

    Returns:
        The names of the files.
    """
    shards = list(_shards(tensors, largest))
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors)
        return {SINGLE}
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return {INDEX, *weight_map.values()}


def _shards(tensors: dict[str, ToStore], largest: float) -> Iterable[dict[str, ToStore]]:
    shard: dict[str, ToStore] = {}
    for name, tensor in tensors.items():
        if shard and sum(x.bytes for x in shard.values()) + tensor.bytes > largest:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard
