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
    assert not output_licence("llama3", "llama2", target_family="llama").refusals
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
