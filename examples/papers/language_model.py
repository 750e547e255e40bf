"""Language modelling on the sources of the Python standard library, byte by byte.

Trained at one length; the loss by position is then measured up to 20 times that length, with the
rotary theta of training and with 50 times that theta. With `copies`, a passage occurs twice in a
share of the training sequences, and the loss on the second copy is measured by distance.

    KERAS_BACKEND=jax python examples/papers/language_model.py ssmax/language_model.json

The configuration names the arms; `ssmax/language_model_paper.json` is the SSMax paper's size, for
a GPU. A run that was stopped goes on where it was; one that is stored is not run again.
Another text is a folder, `text`. That of `study/bible.json` is the Debian package bible-kjv:

    mkdir bible && bible "gen1:1-rev22:21" | split -C 40k - bible/
"""

import functools
import os
import pathlib
import sysconfig
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from attention_statistics import attention_statistics, learned_scales
from copies import measure_copies, repeat_passages
from runs import main
from scale_per_count import ScalePerCount  # noqa: F401  # for the configurations that name it
from training import carry_over, compile_model, count_tokens, make_model, train

THETA_FACTORS = (1, 50)  # of the theta of training
VALIDATION_SEQUENCES = 256


@functools.cache
def load_text(folder: str | None = None) -> dict[str, np.ndarray]:
    """The bytes of files; one in ten is for validation, one for testing.

    Args:
        folder: of text files. By default the modules of the Python standard library.
    """
    if folder is None:
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = [x for x in library.rglob("*.py") if "site-packages" not in x.parts]
    else:
        files = [x for x in pathlib.Path(folder).rglob("*") if x.is_file()]
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for i, file in enumerate(sorted(files)):
        part = {0: "validation", 1: "test"}.get(i % 10, "train")
        parts[part].append(file.read_bytes())
    return {name: np.frombuffer(b"".join(x), "uint8") for name, x in parts.items()}


def draw_windows(
    rng: np.random.Generator, text: np.ndarray, number: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their successors, `[number, length]`."""
    starts = rng.integers(0, len(text) - length, number)
    return split(text[starts[:, None] + np.arange(length + 1)].astype("int32"))


def split(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their successors."""
    return windows[:, :-1], windows[:, 1:]


def draw_training(config: dict[str, Any], rng: np.random.Generator) -> tuple:
    """A batch of training: tokens and their successors."""
    text = load_text(config.get("text"))["train"]
    tokens, targets = draw_windows(rng, text, config["batch_size"], config["length"])
    if "copies" not in config:
        return tokens, targets
    share, lengths = config["copies"]["share"], config["copies"]["lengths"]
    windows = np.concatenate([tokens, targets[:, -1:]], axis=1)
    return split(repeat_passages(rng, windows, share, lengths))


def test_windows(config: dict[str, Any], factor: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the test text, of a multiple of the training length."""
    rng = np.random.default_rng(0)
    return draw_windows(
        rng, load_text(config.get("text"))["test"], number, factor * config["length"]
    )


def losses(model: keras.Model, tokens: np.ndarray, targets: np.ndarray, batch: int) -> np.ndarray:
    """Cross-entropy in nats of every target, `[B, T]`."""
    rows = []
    for i in range(0, len(tokens), batch):
        logits = keras.ops.convert_to_tensor(model.predict_on_batch(tokens[i : i + batch]))
        loss = keras.losses.sparse_categorical_crossentropy(
            targets[i : i + batch], logits, from_logits=True
        )
        rows.append(keras.ops.convert_to_numpy(loss))
    return np.concatenate(rows)


def loss_by_position(config: dict[str, Any], model: keras.Model) -> list[float]:
    """Mean loss over each half of the training length, up to `test_factor` times that length."""
    length, factor = config["length"], config["test_factor"]
    data = test_windows(config, factor, config["test_sequences"])
    by_position = losses(model, *data, batch=4).mean(0)
    return by_position.reshape(2 * factor, length // 2).mean(1).tolist()


def run_one(
    config: dict[str, Any], arm: str, rate: float, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains and measures one model."""
    options = config["arms"][arm]
    config = {**config, "model": {**config["model"], **options.get("model_options", {})}}
    draw = functools.partial(draw_training, config)
    model = train(config, arm, rate, seed, draw, folder)
    text = load_text(config.get("text"))
    held_out = draw_windows(
        np.random.default_rng(0), text["validation"], VALIDATION_SEQUENCES, config["length"]
    )
    record: dict[str, Any] = {
        "parameters": model.count_params(),
        "tokens": count_tokens(config, config["length"]),
        "validation": float(losses(model, *held_out, batch=64).mean()),
        "learned_scales": learned_scales(model),
        "attention": {
            str(factor * config["length"]): attention_statistics(
                model, test_windows(config, factor, 4)[0]
            )
            for factor in (1, 8)
        },
        "loss_by_position": {},
    }
    if "copies" in config:
        record["copies"] = measure_copies(config, losses, model, text["test"])
    for factor in config.get("theta_factors", THETA_FACTORS):
        longer = model
        if factor != 1:
            longer = make_model(config, options["normalizer"], factor)
            compile_model(config, longer, rate)
            carry_over(model, longer)
        record["loss_by_position"][str(factor)] = loss_by_position(config, longer)
    return record


if __name__ == "__main__":
    main(run_one, __doc__)
