"""Text from a causal language model: prefill, then a compiled loop of one token at a time."""

import math
from collections.abc import Callable, Iterable

import numpy as np
from keras import ops

from keras_ssattn._checks import check_integer, check_number
from keras_ssattn._keras.state import sync_state
from keras_ssattn._tensors import cast, dtype_of, to_tensor
from keras_ssattn._typing import ArrayLike, Layer, Size, Tensor
from keras_ssattn.ops.stacks import place

LOWEST_TEMPERATURE = 1e-30  # above 0 in float32
PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of it, so that few lengths compile


def generate(
    model: Layer,
    prompts: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Iterable[int] = (),
    seed: int | None = None,
) -> list[np.ndarray]:
    """New tokens for each prompt, from a `CausalLM`.

    The prompts are padded on the left to one length and read in one pass; then every step reads
    one token of each row, with a cache, in one compiled loop.

    Args:
        model: a `CausalLM`.
        prompts: token ids: a list of lists of any lengths above 0, or integers `[B, T]`. Of a
            model with `padding_id`, padding at the end of a prompt is left out.
        max_new_tokens: the most tokens to generate for each.
        temperature: 0 takes the likeliest token; above, tokens are drawn from
            `softmax(logits / temperature)`.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest likeliest tokens whose probabilities sum to `top_p` or more.
            With `top_k`, of those k, with probabilities among them.
        stop_tokens: tokens that end a row.
        seed: integer, of the draws. The draws are NumPy's: on every backend the same. With `None`
            they follow from `keras.utils.set_random_seed`.

    Returns:
        A list of int32 arrays, one for each prompt: its new tokens, up to and with the first
        stop token.

    Raises:
        TypeError: for prompts that are not integers.
        ValueError: for empty prompts, tokens outside the vocabulary, or options that do not fit.

    Example:

    >>> from keras_ssattn.models import CausalLM, generate
    >>> model = CausalLM(vocabulary_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> tokens = generate(model, [[1, 2, 3], [4]], 5, temperature=0.8, top_p=0.9, seed=0)
    >>> [x.shape for x in tokens]
    [(5,), (5,)]

    References: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., arXiv 1904.09751 (top-p).
    """
    check_integer("max_new_tokens", max_new_tokens)
    _check_sampling(temperature, top_k, top_p, model.vocabulary_size)
    seed = check_integer("seed", seed, least=0, optional=True)
    sync_state(model)
    rows = _check_tokens("prompts", prompts, model.vocabulary_size)
    if model.padding_id is not None:  # padding itself attends to nothing
        rows = [_without_padding(row, model.padding_id) for row in rows]
    if not isinstance(stop_tokens, Iterable):
        raise TypeError(f"`stop_tokens` must be token ids. Received: stop_tokens={stop_tokens!r}")
    stops = tuple(
        np.unique(_check_tokens("stop_tokens", [[*stop_tokens]], model.vocabulary_size)[0])
    )
    length = -(-max(len(row) for row in rows) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(rows), length), "int32")
    mask = np.zeros((len(rows), length), "bool")
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    if seed is None:
        seed = np.random.randint(2**31)  # which `keras.utils.set_random_seed` governs
    draws = np.random.default_rng(seed).random((max_new_tokens, len(rows)), "float32")
    options = (temperature > 0, top_k, top_p is not None, tuple(int(x) for x in stops))
    decode = model.generators.get(
        (options, model.rotary_state()), lambda: _make_decoder(model, *options), model.variables
    )
    settings = np.array([max(float(temperature), LOWEST_TEMPERATURE), top_p or 1.0], "float32")
    inputs = (ops.convert_to_tensor(x) for x in (tokens, mask, draws, settings))
    new = ops.convert_to_numpy(decode(*inputs))
    return [_until(row, stops) for row in new]


def _make_decoder(
    model: Layer, drawn: bool, top_k: int | None, nucleus: bool, stops: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The function that gives N new tokens `[B, N]`.

    Of tokens `[B, T]`, their mask, draws `[N, B]`, and a pair of temperature and `top_p`.
    """

    def ends(token: Tensor) -> Tensor:
        found = ops.zeros_like(token, dtype="bool")
        for stop in stops:
            found = ops.logical_or(found, token == stop)
        return found

    def decode(tokens: Tensor, mask: Tensor, draws: Tensor, settings: Tensor) -> Tensor:
        batch, length = tokens.shape
        count = draws.shape[0]

        def choose(logits: Tensor, i: Size) -> Tensor:
            if not drawn:
                return ops.cast(ops.argmax(logits, axis=-1), "int32")
            return sample(logits, draws[i], settings[0], top_k, settings[1] if nucleus else None)

        def unfinished(i: Size, _token: Tensor, done: Tensor, *_: Tensor) -> Tensor:
            return ops.logical_and(i < count, ops.logical_not(ops.all(done)))

        def step(i: Size, token: Tensor, done: Tensor, new: Tensor, cache: Tensor) -> tuple:
            token = ops.expand_dims(token, 1)
            logits, cache = model.next_logits(token, cache, length + i - 1)
            token = choose(logits, i)
            new = ops.slice_update(new, place(0, i), ops.expand_dims(token, 1))
            return i + 1, token, ops.logical_or(done, ends(token)), new, cache

        cache = model.make_cache(batch, length + count)
        logits, cache = model.next_logits(tokens, cache, 0, mask)
        token = choose(logits, 0)
        new = ops.zeros((batch, count), "int32")
        new = ops.slice_update(new, (0, 0), ops.expand_dims(token, 1))
        start = ops.convert_to_tensor(1, "int32")
        return ops.while_loop(unfinished, step, (start, token, ends(token), new, cache))[3]

    return decode


def sample(
    logits: Tensor,
    draw: Tensor,
    temperature: Tensor,
    top_k: int | None = None,
    top_p: Tensor | None = None,
) -> Tensor:
    """Token ids `[B]`, int32, from logits `[B, V]` and draws `[B]` uniform in [0, 1)."""
    dtype = dtype_of(logits)
    draw, temperature = cast(draw, dtype), cast(to_tensor(temperature), dtype)
    top_p = None if top_p is None else cast(to_tensor(top_p), dtype)
    # the largest is then 0 at any temperature, however small
    logits = (logits - ops.max(logits, axis=-1, keepdims=True)) / temperature
    tokens = None
    if top_k is not None or top_p is not None:
        logits, tokens = ops.top_k(logits, top_k or logits.shape[-1])  # in descending order
    weights = ops.softmax(logits)
    total = ops.cumsum(weights, axis=-1)
    if top_p is not None:
        weights = ops.where(total - weights < top_p, weights, 0.0)
        total = ops.cumsum(weights, axis=-1)
    # the first whose sum passes the draw; none does where the draw rounds up to the whole
    passed = total <= ops.expand_dims(draw, -1) * total[:, -1:]
    index = cast(ops.sum(ops.cast(passed, "int32"), axis=-1), "int32")  # JAX may sum in int64
    index = ops.minimum(index, ops.cast(ops.argmax(total, axis=-1), "int32"))
    if tokens is None:
        return index
    return ops.cast(ops.take_along_axis(tokens, ops.expand_dims(index, -1), axis=-1)[:, 0], "int32")


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, vocabulary_size: int
) -> None:
    check_number("temperature", temperature, "a number, 0 or more", lambda x: 0 <= x < math.inf)
    check_integer("top_k", top_k, optional=True)
    if top_k is not None and top_k > vocabulary_size:
        raise ValueError(
            "`top_k` must not be more than the number of tokens. Received: "
            f"top_k={top_k}, vocabulary_size={vocabulary_size}"
        )
    if top_p is not None:
        check_number("top_p", top_p, "a number in (0, 1]", lambda x: 0 < x <= 1)
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            "`top_k` and `top_p` go with a `temperature` above 0. Received: temperature=0, "
            f"top_k={top_k}, top_p={top_p}"
        )


def _check_tokens(name: str, rows: ArrayLike, vocabulary_size: int) -> list[np.ndarray]:
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


def _without_padding(row: np.ndarray, padding_id: int) -> np.ndarray:
    """The prompt up to its last token that is no padding."""
    tokens = np.flatnonzero(row != padding_id)
    if not tokens.size:
        raise ValueError(
            "`prompts` must have a token that is no padding in each row. Received: a row of "
            f"{row.size} tokens, all {padding_id}"
        )
    return row[: tokens[-1] + 1]


def _until(row: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    """The tokens up to and with the first stop token."""
    found = np.flatnonzero(np.isin(row, stops))
    return row[: found[0] + 1] if found.size else row
