"""The licences that model repos state on the Hub, each with the terms that bear on publishing a merge.

It names terms; it does not interpret them and is not legal advice. The texts, which every entry links to, decide. A
term is stated here where its text says so; a licence that is not in the table is said to be not known, and what a
known one asks beyond what is named here is for its reader to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Licence", "known_licence", "known_licences"]

Kind = Literal["permissive", "attribution", "nc", "sa", "nc-sa", "nd", "gnu", "rail", "custom"]


@dataclass(frozen=True)
class Licence:
    """What is known of a licence.

    Attributes:
        id: The Hub's identifier, or the ``license_name`` of one that the Hub lists as ``other``.
        name: In words.
        kind: What sort of terms it has; sorts are ordered by what one asks beyond another.
        rank: Order among the licences of a kind, from the one that asks least. Equal ranks are not comparable.
        link: The canonical text, where there is one.
        duties: What the publisher of a derived model has to do, a sentence each.
        forbids: Why no derived model may be published, whichever the licensed model's role ("the licence ...").
        forbids_as_source: Why its weights may not go into a model of another family ("the licence ...").
        own_product_only: That `forbids_as_source` also holds for other products of the family, which a licence of
            theirs tells.
        name_begins: What the name of a derived model has to begin with.
        family: Whose model it is for, where it is one maker's: a prefix of those models' types.
    """

    id: str
    name: str
    kind: Kind
    rank: int = 0
    link: str | None = None
    duties: tuple[str, ...] = ()
    forbids: str | None = None
    forbids_as_source: str | None = None
    own_product_only: bool = False
    name_begins: str | None = None
    family: str | None = None


def _permissive() -> Iterator[Licence]:
    rows = (
        ("unlicense", "The Unlicense", "https://unlicense.org/"),
        ("wtfpl", "WTFPL", "http://www.wtfpl.net/txt/copying/"),
        ("cc0-1.0", "Creative Commons Zero 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
        ("isc", "ISC License", "https://opensource.org/license/isc-license-txt"),
        ("mit", "MIT License", "https://opensource.org/license/mit"),
        ("bsd-2-clause", "BSD 2-Clause License", "https://opensource.org/license/bsd-2-clause"),
        ("bsd", "BSD licence (version not stated)", None),
        ("bsd-3-clause", "BSD 3-Clause License", "https://opensource.org/license/bsd-3-clause"),
        ("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    )
    for rank, (key, name, link) in enumerate(rows):
        duties: tuple[str, ...] = (f"Keep the copyright notice and the text of the {name}.",)
        if key == "apache-2.0":
            duties = (f"Pass on the {name}, keep its notices (a NOTICE file too) and say which files were changed.",)
        yield Licence(key, name, "permissive", rank, link, duties if rank > 2 else ())


def _creative_commons() -> Iterator[Licence]:
    rows: tuple[tuple[str, Kind, str, str], ...] = (
        ("by", "attribution", "Attribution", "2.0 2.5 3.0 4.0"),
        ("by-sa", "sa", "Attribution-ShareAlike", "3.0 4.0"),
        ("by-nc", "nc", "Attribution-NonCommercial", "2.0 3.0 4.0"),
        ("by-nc-sa", "nc-sa", "Attribution-NonCommercial-ShareAlike", "2.0 3.0 4.0"),
        ("by-nd", "nd", "Attribution-NoDerivatives", "4.0"),
        ("by-nc-nd", "nd", "Attribution-NonCommercial-NoDerivatives", "3.0 4.0"),
    )
    for code, kind, words, versions in rows:
        for version in versions.split():
            name = f"Creative Commons {words} {version}"
            link = f"https://creativecommons.org/licenses/{code}/{version}/"
            duties = [f"Give its authors credit, link to {name} and say that the model was changed."]
            if "nc" in code:
                duties.append(f"Non-commercial use only ({name}).")
            if code.endswith("sa"):
                duties.append(f"Share it under the same terms ({name}, or a later version of it).")
            # A later version of the same terms may be used for what is adapted from an earlier one.
            rank = 0 if kind == "nd" else round(10 * float(version))
            forbids = "does not allow an adapted version to be shared" if kind == "nd" else None
            yield Licence(f"cc-{code}-{version}", name, kind, rank, link, tuple(duties), forbids)


def _gnu() -> Iterator[Licence]:
    page = "https://www.gnu.org/licenses/"
    for key, name, link in (
        ("lgpl", "GNU LGPL (version not stated)", "licenses.html"),
        ("lgpl-2.1", "GNU LGPL 2.1", "old-licenses/lgpl-2.1.html"),
        ("lgpl-3.0", "GNU LGPL 3.0", "lgpl-3.0.html"),
        ("gpl", "GNU GPL (version not stated)", "licenses.html"),
        ("gpl-2.0", "GNU GPL 2.0", "old-licenses/gpl-2.0.html"),
        ("gpl-3.0", "GNU GPL 3.0", "gpl-3.0.html"),
        ("agpl-3.0", "GNU AGPL 3.0", "agpl-3.0.html"),
    ):
        duties = [f"Publish it under the {name}, with its text, its source and a notice of the changes."]
        if key == "agpl-3.0":
            duties.append(f"Offer the source to those who use it over a network, too ({name}).")
        yield Licence(key, name, "gnu", link=page + link, duties=tuple(duties))


def _rail() -> Iterator[Licence]:
    space = "https://huggingface.co/spaces/"
    for key, name, link in (
        ("openrail", "OpenRAIL licence (variant not stated)", None),
        ("openrail++", "CreativeML Open RAIL++-M", None),
        ("creativeml-openrail-m", "CreativeML OpenRAIL-M", space + "CompVis/stable-diffusion-license"),
        (
            "bigscience-openrail-m",
            "BigScience OpenRAIL-M",
            "https://bigscience.huggingface.co/blog/bigscience-openrail-m",
        ),
        ("bigscience-bloom-rail-1.0", "BigScience RAIL 1.0", space + "bigscience/license"),
        ("bigcode-openrail-m", "BigCode OpenRAIL-M v1", space + "bigcode/bigcode-model-license-agreement"),
        (
            "deepseek",
            "DeepSeek License Agreement 1.0",
            "https://github.com/deepseek-ai/DeepSeek-V3/blob/main/LICENSE-MODEL",
        ),
    ):
        yield Licence(
            key,
            name,
            "rail",
            link=link,
            duties=(
                f"Bind those who get it to the use restrictions of the {name}.",
                f"Pass on the {name}, keep its notices and say which files were changed.",
            ),
        )


_NOTICE = 'Keep in a "Notice" text file: "{}"'
_COPY = "Pass on a copy of the {} and say which files were changed."


def _llama() -> Iterator[Licence]:
    for version, page in (
        ("2", "llama2"),
        ("3", "llama3"),
        ("3.1", "llama3_1"),
        ("3.2", "llama3_2"),
        ("3.3", "llama3_3"),
        ("4", "llama4"),
    ):
        product = "Meta Llama 3" if version == "3" else f"Llama {version}"
        title = "LLAMA 2" if version == "2" else product
        sign = "(c)" if version == "2" else "©"
        name = f"{product} Community License"
        duties = [
            f"Pass on a copy of the {name}.",
            _NOTICE.format(
                f"{product} is licensed under the {title} Community License, Copyright {sign} Meta Platforms, Inc. "
                "All Rights Reserved."
            ),
            f"Keep to the Acceptable Use Policy of {product}; above 700 million monthly users Meta has to be asked.",
        ]
        mark = "Llama 3" if version == "3" else "Llama"
        if version != "2":
            duties += [
                f'Its name must begin with "{mark}".',
                f'Display "Built with {product if version == "3" else mark}" prominently.',
            ]
        only = f"lets it improve no other large language model than {product} and what derives from it"
        yield Licence(
            f"llama{version}",
            name,
            "custom",
            link=f"https://www.llama.com/{page}/license/",
            duties=tuple(duties),
            # Dropped from version 3.1 on, which ask for the name instead.
            forbids_as_source=only if version in ("2", "3") else None,
            own_product_only=True,
            name_begins=None if version == "2" else mark,
            family="llama",
        )


def _makers() -> Iterator[Licence]:
    built = 'Display "Built with Qwen" or "Improved using Qwen" prominently in its documentation.'
    for key, title, repo in (
        ("qwen", "Qwen LICENSE AGREEMENT", "Qwen2.5-72B-Instruct"),
        ("qwen-research", "Qwen RESEARCH LICENSE AGREEMENT", "Qwen2.5-3B-Instruct"),
        ("tongyi-qianwen", "Tongyi Qianwen LICENSE AGREEMENT", "Qwen-7B"),
        ("tongyi-qianwen-research", "Tongyi Qianwen RESEARCH LICENSE AGREEMENT", "Qwen-1_8B"),
    ):
        product = title.split(" LIC")[0].split(" RES")[0]
        old, research = product != "Qwen", "research" in key
        only = "lets it improve no other large language model than Tongyi Qianwen and what derives from it"
        duties = [
            _COPY.format(title),
            _NOTICE.format(
                f"{product} is licensed under the {title}, Copyright (c) Alibaba Cloud. All Rights Reserved."
            ),
            f"Research and evaluation only, no commercial use ({title})."
            if research
            else f"Above 100 million monthly users of a commercial product Alibaba Cloud has to be asked ({title}).",
        ]
        yield Licence(
            key,
            title,
            "custom",
            link=f"https://huggingface.co/Qwen/{repo}/blob/main/LICENSE",
            duties=tuple(duties if old else [*duties, built]),
            forbids_as_source=only if old else None,
            family="qwen",
        )
    yield Licence(
        "gemma",
        "Gemma Terms of Use",
        "custom",
        link="https://ai.google.dev/gemma/terms",
        family="gemma",
        duties=(
            "Bind those who get it to the use restrictions of the Gemma Terms of Use (section 3.2), and tell them.",
            _COPY.format("Gemma Terms of Use"),
            _NOTICE.format(
                "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
            ),
        ),
    )
    for key, name, page, scope in (
        (
            "mrl",
            "Mistral AI Research License",
            "MRL-0.1",
            "Non-commercial research only, and no distribution by a commercial entity",
        ),
        (
            "mnpl",
            "Mistral AI Non-Production License",
            "MNPL-0.1",
            "Testing, research, personal use and evaluation only, not in the course of a commercial activity",
        ),
    ):
        duties = [f"{scope} ({name}).", _COPY.format(name), _NOTICE.format(f"Licensed by Mistral AI under the {name}")]
        yield Licence(
            key, name, "custom", link=f"https://mistral.ai/licenses/{page}.md", duties=tuple(duties), family="mistral"
        )
    yield Licence(
        "exaone",
        "EXAONE AI Model License Agreement - NC (version not stated)",
        "custom",
        family="exaone",
        duties=(
            "Non-commercial use only (EXAONE AI Model License Agreement - NC).",
            "Pass on a copy of the EXAONE AI Model License Agreement.",
            "Read the repo's own LICENSE: version 1.2 adds that it may not serve to develop models that compete with "
            "EXAONE.",
        ),
    )
    yield Licence(
        "nvidia-open-model-license",
        "NVIDIA Open Model License Agreement",
        "custom",
        family="nemotron",
        link="https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
        duties=(
            "Pass on a copy of the NVIDIA Open Model License Agreement.",
            _NOTICE.format("Licensed by NVIDIA Corporation under the NVIDIA Open Model License"),
            "Keep its guardrails, or put similar ones in their place, and keep to NVIDIA's Trustworthy AI terms.",
        ),
    )
    yield Licence(
        "falcon-llm-license",
        "Falcon LLM License",
        "custom",
        family="falcon",
        link="https://falconllm.tii.ae/falcon-terms-and-conditions.html",
        duties=(
            "Bind those who get it to the Acceptable Use Policy of the Falcon LLM License, and pass on its text.",
            'Say that it "is built using artificial intelligence technology from the Technology Innovation Institute".',
        ),
    )
    yield Licence(
        "tencent-hunyuan-community",
        "Tencent Hunyuan Community License Agreement",
        "custom",
        family="hunyuan",
        duties=(
            _COPY.format("Tencent Hunyuan Community License Agreement"),
            'Keep the "Notice" text file that the Tencent Hunyuan Community License Agreement prescribes.',
            "Bind those who get it to its Acceptable Use Policy; no use or distribution outside its territory, which "
            "leaves out the European Union and what else its text names.",
        ),
        forbids_as_source="lets it improve no other large language model than Tencent Hunyuan and what derives from it",
    )


_KNOWN = {
    licence.id: licence
    for table in (_permissive, _creative_commons, _gnu, _rail, _llama, _makers)
    for licence in table()
}


def _key(text: str) -> str:
    words = re.findall(r"[a-z0-9.+]+", text.lower())
    kept = [re.sub(r"^v(?=\d)", "", word) for word in words]
    return "".join(word for word in kept if word not in ("license", "licence", "agreement", "version", "the"))


_ALIASES = {_key(text): licence for licence in _KNOWN.values() for text in (licence.id, licence.name)} | {
    alias: _KNOWN[key]
    for aliases, key in (
        ("apache2 apachev2", "apache-2.0"),
        ("cc0", "cc0-1.0"),
        ("bsd2", "bsd-2-clause"),
        ("bsd3", "bsd-3-clause"),
        ("gpl2 gplv2 gplv2.0", "gpl-2.0"),
        ("gpl3 gplv3 gplv3.0", "gpl-3.0"),
        ("agpl3 agplv3 agplv3.0", "agpl-3.0"),
        ("lgpl3 lgplv3 lgplv3.0", "lgpl-3.0"),
        ("metallama2 metallama2community", "llama2"),
        ("llama3.0 metallama3", "llama3"),
        ("metallama3.1 metallama3.1community", "llama3.1"),
        ("metallama3.2 metallama3.2community", "llama3.2"),
        ("metallama3.3 metallama3.3community", "llama3.3"),
        ("metallama4 metallama4community llama4.0", "llama4"),
        ("gemmaterms", "gemma"),
        ("mistralresearch mistralairesearch mrl0.1", "mrl"),
        ("mnpl0.1 mistralnonproduction", "mnpl"),
        ("nvidiaopenmodel", "nvidia-open-model-license"),
        ("tencenthunyuan", "tencent-hunyuan-community"),
    )
    for alias in aliases.split()
}


def known_licence(identifier: str | None) -> Licence | None:
    """The licence that a repo's ``license`` or ``license_name`` means, or None where that is not known."""
    return None if identifier is None else _ALIASES.get(_key(identifier))


def known_licences() -> tuple[Licence, ...]:
    """All that are known, by kind."""
    return tuple(_KNOWN.values())
