"""The data of the quickstart: utterances of nine speakers, and what classifies them without a net.

Nine men said the two Japanese vowels "ae". An utterance is a series of 7 to 29 steps, each with 12
numbers that describe the sound; the task is to tell who spoke. The data set (Kudo, Toyama and
Shimbo, 1999; public domain at UCI) comes with its own split: 270 utterances to train on, and 370
of other occasions to test on. The package sktime has it inside.
"""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sktime.datasets import load_japanese_vowels

NUM_FEATURES = 12
NUM_SPEAKERS = 9
LONGEST = 29

# What others have published for the same split.
PUBLISHED = {
    "Kudo et al. 1999": {
        "accuracy": 0.941,
        "source": "M. Kudo, J. Toyama, M. Shimbo: Multidimensional curve classification using "
        "passing-through regions. Pattern Recognition Letters 20. As quoted by P. Esling for the "
        "data sets of HV-MOTS",
    },
    "hidden Markov model": {
        "accuracy": 0.962,
        "source": "of 5 states, in the same paper, by the same quotation",
    },
    "ResNet": {
        "accuracy": 0.992,
        "source": "H. Ismail Fawaz et al.: Deep learning for time series classification: a review. "
        "2019. Mean of 10 runs, from results/results-mts-avg-std.csv of hfawaz/dl-4-tsc on GitHub",
    },
}


class Utterances(NamedTuple):
    """Series `[T, 12]` of any lengths, and the speaker of each, from 0 to 8."""

    series: list[np.ndarray]
    speakers: np.ndarray


def load():
    """Returns the `Utterances` to train on and those to test on."""
    return tuple(_load(part) for part in ("train", "test"))


def _load(part):
    tables, names = load_japanese_vowels(part, return_type="df-list")
    return Utterances([table.to_numpy() for table in tables], names.astype("int32") - 1)


def hold_out(train):
    """Returns the first 20 and the last 10 utterances of each speaker, to choose settings by."""
    rank = np.array([np.sum(train.speakers[:i] == x) for i, x in enumerate(train.speakers)])
    return tuple(
        Utterances([x for x, kept in zip(train.series, part, strict=True) if kept],
                   train.speakers[part])
        for part in (rank < 20, rank >= 20)
    )  # fmt: skip


class Scale(NamedTuple):
    """Mean and standard deviation of each feature, over all steps."""

    mean: np.ndarray
    deviation: np.ndarray


def measure_scale(utterances):
    """Returns the `Scale` of utterances: of those to train on, lest the others leak into it."""
    steps = np.concatenate(utterances.series)
    return Scale(steps.mean(0), steps.std(0))


def scaled(utterances, scale):
    """Returns the series with features of about mean 0 and deviation 1."""
    return [((x - scale.mean) / scale.deviation).astype("float32") for x in utterances.series]


def to_inputs(utterances, scale):
    """Returns `[N, 29, 12]`: the scaled series, and zeros after the end of each."""
    return pad(scaled(utterances, scale))


def shifted(inputs, deviation, rng):
    """Returns inputs with a random number added to each feature of an utterance, at all its steps.

    Models that train on these learn to tell men apart whose voices are not the same every day.
    """
    shifts = rng.normal(0, deviation, (len(inputs), 1, NUM_FEATURES)).astype("float32")
    return np.where(inputs.any(axis=-1, keepdims=True), inputs + shifts, 0)


def pad(series):
    """Returns the series as one array, with zeros after the end of each."""
    return np.stack([np.pad(x, ((0, LONGEST - len(x)), (0, 0))) for x in series])


# --- Baselines ---------------------------------------------------------------------------


def baselines(train, test):
    """Returns the accuracies on the test utterances of what needs no neural network."""

    def accuracy(classifier, describe):
        classifier = make_pipeline(StandardScaler(), classifier)
        classifier.fit([describe(x) for x in train.series], train.speakers)
        answers = classifier.predict([describe(x) for x in test.series])
        return float(np.mean(answers == test.speakers))

    nearest = train.speakers[time_warping_distances(test.series, train.series).argmin(1)]
    return {
        "nearest mean": accuracy(NearestCentroid(), lambda x: x.mean(0)),
        "nearest neighbor": accuracy(KNeighborsClassifier(1), lambda x: pad([x]).ravel()),
        "nearest neighbor, time warping": float(np.mean(nearest == test.speakers)),
        "logistic regression on means and deviations": accuracy(
            LogisticRegression(max_iter=1000), lambda x: np.append(x.mean(0), x.std(0))
        ),
        "logistic regression on 10 steps": accuracy(
            LogisticRegression(max_iter=1000), lambda x: resample(x, 10).ravel()
        ),
    }


def resample(x, number):
    """Returns a series `[number, 12]`, interpolated at even distances."""
    places = np.linspace(0, len(x) - 1, number)
    return np.stack([np.interp(places, np.arange(len(x)), feature) for feature in x.T], axis=1)


def time_warping_distances(ones, others):
    """Returns the dynamic time warping distance of each series to each of the others."""
    lengths = np.array([len(x) for x in others])
    others = pad(others)
    return np.array([_warp(x, others)[:, len(x)][np.arange(len(others)), lengths] for x in ones])


def _warp(x, others):
    """The costs of the cheapest alignments of every beginning of x and of each of the others."""
    distances = ((x[:, None] - others[:, None]) ** 2).sum(-1)  # [N, T, 29]
    costs = np.full((len(others), len(x) + 1, LONGEST + 1), np.inf)
    costs[:, 0, 0] = 0
    for i in range(len(x)):
        for j in range(LONGEST):
            before = np.minimum(costs[:, i, j], np.minimum(costs[:, i, j + 1], costs[:, i + 1, j]))
            costs[:, i + 1, j + 1] = distances[:, i, j] + before
    return costs
