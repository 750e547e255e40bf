"""Layouts for model parallelism with `keras.distribution`."""

import keras

from keras_ssattn._keras.heads_layout import HEADS


def layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    model_axis: str = "model",
    sequence_axis: str | None = None,
) -> keras.distribution.LayoutMap:
    """The `LayoutMap` that shards this package's layers over the axis `model_axis` of a mesh.

    Attention is split by head (projections, and what normalizers and length scales have for each
    head), the feed-forward network by its inner size, so that each block needs two sums over
    devices, and the token embedding and the head of `CausalLM` by vocabulary. All else is
    replicated. `num_heads`, `num_kv_heads`, the inner size and the vocabulary must be multiples of
    the number of devices on that axis; a layer that is built with others raises a `ValueError`.
    What an optimizer keeps for a weight is split as the weight is.

    With a `sequence_axis`, tiled attention is split along time as well: each device has a part of
    the queries, and the keys and values go round the devices, so that none holds all of them. What
    lies between two such attentions XLA splits in the same way. The batch is split over the third
    axis of the mesh, if there is one. This needs JAX 0.6 or later.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        model_axis: name of the mesh axis to shard weights over.
        sequence_axis: name of the mesh axis to split time over, or `None`.

    Returns:
        A `keras.distribution.LayoutMap`, for `keras.distribution.ModelParallel`. Add entries
        for layers of your own; keys are regular expressions on variable paths.

    Raises:
        TypeError: if `device_mesh` is not a `DeviceMesh`.
        ValueError: if the mesh has no axis of that name, or more axes than three.

    Example:

    >>> import keras
    >>> from keras_ssattn.distribution import layout_map
    >>> devices = keras.distribution.list_devices()
    >>> mesh = keras.distribution.DeviceMesh(
    ...     (1, len(devices)), ("batch", "model"), devices
    ... )
    >>> parallel = keras.distribution.ModelParallel(
    ...     layout_map=layout_map(mesh), batch_dim_name="batch"
    ... )
    >>> # keras.distribution.set_distribution(parallel)
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. Received: "
            f"device_mesh={device_mesh!r}"
        )
    names = list(device_mesh.axis_names)
    for argument, name in {"model_axis": model_axis, "sequence_axis": sequence_axis}.items():
        if name not in names and not (argument == "sequence_axis" and name is None):
            raise ValueError(
                f"`{argument}` must be an axis of the mesh, {names}. Received: {argument}={name!r}"
            )
    layouts = keras.distribution.LayoutMap(device_mesh)
    attention = r".*(attention|attn)(_\d+)?/"
    feed_forward = r".*feed_forward(_\d+)?/"
    layouts[attention + "(query|key|value|gate)/kernel"] = (None, model_axis, None)  # [E, H, D]
    layouts[attention + "(query|key|value|gate)/bias"] = (model_axis, None)  # [H, D]
    layouts[attention + "attention_output/kernel"] = (model_axis, None, None)  # [H, D, E]
    scale = attention + "normalizer/(.*/)?"
    layouts[scale + "(s|b|sink|beta_bias|gamma_bias)$"] = (model_axis,)  # [H]
    layouts[scale + "(beta|gamma)_kernel"] = (model_axis, None)  # [H, D]
    layouts[scale + "factor_(kernel|bias)"] = (model_axis, None, None)  # [H, K or 1, D]
    layouts[feed_forward + "(gate|up)/kernel"] = (None, model_axis)  # [E, F]
    layouts[feed_forward + "(gate|up)/bias"] = (model_axis,)  # [F]
    layouts[feed_forward + "down/kernel"] = (model_axis, None)  # [F, E]
    layouts[".*token_embedding/embeddings"] = (model_axis, None)  # [V, E]
    layouts[".*head/projection/kernel"] = (None, model_axis)  # [E, V]
    if sequence_axis is not None:
        others = [name for name in names if name not in (model_axis, sequence_axis)]
        if len(others) > 1 or model_axis == sequence_axis:
            raise ValueError(
                "with `sequence_axis` the mesh must have that axis, `model_axis` and at most one "
                f"more, for the batch. Received: a mesh of {names}, model_axis={model_axis!r}, "
                f"sequence_axis={sequence_axis!r}"
            )
        layouts[HEADS] = (*(others or [None]), sequence_axis, model_axis, None)  # [B, T, H, D]
    return layouts
