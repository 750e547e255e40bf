"""Trains a language model on several processes of TensorFlow, by MultiWorkerMirroredStrategy.

    KERAS_BACKEND=tensorflow TF_CONFIG=... python processes_tensorflow.py FOLDER [killed]

The first process writes FOLDER/model.keras after every step, and FOLDER/losses.json at the end.
Run by test_processes.py.
"""

import json
import os
import sys
from pathlib import Path

import tensorflow as tf
from support.processes import STEPS, kill_if, make_compiled, text


def main(folder, killed=False):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    processes, process = strategy.num_replicas_in_sync, strategy.cluster_resolver.task_id
    with strategy.scope():
        model = make_compiled()
        model.optimizer.build(model.trainable_variables)

    def on_each(tokens, targets):
        with tf.GradientTape() as tape:
            loss = model.loss(targets, model(tokens, training=True))  # divided by the processes
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [x.value for x in variables])
        model.optimizer.apply(gradients, variables)  # adds up the gradients of all processes
        return loss

    @tf.function
    def train(tokens, targets):
        losses = strategy.run(on_each, (tokens, targets))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    folder, losses = Path(folder), []
    for step in range(STEPS):
        kill_if(killed, process, step)
        losses.append(float(train(*text(step, process, processes))))
        if process == 0:
            model.save(part := folder / "part.keras")
            os.replace(part, folder / "model.keras")
    if process == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
