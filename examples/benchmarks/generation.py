"""Tokens per second of `CausalLM.generate`, beside models of the same size that others have.

They are KerasHub's `LlamaCausalLM` and, on PyTorch, Hugging Face's `LlamaForCausalLM`. All have
the same numbers of layers, heads and features, the same vocabulary, gated feed-forward networks
and rotary positions, random weights, float32; all generate greedily with their caches, compiled
as they compile by themselves, in turn in one process. The medians of the rounds' ratios are
reported, first calls left out. Then our time per token by the length of the cache.

    pip install keras-hub transformers
    KERAS_BACKEND=jax python examples/benchmarks/generation.py
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

import keras_ssattn
from keras_ssattn.models import CausalLM

RESULTS = pathlib.Path(__file__).parent / "results"
VOCABULARY = 1000
NORMALIZERS = ("softmax", "ssmax", "softpick", "rectified_softpick")


def make_ours(args: argparse.Namespace, normalizer: str) -> CausalLM:
    """The model that is measured."""
    return CausalLM(VOCABULARY, args.hidden_size, args.layers, args.heads, normalizer=normalizer)


def make_reference(args: argparse.Namespace) -> Any:
    """KerasHub's model of that size."""
    feed_forward = make_ours(args, "softmax").blocks[0].feed_forward
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=args.layers,
        num_query_heads=args.heads,
        num_key_value_heads=args.heads,
        hidden_dim=args.hidden_size,
        intermediate_dim=feed_forward.down.kernel.shape[0],
        tie_word_embeddings=True,
    )
    model = keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def make_transformers(args: argparse.Namespace) -> Any:
    """Hugging Face's model of that size, on PyTorch."""
    import transformers

    feed_forward = make_ours(args, "softmax").blocks[0].feed_forward
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        hidden_size=args.hidden_size,
        intermediate_size=feed_forward.down.kernel.shape[0],
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def generator_of(model: Any, prompts: np.ndarray, new: int) -> Callable:
    """A function that generates `new` tokens for each prompt and waits for them."""
    if isinstance(model, CausalLM):
        return lambda: np.array(model.generate(prompts, new))
    if not isinstance(model, keras.Model):
        import torch

        tokens = torch.tensor(prompts)
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
        options["attention_mask"] = torch.ones_like(tokens)
        return lambda: model.generate(tokens, **options)[:, prompts.shape[1] :].numpy()
    shape = (len(prompts), prompts.shape[1] + new)
    tokens, mask = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    tokens[:, : prompts.shape[1]], mask[:, : prompts.shape[1]] = prompts, 1
    inputs = {"token_ids": tokens, "padding_mask": mask}
    return lambda: np.array(
        model.generate(inputs, stop_token_ids=None)["token_ids"][:, prompts.shape[1] :]
    )


def time_of(function: Callable) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(args: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    """A row for each model at a batch size."""
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (batch, args.prompt))
    models = {"keras_hub": make_reference(args)}
    if keras.backend.backend() == "torch":
        models["transformers"] = make_transformers(args)
    models |= {name: make_ours(args, name) for name in NORMALIZERS}
    calls = {name: generator_of(model, prompts, args.new) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):  # the first compiles
        for name, call in calls.items():
            taken = time_of(call)
            if repeat:
                seconds[name].append(taken)
    references = {
        "ratio": seconds["keras_hub"],
        "ratio_to_transformers": seconds.get("transformers"),
    }
    return [
        {
            "name": name,
            "batch": batch,
            "tokens_per_second": batch * args.new / float(np.median(seconds[name])),
            **{
                kind: float(np.median(np.divide(reference, seconds[name])))
                for kind, reference in references.items()
                if reference is not None
            },
        }
        for name in models
    ]


def time_per_token(args: argparse.Namespace, normalizer: str, length: int) -> float:
    """Median seconds of a token with a cache of so many positions, whatever is in them."""
    model = make_ours(args, normalizer)
    prompt = np.random.default_rng(0).integers(1, VOCABULARY, (1, 32))
    tokens = model.stream(prompt, length - prompt.shape[1])
    for _ in range(args.warmup):  # the first compile
        next(tokens)
    return float(np.median([time_of(lambda: next(tokens)) for _ in range(args.steps)]))


def cpu_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns the tables as a dictionary."""
    sizes = ("layers", "heads", "hidden_size", "prompt", "new", "repeats", "steps")
    others = {}
    if keras.backend.backend() == "torch":
        others["transformers"] = importlib.metadata.version("transformers")
    return {
        "backend": keras.backend.backend(),
        "keras": keras.version(),
        "keras_hub": keras_hub.__version__,
        **others,
        "keras_ssattn": keras_ssattn.__version__,
        "cpu_count": cpu_count(),
        **{x: getattr(args, x) for x in sizes},
        "rows": [row for batch in args.batches for row in compare(args, batch)],
        "seconds_per_token": {
            name: {str(x): time_per_token(args, name, x) for x in args.lengths}
            for name in NORMALIZERS
        },
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=192, help="tokens to generate")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 32768])
    parser.add_argument("--warmup", type=int, default=24, help="tokens before those timed")
    parser.add_argument("--steps", type=int, default=40, help="tokens timed at each length")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a short run, of no meaning")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    args = parser.parse_args()
    if args.small:
        args.layers, args.hidden_size, args.prompt, args.new = 1, 32, 32, 8
        args.lengths, args.batches, args.repeats = [64, 128], [2], 1
        args.warmup, args.steps = 2, 3
    result = measure(args)
    print("Greedy generation on {backend}, {layers} layers of {hidden_size}".format(**result))
    for row in result["rows"]:
        print(
            f"batch {row['batch']}: {row['name']:20} {row['tokens_per_second']:8.0f} tokens/s, "
            f"x {row['ratio']:.2f} of KerasHub's"
            + (
                f", x {row['ratio_to_transformers']:.2f} of transformers'"
                if "ratio_to_transformers" in row
                else ""
            )
        )
    for name, by_length in result["seconds_per_token"].items():
        cells = (f"{1e3 * x:.2f} ms at {length}" for length, x in by_length.items())
        print(f"{name:20} a token: {', '.join(cells)}")
    output = args.output or RESULTS / f"generation-{result['backend']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
