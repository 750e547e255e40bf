"""A model trained with Keras's attention, converted to SSMax and trained a little more.

    KERAS_BACKEND=jax python examples/retrofit.py

A small language model of bytes, of plain Keras layers, learns from the sources of Python's standard
library at one length. It is then trained for a few more steps, at that length or at four times as
much, once as it is and once converted with `convert_attention`, on the same text. All are compared
on the same bytes of other files, read after 1, 4 and 8 times the length of training. The model has
no positions but those that causal masks give, so that it takes any length.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import sysconfig
import time
from pathlib import Path

# Keras reads its backend from the environment, once, when it is imported.
os.environ.setdefault(
    "KERAS_BACKEND",
    next(filter(importlib.util.find_spec, ("jax", "tensorflow", "torch")), "tensorflow"),
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_ssattn.models import convert_attention

TIMES = (1, 4, 8)  # lengths of evaluation, in lengths of training
TUNING_TIMES = (1, 4)  # lengths of the few steps more
LEARNING_RATE = 2e-3  # of Adam, in both phases and for all; tuned for none


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run."""

    train_length: int = 64
    hidden_size: int = 64
    num_heads: int = 4
    num_layers: int = 2
    batch_size: int = 16
    steps: int = 1000
    tuning_steps: int = 200
    num_seeds: int = 2
    num_windows: int = 128  # of the text that models are compared on
    scored: int = 32  # bytes at the end of each


SMALL = Settings(
    train_length=8, hidden_size=8, num_heads=2, num_layers=1, batch_size=4, steps=3,
    tuning_steps=2, num_seeds=1, num_windows=4, scored=4,
)  # fmt: skip


def read_text():
    """The bytes of the library's files: of nine in ten to train on, of the tenth to compare on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [np.frombuffer(file.read_bytes(), "uint8").astype("int32") for file in files]
    train = np.concatenate([text for i, text in enumerate(texts) if i % 10 != 9])
    return train, np.concatenate(texts[9::10])


def draw_windows(text, count, length, rng):
    """Stretches of `length` bytes and the one after, `[count, length + 1]`, from anywhere."""
    starts = rng.integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length + 1)]


def make_model(settings):
    """A pre-norm transformer of Keras's layers: bytes `[B, T]` to logits `[B, T, 256]`."""
    size = settings.hidden_size
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(256, size)(tokens)
    for _ in range(settings.num_layers):
        attention = keras.layers.MultiHeadAttention(settings.num_heads, size // settings.num_heads)
        y = keras.layers.LayerNormalization()(x)
        x = x + attention(y, y, use_causal_mask=True)
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * size, activation="gelu")(y)
        x = x + keras.layers.Dense(size)(y)
    return keras.Model(tokens, keras.layers.Dense(256)(keras.layers.LayerNormalization()(x)))


def train(model, windows, batch_size):
    """Trains for a step on each batch of the windows, in order."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE, clipnorm=1.0), loss)
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
    model.fit(windows[:, :-1], windows[:, 1:], **options)


def measure(model, windows, settings):
    """Loss in nats of the windows' last bytes, by how many bytes the model reads, by the length."""
    losses = {}
    for times in TIMES:
        length = times * settings.train_length
        part = windows[:, -length - 1 :]
        logits = model.predict(part[:, :-1], batch_size=32, verbose=0)[:, -settings.scored :]
        logits = logits.astype("float64")
        logits -= logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(-1))
        chosen = np.take_along_axis(logits, part[:, -settings.scored :, None], -1)[..., 0]
        losses[str(length)] = float(np.mean(log_sum - chosen))
    return losses


def run(settings, seed, train_text, test_text):
    """Losses of the models of one seed, and the s of each layer and head of the tuned ones."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    length, batch_size = settings.train_length, settings.batch_size
    test = draw_windows(test_text, settings.num_windows, max(TIMES) * length, rng)
    original = make_model(settings)
    train(original, draw_windows(train_text, settings.steps * batch_size, length, rng), batch_size)
    converted = convert_attention(original, normalizer="ssmax", train_length=length)
    losses = {
        "original": measure(original, test, settings),
        "converted": measure(converted, test, settings),
    }
    scales = {}
    for times in TUNING_TIMES:
        rows = batch_size // times  # as many bytes a step
        windows = draw_windows(train_text, settings.tuning_steps * rows, times * length, rng)
        for name, model in (("original", original), ("converted", converted)):
            tuned = keras.models.clone_model(model)
            tuned.set_weights(model.get_weights())
            train(tuned, windows, rows)
            name = f"{name}, tuned at {times * length}"
            losses[name] = measure(tuned, test, settings)
            found = [w for w in tuned.weights if w.name == "s"]
            if found:
                scales[name] = [keras.ops.convert_to_numpy(s).tolist() for s in found]
    return losses, scales


def table(losses):
    """Means over the seeds, and their ranges, as a table in Markdown."""
    lengths = list(losses[0]["original"])
    lines = [f"| loss in nats | {' | '.join(f'{x} bytes' for x in lengths)} |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name in losses[0]:
        cells = []
        for length in lengths:
            values = [by_name[name][length] for by_name in losses]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="take every step, learn nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    settings = SMALL if arguments.small else Settings()
    start = time.perf_counter()
    train_text, test_text = read_text()
    print(f"{len(train_text)} bytes to train on, {len(test_text)} to compare on.")
    runs = []
    for seed in range(settings.num_seeds):
        runs.append(run(settings, seed, train_text, test_text))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s")
    losses = [x for x, _ in runs]
    print(table(losses))
    results = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "python": platform.python_version(),
        "settings": dataclasses.asdict(settings),
        "learning_rate": LEARNING_RATE,
        "bytes": {"train": len(train_text), "test": len(test_text)},
        "seconds": time.perf_counter() - start,
        "losses": losses,
        "s": [s for _, s in runs],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "retrofit.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Written to {file}.")


if __name__ == "__main__":
    main()
