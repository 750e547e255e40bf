"""The runs of an experiment: arms x learning rates x seeds, each stored when it ends.

Every arm tries the same learning rates with the first seed; the rate with the lowest validation
loss is then run with the other seeds. A run whose file is there is not run again.
"""

import argparse
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import keras

NOT_OF_A_RUN = ("about", "results", "arms", "learning_rates", "seeds")


def run_all(
    config_file: pathlib.Path,
    output: pathlib.Path,
    run_one: Callable,
    small: bool = False,
    only: list[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Runs what is missing; returns the records of the chosen learning rate by arm.

    Args:
        config_file: JSON: `arms`, `learning_rates`, `seeds`, and what `run_one` needs. The entry
            `small` replaces others in a trial at small size.
        output: folder of the stored runs.
        run_one: of the config, the arm, the learning rate, the seed and a folder for its
            checkpoints; returns a record with `validation`, the loss to choose the rate by.
        small: whether to run the trial at small size.
        only: the arms to run; all by default.
    """
    config = read_config(config_file, small)
    chosen = {}
    for arm in only or config["arms"]:
        # an arm that goes on from another one's training goes on from that one's learning rate
        source = config["arms"][arm].get("from")
        rates = config["learning_rates"] if source is None else [best_rate(chosen[source])]
        seeds = config["seeds"]
        first = [_run(config, arm, rate, seeds[0], output, run_one) for rate in rates]
        rate = best_rate(first)
        others = [_run(config, arm, rate, seed, output, run_one) for seed in seeds[1:]]
        chosen[arm] = [x for x in first if x["learning_rate"] == rate] + others
    return chosen


def read_config(config_file: pathlib.Path, small: bool = False) -> dict[str, Any]:
    """The configuration of an experiment, at small size if asked for."""
    config = json.loads(config_file.read_text())
    trial = config.pop("small", {})
    return {**config, **trial} if small else config


def best_rate(records: list[dict[str, Any]]) -> float:
    """The learning rate of the record with the lowest validation loss."""
    return min(records, key=lambda record: record["validation"])["learning_rate"]


def run_name(arm: str, rate: float, seed: int) -> str:
    """The name of a run's files."""
    return re.sub(r"[^a-z0-9.]+", "-", f"{arm} {rate:g} seed {seed}".lower())


def _run(
    config: dict[str, Any],
    arm: str,
    rate: float,
    seed: int,
    output: pathlib.Path,
    run_one: Callable,
) -> dict[str, Any]:
    file = output / f"{run_name(arm, rate, seed)}.json"
    task = {k: v for k, v in config.items() if k not in NOT_OF_A_RUN}
    settings = {**task, "arm": arm, **config["arms"][arm], "learning_rate": rate, "seed": seed}
    if file.exists():
        record = json.loads(file.read_text())
        if record["settings"] != settings:
            raise ValueError(f"{file} is of a run with other settings. Remove it to run it again.")
        return record
    start = time.perf_counter()
    record = run_one(config, arm, rate, seed, output / "checkpoints")
    record = {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        **record,
        "minutes": (time.perf_counter() - start) / 60,
        "backend": keras.backend.backend(),
        "keras": keras.version(),
        "settings": settings,
    }
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{run_name(arm, rate, seed):50} {record['validation']:.4f}", flush=True)
    return record


def main(run_one: Callable, about: str) -> None:
    """The program of an experiment."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("config", type=pathlib.Path, help="relative to this folder")
    parser.add_argument("--small", action="store_true", help="a trial of the program")
    parser.add_argument("--only", nargs="+", help="arms to run")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    args = parser.parse_args()
    config_file = pathlib.Path(__file__).parent / args.config
    output = args.output or config_file.parent / read_config(config_file)["results"]
    run_all(config_file, output, run_one, args.small, args.only)
