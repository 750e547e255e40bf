"""Measures of attention in the logs of `fit`."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import check_flag, check_integer
from keras_ssattn.analysis import measures as functions
from keras_ssattn.analysis._checks import check_index, check_threshold
from keras_ssattn.analysis.recording import Recording, record
from keras_ssattn.analysis.scale import learned_scale

MEASURES = ("entropy", "sink_rate", "sparsity", "kurtosis", "max_activation", "s", "b")
DEFAULT = ("entropy", "sink_rate", "kurtosis", "s")  # where a model has them


class AttentionStatistics(keras.callbacks.Callback):
    """Adds measures of attention to the logs of each epoch of `fit`.

    At the end of an epoch it runs the model on a batch of its own, by `record`, and enters a
    number for each measure and layer, such as `attention/block_1/entropy`. Keras's own callbacks
    record them: `History` always, and `CSVLogger` and `TensorBoard` if they come **after this one**
    in the list; one that comes before does not see them.

    Args:
        inputs: the batch, always the same; small, as all `T x S` weights are computed.
        measures: of `"entropy"`, `"sink_rate"`, `"sparsity"` (of attention weights),
            `"kurtosis"`, `"max_activation"` (of the outputs of `TransformerBlock`s), and `"s"`
            and `"b"` (learned, of layers that have them). `None` for entropy, sink rate, kurtosis
            and s, those of them that the model has.
        every: measure at the first epoch of `fit` and at those whose number it divides. The others
            have NaN, so that all have the same entries, as `CSVLogger` needs.
        per_head: whether to enter what has a value for each head (entropy, sparsity, s, b and
            the weight on a key) for each, `attention/block_1/head_0/entropy`, rather than its
            mean over the heads. That is of the heads that attend to anything.
        sink_threshold: of `sink_rate`.
        key_index, query_index: of `weight_on`. With a `key_index`, the weight on that key,
            averaged over the batch, is entered as well, as `weight_on_key`.

    Raises:
        ValueError: for an unknown measure, or one that no layer of the model has; or another
            option that is not as above.
        TypeError: for a `key_index` or `query_index` that are not integers.

    Example:

    >>> import numpy as np
    >>> import keras_ssattn
    >>> model = keras_ssattn.build(embed_dim=8, hidden_size=8, num_heads=2, num_layers=1)
    >>> model.compile("adam", "mse")
    >>> x, y = np.random.normal(size=(16, 60, 8)), np.zeros((16, 8))
    >>> statistics = keras_ssattn.analysis.AttentionStatistics(x[:2])
    >>> history = model.fit(x, y, callbacks=[statistics], verbose=0).history
    >>> sorted(history)[:2]
    ['attention/ssmax_block_1/entropy', 'attention/ssmax_block_1/kurtosis']
    """

    def __init__(
        self,
        inputs: Any,
        measures: Iterable[str] | None = None,
        *,
        every: int = 1,
        per_head: bool = False,
        sink_threshold: float = 0.3,
        key_index: Any = None,
        query_index: Any = None,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self._required = () if measures is None else _names(measures)
        self.measures = self._required or DEFAULT
        self.every = check_integer("every", every)
        self.per_head = check_flag("per_head", per_head)
        self.sink_threshold = check_threshold("sink_threshold", sink_threshold)
        for name, index in (("key_index", key_index), ("query_index", query_index)):
            if index is not None:
                check_index(name, index)
        if key_index is None and query_index is not None:
            raise ValueError(
                "`key_index` must be given with `query_index`. Received: key_index=None, "
                f"query_index={query_index!r}"
            )
        self.key_index = key_index
        self.query_index = query_index
        self._entries: list[str] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._entries = []
        self.measure()  # what cannot be measured raises here, and not after an epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch % self.every == 0 or not self._entries:
            values = self.measure()
            self._entries = list(values)
        else:
            values = dict.fromkeys(self._entries, math.nan)
        if logs is not None:
            logs.update(values)

    def measure(self) -> dict[str, float]:
        """The entries for the model as it is."""
        recording = record(self.model, self.inputs)
        maps = recording.attention.items()
        # NaN of other layers is only of a head, or a sequence, with nothing to measure
        broken = {layer for layer, x in maps if np.isnan(x.weights).any()}
        values: dict[str, float] = {}
        for name, by_layer in self._measure(recording).items():
            if not by_layer and name in self._required:
                raise ValueError(
                    "`measures` must be of layers that the model has. Received: "
                    f"{name!r}, which no layer of the model {self.model.name!r} has"
                )
            for layer, value in by_layer.items():
                value = np.asarray(ops.convert_to_numpy(value), "float64")
                mean = np.mean if layer in broken else _mean_of_measured
                if self.per_head and value.ndim:
                    for head in range(value.shape[-1]):
                        entry = f"attention/{layer}/head_{head}/{name}"
                        values[entry] = float(mean(value[..., head]))
                else:
                    values[f"attention/{layer}/{name}"] = float(mean(value))
        return values

    def _measure(self, recording: Recording) -> dict[str, dict[str, Any]]:
        """For each measure and layer, a value, or `[H]` or `[B, H]`."""
        of_weights: dict[str, Callable] = {
            "entropy": functions.attention_entropy,
            "sink_rate": partial(functions.sink_rate, threshold=self.sink_threshold),
            "sparsity": functions.sparsity,
        }
        of_states = {"kurtosis": functions.kurtosis, "max_activation": functions.max_activation}
        results: dict[str, dict[str, Any]] = {}
        for name in self.measures:
            if name in of_weights:
                maps = recording.attention.items()
                results[name] = {layer: of_weights[name](*x) for layer, x in maps}
            elif name in of_states:
                states = recording.hidden.items()
                results[name] = {layer: of_states[name](*x) for layer, x in states}
            else:
                results[name] = learned_scale(self.model, name)
        if self.key_index is not None:
            results["weight_on_key"] = {
                layer: functions.weight_on(x.weights, self.key_index, self.query_index, x.mask)
                for layer, x in recording.attention.items()
            }
        return results


def _mean_of_measured(x: np.ndarray) -> Any:
    measured = x[~np.isnan(x)]
    return measured.mean() if measured.size else math.nan


def _names(measures: Any) -> tuple:
    single = isinstance(measures, str) or not isinstance(measures, Iterable)
    names = (measures,) if single else tuple(measures)
    if not names or any(name not in MEASURES for name in names):
        raise ValueError(f"`measures` must be one or more of {MEASURES}. Received: {names}")
    return names
