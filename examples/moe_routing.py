"""Route handwritten digits to a mixture of experts with four normalizers, on any Keras backend.

    KERAS_BACKEND=jax python examples/moe_routing.py

A dense layer, the router, gives each of eight small experts a logit for each image, and a
normalizer turns these into weights; the output is the weighted sum of the experts' outputs:

    y = sum_e w_e(x) f_e(x)        w = normalizer(W x + b)

Compared: `Softmax`, `SSMax`, `Softpick` and `RectifiedSoftpick` as that normalizer, with nothing
else different, on scikit-learn's 1797 digits of 8 x 8 pixels; and "no router", the plain average
of the same experts, which is one network with a hidden layer. Measured are the accuracy, how many
experts an image uses, how evenly they are used, and the weights' zeros and signs. There is no
penalty that balances the load, and none that asks for few experts. All experts are computed for
every image: an exact zero could be skipped, but is not here. Sizes and epochs were set with softmax
and "no router" alone, on other seeds than those reported.

The number of experts is fixed, so SSMax is softmax with a learned temperature.
"""

import functools
import time
from typing import Any

import comparison
import comparison_report as report
import keras
import numpy as np
from comparison import NORMALIZERS, Arm, Outcome, Parts, Settings
from keras import ops
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss

NUM_EXPERTS = 8
HIDDEN_SIZE = 8  # of each expert
NUM_CLASSES = 10
SETTINGS = Settings(epochs=40, batch_size=128, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
SIZES = {"train": 1024, "validation": 256, "test": 517}
MEASURES = {  # and their digits in the table
    "accuracy": 3,
    "experts_used": 1,
    "balance": 2,
    "zeros": 2,
    "negative": 2,
    "unrouted": 3,
}
USED = 0.01  # an expert is used if it has this share of an image's weights, in magnitude


class Experts(keras.layers.Layer):
    """Multilayer perceptrons side by side, and the weighted sum of their outputs.

    Args:
        num_experts: E.
        hidden_size: H, of each expert's one hidden layer.
        output_size: C.

    Call arguments:
        inputs: `[B, D]`.
        weights: `[B, E]`.

    Returns:
        Tensor `[B, C]`.
    """

    def __init__(self, num_experts: int, hidden_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = (num_experts, hidden_size, output_size)
        self.hidden = keras.layers.Dense(
            num_experts * hidden_size, "relu", kernel_initializer="he_normal"
        )

    def build(self, inputs_shape: Any, weights_shape: Any) -> None:
        num_experts, hidden_size, output_size = self.shape
        self.hidden.build(inputs_shape)
        normal = keras.initializers.RandomNormal(stddev=hidden_size**-0.5)
        self.kernel = self.add_weight(self.shape, initializer=normal, name="kernel")
        self.bias = self.add_weight((num_experts, output_size), "zeros", name="bias")

    def call(self, inputs: Any, weights: Any) -> Any:
        hidden = ops.reshape(self.hidden(inputs), (-1, *self.shape[:2]))  # [B, E, H]
        outputs = ops.einsum("beh,ehc->bec", hidden, self.kernel) + self.bias
        return ops.einsum("be,bec->bc", weights, outputs)


def split_experts(layouts: Any, axis: str = "model") -> None:
    """Adds to a `keras.distribution.LayoutMap` that each device has some of the experts."""
    experts = r".*experts(_\d+)?/"
    layouts[experts + r"dense(_\d+)?/kernel"] = (None, axis)  # [D, E H]
    layouts[experts + r"dense(_\d+)?/bias"] = (axis,)  # [E H]
    layouts[experts + "kernel"] = (axis, None, None)  # [E, H, C]
    layouts[experts + "bias"] = (axis, None)  # [E, C]


def make_model(arm: str) -> Any:
    """Returns a compiled mixture of experts, whose router's layer is named "router"."""
    inputs = keras.Input((64,))
    if arm in NORMALIZERS:
        logits = keras.layers.Dense(NUM_EXPERTS)(inputs)
        weights = NORMALIZERS[arm](name="router")(logits)
    else:  # equal logits
        even = keras.layers.Dense(NUM_EXPERTS, kernel_initializer="zeros", trainable=False)
        weights = NORMALIZERS["softmax"](name="router")(even(inputs))
    outputs = Experts(NUM_EXPERTS, HIDDEN_SIZE, NUM_CLASSES)(inputs, weights)
    model = keras.Model(inputs, keras.layers.Softmax()(outputs), name=arm.replace(" ", "_"))
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy")
    return model


def load(seed: int) -> Parts:
    """Returns the digits in three parts, pixels from 0 to 1."""
    x, y = load_digits(return_X_y=True)
    return comparison.split((x / 16).astype("float32"), y, SIZES, seed)


def measure_routing(weights: np.ndarray) -> dict[str, float]:
    """What `[N, E]` weights say of the experts' use.

    Returns:
        `experts_used`: how many have at least 1 % of an image's weights in magnitude;
        `balance`: entropy of the experts' mean magnitudes, relative to that of equal ones;
        `zeros`, `negative`: share of weights that are exactly 0, and of magnitude below 0;
        `unrouted`: share of images whose weights are all 0.
    """
    magnitudes = np.abs(weights.astype("float64"))
    totals = magnitudes.sum(axis=1, keepdims=True)
    total = magnitudes.sum() or 1.0
    shares = magnitudes.sum(axis=0) / total
    shares = shares[shares > 0]
    used = (magnitudes >= USED * totals) & (magnitudes > 0)
    entropy = -(shares * np.log(shares)).sum()
    return {
        "experts_used": float(used.sum(axis=1).mean()),
        "balance": float(entropy / np.log(weights.shape[1])),
        "zeros": float((weights == 0).mean()),
        "negative": float(magnitudes[weights < 0].sum() / total),
        "unrouted": float((totals == 0).mean()),
    }


def with_weights(model: Any) -> Any:
    """Returns a model of the same layers that gives the router's weights and the classes."""
    return keras.Model(model.input, [model.get_layer("router").output, model.output])


def run(arm: str, model: Any, both: Any, settings: Settings, seed: int, rate: float) -> Outcome:
    """Trains a model and measures it; shows each class's mean weights, `[classes, experts]`."""
    parts = load(seed)
    make = functools.partial(make_model, arm)
    comparison.train(model, make, parts.train, settings, seed, rate)
    x = np.concatenate([parts.validation.x, parts.test.x])
    weights, probabilities = both.predict(x, batch_size=len(x), verbose=0)
    validation, test = np.split(probabilities, [len(parts.validation.x)])
    weights = weights[len(parts.validation.x) :]
    y = parts.test.y
    accuracy = float((test.argmax(axis=1) == y).mean())
    shown = [weights[y == digit].mean(axis=0).round(4).tolist() for digit in range(NUM_CLASSES)]
    loss = float(log_loss(parts.validation.y, validation))
    return Outcome(loss, {"accuracy": accuracy, **measure_routing(weights)}, shown)


def arms(settings: Settings) -> dict[str, Arm]:
    """Returns the models to compare, by name."""
    found = {}
    for name in (*NORMALIZERS, "no router"):
        model = make_model(name)
        train = functools.partial(run, name, model, with_weights(model), settings)
        found[name] = Arm(train, settings.rates, comparison.count_trainable(model))
    return found


def plot(results: dict[str, Any]) -> Any:
    """Returns a figure of the measures, and of the mean weights of each digit's images."""
    arms = results["arms"]
    routed = {name: np.array(arms[name]["shown"]) for name in NORMALIZERS}
    title = "Handwritten digits, routed to eight experts by four normalizers"
    figure, above, below = report.two_rows(title, (3, len(routed)), height=7.5)
    report.strip(above[0], arms, "accuracy", "test accuracy (each dot a seed)")
    report.strip(above[1], arms, "experts_used", f"experts used by an image, of {NUM_EXPERTS}")
    report.strip(above[2], arms, "balance", "balance of the load (1: all alike)")
    above[1].set_xlim(0, NUM_EXPERTS + 0.3)
    largest = max(np.abs(x).max() for x in routed.values())
    for axis, (name, weights) in zip(below, routed.items(), strict=True):
        image = axis.imshow(weights, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("expert")
        axis.set_xticks(range(NUM_EXPERTS), range(1, NUM_EXPERTS + 1))
        axis.set_yticks(range(NUM_CLASSES))
    below[0].set_ylabel("digit")
    label = f"mean weight, seed {results['settings']['seeds'][0]}"
    below[0].figure.colorbar(image, ax=list(below), label=label)
    return figure


def main() -> None:
    """Runs the comparison and writes its results and plot."""
    start = time.perf_counter()
    options = comparison.parse_arguments(__doc__.splitlines()[0])
    settings = SETTINGS.small() if options.small else SETTINGS
    seeds = range(options.seed, options.seed + settings.num_seeds)
    results = {
        "data": {"name": "sklearn.datasets.load_digits", **SIZES},
        "num_experts": NUM_EXPERTS,
        "hidden_size": HIDDEN_SIZE,
        **comparison.describe_run(settings, seeds),
        "arms": comparison.compare(arms(settings), seeds),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(report.describe(results, MEASURES))
    comparison.write(results, plot(results), options.output, "moe_routing")


if __name__ == "__main__":
    main()
