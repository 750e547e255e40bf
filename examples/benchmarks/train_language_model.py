"""Time of a training step of `CausalLM`, beside models of the same size that others have.

They are those of `generation.py`: KerasHub's `LlamaCausalLM` and, on PyTorch, Hugging Face's
`LlamaForCausalLM`. All read the same tokens, predict the next one with the same loss, and take a
step of Adam, in turn in one process, compiled as they compile by themselves. The ratio of each
step to KerasHub's step of the same round is a pair; the median of the pairs is reported, of the
time on the clock and of the processor time, with 90 % bootstrap intervals. On PyTorch, the ratio to
Hugging Face's step, too.

    pip install keras-hub transformers
    KERAS_BACKEND=jax python examples/benchmarks/train_language_model.py
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import generation
import keras
import numpy as np
from train_step import summary

REFERENCE = "keras_hub"


def stepper(model: Any, tokens: np.ndarray) -> Callable[[], float]:
    """A function that trains a model one step to predict each next token, and returns the loss."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if not isinstance(model, keras.Model):
        import torch

        given = torch.tensor(tokens)
        optimizer = torch.optim.Adam(model.parameters())
        model.train()

        def step() -> float:
            optimizer.zero_grad()
            logits = model(input_ids=given[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            return float(loss)

        return step
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile="auto")
    if not isinstance(model, generation.CausalLM):
        inputs = {"token_ids": inputs, "padding_mask": np.ones_like(inputs)}
    return lambda: float(model.train_on_batch(inputs, targets, return_dict=True)["loss"])


def make_models(args: argparse.Namespace) -> dict[str, Any]:
    """The models by name, the reference first."""
    models = {REFERENCE: generation.make_reference(args)}
    if keras.backend.backend() == "torch":
        models["transformers"] = generation.make_transformers(args)
    return models | {name: generation.make_ours(args, name) for name in generation.NORMALIZERS}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns the table as a dictionary."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, generation.VOCABULARY, (args.batch, args.length + 1))
    steps = {name: stepper(model, tokens) for name, model in make_models(args).items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    losses = {}
    for i in range(-args.warmup, args.steps):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            losses[name] = step()
            if i >= 0:
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    times = {name: np.array(x) for name, x in taken.items()}
    rows = {name: {"loss": losses[name]} for name in times}
    for name, x in times.items():
        for k, kind in enumerate(("wall", "processor")):
            rows[name][kind] = summary(x[:, k], times[REFERENCE][:, k])
        if "transformers" in times:
            rows[name]["to_transformers"] = summary(x[:, 0], times["transformers"][:, 0])
    sizes = {x: getattr(args, x) for x in ("layers", "heads", "hidden_size", "batch", "length")}
    return {
        "backend": keras.backend.backend(),
        "keras": keras.version(),
        "cpu_count": generation.cpu_count(),
        "steps": args.steps,
        **sizes,
        "models": rows,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those timed")
    parser.add_argument("--small", action="store_true", help="a short run, of no meaning")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    args = parser.parse_args()
    if args.small:
        args.layers, args.hidden_size, args.batch, args.length = 1, 32, 2, 9
        args.steps, args.warmup = 2, 1
    result = measure(args)
    print("A training step on {backend}, {batch} x {length} tokens".format(**result))
    for name, row in result["models"].items():
        wall, processor = row["wall"], row["processor"]
        print(
            f"{name:20}{wall['seconds']:8.3f} s  x {wall['ratio']:.3f}"
            f"  of the processor x {processor['ratio']:.3f}  loss {row['loss']:.3f}"
        )
    output = args.output or generation.RESULTS / f"train_language_model-{result['backend']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
