"""Text from a causal language model: prefill, then one token at a time, all at once or streamed."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_ssattn._checks import check_integer, check_number
from keras_ssattn._keras.observing import is_watched
from keras_ssattn._keras.state import sync_state
from keras_ssattn._keras.tree import settings_of
from keras_ssattn._tensors import cast, dtype_of, to_tensor
from keras_ssattn._typing import ArrayLike, Config, Layer, Size, Tensor
from keras_ssattn.models.prompts import check_tokens, pad_left, without_padding
from keras_ssattn.ops.cache import Cache, Carried, CarriedCache, may_be_carried
from keras_ssattn.ops.stacks import place, runs_eagerly

LOWEST_TEMPERATURE = 1e-30  # above 0 in float32
ROOM_MULTIPLE = 64  # caches are a multiple of it, so that few lengths compile


def generate(
    model: Layer,
    prompts: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_return_sequences: int = 1,
    stop_tokens: Iterable[int] = (),
    prefill_size: int | None = None,
    seed: int | None = None,
) -> list[np.ndarray]:
    """New tokens for each prompt, from a `CausalLM`.

    The prompts are padded on the left to one length and read in one pass; then every step reads
    one token of each row, with a cache, in one compiled loop; on PyTorch by a graph of tensor
    operations, captured once a step has run often, which `model.compile(jit_compile=True)` has
    compiled by `torch.compile`.

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
        min_p: draw from the tokens at least `min_p` times as probable as the likeliest only.
        repetition_penalty: above 1, divides the logits of tokens that the prompt or the new
            tokens have, where they are positive, and multiplies them where they are negative.
        num_return_sequences: how many times to go on from each prompt.
        stop_tokens: tokens that end a row.
        prefill_size: read the prompts so many tokens at a time, for prompts so long that a mask
            of their length squared is too much; `None` for all at once.
        seed: integer, of the draws. The draws are NumPy's: on every backend the same. With `None`
            they follow from `keras.utils.set_random_seed`.

    Returns:
        A list of int32 arrays, one for each prompt, or `num_return_sequences` for each, one after
        the other: the new tokens, up to and with the first stop token.

    Raises:
        TypeError: for prompts that are not integers.
        ValueError: for empty prompts, tokens outside the vocabulary, or options that do not fit.

    Example:

    >>> from keras_ssattn.models import CausalLM, generate
    >>> model = CausalLM(vocabulary_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> tokens = generate(model, [[1, 2, 3], [4]], 5, temperature=0.8, top_p=0.9, seed=0)
    >>> [x.shape for x in tokens]
    [(5,), (5,)]

    References: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., arXiv 1904.09751 (top-p);
    arXiv 2407.01082 (min-p); Keskar et al., arXiv 1909.05858 (repetition penalty).
    """
    plan = _plan(
        model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
        num_return_sequences, stop_tokens, prefill_size, seed,
    )  # fmt: skip
    if runs_eagerly():
        new = np.stack(list(_steps(model, plan)), axis=1)
    else:
        decode = _compiled(model, plan.choice, _make_decoder)
        new = ops.convert_to_numpy(decode(*map(ops.convert_to_tensor, plan.inputs())))
    return [_until(row, plan.choice.stops) for row in new]


def stream(
    model: Layer,
    prompts: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_return_sequences: int = 1,
    stop_tokens: Iterable[int] = (),
    prefill_size: int | None = None,
    seed: int | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, as they come.

    The arguments are those of `generate`, and are checked at the call. The prompts are read when
    the first tokens are asked for; then a compiled step gives those that follow, with the options
    that the model has then and the weights that it has at each step. A loop that is left early
    costs nothing more.

    Returns:
        An iterator over int32 arrays `[B]`, the next token of each row, where B is the number of
        prompts times `num_return_sequences`. It is -1 for a row that has had a stop token; the
        iterator ends with the last row.

    Raises:
        TypeError: as `generate`.
        ValueError: as `generate`.

    Example:

    >>> from keras_ssattn.models import CausalLM, stream
    >>> model = CausalLM(vocabulary_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> steps = stream(model, [[1, 2, 3], [4]], 3, temperature=0.8, seed=0)
    >>> [tokens.shape for tokens in steps]
    [(2,), (2,), (2,)]
    """
    plan = _plan(
        model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
        num_return_sequences, stop_tokens, prefill_size, seed,
    )  # fmt: skip

    return _steps(model, plan)


class Choice(NamedTuple):
    """What decides how a token is chosen, but for numbers: a function is compiled for each."""

    drawn: bool
    top_k: int | None
    nucleus: bool
    has_least: bool  # `min_p`
    penalized: bool
    stops: tuple[int, ...]
    prefill_size: int | None

    def ends(self, token: Tensor) -> Tensor:
        """Whether tokens `[B]` are stop tokens."""
        found = ops.zeros_like(token, dtype="bool")
        for stop in self.stops:
            found = ops.logical_or(found, token == stop)
        return found

    def choose(self, logits: Tensor, draw: Tensor, settings: Tensor, met: Tensor) -> Tensor:
        """The next tokens `[B]`, of logits `[B, V]`, draws `[B]` and tokens met `[B, V]`."""
        if self.penalized:
            penalty = cast(settings[3], dtype_of(logits))
            lowered = ops.where(logits > 0, logits / penalty, logits * penalty)
            logits = ops.where(met, lowered, logits)
        if not self.drawn:
            return ops.cast(ops.argmax(logits, axis=-1), "int32")
        top_p = settings[1] if self.nucleus else None
        min_p = settings[2] if self.has_least else None
        return sample(logits, draw, settings[0], self.top_k, top_p, min_p)

    def meet(self, met: Tensor, token: Tensor) -> Tensor:
        """The tokens met, with these."""
        if not self.penalized:
            return met
        return ops.logical_or(met, ops.expand_dims(token, 1) == ops.arange(met.shape[1]))


class Plan(NamedTuple):
    """What `generate` is asked for, checked, with prompts padded on the left.

    Attributes:
        tokens: integers `[B, T]`.
        mask: boolean `[B, T]`, False at padding.
        draws: floats `[N, B]`, uniform in [0, 1).
        settings: temperature, `top_p`, `min_p` and penalty.
        met: boolean `[B, V]`, which tokens the prompts have; `[B, 1]` where nobody asks.
        choice: what functions are compiled for.
    """

    tokens: np.ndarray
    mask: np.ndarray
    draws: np.ndarray
    settings: np.ndarray
    met: np.ndarray
    choice: Choice

    def inputs(self) -> tuple[np.ndarray, ...]:
        """Those of the compiled functions."""
        return self[:5]


def _plan(
    model: Layer,
    prompts: ArrayLike,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    num_return_sequences: int,
    stop_tokens: Iterable[int],
    prefill_size: int | None,
    seed: int | None,
) -> Plan:
    """Checks the arguments of `generate` and draws its numbers."""
    check_integer("max_new_tokens", max_new_tokens)
    count = check_integer("num_return_sequences", num_return_sequences)
    prefill_size = check_integer("prefill_size", prefill_size, optional=True)
    draws_from = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    _check_sampling(temperature, draws_from, repetition_penalty, count, model.vocabulary_size)
    seed = check_integer("seed", seed, least=0, optional=True)
    sync_state(model)
    rows = check_tokens("prompts", prompts, model.vocabulary_size)
    if model.padding_id is not None:  # padding itself attends to nothing
        rows = [without_padding(row, model.padding_id) for row in rows]
    if not isinstance(stop_tokens, Iterable):
        raise TypeError(f"`stop_tokens` must be token ids. Received: stop_tokens={stop_tokens!r}")
    stops = tuple(
        np.unique(check_tokens("stop_tokens", [[*stop_tokens]], model.vocabulary_size)[0])
    )
    rows = [row for row in rows for _ in range(count)]
    tokens, mask = pad_left(rows, prefill_size)
    if seed is None:
        seed = np.random.randint(2**31)  # which `keras.utils.set_random_seed` governs
    draws = np.random.default_rng(seed).random((max_new_tokens, len(rows)), "float32")
    choice = Choice(
        temperature > 0, top_k, top_p is not None, min_p is not None,
        repetition_penalty is not None, tuple(int(x) for x in stops), prefill_size,
    )  # fmt: skip
    temperature = max(float(temperature), LOWEST_TEMPERATURE)
    settings = (temperature, top_p or 1.0, min_p or 0.0, repetition_penalty or 1.0)
    met = _met(rows, choice, model)
    return Plan(tokens, mask, draws, np.array(settings, "float32"), met, choice)


def _met(rows: list[np.ndarray], choice: Choice, model: Layer) -> np.ndarray:
    """Which tokens the prompts have, `[B, V]`; `[B, 1]` where nobody asks."""
    met = np.zeros((len(rows), model.vocabulary_size if choice.penalized else 1), "bool")
    if choice.penalized:
        for i, row in enumerate(rows):
            met[i, row] = True
    return met


def _steps(model: Layer, plan: Plan) -> Iterator[np.ndarray]:
    """The new tokens `[B]` one after the other, -1 where a row has ended."""
    choice = plan.choice._replace(stops=())  # which are looked for outside of what is compiled
    start = _compiled(model, choice, _make_start)
    step = _compiled(model, choice, _make_step, repeated=not is_watched(model))
    inputs = tuple(map(ops.convert_to_tensor, plan.inputs()))
    settings = inputs[3]
    state = start(*inputs)
    ended = np.zeros(len(plan.tokens), "bool")
    for i in range(len(plan.draws)):
        if i > 0:
            position = np.int32(plan.tokens.shape[1] + i - 1)
            position, draw = map(ops.convert_to_tensor, (position, plan.draws[i]))
            state = step(position, *state, draw, settings)
        new = np.where(ended, -1, ops.convert_to_numpy(state[0])).astype("int32")
        yield new
        ended |= np.isin(new, plan.choice.stops)
        if ended.all():
            return


def _compiled(
    model: Layer,
    choice: Choice,
    make: Callable[[Layer, Choice], Callable],
    repeated: bool = False,
) -> Callable:
    """The function that `make` makes of a model, compiled once for a choice.

    One that is `repeated` takes the state that it gives: a token, the tokens met and the cache,
    which is written over. PyTorch captures it as a graph, in which no layer can be watched.
    """
    compiled = model.jit_compile is True
    settings = (model.rotary_state(), settings_of(model))
    options = (make.__name__, repeated, choice, compiled, settings)
    return model.generators.get(
        options, lambda: make(model, choice), model, consumed=(3,) if repeated else None
    )


def _make_start(model: Layer, choice: Choice) -> Callable:
    """The function that reads the prompts.

    Of tokens `[B, T]`, their mask, draws `[N, B]`, settings and the tokens met, it gives the first
    new tokens `[B]`, the tokens met, and the cache.
    """

    def start(
        tokens: Tensor, mask: Tensor, draws: Tensor, settings: Tensor, met: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = tokens.shape
        room = length + draws.shape[0]
        cache = model.make_cache(batch, -(-room // ROOM_MULTIPLE) * ROOM_MULTIPLE)
        size = length if choice.prefill_size is None else min(choice.prefill_size, length)
        for i in range(0, length, size):
            part = slice(i, i + size)
            logits, cache = model.next_logits(tokens[:, part], cache, i, mask[:, part])
        token = choice.choose(logits, draws[0], settings, met)
        return token, choice.meet(met, token), _carried(cache)

    return start


def _make_step(model: Layer, choice: Choice) -> Callable:
    """The function that reads one token of each row, at a position, and gives what `start` does."""

    def step(
        position: Size, token: Tensor, met: Tensor, cache: Tensor, draw: Tensor, settings: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, cache = model.next_logits(ops.expand_dims(token, 1), _caches(cache), position)
        token = choice.choose(logits, draw, settings, met)
        return token, choice.meet(met, token), _carried(cache)

    return step


def _carried(cache: Any) -> Any:
    """What a compiled loop carries of a model's caches; of one's own making they stay as they are.

    They are a tuple of one `Cache` for each block, unless a model has a `next_logits` of its own.
    """
    if type(cache) is not tuple or not may_be_carried():
        return cache
    return tuple(Carried.of(x) if type(x) in (Cache, CarriedCache) else x for x in cache)


def _caches(carried: Any) -> Any:
    """The inverse of `_carried`."""
    if type(carried) is not tuple:
        return carried
    return tuple(x.cache() if type(x) is Carried else x for x in carried)


def _make_decoder(model: Layer, choice: Choice) -> Callable:
    """The function that gives all new tokens `[B, N]`, of what `start` takes."""
    start, step = _make_start(model, choice), _make_step(model, choice)

    def decode(
        tokens: Tensor, mask: Tensor, draws: Tensor, settings: Tensor, met: Tensor
    ) -> Tensor:
        batch, length = tokens.shape
        count = draws.shape[0]

        def put(new: Tensor, i: Size, done: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
            new = ops.slice_update(new, place(0, i), ops.expand_dims(token, 1))
            return new, ops.logical_or(done, choice.ends(token))

        def unfinished(i: Size, _new: Tensor, done: Tensor, *_: Tensor) -> Tensor:
            return ops.logical_and(i < count, ops.logical_not(ops.all(done)))

        def body(i: Size, new: Tensor, done: Tensor, *state: Tensor) -> tuple:
            state = step(length + i - 1, *state, draws[i], settings)
            return i + 1, *put(new, i, done, state[0]), *state

        state = start(tokens, mask, draws, settings, met)
        new, done = ops.zeros((batch, count), "int32"), ops.zeros((batch,), "bool")
        first = ops.convert_to_tensor(1, "int32")
        loop = (first, *put(new, 0, done, state[0]), *state)
        return ops.while_loop(unfinished, body, loop)[1]

    return decode


def sample(
    logits: Tensor,
    draw: Tensor,
    temperature: Tensor,
    top_k: int | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
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
    if min_p is not None:
        least = cast(to_tensor(min_p), dtype) * ops.max(weights, axis=-1, keepdims=True)
        weights = ops.where(weights >= least, weights, 0.0)
        total = ops.cumsum(weights, axis=-1)
    # the first whose sum passes the draw; none does where the draw rounds up to the whole
    passed = total <= ops.expand_dims(draw, -1) * total[:, -1:]
    index = cast(ops.sum(ops.cast(passed, "int32"), axis=-1), "int32")  # JAX may sum in int64
    index = ops.minimum(index, ops.cast(ops.argmax(total, axis=-1), "int32"))
    if tokens is None:
        return index
    return ops.cast(ops.take_along_axis(tokens, ops.expand_dims(index, -1), axis=-1)[:, 0], "int32")


def _check_sampling(
    temperature: float, options: Config, penalty: float | None, count: int, vocabulary_size: int
) -> None:
    """Raises unless temperature, `top_k`, `top_p`, `min_p`, penalty and count fit."""
    check_number("temperature", temperature, "a number, 0 or more", lambda x: 0 <= x < math.inf)
    top_k = check_integer("top_k", options["top_k"], optional=True)
    if top_k is not None and top_k > vocabulary_size:
        raise ValueError(
            "`top_k` must not be more than the number of tokens. Received: "
            f"top_k={top_k}, vocabulary_size={vocabulary_size}"
        )
    for name in ("top_p", "min_p"):
        if options[name] is not None:
            check_number(name, options[name], "a number in (0, 1]", lambda x: 0 < x <= 1)
    if penalty is not None:
        check_number("repetition_penalty", penalty, "a positive number", lambda x: 0 < x < math.inf)
    if temperature == 0 and (count > 1 or any(x is not None for x in options.values())):
        raise ValueError(
            "`top_k` and `top_p` go with a `temperature` above 0, and so do `min_p` and several "
            "sequences. Received: temperature=0, "
            f"{', '.join(f'{name}={value}' for name, value in options.items())}, "
            f"num_return_sequences={count}"
        )


def _until(row: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    """The tokens up to and with the first stop token."""
    found = np.flatnonzero(np.isin(row, stops))
    return row[: found[0] + 1] if found.size else row
