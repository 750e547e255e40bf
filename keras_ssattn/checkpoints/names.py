"""The one table of names: variable of a `CausalLM`, tensor of the file, and its sizes there."""

from typing import NamedTuple

from keras_ssattn.checkpoints.architecture import Architecture


class Row(NamedTuple):
    """One variable: its path in the model, its name in the file, and its axes there.

    V is the vocabulary, E the hidden size, F the inner size of the feed-forward network, D the size
    of a head, Q and K that of all query and all key heads. A kernel of two axes is transposed.
    """

    variable: str
    name: str
    axes: str


BLOCK = (
    Row("attention_norm/scale", "input_layernorm.weight", "E"),
    Row("attention/query/kernel", "self_attn.q_proj.weight", "QE"),
    Row("attention/key/kernel", "self_attn.k_proj.weight", "KE"),
    Row("attention/value/kernel", "self_attn.v_proj.weight", "KE"),
    Row("attention/query/bias", "self_attn.q_proj.bias", "Q"),
    Row("attention/key/bias", "self_attn.k_proj.bias", "K"),
    Row("attention/value/bias", "self_attn.v_proj.bias", "K"),
    Row("attention/query_norm/scale", "self_attn.q_norm.weight", "D"),
    Row("attention/key_norm/scale", "self_attn.k_norm.weight", "D"),
    Row("attention/attention_output/kernel", "self_attn.o_proj.weight", "EQ"),
    Row("attention/attention_output/bias", "self_attn.o_proj.bias", "E"),
    Row("feed_forward_norm/scale", "post_attention_layernorm.weight", "E"),
    Row("feed_forward/gate/kernel", "mlp.gate_proj.weight", "FE"),
    Row("feed_forward/up/kernel", "mlp.up_proj.weight", "FE"),
    Row("feed_forward/gate/bias", "mlp.gate_proj.bias", "F"),
    Row("feed_forward/up/bias", "mlp.up_proj.bias", "F"),
    Row("feed_forward/down/kernel", "mlp.down_proj.weight", "EF"),
    Row("feed_forward/down/bias", "mlp.down_proj.bias", "E"),
)
EMBEDDING = Row("token_embedding/embeddings", "embed_tokens.weight", "VE")
NORM = Row("head/final_norm/scale", "norm.weight", "E")
HEAD = Row("head/projection/kernel", "lm_head.weight", "VE")

# Families that keep several tensors as one, one above the other in the order of the table.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
# What stands before the names of the model, and of its head.
PREFIXES = (
    ("model.", ""),
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
)


class Place(NamedTuple):
    """Where a variable lies: rows `first` to `end` of a tensor of the file."""

    variable: str
    name: str
    first: int
    end: int
    transposed: bool


class Layout(NamedTuple):
    """Where all variables of a model lie, and the shape of each tensor of the file."""

    places: list[Place]
    shapes: dict[str, tuple[int, ...]]


def layout(
    model: Architecture, fused: bool = False, prefixes: tuple[str, str] = PREFIXES[0]
) -> Layout:
    """The layout of a model in its file."""
    sizes = {
        "V": model.vocabulary_size,
        "E": model.hidden_size,
        "F": model.inner_size,
        "D": model.key_dim,
        "Q": model.num_heads * model.key_dim,
        "K": model.num_kv_heads * model.key_dim,
    }
    base, above = prefixes
    rows = [EMBEDDING._replace(name=base + EMBEDDING.name)]
    for i in range(model.num_layers):
        for row in BLOCK:
            if _has(model, row.variable):
                name = _fuse(row.name) if fused else row.name
                rows.append(
                    Row(f"block_{i + 1}/{row.variable}", f"{base}layers.{i}.{name}", row.axes)
                )
    rows.append(NORM._replace(name=base + NORM.name))
    if not model.tied:
        rows.append(HEAD._replace(name=above + HEAD.name))
    places: list[Place] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        count, *rest = (sizes[axis] for axis in row.axes)
        first = shapes[row.name][0] if row.name in shapes else 0
        shapes[row.name] = (first + count, *rest)
        places.append(
            Place(row.variable, row.name, first, first + count, row.variable.endswith("kernel"))
        )
    return Layout(places, shapes)


def _fuse(name: str) -> str:
    return ".".join(FUSED.get(part, part) for part in name.split("."))


def _has(model: Architecture, variable: str) -> bool:
    """Whether a model has the variable of a row of the table."""
    if variable.endswith("bias"):
        part, layer = variable.split("/")[:2]
        return ("feed_forward" if part == "feed_forward" else layer) in model.biases
    return model.qk_norm or variable.split("/")[1] not in ("query_norm", "key_norm")
