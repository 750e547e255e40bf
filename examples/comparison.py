"""What the comparisons of normalizers share: the arms, the loop over them, and the results.

Every seed is one experiment from beginning to end: new parts of the data, new initial weights,
and a choice among the values of a grid by the loss on that seed's validation part. What is
reported of the test part is that of the choice, and no choice depends on it.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Sequence
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
import sklearn
from sklearn.model_selection import train_test_split

import keras_ssattn
from keras_ssattn import layers

NORMALIZERS = {
    "softmax": layers.Softmax,
    "ssmax": functools.partial(layers.SSMax, init_s=1.0),  # n does not vary: s is a temperature
    "softpick": layers.Softpick,
    "rectified_softpick": layers.RectifiedSoftpick,
}
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How often and how long networks are trained."""

    epochs: int
    batch_size: int
    rates: tuple[float, ...]  # learning rates of Adam: the grid of every network
    num_seeds: int = 10

    def small(self) -> "Settings":
        """The settings of a run that takes every step and trains hardly at all."""
        return dataclasses.replace(self, epochs=1, rates=self.rates[-2:], num_seeds=2)


class Part(NamedTuple):
    """Rows of a data set."""

    x: np.ndarray  # [N, columns]
    y: np.ndarray  # [N], integers


class Parts(NamedTuple):
    """A data set in three parts, drawn anew for each seed."""

    train: Part
    validation: Part
    test: Part


def split(x: np.ndarray, y: np.ndarray, sizes: dict[str, int], seed: int) -> Parts:
    """Draws three parts of the given sizes, each with as large a share of every class."""
    x, x_test, y, y_test = train_test_split(
        x, y, test_size=sizes["test"], stratify=y, random_state=seed
    )
    x, x_validation, y, y_validation = train_test_split(
        x, y, test_size=sizes["validation"], stratify=y, random_state=seed
    )
    return Parts(Part(x, y), Part(x_validation, y_validation), Part(x_test, y_test))


class Outcome(NamedTuple):
    """What one training gave."""

    validation_loss: float  # by which a value of the grid is chosen
    measured: dict[str, float]  # on the test part, and of the trained weights
    shown: Any  # for the plot, as lists


class Arm(NamedTuple):
    """One of the models compared: how to train it with a seed and a value of its grid."""

    run: Callable[[int, float], Outcome]
    grid: Sequence[float]
    num_parameters: int


def train(
    model: Any, make: Callable[[], Any], part: Part, settings: Settings, seed: int, rate: float
) -> None:
    """Trains a compiled model from the weights of a new one, which the seed fixes.

    Its numbers start anew; what the backend has compiled for it stays.
    """
    options = {"batch_size": settings.batch_size, "verbose": 0}
    if not model.optimizer.built:  # a first `fit` draws the order of rows once more than others
        model.fit(part.x[: settings.batch_size], part.y[: settings.batch_size], **options)
    keras.utils.set_random_seed(seed)
    model.set_weights(make().get_weights())
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape))
    model.optimizer.learning_rate = rate
    model.fit(*part, epochs=settings.epochs, **options)


def count_trainable(model: Any) -> int:
    """The number of a model's trainable parameters."""
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


def compare(arms: dict[str, Arm], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Trains each arm with each seed and each value of its grid; keeps what was chosen."""
    results = {}
    for name, arm in arms.items():
        start = time.perf_counter()
        outcomes = [{value: arm.run(seed, value) for value in arm.grid} for seed in seeds]
        results[name] = {
            "num_parameters": arm.num_parameters,
            **choose(outcomes),
            "seconds": round(time.perf_counter() - start, 1),
        }
        accuracy = results[name]["summary"]["accuracy"]["mean"]
        print(f"{name}: test accuracy {accuracy:.3f}, {results[name]['seconds']} s", flush=True)
    return results


def choose(outcomes: Sequence[dict[float, Outcome]]) -> dict[str, Any]:
    """Chooses a value of the grid for each seed, by the validation loss alone.

    Args:
        outcomes: one dictionary by value of the grid for each seed.

    Returns:
        The values chosen, all validation losses, what was measured with the chosen values, its
        mean and sample deviation over the seeds, and what the plot shows of the first seed.
    """
    losses = {
        str(value): [by_value[value].validation_loss for by_value in outcomes]
        for value in outcomes[0]
    }
    chosen = [min(x, key=lambda value: x[value].validation_loss) for x in outcomes]
    kept = [by_value[value] for by_value, value in zip(outcomes, chosen, strict=True)]
    measured = {name: [x.measured[name] for x in kept] for name in kept[0].measured}
    return {
        "chosen": chosen,
        "validation_losses": losses,
        "measured": measured,
        "summary": {
            name: {"mean": float(np.mean(x)), "deviation": float(np.std(x, ddof=1))}
            for name, x in measured.items()
        },
        "shown": kept[0].shown,
    }


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="run all steps, train hardly at all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    return parser.parse_args(arguments)


def describe_run(settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """The backend, versions and settings that the results depend on."""
    backend = keras.config.backend()
    versions = {x: importlib.import_module(x).__version__ for x in ("keras", backend)}
    versions |= {"keras_ssattn": keras_ssattn.__version__, "scikit-learn": sklearn.__version__}
    print(f"Backend: {backend} (set KERAS_BACKEND for another). Versions: {versions}")
    return {
        "backend": backend,
        "versions": versions,
        "settings": {**dataclasses.asdict(settings), "seeds": list(seeds)},
    }


def write(results: dict[str, Any], figure: Any, folder: Path, name: str) -> None:
    """Writes the results, with each list of numbers on a line, and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match.group().split()), text)
    (folder / f"{name}.json").write_text(text + "\n")
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"\nWrote {name}.json and {name}.png to {folder}")
