"""What pydantic finds amiss in a document, in the document's own words.

Its messages speak of the classes that a value is read into (a tuple, an instance of SaveSettings), which whoever wrote
the YAML or JSON has never seen.
"""

from __future__ import annotations

from pydantic_core import ErrorDetails

__all__ = ["value_due"]

# By the first word of an error's type, as in int_type, int_parsing and int_from_float.
_KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "none": "null",
}
_LIMITS = {
    "greater_than_equal": "{ge:.10g} or more",
    "greater_than": "a number above {gt:.10g}",
    "less_than_equal": "{le:.10g} or less",
    "less_than": "a number below {lt:.10g}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
}
_MAPPINGS = ("dict_type", "model_type", "model_attributes_type")


def value_due(error: ErrorDetails, mapping: str = "an object") -> str | None:
    """What should stand where something else does: ``a list``, ``0 or more``, ``'a' or 'b'``.

    Args:
        error: One of those that pydantic found.
        mapping: What keys with values are called in such a document.

    Returns:
        None where it is neither the value's kind nor its limits that are amiss.
    """
    if error["type"] in _MAPPINGS:
        return mapping
    limit = _LIMITS.get(error["type"])
    if limit is not None:
        return limit.format(**error["ctx"])
    return _KINDS.get(error["type"].partition("_")[0])
