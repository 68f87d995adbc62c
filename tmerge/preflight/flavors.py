"""The smallest machine of Hugging Face Jobs that a run fits: ``tmerge merge --remote FLAVOR``."""

from __future__ import annotations

import dataclasses

import psutil
import torch

from tmerge.models import ModelReference
from tmerge.preflight.check import Check
from tmerge.preflight.counts import TextCounts
from tmerge.preflight.document import FittingFlavor, RemoteFlavors
from tmerge.preflight.hardware import Flavor, Offer, offered
from tmerge.preflight.holding import Place
from tmerge.preflight.memory import peak_bytes
from tmerge.recipe import Recipe, model_references

__all__ = ["with_flavors"]


def with_flavors(found: Check, recipe: Recipe) -> Check:
    """What `check` found, and where on the Hub's hardware the run fits.

    The Hub is asked for its hardware where it was asked for a model; a check of local models stays on this machine.

    Args:
        found: The check's result.
        recipe: That was checked.
    """
    named = [reference for key, reference in model_references(recipe).items() if key != "plan"]
    on_the_hub = any(ModelReference.parse(reference).kind == "hub" for reference in named)
    return dataclasses.replace(found, flavors=smallest_flavors(found, recipe, offered(ask=on_the_hub)))


def smallest_flavors(found: Check, recipe: Recipe, offer: Offer) -> RemoteFlavors:
    """The first of what is offered that a run fits, and the first of those with cards.

    A process runs on each card and holds the whole target, so several cards hold no more than one does. The estimate
    does not say what of a run's peak is on the card and what beside it: all of it has to fit either.
    """
    alone = psutil.Process().memory_info().rss
    kind = recipe.device.partition(":")[0]
    fitting = [
        flavor
        for flavor in offer.flavors
        if kind != ("cuda" if not flavor.cards else "cpu") and _fits(found, recipe, flavor, alone)
    ]
    carded = [flavor for flavor in fitting if flavor.cards]
    return RemoteFlavors(
        smallest=_fitting(fitting[0]) if fitting else None,
        with_card=_fitting(carded[0]) if carded else None,
        cards_asked=kind != "cpu",
        source=offer.source,
        read_on=offer.read_on,
        is_live=offer.is_live,
    )


def _fits(found: Check, recipe: Recipe, flavor: Flavor, alone: int) -> bool:
    """Whether a flavor has the memory and the disk.

    Args:
        found: The check's result.
        recipe: That was checked.
        flavor: The flavor.
        alone: Bytes of a process that does nothing yet.
    """
    device = torch.device("cuda" if flavor.cards else "cpu")
    processes = max(flavor.cards, 1)
    if not flavor.cards and recipe.dtype == "auto":
        # Which instructions its processor has is not said, and one without them holds weights in float32.
        recipe = recipe.model_copy(update={"dtype": "float32"})
    free = flavor.memory // processes - alone
    place = Place(device, min(free, flavor.card_memory) if flavor.cards else free, flavor.processors // processes)
    models = (found.target, found.source, found.base)
    layouts = (found.target_layout, found.source_layout)
    several = [relative.facts for relative in found.sources if relative.facts.adapter is None]
    # What is in this machine's cache has to be fetched there.
    fetched = {facts.commit: facts.weight_bytes for facts in (*models, *several) if facts is not None}
    disk = found.estimate.disk_bytes + sum(fetched.values())
    needed = peak_bytes(recipe, models, layouts, found.projections, TextCounts.of(recipe), place, several)
    return place.free is not None and needed <= place.free and disk <= flavor.disk


def _fitting(flavor: Flavor) -> FittingFlavor:
    return FittingFlavor(
        name=flavor.name,
        price_class=flavor.price_class,
        dollars_an_hour=None if flavor.dollars is None else round(flavor.dollars, 4),
        memory_bytes=flavor.memory,
        cards=flavor.cards,
        card_bytes=flavor.card_memory,
    )
