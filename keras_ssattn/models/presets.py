"""Sizes of language models, and patterns of their layers, by name."""

from typing import NamedTuple

from keras_ssattn._checks import check_choice, check_integer
from keras_ssattn._typing import Config, Identifier, PatternName

CONFIGURATIONS: dict[str, Config] = {
    # of arXiv 2501.19399: GPT-2's vocabulary, a gated feed-forward network of 2048
    "ssmax_162m": {
        "vocabulary_size": 50257,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "tie_embeddings": False,
    },
    # tokens are bytes
    "bytes_11m": {"vocabulary_size": 256, "hidden_size": 384, "num_layers": 6, "num_heads": 6},
    "bytes_1m": {"vocabulary_size": 256, "hidden_size": 128, "num_layers": 4, "num_heads": 4},
}


class Pattern(NamedTuple):
    """What sets the global layers of a pattern, one in every few, apart from the others."""

    first: bool  # whether they come first in each group of layers, or last
    positions: bool  # whether they have rotary positions, as the others have
    windows: bool  # whether the others see a window


PATTERNS = {
    "swan": Pattern(first=True, positions=False, windows=True),
    "smollm3": Pattern(first=False, positions=False, windows=False),
    "ministral": Pattern(first=True, positions=True, windows=True),
}


def layer_pattern(
    name: PatternName,
    num_layers: int,
    *,
    sliding_window: int | None = None,
    every: int = 4,
    normalizer: Identifier = "ssmax",
    local_normalizer: Identifier = "softmax",
    rotary: Identifier = "default",
) -> Config:
    """Options of `CausalLM` whose global layers differ from the local ones between them.

    One layer in `every` is global: it sees all earlier tokens and has the `normalizer`, whose
    length scale then follows the whole length. The others are local.

    Args:
        name: `"swan"`: global layers without positions, the first of each group, among local
            layers with a window and rotary positions. `"smollm3"`: the same without windows, the
            global layer the last of each group. `"ministral"`: as `"swan"`, but all layers have
            rotary positions.
        num_layers: number of layers.
        sliding_window: of the local layers; not for `"smollm3"`.
        every: size of a group.
        normalizer: of the global layers, as in `MultiHeadAttention`.
        local_normalizer: of the local layers.
        rotary: as in `CausalLM`, of the layers with positions.

    Returns:
        A dictionary of the options `num_layers`, `normalizer`, `rotary` and `sliding_window`.

    Raises:
        ValueError: for another name, sizes that are not positive integers, or a window missing
            or of no use.

    Example:

    >>> from keras_ssattn.models import CausalLM, layer_pattern
    >>> options = layer_pattern("swan", num_layers=4, sliding_window=512)
    >>> options["sliding_window"]
    [None, 512, 512, 512]
    >>> model = CausalLM(vocabulary_size=50, hidden_size=16, num_heads=2, **options)
    >>> [block.attention.rotary is None for block in model.blocks]
    [True, False, False, False]

    References: arXiv 2504.08719 (SWAN), whose length scale is logarithmic; the published
    implementations of SmolLM3 and Ministral, whose `normalizer` is softmax.
    """
    check_choice("name", name, PATTERNS)
    num_layers, every = check_integer("num_layers", num_layers), check_integer("every", every)
    pattern = PATTERNS[name]
    sliding_window = check_integer("sliding_window", sliding_window, optional=True)
    if (sliding_window is not None) != pattern.windows:
        wanted = "an integer" if pattern.windows else "None"
        raise ValueError(
            f"`sliding_window` must be {wanted} in the pattern {name!r}. Received: "
            f"sliding_window={sliding_window}"
        )
    place = 0 if pattern.first else every - 1
    is_global = [i % every == place for i in range(num_layers)]
    return {
        "num_layers": num_layers,
        "normalizer": [normalizer if x else local_normalizer for x in is_global],
        "rotary": [rotary if not x or pattern.positions else None for x in is_global],
        "sliding_window": [None if x else sliding_window for x in is_global],
    }
