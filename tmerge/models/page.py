"""What can be merged and what is refused, as a page: written from the tables that decide it."""

from __future__ import annotations

import sys
from itertools import chain

from jinja2 import Environment, PackageLoader, StrictUndefined

from tmerge.models.door import LARGEST_SIZE, MOST_LAYERS
from tmerge.models.gguf_held import DECIDING_KEYS, HELD_ALONE
from tmerge.models.layouts import ATTENTION_NAMES, FUSED_ATTENTION, FUSED_MLP, MLP_NAMES
from tmerge.models.licence_terms import known_licences
from tmerge.models.settings import READ_BY_BOTH
from tmerge.models.stored import COMPUTED, PREDICTION_LAYERS, SIDE_PARTS

__all__ = ["models_page"]


def models_page() -> str:
    """Markdown, as docs/models.md holds it."""
    fused = sorted({(kind, module) for kind, (module, _) in FUSED_ATTENTION.items()} | set(FUSED_MLP.items()))
    environment = Environment(
        loader=PackageLoader("tmerge.models"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    return environment.get_template("models.md").render(
        plain={name: _code(modules) for name, modules in chain(ATTENTION_NAMES.items(), MLP_NAMES.items())},
        fused=", ".join(f"{kind} (`{module}`)" for kind, module in fused),
        layers=f"{MOST_LAYERS:,}",
        size=f"{LARGEST_SIZE:,}",
        side=[PREDICTION_LAYERS, *(kind for kind, _ in SIDE_PARTS)],
        computed=_code(sorted(COMPUTED)),
        both=", ".join(sorted(READ_BY_BOTH)),
        keys=_code(sorted({*DECIDING_KEYS, *HELD_ALONE})),
        forbidding=[
            {"name": f"[{licence.name}]({licence.link})" if licence.link else licence.name, "words": f"It {words}."}
            for licence in known_licences()
            if (words := licence.forbids or licence.forbids_as_source) is not None
        ],
    )


def _code(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    sys.stdout.write(models_page())
