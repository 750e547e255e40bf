"""Rotary positions and temperature in a config.json, read and written."""

import math

from keras_ssattn._typing import Config
from keras_ssattn.checkpoints.architecture import Architecture, Rotary, Temperature, sorted_pairs
from keras_ssattn.checkpoints.fields import REQUIRED, Fields

LENGTH = "original_max_position_embeddings"
LENGTH_WITHOUT = 16384  # where a file must have one, though nothing depends on it
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
    fields: Fields, key_dim: int, defaults: Config, types: tuple[str, ...], extras: tuple[str, ...]
) -> tuple[Rotary, Temperature | None]:
    """Rotary positions and temperature of `rope_parameters`, or of older fields.

    Args:
        fields: of the config.json.
        key_dim: size of a head.
        defaults: what the family has where the file has no `rope_theta` or no `rope_parameters`.
        types: the scalings that the family has.
        extras: what else it reads, `"partial_rotary_factor"` or `"llama_4_scaling_beta"`.
    """
    rope = _find_parameters(fields, defaults.get("rope_parameters", {}))
    given = [rope.take("rope_type"), rope.take("type")]
    kind, *rest = [x for x in given if x is not None] or ["default"]
    if kind not in types or any(x != kind for x in rest):
        rope.refuse("rope_type", [kind, *rest], f"one of {types}")
    theta = rope.number("rope_theta", defaults.get("rope_theta", 1e4))
    share = rope.number("partial_rotary_factor", 1.0)
    if share > 1 or (share != 1 and "partial_rotary_factor" not in extras):
        rope.refuse("partial_rotary_factor", share, "1")
    size = int(key_dim * share)
    if size == 0 or size % 2:
        expected = "a size of which pairs of features can be rotated"
        fields.refuse("head_dim", key_dim, f"{expected}, of this share: {share}")
    length = rope.left.get(LENGTH)
    scaling = _read_scaling(rope, kind, fields.config.get("max_position_embeddings"))
    temperature = None
    if "llama_4_scaling_beta" in extras:  # with 0, the length must still be there
        rope.take(LENGTH)
        beta = rope.slope("llama_4_scaling_beta")
        temperature = Temperature(beta, Fields({LENGTH: length}, rope.where).integer(LENGTH))
    rope.finish(frozenset({"max_position_embeddings"}))
    rotary = Rotary(theta, size / key_dim, sorted_pairs(scaling))
    return rotary, temperature if temperature and temperature.beta else None


def _find_parameters(fields: Fields, default: Config) -> Fields:
    """The parameters, of which older files have some outside; `default` if the file has none."""
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            fields.refuse(name, value, "an object or null")
    if new and old and new != old:
        fields.refuse("rope_scaling", old, "null, beside `rope_parameters`")
    rope = Fields(old or (default if new is None else new), f"`rope_parameters` of {fields.where}")
    for name in ("rope_theta", "partial_rotary_factor"):
        value = fields.take(name)
        inner = rope.left.setdefault(name, value)
        if value is not None and inner != value:
            fields.refuse(name, value, f"{inner!r}, as in `rope_parameters`, given or by default")
    return rope


def _read_scaling(rope: Fields, kind: str, longest: int | None) -> Config:
    """The scaling as `rotary_frequencies` takes it, with what the file leaves out."""
    if kind == "default":
        return {}
    found = {name: rope.take(name) for name in ENTRIES[kind]}
    if kind == "yarn":
        found["truncate"] = bool(found["truncate"]) or "truncate" not in rope.config
        if found["factor"] is None and longest and found[LENGTH]:
            known = Fields({"max_position_embeddings": longest, **found}, rope.where)
            found["factor"] = known.number("max_position_embeddings") / known.number(LENGTH)
        found["beta_fast"], found["beta_slow"] = found["beta_fast"] or 32, found["beta_slow"] or 1
        if not (found["mscale"] and found["mscale_all_dim"]):  # one without the other is not read
            found["mscale"] = found["mscale_all_dim"] = None
    for name in ENTRIES[kind][:2] if kind == "yarn" else ENTRIES[kind]:
        Fields({x: y for x, y in found.items() if y is not None}, rope.where).take(name, REQUIRED)
    return {"type": kind, **{SCALING[x]: y for x, y in found.items() if y is not None}}


def write_positions(model: Architecture, extras: tuple[str, ...]) -> Config:
    """The `rope_parameters` of a model, in a family with these extras."""
    theta, fraction, scaling = model.rotary
    own = {name: key for key, name in SCALING.items()}
    entries = {own[name]: value for name, value in scaling if name != "type"}
    rope: Config = {
        "rope_type": dict(scaling).get("type", "default"),
        "rope_theta": theta,
        **entries,
    }
    if fraction != 1.0:
        size = round(fraction * model.key_dim)
        while int(model.key_dim * fraction) < size:  # as the file is read, which rounds down
            fraction = math.nextafter(fraction, 1.0)
        rope["partial_rotary_factor"] = fraction
    if "llama_4_scaling_beta" in extras or model.temperature is not None:
        beta, length = model.temperature or Temperature(0.0, LENGTH_WITHOUT)
        rope["llama_4_scaling_beta"] = beta
        rope.setdefault(LENGTH, length)
    return rope
