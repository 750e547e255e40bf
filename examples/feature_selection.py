"""Select features by a gate with four normalizers, on any Keras backend.

    KERAS_BACKEND=jax python examples/feature_selection.py

The gate holds one logit for each of the n columns; a normalizer turns the logits into weights,
and each column is multiplied by its own before a small network classifies:

    y = f(n w * x)        w = normalizer(logits)

Compared: `Softmax`, `SSMax`, `Softpick` and `RectifiedSoftpick` as that normalizer, with nothing
else different, on scikit-learn's breast cancer data: 30 real columns and 90 of noise. The columns
of noise are the real ones, each three times, each shuffled by itself, so that they look alike and
tell nothing; a good gate gives them no weight. All logits start at 1, where n w is (nearly) 1 for
every normalizer. No penalty is on the gate; the kernels of the network have an L2 penalty, because
without one the network can undo the gate. It and the number of epochs were set by softmax and
"no gate" alone, on other seeds than those reported.

Beside them, "no gate" is the same network on all columns, and "L1 linear SVM" is `LinearSVC` with
an L1 penalty, as scikit-learn's guide has it for selecting features; its grid is that of C, chosen
by the validation accuracy (it has no probabilities).

The number of columns is fixed, so SSMax is softmax with a learned temperature.
"""

import functools
import time
from typing import Any

import comparison
import comparison_report as report
import keras
import numpy as np
from comparison import NORMALIZERS, Arm, Outcome, Part, Parts, Settings
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

NUM_REAL = 30  # columns
COPIES = 3  # of each, shuffled
NUM_COLUMNS = NUM_REAL * (1 + COPIES)
HIDDEN_SIZE = 16
PENALTY = 0.03  # times the sum of squares of each kernel
COSTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # the linear model's grid, of C
SETTINGS = Settings(epochs=100, batch_size=64, rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
SIZES = {"train": 256, "validation": 128, "test": 185}
MEASURES = {  # and their digits in the table
    "accuracy": 3,
    "noise_weight": 2,
    "noise_zeros": 2,
    "real_zeros": 2,
    "ranking": 2,
}


class FeatureGate(keras.layers.Layer):
    """Multiplies each of n features by n times its weight, `normalizer(logits)`.

    Args:
        normalizer: a layer on logits.

    Call arguments:
        inputs: `[B, n]`.

    Returns:
        Tensor `[B, n]`.
    """

    def __init__(self, normalizer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalizer = normalizer

    def build(self, input_shape: Any) -> None:
        self.normalizer.build(input_shape[-1:])
        self.logits = self.add_weight(input_shape[-1:], "ones", name="logits")

    def weights_of_features(self) -> Any:
        """The weights, `[n]`."""
        return self.normalizer(self.logits)

    def call(self, inputs: Any) -> Any:
        return inputs * self.weights_of_features() * inputs.shape[-1]


def make_model(arm: str) -> Any:
    """Returns a compiled classifier, whose gate, if it has one, is named "gate"."""
    inputs = keras.Input((NUM_COLUMNS,))
    x = inputs
    if arm in NORMALIZERS:
        x = FeatureGate(NORMALIZERS[arm](), name="gate")(x)
    penalty = keras.regularizers.L2(PENALTY)
    x = keras.layers.Dense(HIDDEN_SIZE, "relu", kernel_regularizer=penalty)(x)
    outputs = keras.layers.Dense(1, "sigmoid", kernel_regularizer=penalty)(x)
    model = keras.Model(inputs, outputs, name=arm.replace(" ", "_"))
    model.compile(keras.optimizers.Adam(), "binary_crossentropy")
    return model


def load(seed: int) -> Parts:
    """Returns the data in three parts, real columns first, by the scale of the training part."""
    x, y = load_breast_cancer(return_X_y=True)
    noise = np.random.default_rng(seed).permuted(np.tile(x, COPIES), axis=0)
    parts = comparison.split(np.concatenate([x, noise], axis=1), y, SIZES, seed)
    scale = StandardScaler().fit(parts.train.x).transform
    return Parts(*(Part(scale(part.x).astype("float32"), part.y) for part in parts))


def measure_selection(weights: np.ndarray) -> dict[str, float]:
    """What one weight for each column says of the selection.

    Returns:
        `noise_weight`: share of the weights' magnitude on the columns of noise;
        `noise_zeros`, `real_zeros`: share of the columns whose weight is exactly 0;
        `ranking`: probability that a real column has a larger magnitude than one of noise.
    """
    magnitudes = np.abs(weights.astype("float64"))
    is_real = np.arange(NUM_COLUMNS) < NUM_REAL
    total = magnitudes.sum() or 1.0
    return {
        "noise_weight": float(magnitudes[~is_real].sum() / total),
        "noise_zeros": float((weights[~is_real] == 0).mean()),
        "real_zeros": float((weights[is_real] == 0).mean()),
        "ranking": float(roc_auc_score(is_real, magnitudes)),
    }


def run(arm: str, model: Any, settings: Settings, seed: int, rate: float) -> Outcome:
    """Trains a network and measures it; shows the gate's weights."""
    parts = load(seed)
    make = functools.partial(make_model, arm)
    comparison.train(model, make, parts.train, settings, seed, rate)
    x = np.concatenate([parts.validation.x, parts.test.x])
    probabilities = model.predict(x, batch_size=len(x), verbose=0)[:, 0]
    validation, test = np.split(probabilities, [len(parts.validation.x)])
    measured = {"accuracy": float(((test > 0.5) == parts.test.y).mean())}
    shown = None
    if arm in NORMALIZERS:
        weights = keras.ops.convert_to_numpy(model.get_layer("gate").weights_of_features())
        measured |= measure_selection(weights)
        shown = weights.round(4).tolist()
    return Outcome(float(log_loss(parts.validation.y, validation)), measured, shown)


def run_linear(seed: int, cost: float) -> Outcome:
    """Fits a linear model with an L1 penalty and measures it; shows its coefficients."""
    parts = load(seed)
    model = LinearSVC(C=cost, penalty="l1", dual=False, max_iter=10_000, random_state=seed)
    model.fit(*parts.train)
    weights = model.coef_[0]
    measured = {"accuracy": float(model.score(*parts.test)), **measure_selection(weights)}
    loss = 1 - float(model.score(*parts.validation))  # ties go to the smallest C
    return Outcome(loss, measured, weights.round(4).tolist())


def arms(settings: Settings) -> dict[str, Arm]:
    """Returns the models to compare, by name."""
    found = {}
    for name in (*NORMALIZERS, "no gate"):
        model = make_model(name)
        train = functools.partial(run, name, model, settings)
        found[name] = Arm(train, settings.rates, comparison.count_trainable(model))
    found["L1 linear SVM"] = Arm(run_linear, COSTS, NUM_COLUMNS + 1)
    return found


def plot(results: dict[str, Any]) -> Any:
    """Returns a figure of the measures, and of each gate's weights."""
    arms = results["arms"]
    title = "Breast cancer data with three columns of noise for each real one, under four gates"
    figure, above, below = report.two_rows(title, (3, len(NORMALIZERS)), height=7)
    report.strip(above[0], arms, "accuracy", "test accuracy (each dot a seed)")
    report.strip(above[1], arms, "noise_weight", "share of the weight that is on noise")
    report.strip(above[2], arms, "noise_zeros", "share of noise columns at exactly 0")
    even = 1 - NUM_REAL / NUM_COLUMNS
    above[1].axvline(even, color="black", linestyle="--", linewidth=1)
    above[1].text(even - 0.01, list(arms).index("no gate"), "even gate", ha="right", va="center")
    above[1].set_xlim(0, 0.8)
    above[2].set_xlim(-0.03, 1.03)
    for axis, name in zip(below, NORMALIZERS, strict=True):
        weights = np.array(arms[name]["shown"])
        real, noise = -np.sort(-weights[:NUM_REAL]), -np.sort(-weights[NUM_REAL:])
        axis.bar(range(NUM_REAL), real, width=1, color=report.COLORS[name])
        axis.bar(range(NUM_REAL, NUM_COLUMNS), noise, width=1, color="#c4c4c4")
        axis.set_title(name, fontsize=11)
        axis.set_xticks([0, NUM_REAL, NUM_COLUMNS])
        axis.spines[["top", "right"]].set_visible(False)
    below[0].figure.supxlabel("columns, each kind sorted: real (color), noise (gray)", fontsize=10)
    below[0].set_ylabel(f"weight in the gate, seed {results['settings']['seeds'][0]}")
    return figure


def main() -> None:
    """Runs the comparison and writes its results and plot."""
    start = time.perf_counter()
    options = comparison.parse_arguments(__doc__.splitlines()[0])
    settings = SETTINGS.small() if options.small else SETTINGS
    seeds = range(options.seed, options.seed + settings.num_seeds)
    results = {
        "data": {"name": "sklearn.datasets.load_breast_cancer", **SIZES},
        "num_columns": {"real": NUM_REAL, "noise": NUM_COLUMNS - NUM_REAL},
        "hidden_size": HIDDEN_SIZE,
        "penalty": PENALTY,
        **comparison.describe_run(settings, seeds),
        "arms": comparison.compare(arms(settings), seeds),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(report.describe(results, MEASURES))
    comparison.write(results, plot(results), options.output, "feature_selection")


if __name__ == "__main__":
    main()
