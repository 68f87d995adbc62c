"""What two licences make of a merge's: the stricter where it is known, named duties, and refusals."""

from __future__ import annotations

import itertools

import pytest

from tmerge.models.licence_terms import known_licence
from tmerge.models.licences import output_licence

KNOWN = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "gpl-3.0", "llama3.2", "gemma", "qwen")


@pytest.mark.parametrize(
    ("target", "source", "stated", "words"),
    [
        ("apache-2.0", "apache-2.0", "apache-2.0", "NOTICE file"),
        ("mit", "apache-2.0", "apache-2.0", "MIT License"),
        ("apache-2.0", "gemma", "gemma", "Gemma is provided under and subject to the Gemma Terms of Use"),
        ("apache-2.0", "llama3.2", "llama3.2", 'Its name must begin with "Llama"'),
        ("apache-2.0", "llama3", "llama3", 'Display "Built with Meta Llama 3"'),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0", "Non-commercial use only"),
        ("cc-by-sa-4.0", "mit", "cc-by-sa-4.0", "Share it under the same terms"),
        ("gpl-3.0", "apache-2.0", "gpl-3.0", "Publish it under the GNU GPL 3.0"),
        ("apache-2.0", "qwen", "other", 'Display "Built with Qwen"'),
    ],
)
def test_the_stricter_is_stated_with_its_duties(target, source, stated, words):
    found = output_licence(target, source, target_repo="user/a", source_repo="user/b")
    assert found.id == stated and not found.unknown
    assert any(words in duty for duty in found.duties), found.duties
    assert (found.name is None) == (stated != "other")
    assert all(url.startswith("http") for _, url in found.links) and found.links
    # Which of the two is changed and which is read makes no difference to what is stated.
    assert output_licence(source, target).id == stated


@pytest.mark.parametrize(("target", "source"), list(itertools.product(KNOWN, KNOWN)))
def test_no_duty_of_either_is_lost(target, source):
    found = output_licence(target, source, target_repo="user/a", source_repo="user/b")
    for licence in (known_licence(target), known_licence(source)):
        assert licence is not None and set(licence.duties) <= set(found.duties)
    assert len(set(found.duties)) == len(found.duties)


@pytest.mark.parametrize(
    ("target", "source", "family", "words"),
    [
        ("apache-2.0", "llama2", "mistral", "lets it improve no other large language model"),
        ("apache-2.0", "llama3", "qwen2", "lets it improve no other large language model"),
        ("mit", "tongyi-qianwen", "llama", "lets it improve no other large language model"),
        ("apache-2.0", "cc-by-nc-nd-4.0", "llama", "does not allow an adapted version"),
        ("cc-by-nd-4.0", "apache-2.0", "llama", "does not allow an adapted version"),
        ("cc-by-sa-4.0", "cc-by-nc-4.0", "llama", "cannot both be met"),
    ],
)
def test_terms_that_forbid_it_are_said(target, source, family, words):
    found = output_licence(target, source, target_family=family)
    assert any(words in refusal for refusal in found.refusals), found


def test_a_family_may_improve_itself():
    assert not output_licence("llama3", "llama3", target_family="llama").refusals
    assert not output_licence("llama2", "llama2", target_family="llama").refusals
    # A Mistral that only has Llama's layout is no Llama.
    assert output_licence("apache-2.0", "llama2", target_family="llama").refusals


@pytest.mark.parametrize(
    ("target", "source", "words"),
    [
        (None, "apache-2.0", "states no licence"),
        ("apache-2.0", None, "states no licence"),
        ("apache-2.0", "our-own-licence", "is not one whose terms are known here"),
        ("other", "apache-2.0", "without a name"),
        ("unknown", "mit", "states no licence"),
    ],
)
def test_what_is_not_known_is_other_with_a_link(target, source, words):
    found = output_licence(target, source, target_repo="user/a", source_repo="user/b")
    assert found.id == "other" and found.name and any(words in line for line in found.unknown)
    assert found.links and all(url.startswith("http") for _, url in found.links)


@pytest.mark.parametrize(
    ("said", "id"),
    [
        ("Apache 2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("GPL-3.0", "gpl-3.0"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2"),
        ("qwen-research", "qwen-research"),
        ("Gemma", "gemma"),
    ],
)
def test_spellings(said, id):
    licence = known_licence(said)
    assert licence is not None and licence.id == id


def test_names_that_have_to_begin_so():
    assert output_licence("apache-2.0", "llama3.1").name_begins == "Llama"
    assert output_licence("llama3", "apache-2.0").name_begins == "Llama 3"
    assert output_licence("apache-2.0", "gemma").name_begins is None


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("llama3.1", "llama2"),
        ("llama3.1", "llama3"),
        ("llama3.3", "llama3"),
        ("llama4", "llama3"),
        ("llama3", "llama2"),
        ("llama2", "llama3"),
    ],
)
def test_an_early_llama_may_improve_none_but_itself(target, source):
    (refusal,) = output_licence(target, source, target_family="llama").refusals
    assert "lets it improve no other large language model" in refusal and known_licence(source).name in refusal


def test_a_llama_that_is_not_known_is_left_to_be_made_sure_of_and_later_ones_forbid_nothing():
    unclear = output_licence(None, "llama3", target_family="llama")
    assert not unclear.refusals and any("Make sure of the target" in duty for duty in unclear.duties)
    # From version 3.1 on the text asks for the name instead.
    assert not output_licence("llama3", "llama3.1", target_family="llama").refusals
    assert not output_licence("llama3.3", "llama3.1", target_family="llama").refusals


@pytest.mark.parametrize(
    ("target", "source", "link"),
    [
        ("apache-2.0", "our-own-licence", "https://huggingface.co/user/b"),
        ("our-own-licence", "apache-2.0", "https://huggingface.co/user/a"),
        ("apache-2.0", None, "https://huggingface.co/user/b"),
        ("apache-2.0", "other", "https://huggingface.co/user/b"),
        ("gpl-3.0", "qwen", known_licence("qwen").link),
        ("cc-by-nc-4.0", "gemma", known_licence("gemma").link),
        ("gemma", "cc-by-nc-4.0", known_licence("gemma").link),
    ],
)
def test_the_one_link_is_to_what_is_unclear_or_stricter(target, source, link):
    found = output_licence(target, source, target_repo="user/a", source_repo="user/b")
    assert found.id == "other" and found.link == link


def test_what_has_no_page_is_not_linked_to_another_ones_terms():
    found = output_licence("apache-2.0", "our-own-licence", target_repo="user/a")
    assert found.link is None and found.links == (("Apache License 2.0", known_licence("apache-2.0").link),)


def test_what_the_source_was_before_its_fine_tuning_has_terms_too():
    def of(source, base):
        return output_licence(
            "apache-2.0", source, target_repo="user/a", source_repo="user/b", source_base=(base, "user/c")
        )

    plain = output_licence("apache-2.0", "mit", target_repo="user/a", source_repo="user/b")
    assert of("mit", "mit") == plain
    gemma = of("mit", "gemma")
    assert gemma.id == "gemma" and set(known_licence("gemma").duties) <= set(gemma.duties)
    assert "the source_base's Gemma Terms of Use" in gemma.why.replace("The source", "the source")
    assert any("The source_base's licence, Llama 2" in line for line in of("mit", "llama2").refusals)
    unclear = of("mit", None)
    assert unclear.id == "other" and unclear.link == "https://huggingface.co/user/c"
    assert any(line.startswith("The source_base states no licence") for line in unclear.unknown)
    three = of("gpl-3.0", "cc-by-nc-4.0")
    assert three.name == "apache-2.0-and-gpl-3.0-and-cc-by-nc-4.0" and "None of the target's" in three.why
    assert any("cannot both be met" in line for line in three.refusals)
    assert of("mit", "bsd-3-clause").why.startswith("All are permissive")
