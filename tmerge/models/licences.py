"""What the merge of two models carries of their licences, and what stands against publishing it.

The terms themselves are in licence_terms.py. Nothing here is legal advice: the texts, which every answer links to,
decide.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
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
# From what asks for most: whose page a card's single link shows where no licence takes in the others.
_STRICTEST_FIRST = ("custom", "rail", "gnu", "nd", "nc-sa", "nc", "sa", "attribution", "permissive")
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
    def who(self) -> str:
        """Its role in a sentence: one of several, which has a number, goes without an article."""
        return self.role if re.search(r"\d", self.role) else f"the {self.role}"

    @property
    def label(self) -> str:
        if self.known is not None:
            return f"{self.who}'s {self.known.name}"
        return f"{self.who}'s {self.stated}" if self.slug else f"{self.who}'s licence"

    @property
    def doubt(self) -> str | None:
        """What cannot be told of this side."""
        if self.known is not None:
            return None
        if self.stated is None:
            return f"{_begun(self.who)} states no licence: without one, nothing allows a merge of it to be published."
        if self.slug is None:
            stated = f'{_begun(self.who)} states its licence as "{self.stated}" without a name'
            return f"{stated}: its terms are not known here."
        return f'{_begun(self.who)}\'s licence, "{self.stated}", is not one whose terms are known here: read it.'


def _begun(words: str) -> str:
    """At the beginning of a sentence."""
    return words[:1].upper() + words[1:]


def _stricter(first: Licence, second: Licence) -> Licence | None:
    """The licence whose terms take in the other's, or None where neither's do."""
    if first.id == second.id:
        return first
    if first.kind == second.kind and first.rank != second.rank:
        return max(first, second, key=lambda licence: licence.rank)
    for outer, inner in ((first, second), (second, first)):
        if inner.kind in _TAKES[outer.kind].split() or (inner.id, outer.id) in _CONVERTS:
            return outer
    return None


def _strictest(known: list[Licence]) -> Licence | None:
    """The licence whose terms take in those of all others, or None where no one's do."""
    return next((licence for licence in known if all(_stricter(licence, other) is licence for other in known)), None)


def _listed(words: list[str]) -> str:
    """A and B; A, B and C."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _contradict(first: Licence, second: Licence) -> bool:
    """Whether one demands that all be under itself and the other adds terms that it does not allow."""
    kinds = {first.kind, second.kind}
    if "nd" in kinds or not kinds & {"sa", "nc-sa", "gnu"} or _stricter(first, second) is not None:
        return False
    return kinds != {"gnu"}


def output_licence(
    target: str | None,
    source: str | None,
    *,
    target_repo: str | None = None,
    source_repo: str | None = None,
    target_family: str | None = None,
    source_base: tuple[str | None, str | None] | None = None,
    adapters: Mapping[str, tuple[str | None, str | None]] | None = None,
    sources: Mapping[str, tuple[str | None, str | None]] | None = None,
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
        source_base: Of a task vector: licence and Hub id of what the source was before its fine-tuning. Its weights
            go into the merge too, with a minus before them.
        adapters: Whose -> licence and Hub id of an adapter that is joined to a model, or carried alone; of one that
            states none, its base's is taken to hold.
        sources: Name -> licence and Hub id of several models that are carried; then the source is their base.
    """
    read = "source" if sources is None else "source_base"
    sides = [_Side.of("target", target, target_repo), _Side.of(read, source, source_repo)]
    for role, (stated, repo) in (sources or {}).items():
        further = _Side.of(role, stated, repo)
        if further.slug is None or further.slug not in [side.slug for side in sides[1:]]:
            sides.append(further)
    if source_base is not None and sources is None:
        base = _Side.of("source_base", *source_base)
        # A fine-tuned model mostly keeps its base's licence; then that is nothing further.
        if base.slug is None or base.slug != sides[1].slug:
            sides.append(base)
    for role, (stated, repo) in (adapters or {}).items():
        adapter = _Side.of(role, stated, repo)
        if adapter.stated is not None and adapter.slug not in [side.slug for side in sides]:
            sides.append(adapter)
    refusals = [
        f"{_begun(s.who)}'s licence, {s.known.name}, {s.known.forbids}." for s in sides if s.known and s.known.forbids
    ]
    unknown = [side.doubt for side in sides if side.doubt]
    duties = [duty for side in sides if side.known for duty in side.known.duties]
    into = sides[0].known
    for side in sides[1:]:
        out = side.known
        if out is None or not out.forbids_as_source or not out.family:
            continue
        same = into.family == out.family if into else (target_family or "").lower().startswith(out.family)
        if not same or (out.own_product_only and into is not None and into is not out):
            refusals.append(f"{_begun(side.who)}'s licence, {out.name}, {out.forbids_as_source}.")
        elif into is not out:
            duties.append(f"Make sure of the target: {side.who}'s licence, {out.name}, {out.forbids_as_source}.")
    for one_side, other_side in itertools.combinations([side for side in sides if side.known], 2):
        assert one_side.known is not None and other_side.known is not None
        if _contradict(one_side.known, other_side.known):
            refusals.append(f"The terms of {one_side.label} and of {other_side.label} cannot both be met in one model.")
        elif (
            _stricter(one_side.known, other_side.known) is None
            and one_side.known.kind == other_side.known.kind == "gnu"
        ):
            unknown.append(
                f"Whether {one_side.known.name} and {other_side.known.name} can be combined depends on their versions, "
                'and on "or any later version".'
            )
        elif {one_side.known.id, other_side.known.id} == {"apache-2.0", "gpl-2.0"}:
            unknown.append('Apache-2.0 goes with GNU GPL 2.0 only where that was given with "or any later version".')
    known = [side.known for side in sides if side.known is not None]
    chosen = _strictest(known) if len(known) == len(sides) else None
    why = _why(sides, known, chosen)
    links = _links(sides)
    slugs = [side.slug for side in sides]
    single = slugs[0] if len(set(slugs)) == 1 else None
    if chosen is not None:
        single = chosen.id
    if single in _HUB_IDS:
        name = link = None
    elif single is not None:
        name = re.sub(r"[^a-z0-9.]+", "-", single)
        link = next((side.page for side in sides if side.slug == name and side.page), None)
    else:
        name = "unknown" if None in slugs else "-and-".join(dict.fromkeys(map(str, slugs)))
        # What is not known here has to be read first: the link leads there, or nowhere.
        unclear = [side for side in sides if side.known is None]
        first = min(unclear or sides, key=lambda side: _STRICTEST_FIRST.index(side.known.kind) if side.known else 0)
        link = next((side.page for side in [first, *unclear] if side.page), None)
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


def _why(sides: list[_Side], known: list[Licence], chosen: Licence | None) -> str:
    """How the licence follows from those of the models, in a sentence."""
    labels = [side.label for side in sides]
    two = len(sides) == 2
    if len(known) < len(sides):
        unclear = [side.label for side in sides if side.known is None]
        return f"It cannot be told what {_listed(unclear)} {'asks' if len(unclear) == 1 else 'ask'} for."
    if chosen is None and two:
        return f"Neither {labels[0]} nor {labels[1]} takes in the other, so the terms of both apply."
    if chosen is None:
        return f"None of {_listed(labels)} takes in the others, so the terms of all apply."
    both = "both" if two else "all"
    if all(licence is chosen for licence in known):
        return f"{both.capitalize()} models state the {chosen.name}."
    if all(licence.kind == "permissive" for licence in known):
        return f"{both.capitalize()} are permissive and {both} apply; {chosen.name} is stated, as it asks for more."
    more = next(side.label for side in sides if side.known is chosen)
    less = _listed([side.label for side in sides if side.known is not chosen])
    return f"{more[0].upper()}{more[1:]} asks for more than {less}; the notices of {both} are kept."


def _links(sides: list[_Side]) -> tuple[tuple[str, str], ...]:
    """What and where, the same text once."""
    names: dict[str, str] = {}
    for side in sides:
        if side.page is not None:
            names.setdefault(side.page, side.known.name if side.known else f"{side.who}'s page")
    return tuple((what, url) for url, what in names.items())
