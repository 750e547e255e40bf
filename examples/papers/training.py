"""Training of a `CausalLM` as the SSMax paper does it, by Keras's own means, resumable."""

import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from runs import run_name

from keras_ssattn.models import CausalLM, layer_pattern

Draw = Callable[[np.random.Generator], tuple]  # a batch: tokens, targets, weights of targets


class Batches(keras.utils.PyDataset):
    """Batches that depend on the seed and on the number of the step alone."""

    def __init__(self, draw: Draw, seed: int, steps: int) -> None:
        super().__init__()
        self.draw, self.seed, self.steps, self.epoch = draw, seed, steps, 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple:
        return self.draw(np.random.default_rng((self.seed, self.epoch, step)))


def make_model(config: dict[str, Any], normalizer: Any, theta_factor: float = 1.0) -> CausalLM:
    """A model of the configured size; its rotary theta multiplied by a factor.

    With `pattern`, the options of `layer_pattern`, the normalizer is that of the global layers.
    """
    rotary = keras.saving.deserialize_keras_object(config["model"]["rotary"])
    if theta_factor != 1.0:
        rotary.theta *= theta_factor
    options = {**config["model"], "rotary": rotary, "normalizer": normalizer}
    if "pattern" in config:
        shared = {x: options[x] for x in ("num_layers", "rotary", "normalizer")}
        options |= layer_pattern(**config["pattern"], **shared)
    return CausalLM(**options, name="model")


def compile_model(config: dict[str, Any], model: CausalLM, learning_rate: float) -> None:
    """AdamW (0.9, 0.95), decay of matrices only, gradients clipped, warm-up and cosine decay."""
    steps = config["epochs"] * config["steps_per_epoch"]
    warmup = steps // 20
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, alpha=0.1, warmup_target=learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=config["weight_decay"],
        beta_2=0.95,
        clipnorm=1.0,
        name="optimizer",  # not one with a number that counts on, for `carry_over`
        gradient_accumulation_steps=config.get("gradient_accumulation_steps"),
    )
    optimizer.exclude_from_weight_decay([x for x in model.trainable_variables if x.ndim < 2])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, weighted_metrics=[])
    optimizer.build(model.trainable_variables)


def carry_over(source: CausalLM, target: CausalLM) -> None:
    """Weights and the optimizer's state, by name; what only the target has stays as it is."""
    for part in (lambda x: x, lambda x: x.optimizer):
        values = {x.path: x for x in part(source).variables}
        for variable in part(target).variables:
            if variable.path in values:
                # a copy: on JAX training and prediction consume the arrays that they are given
                variable.assign(keras.ops.convert_to_numpy(values[variable.path]))


def train(
    config: dict[str, Any], arm: str, rate: float, seed: int, draw: Draw, folder: pathlib.Path
) -> CausalLM:
    """The trained model of an arm.

    A checkpoint is kept after each epoch, and training goes on after the last that is there. An
    arm with `from` starts at that arm's checkpoint after `after` epochs, in place of new weights.
    """
    options = config["arms"][arm]
    keras.utils.set_random_seed(seed)
    model = make_model(config, options["normalizer"])
    compile_model(config, model, rate)
    here = folder / run_name(arm, rate, seed)
    done = [epoch for epoch in range(1, config["epochs"] + 1) if (here / f"{epoch}.keras").exists()]
    checkpoint, first = here / f"{done[-1]}.keras" if done else None, done[-1] if done else 0
    if "from" in options and not done:
        first = options["after"]
        checkpoint = folder / run_name(options["from"], rate, seed) / f"{first}.keras"
    if checkpoint is not None:
        carry_over(keras.models.load_model(checkpoint), model)
    batches = Batches(draw, seed, config["steps_per_epoch"])
    model.fit(
        batches,
        initial_epoch=first,
        epochs=config["epochs"],
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, _logs: setattr(batches, "epoch", epoch)
            ),
            keras.callbacks.ModelCheckpoint(here / "{epoch}.keras"),
        ],
    )
    return model


def count_tokens(config: dict[str, Any], length: int) -> int:
    """Tokens that a run trains on, in sequences of a length."""
    return config["epochs"] * config["steps_per_epoch"] * config["batch_size"] * length
