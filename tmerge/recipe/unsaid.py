"""What a recipe leaves unsaid where that hangs on another section's choice; all other defaults are the fields' own.

Six things do. An adapter is of one model, which is `source` and `source_base` alike, and is carried as a task vector;
and so are `sources`, whose base stands in the place of the source, and which no training is drawn to. A kind of fusion
brings what was measured best with it in other sections (its ``beside``). What lies on the residual stream is carried
by one correspondence for the whole model, so that ``fusion.stream`` is on where the transport is such a one; and it
has no room in a result that is written as an adapter. And a section that does not name its kind is of the first.

Beside that, resolved recipes once named every key of every kind: what they wrote out for the kind that was not chosen
says nothing, and is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmerge.recipe.fusion import Reconstruction, TaskVector, Weights

__all__ = ["unsaid", "with_unsaid"]

# Choice -> the other choice's keys, at the values that a resolved recipe of before had for them.
_WRITTEN_OUT: dict[str, dict[str, Any]] = {
    "weights": {"stream": False},
    "none": {"matching": "one-to-one", "signed": False},
    "shared": {
        "eta": 0.1,
        "layer_max_iterations": 1000,
        "layer_tolerance": 1e-9,
        "layer_cost": "median-scaled",
        "layer_marginals": "balanced",
        "layers_kept": 3,
    },
}

_KINDS: dict[str, type[Weights] | type[TaskVector] | type[Reconstruction]] = {
    "task-vector": TaskVector,
    "reconstruct": Reconstruction,
}


def with_unsaid(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's mapping in which each section says what it is by another's choice.

    Args:
        data: Top-level keys. Sections that are mappings, or not there, are filled; what is no mapping stays as it is.
    """
    filled, joined = dict(data), bool(data.get("sources"))
    learned = joined or data.get("adapter") is not None
    if joined and filled.get("source") is None and filled.get("source_base") is not None:
        filled["source"] = filled["source_base"]
    elif learned and not joined:
        for name, other in (("source", "source_base"), ("source_base", "source")):
            if filled.get(name) is None and filled.get(other) is not None:
                filled[name] = filled[other]
    if joined:
        # Several have no one distribution to learn from.
        filled["adaptation"] = _with({"objective": "sft"}, data.get("adaptation"))
    fusion = filled["fusion"] = _with({"what": "task-vector" if learned else "weights"}, data.get("fusion"))
    what = _said(fusion, "what")
    kind = _KINDS.get(what, Weights) if isinstance(what, str) else Weights
    for name, values in kind.beside.items():
        filled[name] = _with(values, data.get(name))
    if kind is Reconstruction and filled.get("source_base") is not None:
        filled["evaluation"] = _with(
            {"controls": ["shrink", "noise", "permuted", "source_base"]}, data.get("evaluation")
        )
    transport = filled["transport"]
    # A fitted map is another one for every layer, and the stream has none of its own.
    carries_stream = _said(transport, "structure") == "shared" and _said(transport, "map") in (None, "plan")
    if kind is TaskVector and (not carries_stream or _said(data.get("save"), "form") == "adapter"):
        filled["fusion"] = _with({"stream": False}, fusion)
    for name, choice in (("fusion", "what"), ("transport", "structure")):
        filled[name] = _without_written_out(filled[name], choice)
    return filled


def unsaid(data: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a resolved recipe has and its file does not say, as it was written by a tmerge that lacked it.

    What is nothing by default is passed over: then there was nothing to say.

    Args:
        data: As YAML gives the file.
        resolved: All keys of the recipe that was made of it.

    Returns:
        Key, dotted -> value.
    """
    found: dict[str, Any] = {}
    for key, value in resolved.items():
        if value is None or value in ({}, []):
            continue
        if key not in data:
            found[key] = value
        elif isinstance(value, Mapping) and isinstance(section := data[key], Mapping):
            found |= {f"{key}.{name}": left for name, left in unsaid(section, value).items()}
    return found


def _with(values: Mapping[str, Any], section: Any) -> Any:
    if section is None:
        return dict(values)
    return {**values, **section} if isinstance(section, Mapping) else section


def _said(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, Mapping) else getattr(section, key, None)


def _without_written_out(section: Any, choice: str) -> Any:
    if not isinstance(section, Mapping):
        return section
    chosen = section.get(choice)
    others = _WRITTEN_OUT.get(chosen, {}) if isinstance(chosen, str) else {}
    return {
        key: value
        for key, value in section.items()
        if key not in others or (type(value), value) != (type(others[key]), others[key])
    }
