"""Which machine of Hugging Face Jobs a run fits, from the sizes of models that nobody has to download."""

import html
from dataclasses import replace

import pytest

from tests.pico import save_pico
from tmerge.preflight import flavors
from tmerge.preflight.check import check
from tmerge.preflight.flavors import smallest_flavors, with_flavors
from tmerge.preflight.hardware import Flavor, Offer, offered
from tmerge.recipe import Recipe

GB = 10**9


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # Of twenty layers, as a block of two would be half of a model.
    target, source = (save_pico(family, folder / family, layers=20) for family in ("llama", "qwen2"))
    recipe = Recipe(target=str(target), source=str(source))
    return recipe, check(recipe)


@pytest.fixture(autouse=True)
def small_process(monkeypatch):
    """A process that takes a gigabyte before it begins, whatever the tests before this one have left in it."""

    class Process:
        def memory_info(self):
            return type("Memory", (), {"rss": GB})

    monkeypatch.setattr(flavors.psutil, "Process", Process)


def of_size(found, target, source):
    """As `check` would find models of so many parameters."""
    models = {"target": (found.target, target), "source": (found.source, source)}
    sized = {
        role: replace(facts, parameters=int(parameters), weight_bytes=2 * int(parameters), commit=role)
        for role, (facts, parameters) in models.items()
    }
    return replace(found, **sized)


def named(pair, target=1e9, source=1e9, offer=None, **keys):
    recipe, found = pair
    recipe = Recipe.from_mapping(recipe.model_dump(mode="json") | keys)
    fitting = smallest_flavors(of_size(found, target, source), recipe, offer or offered(ask=False))
    return fitting, *(None if one is None else one.name for one in (fitting.smallest, fitting.with_card))


def test_larger_models_need_larger_machines_and_the_target_counts_whole(pair):
    assert named(pair, 1e8, 1e8)[1:] == ("cpu-basic", "t4-small")
    # 20 GB of float32 do not fit 16, and 10 GB of bfloat16 fit a small card.
    assert named(pair, 5e9, 1e8)[1:] == ("cpu-upgrade", "t4-small")
    assert named(pair, 30e9, 1e8)[2] == "a100-large"
    # Neither two cards of 96 GB nor four of 80 hold more than one of them does: each process holds all of the target.
    assert named(pair, 40e9, 1e8)[2] == "h200"


def test_a_source_by_blocks_needs_no_larger_machine(pair):
    assert named(pair, 1e9, 20e9, memory="resident")[2] != named(pair, 1e9, 20e9, memory="blocks")[2] == "t4-small"


def test_the_recipes_device_is_kept_to(pair):
    assert named(pair, 1e8, 1e8, device="cpu")[1:] == ("cpu-basic", None)


def test_nothing_fits_is_a_line(pair):
    fitting, smallest, with_card = named(pair, 1e12, 1e9)
    assert smallest is with_card is None
    assert fitting.words.startswith("none of Hugging Face Jobs' flavors has the memory and the disk for it, as ")


def test_disk_counts_too(pair):
    roomy = Flavor("roomy", 4, 100 * GB, 100 * GB)
    crammed = replace(roomy, name="crammed", disk=5 * GB)
    offer = Offer((crammed, roomy), "here", "2026-01-01", False)
    assert named(pair, 1e9, 3e9, offer)[1] == "roomy"


def test_several_cards_share_the_machine_and_not_the_card(pair):
    one = Flavor("one", 8, 30 * GB, 400 * GB, 1, 24 * GB)
    four = replace(one, name="four", cards=4)
    alone = (offer_of(four, replace(four, name="wide", memory=120 * GB)), ("wide", "wide"))
    assert named(pair, 4e9, 1e8, alone[0])[1:] == alone[1]
    assert named(pair, 4e9, 1e8, offer_of(one, four))[1:] == ("one", "one")
    assert named(pair, 14e9, 1e8, offer_of(replace(four, memory=900 * GB)))[1:] == (None, None)


def offer_of(*flavors):
    return Offer(flavors, "here", "2026-01-01", False)


def test_no_price_is_made_up(pair):
    fitting, *_ = named(pair, 1e9, 1e9, offer_of(Flavor("one", 8, 60 * GB, 400 * GB, 1, 24 * GB)))
    assert "$" not in fitting.words and "one (small card)" in fitting.words


def test_the_table_names_the_hubs_own_flavors_and_says_its_date():
    from huggingface_hub import JobHardware

    offer = offered(ask=False)
    assert {flavor.name for flavor in offer.flavors} == {hardware.value for hardware in JobHardware}
    assert all(flavor.cards * 1.0 == int(bool(flavor.card_memory)) or "x" in flavor.name for flavor in offer.flavors)
    by_name = {flavor.name: flavor for flavor in offer.flavors}
    assert (by_name["l4x4"].cards, by_name["l4x4"].card_memory) == (4, 24 * GB)
    assert by_name["l4x4"].price_class == "4 of a small card" and by_name["h200"].price_class == "largest card"
    assert [flavor.dollars for flavor in offer.flavors] == sorted(flavor.dollars for flavor in offer.flavors)


def test_a_check_has_it_in_words_and_in_json(pair):
    recipe, found = pair
    assert found.to_dict()["flavors"] is None
    shown = with_flavors(found, recipe).document().flavors
    assert shown.words == (
        "the smallest flavor of Hugging Face Jobs that it fits: cpu-basic (CPU, $0.01 an hour); with a card t4-small "
        "(small card, $0.40 an hour); as huggingface.co/docs/hub/jobs-pricing listed them on 2026-11-29"
    )


def test_the_app_shows_the_same_words(pair):
    cards = pytest.importorskip("tmerge.ui.parts.cards", reason="the app's extra is not installed")
    recipe, found = pair
    shown = with_flavors(found, recipe).document()
    assert shown.flavors.words in html.unescape(cards.check_cards(shown, None))
    assert "flavor of" not in cards.check_cards(found.document(), None)
