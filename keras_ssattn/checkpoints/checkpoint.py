"""A released model in a folder: checked as a whole, then read; and written from a model."""

import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_ssattn._checks import check_number
from keras_ssattn._keras.initializing import weights_from
from keras_ssattn._typing import Config, DType, Layer, Option, Shape, Tensor
from keras_ssattn.checkpoints.architecture import Architecture, architecture_of
from keras_ssattn.checkpoints.families import FAMILIES, Family, family_of
from keras_ssattn.checkpoints.fields import WITHOUT_EFFECT, Fields
from keras_ssattn.checkpoints.folder import read_config, read_headers, remove_superseded
from keras_ssattn.checkpoints.names import EMBEDDING, HEAD, PREFIXES, Place, layout
from keras_ssattn.checkpoints.safetensors import Stored, ToStore, write_folder, write_text

# Fields of a written file that follow from the model, and those that mean none where they are null.
FIXED = {"architectures", "dtype", "is_causal", "model_type", "torch_dtype"}
TOKENS: Config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DTYPES = ("float16", "bfloat16", "float32", "float64")
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
# Tensors that a text model has no use for, or that follow from config.json.
PASSED_OVER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
ACTIVATION_SCALE = re.compile(r".*\.(activation_scale|input_scale)")
PATIENCE = 3.0  # seconds until a progress bar appears


class Checkpoint:
    """A folder whose config.json and headers fit each other; no weight has been read.

    Args:
        folder: a local folder in Hugging Face's layout.

    Attributes:
        options: of `CausalLM`, with the dtype of the weights.
        kept: the fields of config.json that have no effect, and its `model_type`, for writing.
        passed_over: names of the tensors that are not read.

    Raises:
        ValueError: for a folder, a config.json or a file that is not understood as a whole.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        folder = pathlib.Path(folder)
        where = str(folder / "config.json")
        config = read_config(folder)
        self.has_vision = config.get("model_type") == "mistral3"
        config = _text_config(config, where) if self.has_vision else config
        self.family = family_of(config, where)
        config = dict(config)
        self.is_float8 = _read_quantization(config.pop("quantization_config", None))
        fields = Fields(config, where)
        self.tensors = read_headers(folder)
        if fields.integer("num_hidden_layers") > len(self.tensors):  # before anything is as long
            fields.refuse("num_hidden_layers", config["num_hidden_layers"], "those of the files")
        self.architecture = self.family.read(fields.config, where)
        self.prefixes = self._find_prefixes(folder)
        self.passed_over = self._check_names(folder)
        self.kept = {k: v for k, v in config.items() if k in WITHOUT_EFFECT}
        dtype = config.get("dtype") or config.get("torch_dtype") or self._dtype_of_embedding()
        if dtype not in DTYPES:
            fields.refuse("dtype", dtype, f"one of {DTYPES}")
        self.options: Config = {**self.architecture.options(), "dtype": dtype}

    def _find_prefixes(self, folder: pathlib.Path) -> tuple[str, str]:
        for prefixes in PREFIXES:
            if prefixes[0] + EMBEDDING.name in self.tensors:
                return prefixes
        expected = [base + EMBEDDING.name for base, _ in PREFIXES]
        raise ValueError(f"{folder} must have a tensor named one of {expected}. It has none.")

    def _dtype_of_embedding(self) -> str:
        return self.tensors[self.prefixes[0] + EMBEDDING.name].dtype.name

    def _check_names(self, folder: pathlib.Path) -> list[str]:
        """Raises unless the tensors are those of the model; returns those that are of no use."""
        expected = layout(self.architecture, self.family.fused, self.prefixes).shapes
        scales = self._check_tensors(folder, expected)
        passed_over = []
        head = self.prefixes[1] + HEAD.name
        for name in self.tensors.keys() - expected.keys() - scales:
            patterns = [PASSED_OVER, *[VISION] * self.has_vision]
            patterns += [ACTIVATION_SCALE] * self.is_float8
            if name != head and not any(pattern.fullmatch(name) for pattern in patterns):
                raise ValueError(
                    f"{folder} has the tensor {name!r}, for which the model that its config.json "
                    f"describes has no place. Received: shape {self.tensors[name].shape}"
                )
            passed_over.append(name)
        return sorted(passed_over)

    def _check_tensors(self, folder: pathlib.Path, expected: dict[str, tuple]) -> set[str]:
        """Raises unless tensors of these shapes are there; returns the names of their scales."""
        scales = set()
        for name, shape in expected.items():
            if name not in self.tensors:
                raise ValueError(f"{folder} must have the tensor {name!r} of shape {shape}.")
            found = self.tensors[name]
            if found.shape != shape:
                raise ValueError(
                    f"{folder}: {name!r} must have shape {shape}, by config.json. Received: shape "
                    f"{found.shape}"
                )
            if found.dtype == FLOAT8 and self.is_float8:
                self._scale(name)
                scales.add(f"{name}_scale_inv")
            elif found.dtype.name not in DTYPES:
                raise ValueError(
                    f"{folder}: {name!r} must have one of the dtypes {DTYPES}. Received: "
                    f"{found.dtype}"
                )
        return scales

    def _scale(self, name: str) -> np.float32:
        """What the 8-bit numbers of a tensor are multiplied by."""
        stored = self.tensors.get(f"{name}_scale_inv")
        scale = None
        if stored is not None and math.prod(stored.shape) == 1:
            scale = np.float32(stored.read().reshape(()))
        if scale is None or not 0 < scale < np.inf:
            raise ValueError(
                f"{name!r}, of 8-bit floats, must have one positive {name + '_scale_inv'!r}. "
                f"Received: {scale if stored is None or scale is not None else stored.shape}"
            )
        return scale

    def load(self, make: Callable[..., Layer], options: Config) -> Layer:
        """Makes a model that starts with the weights.

        Args:
            make: `CausalLM`, or a subclass.
            options: of it, in place of those of the folder.

        Raises:
            ValueError: if the model has other variables.
        """
        places = self._places(options)
        kernels = {place.variable.rpartition("/")[0]: place for place in places}
        progress, read = Progress(len(places)), set()

        def source(path: str, shape: Shape, dtype: DType) -> Tensor:
            parts = path.split("/")  # a model may be made in the scope of other names
            inner = ("/".join(parts[i:]) for i in range(len(parts)))
            place = next((kernels[x] for x in inner if x in kernels), None)
            if place is None or keras.distribution.distribution() is not None:
                return None  # Keras would put all of it on one device
            if math.prod(shape) != self._count(place):
                return None
            read.add(place.variable)
            progress.step()
            return _tensor(self._read(place), shape, dtype)

        with weights_from(source):
            model = make(**{**self.options, "huggingface_config": self.kept, **options})
        for variable, place in self._match(model, places):
            if place.variable not in read:
                _assign(variable, self._read(place))
                progress.step()
        return model

    def _places(self, options: Config) -> list[Place]:
        """Where the variables of a model of these options lie."""
        places, _ = layout(self.architecture, self.family.fused, self.prefixes)
        places = [place for place in places if place.variable != HEAD.variable]
        name = self._name_of_head(options)
        head = Place(HEAD.variable, name, 0, self.architecture.vocabulary_size, True)
        tied = options.get("tie_embeddings", self.architecture.tied)
        return places if tied else [*places, head]

    def _match(self, model: Layer, places: list[Place]) -> list[tuple[keras.Variable, Place]]:
        """The variables and their places, or raises unless they fit one another."""
        variables = _variables(model)
        pairs = [(variables.pop(place.variable, None), place) for place in places]
        unread = [path for path in variables if "/normalizer/" not in path]
        if unread:
            raise ValueError(
                f"the options must not add weights that the folder has not. Received: {unread[0]!r}"
            )
        for variable, place in pairs:
            if variable is None or math.prod(variable.shape) != self._count(place):
                raise ValueError(
                    f"the options must leave {place.name!r} its place and size, "
                    f"{self.tensors[place.name].shape}. Received: a model with "
                    f"{'none' if variable is None else tuple(variable.shape)} at {place.variable!r}"
                )
        return pairs

    def _name_of_head(self, options: Config) -> str:
        """The tensor of a head of its own: where the file has none, the embedding's.

        A file may have both and say that they are one. If they are not, only the user knows.
        """
        embedding, head = self.prefixes[0] + EMBEDDING.name, self.prefixes[1] + HEAD.name
        if head not in self.tensors:
            return embedding
        if self.architecture.tied and "tie_embeddings" not in options:
            first, second = self.tensors[embedding], self.tensors[head]
            if first.shape != second.shape or not _equal(first, second):
                raise ValueError(
                    f"'tie_word_embeddings' is true, but {head!r} is not the embedding. Pass "
                    "`tie_embeddings=True` to pass over it, or False to use it."
                )
        return head

    def _count(self, place: Place) -> int:
        return (place.end - place.first) * math.prod(self.tensors[place.name].shape[1:])

    def _read(self, place: Place) -> np.ndarray:
        """The numbers of a variable, but for its shape."""
        stored = self.tensors[place.name]
        array = stored.read(place.first, place.end)
        if stored.dtype == FLOAT8:
            array = array.astype("float32") * self._scale(place.name)
        return array.T if place.transposed else array


def _text_config(config: Config, where: str) -> Config:
    """The config of the text model inside one that sees images, too."""
    fields = Fields(config, where)
    text = fields.take("text_config")
    if not isinstance(text, dict):
        fields.refuse("text_config", text, "an object")
    inner = {"model_type": "mistral", **text}
    inner["tie_word_embeddings"] = fields.take("tie_word_embeddings", True)  # that of text is not
    for name in ("dtype", "torch_dtype", "quantization_config"):
        inner[name] = fields.take(name, inner.get(name))
    fields.finish(
        WITHOUT_EFFECT
        | {"vision_config", "image_token_id", "image_token_index", "projector_hidden_act",
           "vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size"}
    )  # fmt: skip
    return {**{k: v for k, v in config.items() if k in ("eos_token_id", "bos_token_id")}, **inner}


def _read_quantization(found: Config | None) -> bool:
    """Whether kernels are 8-bit floats with one scale each; raises for other ways."""
    if found is None:
        return False
    inner = Fields(found if isinstance(found, dict) else {}, "`quantization_config`")
    if inner.take("quant_method") != "fp8":
        inner.refuse("quant_method", found, '"fp8"; other ways are not read')
    inner.require({"weight_block_size": None})
    block = inner.config.get("weight_block_size")
    if block is not None:
        inner.refuse("weight_block_size", block, "null: one scale for each kernel")
    inner.finish(frozenset({"activation_scheme", "modules_to_not_convert", "dequantize"}))
    return True


def _variables(model: Layer) -> dict[str, keras.Variable]:
    """The weights of a model by their paths inside it."""
    start = model.token_embedding.path.removesuffix(model.token_embedding.name)
    return {weight.path.removeprefix(start): weight for weight in model.weights}


def _equal(first: Stored, second: Stored, rows: int = 4096) -> bool:
    """Whether two tensors are the same, a few rows at a time."""
    return all(
        np.array_equal(first.read(i, min(i + rows, first.shape[0])),
                       second.read(i, min(i + rows, first.shape[0])))
        for i in range(0, first.shape[0], rows)
    )  # fmt: skip


def _tensor(array: np.ndarray, shape: Shape, dtype: DType) -> Tensor:
    """A tensor of a shape and dtype; PyTorch's bfloat16 without Keras's way through float32."""
    array = array.reshape(shape).astype(dtype, copy=False)
    if dtype == "bfloat16" and keras.backend.backend() == "torch" and hasattr(ops, "view"):
        return ops.view(ops.convert_to_tensor(array.view("int16")), dtype)
    return ops.convert_to_tensor(array)


def _assign(variable: keras.Variable, array: np.ndarray) -> None:
    """Assigns numbers of any dtype and shape; each device gets only its part of them."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        variable.assign(_tensor(array, variable.shape, variable.dtype))
        return
    array = array.reshape(variable.shape).astype(variable.dtype, copy=False)
    layout = distribution.get_variable_layout(variable)
    variable.assign(keras.distribution.distribute_tensor(array, layout))


class Progress:
    """Keras's progress bar, once something has taken a few seconds."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.start = count, 0, time.monotonic()
        self.bar: keras.utils.Progbar | None = None

    def step(self) -> None:
        self.done += 1
        if self.bar is None and time.monotonic() - self.start > PATIENCE:
            self.bar = keras.utils.Progbar(self.count, unit_name="tensor")
        if self.bar is not None:
            self.bar.update(self.done)


def write_checkpoint(
    model: Layer, folder: str | os.PathLike, kept: Config | None, largest: float, **fields: Option
) -> None:
    """Writes a model's config.json and weights; see `CausalLM.to_huggingface`."""
    folder, kept = pathlib.Path(folder), kept or {}
    largest = check_number("max_shard_size", largest, "a positive number", lambda x: x > 0)
    for name in FIXED & fields.keys():
        raise ValueError(f"`fields` must not have {name!r}. Received: {fields}")
    family, config = _config_of(architecture_of(model), kept.get("model_type"))
    variables = _variables(model)
    first = variables[EMBEDDING.variable]
    dtype = keras.utils.standardize_dtype(first.dtype)
    config = {**TOKENS, **kept, **config, "dtype": dtype}
    config.pop("torch_dtype", None)
    if model.padding_id is not None:
        config["pad_token_id"] = model.padding_id
    if family.read({**config, **fields}) != family.read(config):
        raise ValueError(f"`fields` must not change the model. Received: {fields}")
    try:
        text = json.dumps({**config, **fields}, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise ValueError(f"`fields` must be values of JSON. Received: {fields}") from error
    places, shapes = layout(architecture_of(model), family.fused)
    parts: dict[str, list[Place]] = {}
    for place in places:
        parts.setdefault(place.name, []).append(place)
    unwritten = variables.keys() - {place.variable for place in places}
    if unwritten:
        raise ValueError(
            "a Hugging Face folder has no place for a model that is quantized or has adapters; "
            f"`model.save` has. Received: {min(unwritten)!r}"
        )

    def tensor(name: str) -> ToStore:
        found = [(variables[part.variable], part) for part in parts[name]]
        own = np.dtype(keras.utils.standardize_dtype(found[0][0].dtype))
        return ToStore(own, shapes[name], lambda: _joined(found, shapes[name]))

    folder.mkdir(parents=True, exist_ok=True)
    written = write_folder(folder, {name: tensor(name) for name in shapes}, largest)
    write_text(folder / "config.json", text)
    remove_superseded(folder, written)


def _joined(parts: list[tuple[keras.Variable, Place]], shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a file that these variables make up."""
    arrays = []
    for variable, place in parts:
        array = ops.convert_to_numpy(variable.value)
        rows = place.end - place.first
        if place.transposed:
            array = array.reshape((shape[1], rows)).T
        arrays.append(array.reshape((rows, *shape[1:])))
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _config_of(model: Architecture, name: str | None) -> tuple[Family, Config]:
    """The family that can express a model, that of `name` if there is one, and its config.json."""
    families = [FAMILIES[name]] if name in FAMILIES else list(FAMILIES.values())
    for family in families:
        if family.name == "llama" and model.hidden_size % model.num_heads:
            continue  # transformers refuses it, though it has a `head_dim`
        config = family.write(model)
        try:
            if family.read(config) == model:
                return family, config
        except ValueError:
            continue
    raise ValueError(
        f"no family of {tuple(f.name for f in families)} can express this model. Received: {model}"
    )
