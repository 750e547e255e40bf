"""Writes tiny folders of released families and what `transformers` computes of them.

KERAS_BACKEND=torch python write_released.py [NAME ...]

It needs `transformers`. The folders are `tests/data/huggingface/NAME`, in bfloat16; the logits
are of their numbers in float32.
"""

import json
import sys

import ml_dtypes
import numpy as np
import torch
from support import TESTS, released

from keras_ssattn.checkpoints.safetensors import ToStore, read_header, write_file

DATA = TESTS / "data" / "huggingface"
LENGTH, PADDED, NEW = 24, 7, 6


def write(name, model):
    folder = DATA / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # anew: in half precision the model has rounded its frequencies, too
    write_logits(folder, type(model).from_pretrained(folder, dtype=torch.float32))


def write_logits(folder, model):
    """Logits of rows of which one is padded on the left, and tokens that follow the other."""
    model = model.eval()
    tokens = np.random.default_rng(5).integers(3, 47, (2, LENGTH))
    mask = np.ones((2, LENGTH), bool)
    mask[1, :PADDED] = False
    found = released.logits(model, tokens, mask)
    row = tokens[:1]
    for _ in range(NEW):
        row = np.append(row, released.logits(model, row)[:, -1:].argmax(-1), axis=1)
    new = row[0, LENGTH:]
    np.savez_compressed(
        folder / "logits.npz", tokens=tokens.astype("int32"), mask=mask, logits=found, new=new
    )


def write_float8(name, source):
    """A folder with kernels of 8-bit floats, and the logits of what they stand for."""
    folder = DATA / name
    released.make_vision(source).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    file, stored, plain = folder / "model.safetensors", {}, {}
    for key, tensor in read_header(file).items():
        array = plain[key] = stored[key] = tensor.read()
        if key.startswith("language_model") and key.endswith("proj.weight"):
            wide = array.astype("float32")
            scale = (np.abs(wide).max() / 448).astype(ml_dtypes.bfloat16)
            stored[key] = (wide / scale.astype("float32")).astype(ml_dtypes.float8_e4m3fn)
            plain[key] = stored[key].astype("float32") * scale.astype("float32")
            stored[f"{key}_scale_inv"] = scale
            stored[key.replace("weight", "activation_scale")] = scale
    save(file, plain)
    model = released.transformers.Mistral3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    write_logits(folder, model)
    save(file, stored)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def save(file, arrays):
    write_file(file, {k: ToStore(v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()})


def main(*names):
    for name in names or (*released.MODELS, "mistral3", "float8"):
        if name == "float8":
            write_float8(name, "ministral3")
        elif name == "mistral3":
            write(name, released.make_vision("mistral_nemo", tied=True))
        else:
            write(name, released.make(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
