"""Prompts of any lengths, checked and padded to one."""

import numpy as np
from keras import ops

from keras_ssattn._typing import ArrayLike

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of it, so that few lengths compile


def check_tokens(name: str, rows: ArrayLike, vocabulary_size: int) -> list[np.ndarray]:
    """The rows as arrays of token ids; of `stop_tokens`, a row may be empty."""
    if hasattr(rows, "to_list"):  # of TensorFlow's ragged tensors, that Keras would pad
        rows = rows.to_list()
    elif ops.is_tensor(rows):
        rows = ops.convert_to_numpy(rows)
    try:
        rows = [np.asarray(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be rows of token ids. Received: {rows!r}") from error
    if not rows:
        raise ValueError(f"`{name}` must have one prompt or more. Received: none")
    for row in rows:
        if row.ndim != 1 or (name == "prompts" and not row.size):
            raise ValueError(
                f"`{name}` must be token ids, one or more in a row. Received: a row of shape "
                f"{row.shape}"
            )
        if row.size and row.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must be integers. Received: dtype {row.dtype}")
        if row.size and not 0 <= row.min() <= row.max() < vocabulary_size:
            raise ValueError(
                f"`{name}` must be from 0 to {vocabulary_size - 1}. Received: from {row.min()} "
                f"to {row.max()}"
            )
    return rows


def without_padding(row: np.ndarray, padding_id: int) -> np.ndarray:
    """The prompt up to its last token that is no padding."""
    tokens = np.flatnonzero(row != padding_id)
    if not tokens.size:
        raise ValueError(
            "`prompts` must have a token that is no padding in each row. Received: a row of "
            f"{row.size} tokens, all {padding_id}"
        )
    return row[: tokens[-1] + 1]


def pad_left(rows: list[np.ndarray], prefill_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, T]` and their mask; T is such that few lengths are compiled for."""
    longest = max(len(row) for row in rows)
    multiple = PROMPT_MULTIPLE
    if prefill_size is not None and longest > prefill_size:
        multiple = prefill_size
    length = -(-longest // multiple) * multiple
    tokens = np.zeros((len(rows), length), "int32")
    mask = np.zeros((len(rows), length), "bool")
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask
