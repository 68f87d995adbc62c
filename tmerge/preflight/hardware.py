"""The hardware of Hugging Face Jobs: as the Hub lists it now, or as its documentation did on a day.

A price is only ever one that was read: from the Hub, or from the page that the table below was taken from.
"""

from __future__ import annotations

import datetime
import functools
import re
import time
from dataclasses import dataclass

from huggingface_hub import JobHardwareInfo, constants

from tmerge.hub_client import hub_client

__all__ = ["CARDS", "Flavor", "Offer", "offered"]

_PAGE, _READ_ON = "huggingface.co/docs/hub/jobs-pricing", "2026-11-29"

CARDS = re.compile(r"x([0-9]+)$")
"""How a flavor's name ends that has so many cards: l4x4, a10g-largex2."""

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([GT])B")
_UNITS = {"G": 10**9, "T": 10**12}
_HOURLY = {"second": 3600, "minute": 60, "hour": 1}
# An app lives for long: what the Hub said counts for so many seconds.
_KEPT_SECONDS = 3600
# Of one card's memory in GB, the names of the classes that it lies in.
_CLASSES = ((24, "small card"), (48, "middle card"), (96, "large card"))


@dataclass(frozen=True)
class Flavor:
    """A machine of Hugging Face Jobs.

    Attributes:
        name: As ``--remote`` takes it.
        processors: Virtual ones.
        memory: Of the machine, in bytes.
        disk: That goes with the job, in bytes.
        cards: How many; 0 of a processor's.
        card_memory: Of each, in bytes.
        dollars: An hour, as they were read; None where they were not.
    """

    name: str
    processors: int
    memory: int
    disk: int
    cards: int = 0
    card_memory: int = 0
    dollars: float | None = None

    @property
    def price_class(self) -> str:
        """In words, for where no price is known."""
        if not self.cards:
            return "CPU"
        kind = next((words for most, words in _CLASSES if self.card_memory <= most * 10**9), "largest card")
        return kind if self.cards == 1 else f"{self.cards} of a {kind}"


@dataclass(frozen=True)
class Offer:
    """What there is, the cheapest first; where a price is missing, the smallest.

    Attributes:
        flavors: All that are known.
        source: Where they were read: the Hub's address, or a page.
        read_on: Date (ISO 8601).
        is_live: Whether the Hub was asked, and has answered.
    """

    flavors: tuple[Flavor, ...]
    source: str
    read_on: str
    is_live: bool


def offered(*, ask: bool) -> Offer:
    """The flavors.

    Args:
        ask: Whether the Hub may be asked; where it does not answer, or not in words that are known, the table counts.
    """
    if ask and not constants.HF_HUB_OFFLINE:
        try:
            return _listed(constants.ENDPOINT, int(time.monotonic() // _KEPT_SECONDS))
        # No answer, a refusal, or one that this client cannot read: a check is not to fail of what it only adds.
        except Exception:  # noqa: BLE001
            pass
    return Offer(_in_order(_TABLE), _PAGE, _READ_ON, False)


@functools.lru_cache(maxsize=1)
def _listed(endpoint: str, hour: int) -> Offer:
    flavors = [_flavor(hardware) for hardware in hub_client(endpoint).list_jobs_hardware()]
    if not flavors:
        raise ValueError("the Hub lists no hardware")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Offer(_in_order(flavors), endpoint.rpartition("//")[2], today, True)


def _flavor(hardware: JobHardwareInfo) -> Flavor:
    """Of the Hub's words.

    Raises:
        ValueError: One of them is not a size or a number.
    """
    hourly = _HOURLY.get(hardware.unit_label)
    dollars = None if hourly is None or hardware.unit_cost_usd is None else hourly * hardware.unit_cost_usd
    accelerator = hardware.accelerator
    cards = 0 if accelerator is None else int(accelerator.quantity)
    return Flavor(
        hardware.name,
        int(hardware.cpu.split()[0]),
        _bytes(hardware.ram),
        _bytes(hardware.ephemeral_storage),
        cards,
        # The Hub lists the memory of all cards together.
        0 if accelerator is None else _bytes(accelerator.vram) // cards,
        dollars,
    )


def _bytes(words: str) -> int:
    size = _SIZE.fullmatch(words.strip())
    if size is None:
        raise ValueError(f"{words!r} is no size")
    return int(float(size[1]) * _UNITS[size[2]])


def _in_order(flavors: list[Flavor]) -> tuple[Flavor, ...]:
    priced = all(flavor.dollars is not None for flavor in flavors)
    return tuple(
        sorted(
            flavors,
            key=lambda flavor: (
                flavor.dollars if priced and flavor.dollars is not None else 0.0,
                flavor.cards,
                flavor.card_memory,
                flavor.memory,
            ),
        )
    )


def _of(name: str, processors: int, memory: int, card_memory: int, disk: int, dollars: float) -> Flavor:
    """A line of the page, which has GB, and the memory of all cards together."""
    cards = 0 if not card_memory else int(found[1]) if (found := CARDS.search(name)) else 1
    each = card_memory * 10**9 // cards if cards else 0
    return Flavor(name, processors, memory * 10**9, disk * 10**9, cards, each, dollars)


# As the page said on that day (huggingface/hub-docs at 0b8c07f8, docs/hub/jobs-pricing.md): name, vCPU, memory, memory
# of all cards and disk in GB, dollars an hour.
_TABLE = [
    _of("cpu-basic", 2, 16, 0, 50, 0.01),
    _of("cpu-upgrade", 8, 32, 0, 50, 0.03),
    _of("cpu-xl", 16, 124, 0, 1000, 1.00),
    _of("cpu-performance", 32, 256, 0, 1024, 1.90),
    _of("t4-small", 4, 15, 16, 50, 0.40),
    _of("t4-medium", 8, 30, 16, 100, 0.60),
    _of("l4x1", 8, 30, 24, 400, 0.80),
    _of("l4x4", 48, 186, 96, 3200, 3.80),
    _of("l40sx1", 8, 62, 48, 380, 1.80),
    _of("l40sx4", 48, 382, 192, 3200, 8.30),
    _of("l40sx8", 192, 1534, 384, 6500, 23.50),
    _of("a10g-small", 4, 15, 24, 110, 1.00),
    _of("a10g-large", 12, 46, 24, 200, 1.50),
    _of("a10g-largex2", 24, 92, 48, 1000, 3.00),
    _of("a10g-largex4", 48, 184, 96, 2000, 5.00),
    _of("a100-large", 12, 142, 80, 1000, 2.50),
    _of("a100x4", 48, 568, 320, 4000, 10.00),
    _of("a100x8", 96, 1136, 640, 8000, 20.00),
    _of("h200", 23, 256, 141, 3000, 5.00),
    _of("h200x2", 46, 512, 282, 6000, 10.00),
    _of("h200x4", 92, 1024, 564, 12000, 20.00),
    _of("h200x8", 184, 2048, 1128, 24000, 40.00),
    _of("rtx-pro-6000", 23, 256, 96, 475, 2.75),
    _of("rtx-pro-6000x2", 46, 512, 192, 950, 5.50),
    _of("rtx-pro-6000x4", 92, 1024, 384, 1900, 11.00),
    _of("rtx-pro-6000x8", 184, 2048, 768, 3800, 22.00),
]
