"""The runs of an experiment: conditions x arms x learning rates x seeds, each stored when it ends.

Every arm tries the same learning rates with the first seed, within each condition; the rate with
the lowest validation loss is then run with the other seeds. An experiment has one file, with a
record a line. A run that is there is not run again.
"""

import argparse
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import keras

Record = dict[str, Any]
NOT_OF_A_RUN = ("about", "results", "arms", "conditions", "learning_rates", "seeds")
DIGITS = 5  # of the numbers stored


def run_all(
    config_file: pathlib.Path,
    results: pathlib.Path,
    run_one: Callable,
    small: bool = False,
    only: list[str] | None = None,
) -> dict[str, dict[str, list[Record]]]:
    """Runs what is missing; returns the records of the chosen rate by condition and arm.

    Args:
        config_file: JSON: `arms`, `learning_rates`, `seeds`, and what `run_one` needs. The entry
            `small` replaces others in a trial at small size. The entry `conditions` has, by name,
            what replaces others; every arm is run within each. Without it there is one, "".
        results: the file of the stored runs. Checkpoints are in the folder of that name.
        run_one: of the config, the arm, the learning rate, the seed and a folder for its
            checkpoints; returns a record with `validation`, the loss to choose the rate by.
        small: whether to run the trial at small size.
        only: the arms to run; all by default.
    """
    config = read_config(config_file, small)
    conditions = config.pop("conditions", {"": {}})
    tasks = {condition: {**config, **options} for condition, options in conditions.items()}
    known = {arm for task in tasks.values() for arm in task["arms"]}
    if unknown := set(only or ()) - known:
        raise ValueError(f"`only` must name arms: {sorted(known)}. Received: {sorted(unknown)}")
    chosen: dict[str, dict[str, list[Record]]] = {}
    for condition, task in tasks.items():
        found = chosen[condition] = {}

        def run(
            arm: str, rate: float, seed: int, task: Record = task, condition: str = condition
        ) -> Record:
            return _run(task, condition, arm, rate, seed, results, run_one)

        for arm in [x for x in task["arms"] if only is None or x in only]:
            # an arm that goes on from another one's training goes on from that one's rate
            source = task["arms"][arm].get("from")
            if source not in (None, *found):
                raise ValueError(
                    f"`only` must name {source!r}, which {arm!r} goes on from. Received: {only}"
                )
            rates = task["learning_rates"] if source is None else [best_rate(found[source])]
            seeds = task["seeds"]
            first = [run(arm, rate, seeds[0]) for rate in rates]
            rate = best_rate(first)
            others = [run(arm, rate, seed) for seed in seeds[1:]]
            found[arm] = [x for x in first if x["learning_rate"] == rate] + others
    return chosen


def read_config(config_file: pathlib.Path, small: bool = False) -> dict[str, Any]:
    """The configuration of an experiment, at small size if asked for."""
    config = json.loads(config_file.read_text())
    trial = config.pop("small", {})
    return {**config, **trial} if small else config


def read_runs(results: pathlib.Path) -> list[Record]:
    """The stored runs of an experiment; none if there is no file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def best_rate(records: list[Record]) -> float:
    """The learning rate of the record with the lowest validation loss."""
    return min(records, key=lambda record: record["validation"])["learning_rate"]


def run_name(arm: str, rate: float, seed: int) -> str:
    """The name of a run's files."""
    return slug(f"{arm} {rate:g} seed {seed}")


def slug(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())


def rounded(value: Any) -> Any:
    """A record with floats of few digits."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _run(
    config: dict[str, Any],
    condition: str,
    arm: str,
    rate: float,
    seed: int,
    results: pathlib.Path,
    run_one: Callable,
) -> Record:
    name = f"{condition} {run_name(arm, rate, seed)}".strip()
    key = {"arm": arm, "learning_rate": rate, "seed": seed}
    if condition:
        key = {"condition": condition, **key}
    task = {k: v for k, v in config.items() if k not in NOT_OF_A_RUN}
    settings = {**task, **config["arms"][arm], **key}
    for record in read_runs(results):
        if all(record.get(k) == v for k, v in key.items()):
            if record["settings"] != settings:
                raise ValueError(
                    f"{results} has the run {name!r} with other settings. Remove it to run it again"
                )
            return record
    start = time.perf_counter()
    folder = results.with_suffix("") / "checkpoints" / slug(condition)
    found = run_one(config, arm, rate, seed, folder)
    minutes = (time.perf_counter() - start) / 60
    record = {
        **key,
        **rounded({**found, "minutes": minutes}),
        "backend": keras.backend.backend(),
        "keras": keras.version(),
        "settings": settings,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")  # at once: other processes may add to the file
    print(f"{name:60} {record['validation']:.4f}", flush=True)
    return record


def main(run_one: Callable, about: str) -> None:
    """The program of an experiment."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("config", type=pathlib.Path, help="relative to this folder")
    parser.add_argument("--small", action="store_true", help="a trial of the program")
    parser.add_argument("--only", nargs="+", help="arms to run")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the file of results")
    args = parser.parse_args()
    config_file = pathlib.Path(__file__).parent / args.config
    results = config_file.parent / f"{read_config(config_file)['results']}.jsonl"
    if args.output is not None:
        results = args.output / results.name
    run_all(config_file, results, run_one, args.small, args.only)
