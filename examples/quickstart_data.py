"""The data of the quickstart: hourly temperatures, parts in time, windows, naive forecasts."""

from typing import NamedTuple

import numpy as np
from vega_datasets import local_data

HORIZON = 24  # hours that a model forecasts
BATCH_SIZE = 32

# Each part of the year is cut into windows by itself, so that no window spans two of them.
PARTS = {
    "train": ("2010-01-01", "2010-08-31"),
    "validation": ("2010-09-01", "2010-09-30"),
    "test": ("2010-10-01", "2010-12-31"),
}


def load_table():
    """Returns temperatures in °F by date, every hour of 2010, with gaps interpolated."""
    return local_data.seattle_temps().set_index("date").asfreq("h").interpolate()


def split(table):
    """Returns the parts of the table, one after the other in time."""
    return {name: table.loc[first:last] for name, (first, last) in PARTS.items()}


class Scale(NamedTuple):
    """Standard deviations, in °F, by which a model's inputs and outputs are divided."""

    change: float  # from one hour to the next
    temperature: float


def measure_scale(part):
    """Returns the `Scale` of a part: that of training, lest the others leak into it."""
    temperatures = part["temp"].to_numpy()
    return Scale(float(np.diff(temperatures).std()), float(temperatures.std()))


def forecast_hours(part, length, step):
    """Returns the rows of a part at which a forecast starts, with `length` hours before each.

    One hour more is left before the first, because a model is given changes. The number is a
    multiple of the batch size, so that models are compiled for one shape of batch.
    """
    hours = np.arange(length + 1, len(part) - HORIZON + 1, step)
    return hours[len(hours) % BATCH_SIZE :]


def make_windows(part, hours, length, scale):
    """Returns inputs `[N, length, 3]` and targets `[N, HORIZON]` around the given rows.

    The features are the change since the hour before, and the time of day as a point on a
    circle; the targets are the coming hours' differences from the last known temperature.
    """
    temperatures = part["temp"].to_numpy()
    changes = np.diff(temperatures, prepend=np.nan) / scale.change
    angle = 2 * np.pi * part.index.hour.to_numpy() / 24
    features = np.stack([changes, np.sin(angle), np.cos(angle)], axis=-1)
    inputs = features[hours[:, None] + np.arange(-length, 0)]
    targets = (future(part, hours) - last_known(part, hours)) / scale.temperature
    return inputs.astype("float32"), targets.astype("float32")


def future(part, hours):
    """Returns the temperatures to forecast, `[N, HORIZON]`."""
    return part["temp"].to_numpy()[hours[:, None] + np.arange(HORIZON)]


def last_known(part, hours):
    """Returns the temperature just before each forecast, `[N, 1]`."""
    return part["temp"].to_numpy()[hours[:, None] - 1]


def naive_forecasts(part, hours):
    """Returns the forecasts that need no model: nothing changes; the last 24 hours repeat."""
    return {
        "persistence": np.repeat(last_known(part, hours), HORIZON, axis=1),
        "same hour yesterday": future(part, hours - HORIZON),
    }
