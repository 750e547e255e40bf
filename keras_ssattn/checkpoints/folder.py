"""A Hugging Face folder: its config.json, and the tensors of its files."""

import pathlib
import re

from keras_ssattn._typing import Config
from keras_ssattn.checkpoints.safetensors import INDEX, SINGLE, Stored, load_json, read_header

# Files of weights that `write_folder` may have written.
WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
LONGEST_NAME = 255  # bytes of a file's name


def read_config(folder: pathlib.Path) -> Config:
    """The config.json of a folder.

    Raises:
        ValueError: for a folder without one, or not in Hugging Face's layout.
    """
    path = folder / "config.json"
    if path.is_file():
        return load_json(path.read_bytes(), path)
    if (folder / "params.json").is_file():
        raise ValueError(
            f"{folder} must be in Hugging Face's layout, with a config.json. Received: "
            "params.json, of Mistral's own, in which the rows of queries are in another order"
        )
    raise ValueError(f"`folder` must be a folder with a config.json. Received: folder={folder}")


def read_headers(folder: pathlib.Path) -> dict[str, Stored]:
    """The tensors of all files of a folder, by name; nothing but the headers is read.

    Raises:
        ValueError: for a folder without safetensors, a missing file, or an index that does not
            fit.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if not single.is_file():
            raise ValueError(_explain_missing(folder))
        return read_header(single)
    weight_map = load_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a `weight_map`. Received: {weight_map!r}")
    for file in weight_map.values():
        _check_file_name(index, file)
    files = sorted(set(weight_map.values()))
    if single.is_file() and SINGLE not in files:
        raise ValueError(f"{folder} must have {SINGLE} or {INDEX}. Received: both, of other files")
    tensors: dict[str, Stored] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} must have all files of its index. Received: no {file}")
        found = read_header(folder / file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{folder} must have each tensor once. Received: {twice[0]!r} twice")
        tensors |= found
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path != folder / file:
            raise ValueError(f"{folder / file} must hold {name!r}, as the index says. It does not.")
    return tensors


def _check_file_name(index: pathlib.Path, file: object) -> None:
    plain = (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not set(file) & set("/\\:\0")
        and len(file.encode(errors="replace")) <= LONGEST_NAME
    )
    if not plain:
        raise ValueError(
            f"{index} must name safetensors files of its own folder. Received: {file!r}"
        )


def remove_superseded(folder: pathlib.Path, written: set[str]) -> None:
    """Removes the files of weights that an earlier model had beside those now written."""
    for path in list(folder.iterdir()):
        if WRITTEN.fullmatch(path.name) and path.name not in written:
            path.unlink()


def _explain_missing(folder: pathlib.Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [x for x in names if x.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    expected = f"{folder} must have {SINGLE} or {INDEX}. Received: "
    if pickled:
        return (
            f"{expected}{pickled[0]}, a pickle, which may run any program when it is read. Convert "
            "it to safetensors where you trust it"
        )
    consolidated = [x for x in names if x.startswith("consolidated")]
    if consolidated:
        return f"{expected}{consolidated[0]}, in Mistral's own layout"
    return f"{expected}neither"
