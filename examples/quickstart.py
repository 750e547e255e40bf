"""Tell nine speakers apart with four kinds of attention, on any Keras backend.

    KERAS_BACKEND=jax python examples/quickstart.py

Trains small transformers of `keras_ssattn.build` that differ in nothing but the normalizer of their
attention, on utterances of 7 to 29 steps, and compares them with baselines and published figures.
Moves one of them to other processes on other backends, and exports it. Then it loads two small
language models and shows what the normalizers are for: contexts 32 times as long as in training.
Without KERAS_BACKEND it takes the first backend that is installed.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
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
import quickstart_data as data
import quickstart_report as report

import keras_ssattn

PAPERS = Path(__file__).parent / "papers"
sys.path.append(str(PAPERS))
import retrieval  # noqa: E402
import training  # noqa: E402

NORMALIZERS = ("softmax", "ssmax", "softpick", "rectified_softpick")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run, the same for all models.

    Chosen on thirds of the training split, held out as `--validate` does it.
    """

    hidden_size: int = 32
    num_heads: int = 4
    num_layers: int = 1
    dropout: float = 0.1
    shift: float = 0.3
    learning_rate: float = 1e-2  # at first
    weight_decay: float = 0.1
    batch_size: int = 32
    passes: int = 30  # over the training split
    num_seeds: int = 2
    length_factors: tuple = (1, 2, 4, 8, 16, 32)
    test_sequences: int = 16  # of each length


SMALL = Settings(
    hidden_size=8, num_heads=2, passes=1, num_seeds=1, length_factors=(1, 2), test_sequences=8
)  # fmt: skip


# --- 1. A model for sequences of any length ------------------------------------------------


def make_model(normalizer, settings, num_utterances):
    """Returns a compiled classifier: the package's transformer and one dense layer.

    By its name SSMax starts near softmax. `SSMax(init_s=...)` in its place starts elsewhere.
    """
    encoder = keras_ssattn.build(
        embed_dim=data.NUM_FEATURES,
        hidden_size=settings.hidden_size,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        dropout=settings.dropout,
        window_size=None,  # any length
        normalizer=normalizer,
        rotary="default",  # without positions the order of the steps is lost
        causal=False,  # the whole utterance is there before the answer
        output_mode="mean_pool",
    )
    model = keras.Sequential(
        [
            keras.Input((None, data.NUM_FEATURES)),
            keras.layers.Masking(),  # steps of zeros are padding: no key, no query, not in the mean
            encoder,
            keras.layers.Dense(data.NUM_SPEAKERS, name="speaker"),
        ],
        name=normalizer,
    )
    num_updates = settings.passes * num_utterances // settings.batch_size
    rate = keras.optimizers.schedules.CosineDecay(settings.learning_rate, num_updates)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def train(model, inputs, speakers, settings, seed):
    """Trains a model from new weights that the seed fixes.

    To train it again takes no second compilation, only an optimizer set back to its start.
    """
    keras.utils.set_random_seed(seed)
    model.set_weights(keras.models.clone_model(model).get_weights())
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape))
    passes = np.tile(np.arange(len(inputs)), settings.passes)
    model.fit(
        data.shifted(inputs[passes], settings.shift, np.random.default_rng(seed)),
        speakers[passes],
        batch_size=settings.batch_size,
        verbose=1 if sys.stdout.isatty() else 2,  # a bar, or in a file a line
    )


def train_and_test(settings, seeds, training_data, test_data):
    """Trains each model with each seed; returns the accuracies, the seconds, and a model.

    The model is that with SSMax and the last seed.
    """
    accuracies, seconds = {}, {}
    for name in NORMALIZERS:
        start = time.perf_counter()
        model = make_model(name, settings, len(training_data[0]))
        accuracies[name] = []
        for seed in seeds:
            print(f"\n{name}, seed {seed}:", flush=True)
            train(model, *training_data, settings, seed)
            answers = predict(model, test_data[0]).argmax(-1)
            accuracies[name].append(float(np.mean(answers == test_data[1])))
            print(f"right on {accuracies[name][-1]:.1%} of the test utterances", flush=True)
        seconds[name] = time.perf_counter() - start
        if name == "ssmax":
            ssmax = model
    return accuracies, seconds, ssmax


def predict(model, inputs):
    """Returns the outputs, computed as one batch: another size would be compiled anew."""
    return model.predict(inputs, batch_size=len(inputs), verbose=0)


def padding_difference(model, series):
    """Returns how far padding moves the answer to the shortest utterance: a mask leaves nothing."""
    shortest = min(series, key=len)
    alone, padded = predict(model, shortest[None]), predict(model, data.pad([shortest]))
    return float(np.abs(alone - padded).max())


# --- 2. Another process, another backend, another runtime ------------------------------------

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


def predict_elsewhere(path, inputs, backends):
    """Returns the outputs of a saved model by backend, loaded by a new process on each."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "inputs.npy")
        np.save(given, inputs)
        returned = {backend: Path(folder, f"{backend}.npy") for backend in backends}
        processes = []
        for backend, file in returned.items():
            print(f"Loading the saved model on {backend}, in another process", flush=True)
            command = [sys.executable, "-c", RELOAD, str(path), str(given), str(file)]
            environment = {**os.environ, "KERAS_BACKEND": backend}
            processes.append(subprocess.Popen(command, env=environment))
        for process in processes:
            if process.wait() != 0:
                raise subprocess.CalledProcessError(process.returncode, process.args)
        return {backend: np.load(file) for backend, file in returned.items()}


def check_reload(model, path, inputs):
    """Saves a model and returns how far it is from itself, reloaded here and elsewhere."""
    model.save(path)
    here = keras.saving.load_model(path, compile=False)
    reloaded = {"this process": predict(here, inputs)}
    reloaded |= predict_elsewhere(path, inputs, other_backends())
    outputs = predict(model, inputs)
    return {name: float(np.abs(x - outputs).max()) for name, x in reloaded.items()}


def check_export(model, folder, inputs):
    """Exports a model for use without Keras, and returns how far it is from itself there.

    PyTorch writes its own format. The others write a SavedModel, for which TensorFlow is needed.
    """
    if keras.config.backend() == "torch":
        name, export = "quickstart.pt2", export_to_torch
    elif importlib.util.find_spec("tensorflow"):
        name, export = "quickstart_saved_model", export_to_tensorflow
    else:
        return {"skipped": "a SavedModel needs the package tensorflow, which is not installed"}
    print(f"Exporting the model to {name}, and running it there", flush=True)
    exported = export(model, str(folder / name))
    differences = [
        np.abs(exported(x) - predict(model, x)).max()
        for x in (inputs, inputs[:5, :11])  # any batch, any length
    ]
    return {"file": name, "difference": float(max(differences))}


def export_to_torch(model, path):
    """Writes a model by `torch.export`; returns what is read from the file, as a function."""
    import torch

    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=2)}
    model.export(path, format="torch", verbose=False, dynamic_shapes=[(sizes,)])
    module = torch.export.load(path).module()
    return lambda inputs: module(torch.from_numpy(inputs)).detach().numpy()


def export_to_tensorflow(model, path):
    """Writes a model as a SavedModel; returns what is read from there, as a function."""
    import tensorflow

    model.export(path, format="tf_saved_model", verbose=False)
    loaded = tensorflow.saved_model.load(path)
    return lambda inputs: loaded.serve(inputs).numpy()


# --- 3. What the normalizers are for --------------------------------------------------------


def look_up(settings):
    """Returns what two small language models do when asked for one of ever more items.

    They were trained by examples/papers on contexts of 64 items, to give the value of a key.
    """
    config = json.loads((PAPERS / "ssmax" / "retrieval.json").read_text())
    number = settings.test_sequences
    found = {"train_length": config["length"], "models": {}}
    for name in ("softmax", "ssmax"):
        model = training.make_model(config, name)
        model.load_weights(PAPERS / "results" / "retrieval" / f"{name}-0.003-seed-0.weights.h5")
        found["models"][name] = by_length = {}
        for factor in settings.length_factors:
            length = factor * config["length"]
            print(f"{name}: {length} items", flush=True)
            rng = np.random.default_rng((2, length))
            tokens, answers, places = retrieval.draw_task(rng, config, number, length)
            given = retrieval.answer(config, model, tokens).argmax(-1)
            # of the first layer, which finds the items, in the first two sequences
            weights = retrieval.weight_on_needle(model, tokens[:2], places[:2])[0]
            by_length[str(length)] = {
                "accuracy": float(np.mean(given == answers)),
                "weight": float(np.mean(weights)),
            }
    return found


# --- 4. All of it ---------------------------------------------------------------------------


def parse_arguments(arguments=None):
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="run all steps, train hardly at all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--passes", type=int, help="over the utterances to train on")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--validate", action="store_true", help="train on 2/3 of the training split, test on 1/3"
    )
    return parser.parse_args(arguments)


def main():
    """Runs the example and writes its results, plot and models."""
    start = time.perf_counter()
    options = parse_arguments()
    settings = SMALL if options.small else Settings()
    if options.passes is not None:
        settings = dataclasses.replace(settings, passes=options.passes)
    options.output.mkdir(parents=True, exist_ok=True)
    backend = keras.config.backend()
    versions = {x: importlib.import_module(x).__version__ for x in ("keras", backend)}
    versions["keras_ssattn"] = keras_ssattn.__version__
    print(f"Backend: {backend} (set KERAS_BACKEND for another). Versions: {versions}")

    known, new = data.load()
    if options.validate:
        known, new = data.hold_out(known)
    print(f"{len(known.series)} utterances to train on, {len(new.series)} others to test on")
    scale = data.measure_scale(known)
    inputs = data.to_inputs(new, scale)
    seeds = range(options.seed, options.seed + settings.num_seeds)
    accuracies, seconds, model = train_and_test(
        settings, seeds, (data.to_inputs(known, scale), known.speakers), (inputs, new.speakers)
    )
    results = {
        "utterances": {"train": len(known.series), "test": len(new.series)},
        "parameters": model.count_params(),
        "accuracies": accuracies,
        "baselines": data.baselines(known, new),
        "published": data.PUBLISHED,
        "padding_difference": padding_difference(model, data.scaled(new, scale)),
        "reload_difference": check_reload(model, options.output / "quickstart.keras", inputs),
        "export": check_export(model, options.output, inputs),
        "look_up": look_up(settings),
        "model_seconds": seconds,
        "backend": backend,
        "versions": versions,
        "settings": {**dataclasses.asdict(settings), "seeds": list(seeds)},
        "seconds": time.perf_counter() - start,
    }
    print(report.describe(results))
    report.plot(results).savefig(options.output / "quickstart.png", dpi=160)
    (options.output / "quickstart.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nWrote quickstart.json, .png and .keras to {options.output}")
    print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
