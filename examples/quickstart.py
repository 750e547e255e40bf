"""Forecast tomorrow's temperatures with four kinds of attention, on any Keras backend.

    KERAS_BACKEND=jax python examples/quickstart.py

Trains four small transformers that differ in nothing but the normalizer of their attention,
compares them with two forecasts that need no model, also on windows up to eight times as long
as those of training, and moves one trained model to another process on another backend.
Without KERAS_BACKEND it takes the first backend that is installed.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# Keras reads its backend from the environment, once, when it is imported.
os.environ.setdefault(
    "KERAS_BACKEND",
    next(filter(importlib.util.find_spec, ("jax", "tensorflow", "torch")), "tensorflow"),
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import quickstart_report as report
from quickstart_data import (
    BATCH_SIZE,
    HORIZON,
    Scale,
    forecast_hours,
    future,
    last_known,
    load_table,
    make_windows,
    measure_scale,
    naive_forecasts,
    split,
)

import keras_ssattn

NORMALIZERS = ("softmax", "ssmax", "softpick", "rectified_softpick")
LENGTHS = (60, 240, 480)  # hours that a model looks back; it is trained on the first
LEARNING_RATE = 3e-3  # at first; the same for all models, tuned for none of them


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run; `test_step` shares no divisor with 24, so every hour of day is met."""

    hidden_size: int = 32
    num_heads: int = 4
    num_layers: int = 2
    epochs: int = 4
    num_seeds: int = 2
    train_step: int = 4
    test_step: int = 25


SMALL = Settings(
    hidden_size=8, num_heads=2, num_layers=1, epochs=1, num_seeds=1, train_step=16, test_step=49
)


# --- 1. Data -----------------------------------------------------------------------------


class Task(NamedTuple):
    """What models are trained on, and what they are to forecast."""

    train: tuple
    validation: tuple
    test: Any  # the part of the table
    hours: np.ndarray  # rows of it
    scale: Scale


def prepare(settings):
    """Returns the `Task`, and says what is in it."""
    parts = split(load_table())
    print("Hourly temperatures in Seattle:")
    for name, part in parts.items():
        low, high = part["temp"].min(), part["temp"].max()
        first, last = part.index[0], part.index[-1]
        print(f"  {name}: {first:%d %b %Y} to {last:%d %b %Y}, {low:.1f} to {high:.1f} °F")
    scale = measure_scale(parts["train"])
    windows = {}
    for name in ("train", "validation"):
        hours = forecast_hours(parts[name], LENGTHS[0], settings.train_step)
        windows[name] = make_windows(parts[name], hours, LENGTHS[0], scale)
    # Windows of every length precede the same hours, so that their errors compare.
    hours = forecast_hours(parts["test"], max(LENGTHS), settings.test_step)
    print(f"{len(windows['train'][0])} windows of {LENGTHS[0]} hours to train on.")
    print(f"{len(hours)} test forecasts of {HORIZON} hours, from windows of {LENGTHS} hours.")
    return Task(**windows, test=parts["test"], hours=hours, scale=scale)


# --- 2. Models ---------------------------------------------------------------------------


def make_model(normalizer, settings, num_windows):
    """Returns a compiled forecaster: the package's transformer and one dense layer.

    The string "ssmax" is the package's default, s = 1 in every head. To start as ordinary
    softmax on average, give `SSMax(init_s="auto", train_length=60)` in its place.
    """
    transformer = keras_ssattn.build(
        embed_dim=3,
        hidden_size=settings.hidden_size,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        dropout=0.0,
        window_size=None,  # any length
        normalizer=normalizer,
    )
    head = keras.layers.Dense(HORIZON, name="forecast")
    model = keras.Sequential([transformer, head], name=normalizer)
    num_updates = settings.epochs * num_windows // BATCH_SIZE
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, num_updates)
    model.compile(keras.optimizers.Adam(rate), loss="mae")
    return model


def train(model, task, settings, seed):
    """Trains a model from new weights that the seed fixes.

    To train it again takes no second compilation, only an optimizer set back to its start.
    """
    keras.utils.set_random_seed(seed)
    model.set_weights(keras.models.clone_model(model).get_weights())
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape))
    model.fit(
        *task.train,
        batch_size=BATCH_SIZE,
        epochs=settings.epochs,
        validation_data=task.validation,
        verbose=1 if sys.stdout.isatty() else 2,  # a bar, or in a file a line, for each epoch
    )


def forecast(model, task, length):
    """Returns a model's test forecasts in °F, `[N, HORIZON]`, from windows of a length."""
    inputs, _ = make_windows(task.test, task.hours, length, task.scale)
    outputs = model.predict(inputs, batch_size=BATCH_SIZE, verbose=0)
    return last_known(task.test, task.hours) + task.scale.temperature * outputs


def learned_scales(model):
    """Returns SSMax's s, a list of heads for each layer."""
    layers = model.layers[0].layers
    blocks = [x for x in layers if isinstance(x, keras_ssattn.TransformerBlock)]
    return [keras.ops.convert_to_numpy(x.attention.normalizer.s).tolist() for x in blocks]


# --- 3. Another process, another backend ---------------------------------------------------

RELOAD = """
import sys
import keras, numpy
import keras_ssattn  # registers the layers that the file names
model = keras.saving.load_model(sys.argv[1], compile=False)
numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2]), verbose=0))
"""


def other_backends():
    """Returns the backends that are installed beside the one in use."""
    names = ("jax", "tensorflow", "torch")
    return [x for x in names if x != keras.config.backend() and importlib.util.find_spec(x)]


def predict_elsewhere(path, inputs, backend):
    """Returns the outputs of a saved model, loaded by a new process on another backend."""
    with tempfile.TemporaryDirectory() as folder:
        given, returned = Path(folder, "inputs.npy"), Path(folder, "outputs.npy")
        np.save(given, inputs)
        print(f"Loading the saved model on {backend}, in another process", flush=True)
        subprocess.run(
            [sys.executable, "-c", RELOAD, str(path), str(given), str(returned)],
            env={**os.environ, "KERAS_BACKEND": backend},
            check=True,
        )
        return np.load(returned)


def check_reload(model, path, inputs):
    """Saves a model and returns how far it is from itself, reloaded here and elsewhere."""
    model.save(path)
    outputs = model.predict(inputs, verbose=0)
    here = keras.saving.load_model(path, compile=False)
    reloaded = {"this process": here.predict(inputs, verbose=0)}
    for backend in other_backends():
        reloaded[backend] = predict_elsewhere(path, inputs, backend)
    return {name: float(np.abs(x - outputs).max()) for name, x in reloaded.items()}


# --- 4. All of it ------------------------------------------------------------------------


def train_and_forecast(task, settings, seeds):
    """Trains each model with each seed; returns the forecasts, facts on them, and a model.

    The forecasts are in a dictionary of each seed's dictionary by length, by normalizer; the
    model is that with SSMax and the last seed.
    """
    forecasts = {name: [] for name in NORMALIZERS}
    facts = {"model_seconds": {}, "learned_s": []}
    for name in NORMALIZERS:
        start = time.perf_counter()
        model = make_model(name, settings, len(task.train[0]))
        if name == "ssmax":
            ssmax, facts["initial_s"] = model, learned_scales(model)
        for seed in seeds:
            print(f"\n{name}, seed {seed}:", flush=True)
            train(model, task, settings, seed)
            forecasts[name].append({length: forecast(model, task, length) for length in LENGTHS})
            if name == "ssmax":
                facts["learned_s"].append(learned_scales(model))
        facts["model_seconds"][name] = time.perf_counter() - start
    return forecasts, facts, ssmax


def measure_errors(task, forecasts):
    """Returns mean absolute errors of the models' forecasts and of the naive ones."""

    def error(x):
        return float(np.abs(x - future(task.test, task.hours)).mean())

    naive = naive_forecasts(task.test, task.hours)
    return {
        "unit": "mean absolute error in degrees Fahrenheit",
        "errors": {
            name: {str(length): [error(made[length]) for made in by_seed] for length in LENGTHS}
            for name, by_seed in forecasts.items()
        },
        "baselines": {name: error(x) for name, x in naive.items()},
    }


def example_day(task, forecasts):
    """Returns one forecast to plot: the hours before and during it, and what models said."""
    i = len(task.hours) // 2
    start = task.hours[i]
    known = task.test["temp"].iloc[start - LENGTHS[0] : start + HORIZON]
    return known, {
        length: {name: by_seed[0][length][i] for name, by_seed in forecasts.items()}
        for length in (min(LENGTHS), max(LENGTHS))
    }


def parse_arguments(arguments=None):
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="run all steps, train hardly at all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--epochs", type=int, help="passes over the training windows")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    return parser.parse_args(arguments)


def main():
    """Runs the example and writes its results, plot and model."""
    start = time.perf_counter()
    options = parse_arguments()
    settings = SMALL if options.small else Settings()
    if options.epochs is not None:
        settings = dataclasses.replace(settings, epochs=options.epochs)
    options.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("tensorflow").setLevel("ERROR")  # three lengths are three traces, as meant
    backend = keras.config.backend()
    versions = {x: importlib.import_module(x).__version__ for x in ("keras", backend)}
    versions["keras_ssattn"] = keras_ssattn.__version__
    print(f"Backend: {backend} (set KERAS_BACKEND for another). Versions: {versions}")

    task = prepare(settings)
    seeds = range(options.seed, options.seed + settings.num_seeds)
    forecasts, facts, ssmax = train_and_forecast(task, settings, seeds)
    sample, _ = make_windows(task.test, task.hours[:8], max(LENGTHS), task.scale)
    results = {
        **measure_errors(task, forecasts),
        **facts,
        "reload_difference": check_reload(ssmax, options.output / "quickstart.keras", sample),
        "output_unit_in_degrees": task.scale.temperature,
        "backend": backend,
        "versions": versions,
        "settings": {**dataclasses.asdict(settings), "seeds": list(seeds)},
        "seconds": time.perf_counter() - start,
    }
    print(report.describe(results))
    figure = report.plot(results, *example_day(task, forecasts))
    figure.savefig(options.output / "quickstart.png", dpi=130)
    (options.output / "quickstart.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nWrote quickstart.json, .png and .keras to {options.output}")
    print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
