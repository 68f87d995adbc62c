"""What the merge of two models carries of their licences, and what stands against publishing it.

The terms themselves are in licence_terms.py. Nothing here is legal advice: the texts, which every answer links to,
decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tmerge.models.licence_terms import Licence, known_licence

__all__ = ["OutputLicence", "output_licence"]


@dataclass(frozen=True)
class OutputLicence:
    """What a merge's model card has to state, and what stands against publishing it.

    Attributes:
        id: For the card's ``license``: one of the Hub's identifiers, or ``other``.
        name: For the card's ``license_name``, where the id is ``other``.
        link: For the card's ``license_link``, where the id is ``other`` and there is a page.
        links: What and where, for all the texts that apply.
        duties: What the publisher has to do, a sentence each.
        name_begins: What the merge's name has to begin with.
        why: How the licence follows from the two, in a sentence.
        refusals: The terms that forbid publishing this merge, a sentence each.
        unknown: What could not be told, a sentence each.
    """

    id: str
    name: str | None
    link: str | None
    links: tuple[tuple[str, str], ...]
    duties: tuple[str, ...]
    why: str
    refusals: tuple[str, ...]
    unknown: tuple[str, ...]
    name_begins: str | None = None


# The Hub's list (https://huggingface.co/docs/hub/repositories-licenses), without `other` and `unknown`. It refuses a
# card that states anything else; an identifier that joined the list later goes out as `other` with its name.
_HUB_IDS = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma""".split()
)

# What a kind takes in: the terms of each kind on the right can be met by publishing under one on the left.
_TAKES: dict[str, str] = {
    "permissive": "",
    "attribution": "permissive",
    "nd": "permissive attribution",
    "nc": "permissive attribution",
    "sa": "permissive attribution",
    "nc-sa": "permissive attribution nc",
    "gnu": "permissive attribution",
    "rail": "permissive attribution",
    "custom": "permissive attribution",
}
# The conversions that the texts themselves (or, for BY-SA 4.0, Creative Commons) name: from the first to the second.
_CONVERTS = {
    ("lgpl-2.1", "gpl-2.0"),
    ("lgpl-2.1", "gpl-3.0"),
    ("lgpl-3.0", "gpl-3.0"),
    ("lgpl-3.0", "agpl-3.0"),
    ("gpl-3.0", "agpl-3.0"),
    ("cc-by-sa-4.0", "gpl-3.0"),
}


@dataclass(frozen=True)
class _Side:
    role: str
    stated: str | None
    known: Licence | None
    page: str | None

    @classmethod
    def of(cls, role: str, stated: str | None, repo: str | None) -> _Side:
        page = None if repo is None else f"https://huggingface.co/{repo}"
        text = (stated or "").strip()
        known = known_licence(text)
        return cls(role, None if text.lower() in ("", "none", "unknown") else text, known, known and known.link or page)

    @property
    def slug(self) -> str | None:
        """For the card's ``license_name``; None where there is nothing to name."""
        text = self.known.id if self.known else (self.stated or "").lower()
        return None if text == "other" else re.sub(r"[^a-z0-9.]+", "-", text).strip("-.") or None

    @property
    def label(self) -> str:
        if self.known is not None:
            return f"the {self.role}'s {self.known.name}"
        return f"the {self.role}'s {self.stated}" if self.slug else f"the {self.role}'s licence"

    @property
    def doubt(self) -> str | None:
        """What cannot be told of this side."""
        if self.known is not None:
            return None
        if self.stated is None:
            return f"The {self.role} states no licence: without one, nothing allows a merge of it to be published."
        if self.slug is None:
            return (
                f'The {self.role} states its licence as "{self.stated}" without a name: its terms are not known here.'
            )
        return f'The {self.role}\'s licence, "{self.stated}", is not one whose terms are known here: read it.'


def _stricter(one: Licence, other: Licence) -> Licence | None:
    """The licence whose terms take in the other's, or None where neither's do."""
    if one.id == other.id:
        return one
    if one.kind == other.kind and one.rank != other.rank:
        return max(one, other, key=lambda licence: licence.rank)
    for outer, inner in ((one, other), (other, one)):
        if inner.kind in _TAKES[outer.kind].split() or (inner.id, outer.id) in _CONVERTS:
            return outer
    return None


def _contradict(one: Licence, other: Licence) -> bool:
    """Whether one demands that all be under itself and the other adds terms that it does not allow."""
    kinds = {one.kind, other.kind}
    if "nd" in kinds or not kinds & {"sa", "nc-sa", "gnu"} or _stricter(one, other) is not None:
        return False
    return kinds != {"gnu"}


def output_licence(
    target: str | None,
    source: str | None,
    *,
    target_repo: str | None = None,
    source_repo: str | None = None,
    target_family: str | None = None,
) -> OutputLicence:
    """What the merge of a source into a target carries.

    Args:
        target: The target's licence as its repo states it, None where it states none.
        source: The source's.
        target_repo: The target's Hub id, None for a local model.
        source_repo: The source's.
        target_family: The target's model type. It tells whether the target is of the source's family where its
            licence does not: Llama 2 may go into a Llama. A known licence decides before it, as models that only
            have Llama's architecture are no Llamas.
    """
    sides = (_Side.of("target", target, target_repo), _Side.of("source", source, source_repo))
    refusals = [
        f"The {s.role}'s licence, {s.known.name}, {s.known.forbids}." for s in sides if s.known and s.known.forbids
    ]
    unknown = [side.doubt for side in sides if side.doubt]
    duties = [duty for side in sides if side.known for duty in side.known.duties]
    into, out = (side.known for side in sides)
    if out is not None and out.forbids_as_source and out.family:
        same = into.family == out.family if into else (target_family or "").lower().startswith(out.family)
        if not same:
            refusals.append(f"The source's licence, {out.name}, {out.forbids_as_source}.")
        elif into is not out:
            duties.append(f"Make sure of the target: the source's licence, {out.name}, {out.forbids_as_source}.")
    first, second = sides
    if into is not None and out is not None:
        chosen = _stricter(into, out)
        if _contradict(into, out):
            refusals.append(f"The terms of {first.label} and of {second.label} cannot both be met in one model.")
        elif chosen is None and into.kind == out.kind == "gnu":
            unknown.append(
                f"Whether {into.name} and {out.name} can be combined depends on their versions, and on "
                '"or any later version".'
            )
        elif {into.id, out.id} == {"apache-2.0", "gpl-2.0"}:
            unknown.append('Apache-2.0 goes with GNU GPL 2.0 only where that was given with "or any later version".')
        if chosen is None:
            why = f"Neither {first.label} nor {second.label} takes in the other, so the terms of both apply."
        elif into is out:
            why = f"Both models state the {out.name}."
        elif into.kind == out.kind == "permissive":
            why = f"Both are permissive and both apply; {chosen.name} is stated, as it asks for more."
        else:
            more, less = (first, second) if chosen is into else (second, first)
            first_word = more.label[0].upper() + more.label[1:]
            why = f"{first_word} asks for more than {less.label}; the notices of both are kept."
    else:
        chosen = None
        unclear = [side.label for side in sides if side.known is None]
        why = f"It cannot be told what {' and '.join(unclear)} {'asks' if len(unclear) == 1 else 'ask'} for."
    links = _links(sides)
    single = first.slug if first.slug == second.slug else None
    if chosen is not None:
        single = chosen.id
    if single in _HUB_IDS:
        name = link = None
    elif single is not None:
        name = re.sub(r"[^a-z0-9.]+", "-", single)
        link = next((side.page for side in sides if side.slug == name and side.page), None)
    else:
        name = f"{first.slug}-and-{second.slug}" if first.slug and second.slug else "unknown"
        link = links[0][1] if links else None
    return OutputLicence(
        id=single if single in _HUB_IDS and single else "other",
        name=name,
        link=link,
        links=links,
        duties=tuple(dict.fromkeys(duties)),
        why=why,
        refusals=tuple(refusals),
        unknown=tuple(unknown),
        name_begins=next((side.known.name_begins for side in sides if side.known and side.known.name_begins), None),
    )


def _links(sides: tuple[_Side, _Side]) -> tuple[tuple[str, str], ...]:
    """What and where, the same text once."""
    found: dict[str, str] = {}
    for side in sides:
        if side.page is not None:
            found.setdefault(side.page, side.known.name if side.known else f"the {side.role}'s page")
    return tuple((what, url) for url, what in found.items())
