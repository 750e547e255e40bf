"""A small model of a released architecture: to a Hugging Face folder, back, and its length scale.

    KERAS_BACKEND=jax python examples/checkpoints.py

A language model in the way of Ministral 3 and Devstral Small 2 (heads that are not hidden size /
heads wide, YaRN, a temperature by position) learns from the sources of Python's standard library,
and is written as a Hugging Face folder. Every backend that is installed loads the folder in a
process of its own, and so does `transformers`; their logits and greedy tokens are compared with
those of the model that was written. Then the folder is loaded with other length scales in place of
the temperature. All are compared by their loss at positions up to four times the length of
training, at once and after a few more steps at that length, on the same text.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

# Keras reads its backend from the environment, once, when it is imported.
os.environ.setdefault(
    "KERAS_BACKEND",
    next(filter(importlib.util.find_spec, ("jax", "tensorflow", "torch")), "tensorflow"),
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_ssattn.layers import PositionTemperature, QwenLogScale, RotaryEmbedding, Softmax, SSMax
from keras_ssattn.models import CausalLM

BACKENDS = [x for x in ("jax", "tensorflow", "torch") if importlib.util.find_spec(x)]
TIMES = (1, 2, 4)  # the longest positions of each column, in lengths of training
LEARNING_RATE = 2e-3  # of Adam, in both phases and for all; tuned for none
START = 0  # the token `<s>`, at the start of every text
PROMPT = "    def __init__(self"
AS_RELEASED = "temperature by position"  # what the model was trained with

LOAD = """
import sys
import numpy as np
from keras_ssattn import CausalLM

folder, given, returned, count = sys.argv[1:]
model, tokens = CausalLM.from_huggingface(folder), np.load(given)
logits = model.predict(tokens, verbose=0)
new = model.generate(tokens[:, : tokens.shape[1] // 4], int(count))
np.savez(returned, logits=logits, new=new)
"""
LOAD_BY_TRANSFORMERS = """
import sys
import numpy as np
import torch
import transformers

folder, given, returned, count = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokens = torch.tensor(np.load(given)).long()
prompts = tokens[:, : tokens.shape[1] // 4]
options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": int(count)}
with torch.no_grad():
    logits, new = model(tokens).logits, model.generate(prompts, do_sample=False, **options)
np.savez(returned, logits=logits.numpy(), new=new[:, prompts.shape[1] :].numpy())
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run."""

    train_length: int = 64
    vocabulary_size: int = 512
    hidden_size: int = 80
    inner_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    key_dim: int = 16
    original_length: int = 16  # of positions, before YaRN: a quarter of the length of training
    factor: float = 16.0
    batch_size: int = 16
    steps: int = 600
    tuning_steps: int = 100
    num_seeds: int = 2
    num_files: int | None = None  # of text; None for all
    num_windows: int = 96  # of the text that models are compared on
    num_checked: int = 4  # of these, for the comparison of backends
    new_tokens: int = 24
    bin_size: int = 16  # positions whose losses are averaged

    @property
    def longest(self):
        return max(TIMES) * self.train_length


SMALL = Settings(
    train_length=8, vocabulary_size=300, hidden_size=12, inner_size=16, num_layers=1, num_heads=2,
    num_kv_heads=1, key_dim=4, original_length=4, batch_size=4, steps=3, tuning_steps=2,
    num_seeds=1, num_files=30, num_windows=4, num_checked=2, new_tokens=4, bin_size=4,
)  # fmt: skip


# --- 1. Text and tokens ------------------------------------------------------------------


class Bytes:
    """A tokenizer without training, where the package `tokenizers` is not installed."""

    size = 257

    def encode(self, text):
        return [1 + x for x in text.encode()]

    def decode(self, tokens):
        return bytes(x - 1 for x in tokens if x > START).decode(errors="replace")


class Pairs:
    """A tokenizer of byte pairs, trained on texts."""

    def __init__(self, texts, size):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = {"special_tokens": ["<s>"], "initial_alphabet": alphabet}
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
        self.tokenizer.train_from_iterator(texts, trainer)
        self.size = self.tokenizer.get_vocab_size()

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, tokens):
        return self.tokenizer.decode([int(x) for x in tokens])


def read_text(size, num_files=None):
    """A tokenizer, and tokens: of nine in ten files to train on, of the tenth to compare on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:num_files]
    texts = [file.read_text("utf-8") for file in files]
    train = [text for i, text in enumerate(texts) if i % 10 != 9]
    tokenizer = Pairs(train, size) if importlib.util.find_spec("tokenizers") else Bytes()
    parts = ([tokenizer.encode(x) for x in part] for part in (train, texts[9::10]))
    return tokenizer, *(np.concatenate([np.array(x, "int32") for x in part]) for part in parts)


def draw_windows(text, count, length, rng):
    """Stretches from anywhere, `[count, length + 1]`; `<s>` is the first token of each."""
    starts = rng.integers(0, len(text) - length, count)
    windows = text[starts[:, None] + np.arange(-1, length)]
    windows[:, 0] = START
    return windows


# --- 2. A model, and what is done with it --------------------------------------------------


def make_model(settings, vocabulary_size):
    """A model that is one of the family `ministral3`."""
    length = settings.original_length
    yarn = {
        "type": "yarn", "factor": settings.factor, "original_length": length, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }  # fmt: skip
    return CausalLM(
        vocabulary_size,
        settings.hidden_size,
        settings.num_layers,
        settings.num_heads,
        settings.num_kv_heads,
        key_dim=settings.key_dim,
        normalizer=Softmax(length_scale=PositionTemperature(0.1, length)),
        rotary=RotaryEmbedding(scaling=yarn),
        ffn_expansion=settings.inner_size / settings.hidden_size,
        norm_epsilon=1e-5,
        tie_embeddings=False,
    )


def other_scales(length):
    """Options of `from_huggingface`, by the name of the length scale that they give."""
    return {
        AS_RELEASED: {},
        "none": {"normalizer": "softmax"},
        "SSMax, s log n": {"normalizer": SSMax(init_s="auto", train_length=length)},
        "Qwen's log n": {"normalizer": Softmax(length_scale=QwenLogScale(length))},
    }


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE, clipnorm=1.0), loss)
    return model


def train(model, windows, batch_size):
    """Trains for a step on each batch of the windows, in order."""
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
    model.fit(windows[:, :-1], windows[:, 1:], **options)


def measure(model, windows, settings):
    """Loss in nats at each position, as means over the windows and `bin_size` positions."""
    logits = model.predict(windows[:, :-1], batch_size=16, verbose=0).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    losses = losses.mean(0).reshape(-1, settings.bin_size).mean(-1)
    return losses.round(5).tolist()


def complete(model, tokenizer, settings):
    """The prompt and what the model goes on with, token by token."""
    prompt = [START, *tokenizer.encode(PROMPT)]  # which the tokenizer would not put there
    new = [int(tokens[0]) for tokens in model.stream([prompt], settings.new_tokens)]
    return tokenizer.decode([*prompt[1:], *new])


def check(model, folder, windows, settings, backends):
    """How far others are from the model that was written, each in a process of its own.

    Returns:
        By name: the largest difference of a logit, in deviations of the logits, and whether all
        greedy tokens are equal.
    """
    tokens = windows[: settings.num_checked, :-1]
    expected = model.predict(tokens, verbose=0)
    greedy = model.generate(tokens[:, : tokens.shape[1] // 4], settings.new_tokens)
    programs = dict.fromkeys(backends, LOAD)
    if "torch" in backends and importlib.util.find_spec("transformers"):
        programs["transformers"] = LOAD_BY_TRANSFORMERS
    found = {}
    for name, program in programs.items():
        given, returned = folder / "tokens.npy", folder / f"{name}.npz"
        np.save(given, tokens)
        arguments = [str(folder), str(given), str(returned), str(settings.new_tokens)]
        backend = name if name in BACKENDS else "torch"
        environment = {**os.environ, "KERAS_BACKEND": backend}
        command = [sys.executable, "-c", program, *arguments]
        subprocess.run(command, env=environment, check=True)
        with np.load(returned) as loaded:
            error = np.abs(loaded["logits"] - expected).max() / expected.std()
            equal = bool(np.array_equal(loaded["new"], greedy))
        found[name] = {"logits": float(error), "tokens_equal": equal}
        print(f"{name}: logits within {error:.0e} deviations, tokens equal: {equal}", flush=True)
    return found


# --- 3. All of it ------------------------------------------------------------------------


def run(settings, seed, tokenizer, texts, backends):
    """Losses by length scale, at once and tuned; s after tuning; texts; and the comparison."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    length, rows = settings.train_length, settings.batch_size // max(TIMES)
    train_text, test_text = texts
    test = draw_windows(test_text, settings.num_windows, settings.longest, rng)
    model = compiled(make_model(settings, tokenizer.size))
    count = settings.steps * settings.batch_size
    train(model, draw_windows(train_text, count, length, rng), settings.batch_size)
    windows = draw_windows(train_text, settings.tuning_steps * rows, settings.longest, rng)
    losses, scales, written, checks = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        fields = {"bos_token_id": START, "max_position_embeddings": settings.longest}
        model.to_huggingface(folder, **fields)
        if backends:
            checks = check(model, Path(folder), test, settings, backends)
        for name, options in other_scales(length).items():
            loaded = compiled(CausalLM.from_huggingface(folder, **options))
            losses[name] = {"at once": measure(loaded, test, settings)}
            train(loaded, windows, rows)  # as many tokens a step as before
            losses[name]["tuned"] = measure(loaded, test, settings)
            if seed == 0:
                written[name] = complete(loaded, tokenizer, settings)
            found = [keras.ops.convert_to_numpy(w) for w in loaded.weights if w.name == "s"]
            if found:
                scales[name] = np.array(found, "float64").round(4).tolist()
    return {"losses": losses, "s": scales, "texts": written, "checks": checks}


def columns(settings):
    """The bins of positions of each column of the table, by its name."""
    ends = [times * settings.train_length for times in TIMES]
    return {
        f"{first + 1} to {end}": slice(first // settings.bin_size, end // settings.bin_size)
        for first, end in zip([0, *ends], ends, strict=False)
    }


def table(runs, settings):
    """Means over the seeds, and their ranges, as a table in Markdown."""
    parts = columns(settings)
    lines = [f"| loss in nats at positions | {' | '.join(parts)} |"]
    lines.append("|---" * (1 + len(parts)) + "|")
    for when in ("at once", "tuned"):
        for name in runs[0]["losses"]:
            bins = np.array([x["losses"][name][when] for x in runs])
            means = [bins[:, part].mean(1) for part in parts.values()]
            cells = [f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in means]
            lines.append(f"| {name}, {when} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs, settings):
    """A figure of the loss by position, at once and tuned, for each length scale."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    positions = (np.arange(settings.longest // settings.bin_size) + 0.5) * settings.bin_size
    colors = ("#666666", "#0072b2", "#d55e00", "#009e73")
    for axis, when in zip(axes, ("at once", "tuned"), strict=True):
        for color, name in zip(colors, runs[0]["losses"], strict=True):
            bins = np.array([x["losses"][name][when] for x in runs])
            axis.plot(positions, bins.mean(0), color=color, marker="o", markersize=3, label=name)
        axis.axvline(settings.train_length, color="black", linestyle=":", linewidth=1)
        axis.set_title(when)
        axis.set_xlabel(f"position (trained up to {settings.train_length})")
        axis.grid(color="#e5e5e5")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss, nats")
    figure.suptitle("A model with another length scale than that of its training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="take every step, learn nothing")
    parser.add_argument("--backends", nargs="*", default=BACKENDS, help="that load the folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    settings = SMALL if arguments.small else Settings()
    start = time.perf_counter()
    tokenizer, *texts = read_text(settings.vocabulary_size, settings.num_files)
    print(f"{len(texts[0])} tokens to train on, {len(texts[1])} to compare on.", flush=True)
    runs = []
    for seed in range(settings.num_seeds):
        backends = [] if seed else arguments.backends
        runs.append(run(settings, seed, tokenizer, texts, backends))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    for name, text in runs[0]["texts"].items():
        print(f"{name}: {text!r}")
    print(table(runs, settings))
    results = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "python": platform.python_version(),
        "settings": dataclasses.asdict(settings),
        "learning_rate": LEARNING_RATE,
        "tokenizer": type(tokenizer).__name__,
        "tokens": {"train": len(texts[0]), "test": len(texts[1])},
        "seconds": time.perf_counter() - start,
        "checks": runs[0]["checks"],
        "runs": [{k: v for k, v in x.items() if k != "checks"} for x in runs],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "checkpoints.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    plot(runs, settings).savefig(file.with_suffix(".png"), dpi=120)
    print(f"Written to {file}, and a plot beside it.")


if __name__ == "__main__":
    main()
