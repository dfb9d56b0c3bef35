"""How positions are rotated: what config.json says of it, under the names of older and newer versions of transformers.

Scaling that depends on the sequence's length is not supported: the keys in the cache would have to be rotated again.
"""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader

# The numbers of each type of scaling beside `factor`; the native class knows what those that are absent mean.
SCALING = {
    "linear": set[str](),
    "llama3": {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    },
}
ROPE_TYPES = ("default", *SCALING)
PLACES = ("rope_parameters", "rope_scaling")
EVERYWHERE = ("rope_theta", "partial_rotary_factor")


def rotary_positions(reader: ConfigReader, supported: tuple[str, ...] = ROPE_TYPES) -> dict[str, Any]:
    """What config.json says, under the keys of newer transformers.

    The result has `rope_type` and, where config.json says so, `rope_theta` (a positive number), `partial_rotary_factor` and
    the numbers of a scaling. Noted are types that are not `supported`, scaling that no type explains, numbers that are none,
    and two places that say different things.
    """
    found: dict[str, tuple[str, Any]] = {}
    for place in PLACES:
        rope = reader.get(place)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            reader.problems.append(f"{place} must be an object, got {rope!r}")
            continue
        said = {key: value for key, value in rope.items() if value is not None}
        kind: Any = said.get("rope_type", said.get("type"))
        known = isinstance(kind, str) and kind in supported
        if kind is not None and not known:
            reader.unsupported(f"{place} asks for {kind!r} rotary embeddings, and supported are {', '.join(supported)}")
        scaling = said.keys() - {"rope_type", "type", *EVERYWHERE}
        if scaling and kind in (None, "default"):
            reader.problems.append(f"{place} has {', '.join(sorted(scaling))}, but no rope_type that says how to scale")
        elif known:
            _check_scaling(reader, place, kind, said, scaling)
        for key, value in said.items():
            _agree(reader, found, "rope_type" if key == "type" else key, f"{place}.{key}", value)
    for key in EVERYWHERE:
        if reader.get(key) is not None:
            _agree(reader, found, key, key, reader.values[key])
    result = {"rope_type": "default"} | {key: value for key, (_, value) in found.items()}
    for key in EVERYWHERE:
        if key in found:
            result[key] = reader.positive(*found[key])
    _compare_lengths(reader, result)
    return result


def published_rotary_positions(
    reader: ConfigReader, rotated: float | None = None, supported: tuple[str, ...] = ROPE_TYPES
) -> dict[str, Any]:
    """The native configuration's `rope_parameters` of a published family; `rotated` is the part of each head that is rotated
    where config.json does not say it, None in a family that rotates all of it."""
    rope = rotary_positions(reader, supported)
    if "rope_theta" not in rope:
        rope["rope_theta"] = reader.number("rope_theta")
    if rotated is not None:
        return {"partial_rotary_factor": rotated} | rope
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        reader.unsupported(
            f"partial_rotary_factor is {reader.values['partial_rotary_factor']}, and only 1.0 is supported"
        )
    return rope


def _check_scaling(reader: ConfigReader, place: str, kind: str, said: dict[str, Any], scaling: set[str]) -> None:
    """Numbers where numbers belong, and nothing else."""
    if kind == "default":
        return
    if "factor" not in said:
        reader.problems.append(f"{place}.factor missing, by which {kind!r} scales")
    for key in sorted(scaling & {"factor", *SCALING[kind]}):
        reader.positive(f"{place}.{key}", said[key])
    unknown = sorted(scaling - {"factor", "truncate", *SCALING[kind]})
    if unknown:
        reader.problems.append(f"{place} has {', '.join(unknown)}, of which {kind!r} scaling knows nothing")
    if "truncate" in scaling and (kind != "yarn" or not isinstance(said["truncate"], bool)):
        reader.problems.append(f"{place}.truncate must be true or false, and of yarn, got {said['truncate']!r}")


def _compare_lengths(reader: ConfigReader, rope: dict[str, Any]) -> None:
    """Older transformers, and so the code of older checkpoints, take YaRN's factor from two lengths, whatever `factor` is."""
    original, whole = rope.get("original_max_position_embeddings"), reader.values.get("max_position_embeddings")
    if rope["rope_type"] != "yarn" or not all(type(number) in (int, float) for number in (original, whole)):
        return
    factor = rope.get("factor")
    if original and whole / original not in (factor, 1):
        reader.remarks.append(
            f"{reader.file} scales positions by the factor {factor}, which is used, and from {original} to {whole} "
            f"positions, which is {whole / original:g}: code of older versions of transformers uses that"
        )


def _agree(reader: ConfigReader, found: dict[str, tuple[str, Any]], key: str, place: str, value: Any) -> None:
    if key not in found:
        found[key] = (place, value)
    elif found[key][1] != value:
        first, other = found[key]
        reader.problems.append(f"{first} {other!r} and {place} {value!r} disagree")
