"""Rotary positions and temperature in a config.json, read and written."""

from keras_ssattn._typing import Config
from keras_ssattn.checkpoints.architecture import Architecture, Rotary, Temperature, sorted_pairs
from keras_ssattn.checkpoints.fields import REQUIRED, Fields

LENGTH = "original_max_position_embeddings"
# Names of a scaling's entries in a config.json, and here.
SCALING = {
    "factor": "factor",
    LENGTH: "original_length",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
ENTRIES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    ),
}  # fmt: skip


def read_positions(
    fields: Fields, key_dim: int, theta: float, types: tuple[str, ...], extras: tuple[str, ...]
) -> tuple[Rotary, Temperature | None]:
    """Rotary positions and temperature of `rope_parameters`, or of older fields.

    Args:
        fields: of the config.json.
        key_dim: size of a head.
        theta: the base where the file has none.
        types: the scalings that the family has.
        extras: what else it reads, `"partial_rotary_factor"` or `"llama_4_scaling_beta"`.
    """
    rope = _find_parameters(fields)
    kinds = {rope.take("rope_type"), rope.take("type")} - {None} or {"default"}
    if len(kinds) > 1 or not kinds <= set(types):
        rope.refuse("rope_type", sorted(map(str, kinds)), f"one of {types}")
    kind = kinds.pop()
    theta, share = rope.number("rope_theta", theta), rope.number("partial_rotary_factor", 1.0)
    if share > 1 or (share != 1 and "partial_rotary_factor" not in extras):
        rope.refuse("partial_rotary_factor", share, "1")
    pairs = -(-int(key_dim * share) // 2)
    if not 0 < 2 * pairs <= key_dim:
        fields.refuse("head_dim", key_dim, "a size of which pairs of features can be rotated")
    length = rope.left.get(LENGTH)
    scaling = _read_scaling(rope, kind, fields.config.get("max_position_embeddings"))
    temperature, beta = None, None
    if "llama_4_scaling_beta" in extras:
        beta = rope.take("llama_4_scaling_beta")
        rope.take(LENGTH)
    if beta is not None and (isinstance(beta, bool) or not isinstance(beta, (int, float))):
        rope.refuse("llama_4_scaling_beta", beta, "a number or null")
    if beta:
        temperature = Temperature(float(beta), Fields({LENGTH: length}, rope.where).integer(LENGTH))
    rope.finish(frozenset({"max_position_embeddings"}))
    return Rotary(theta, 2 * pairs / key_dim, sorted_pairs(scaling)), temperature


def _find_parameters(fields: Fields) -> Fields:
    """The parameters, of which older files have some outside."""
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    if new and old and new != old:
        fields.refuse("rope_scaling", old, "null, beside `rope_parameters`")
    found = old or new or {}
    if not isinstance(found, dict):
        fields.refuse("rope_parameters", found, "an object or null")
    rope = Fields(found, f"`rope_parameters` of {fields.where}")
    for name in ("rope_theta", "partial_rotary_factor"):
        value = fields.take(name)
        inner = rope.left.setdefault(name, value)
        if value is not None and inner != value:
            fields.refuse(name, value, f"{inner!r}, as in `rope_parameters`")
    return rope


def _read_scaling(rope: Fields, kind: str, longest: int | None) -> Config:
    """The scaling as `rotary_frequencies` takes it, with what the file leaves out."""
    if kind == "default":
        return {}
    found = {name: rope.take(name) for name in ENTRIES[kind]}
    if kind == "yarn":
        found["truncate"] = bool(found["truncate"]) or "truncate" not in rope.config
        if found["factor"] is None and longest and found[LENGTH]:
            found["factor"] = longest / found[LENGTH]
        found["beta_fast"], found["beta_slow"] = found["beta_fast"] or 32, found["beta_slow"] or 1
        if not (found["mscale"] and found["mscale_all_dim"]):  # one without the other is not read
            found["mscale"] = found["mscale_all_dim"] = None
    for name in ENTRIES[kind][:2] if kind == "yarn" else ENTRIES[kind]:
        Fields({x: y for x, y in found.items() if y is not None}, rope.where).take(name, REQUIRED)
    return {"type": kind, **{SCALING[x]: y for x, y in found.items() if y is not None}}


def write_positions(model: Architecture) -> Config:
    """The `rope_parameters` of a model."""
    theta, fraction, scaling = model.rotary
    own = {name: key for key, name in SCALING.items()}
    entries = {own[name]: value for name, value in scaling if name != "type"}
    rope: Config = {
        "rope_type": dict(scaling).get("type", "default"),
        "rope_theta": theta,
        **entries,
    }
    if fraction != 1.0:
        rope["partial_rotary_factor"] = fraction
    if model.temperature is not None:
        rope["llama_4_scaling_beta"] = model.temperature.beta
        rope.setdefault(LENGTH, model.temperature.original_length)
    return rope
