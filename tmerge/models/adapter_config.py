"""An adapter's ``adapter_config.json``, as PEFT writes it: what of it decides the change that a LoRA makes.

PEFT's own class is not asked: reading a model needs no PEFT, and its class takes values of any kind and drops keys that
it does not know with a warning. What changes a model in a way that is not computed here is refused by its key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tmerge.documents import parse_json
from tmerge.errors import CheckpointError
from tmerge.validation import value_due

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "AdapterConfig"]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LORA = "LORA"
# Under any other the base's own weights are changed before training, and the tensors alone are not the change.
_KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
_REFUSED = {
    "layer_replication": "repeats layers of its base",
    "alora_invocation_tokens": "is in force only after certain tokens",
    "trainable_token_indices": "trains single tokens' embeddings apart",
    "target_parameters": "changes parameters of stacked experts",
    "use_qalora": "pools its inputs (QALoRA)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "arrow_config": "routes between several (Arrow)",
    "velora_config": "is a VeLoRA",
    "monteclora_config": "is drawn at random (MonteCLoRA)",
    "kasa_config": "changes its base first (KaSA)",
    "megatron_config": "is split over Megatron's layers",
}
# Patterns are a stranger's: what repeats what repeats takes a time that grows with a power of a name's length.
_REPEATS, _REPEATS_A_GROUP, _MOST_REPEATS = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]"), 3
_MOST_CHOICES, _LONGEST = 8, 200
_Rank = Annotated[int, Field(ge=1, le=1 << 20)]


class AdapterConfig(BaseModel):
    """Of a LoRA; keys that make no difference to what it computes when it is used are passed over.

    Attributes:
        base_model_name_or_path: What it was trained on, as its trainer named it: a hint, and no more.
        revision: Of that.
        r: Rank of each change.
        lora_alpha: A change is ``lora_alpha / r * B A``.
        use_rslora: It is divided by sqrt(r) instead.
        use_dora: Directions alone are changed, and each output's length is stored beside them.
        rank_pattern: Pattern of a module's name -> its own rank.
        alpha_pattern: Likewise, its own `lora_alpha`.
        ensure_weight_tying: What is learned of an embedding holds for the head that is tied to it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: _Rank = 8
    lora_alpha: float = Field(8, allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    ensure_weight_tying: bool = False

    @classmethod
    def read(cls, path: Path, where: str) -> AdapterConfig:
        """Read the file of an adapter.

        Args:
            path: Of the file.
            where: The adapter, as it was named.

        Raises:
            CheckpointError: There is none, it is no config of a LoRA, or of one that does what is not computed here.
        """
        try:
            stored = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{where!r} has no {ADAPTER_CONFIG}, so it is no PEFT adapter; name the repo or folder that has one"
            ) from None
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise CheckpointError(f"{where!r}: its {ADAPTER_CONFIG} is no JSON object; download the adapter again")
        _refuse_other_kinds(where, stored)
        try:
            config = cls.model_validate({key: value for key, value in stored.items() if value is not None})
            for pattern in (*config.rank_pattern, *config.alpha_pattern):
                if _takes_long(pattern):
                    raise CheckpointError(
                        f"{where!r}: its {ADAPTER_CONFIG} has the pattern {pattern!r:.60}, which could take for ever "
                        "to match; write names of modules in its place"
                    )
                re.compile(pattern)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            said = f"{key} {first['input']!r:.40}, and {value_due(first) or first['msg']} is expected"
            raise CheckpointError(f"{where!r}: its {ADAPTER_CONFIG} has {said}; download the adapter again") from None
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{where!r}: its {ADAPTER_CONFIG} has a pattern of names that is none ({error}); mend it"
            ) from None
        return config

    def rank(self, module: str) -> int:
        """Of a module's change.

        Args:
            module: Its name in the base.
        """
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """What ``B A`` of a module is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return float(alpha / (rank**0.5 if self.use_rslora else rank))


def _takes_long(pattern: str) -> bool:
    """Whether a pattern could try more ways through a name than there is time for."""
    return (
        len(pattern) > _LONGEST
        or _REPEATS_A_GROUP.search(pattern) is not None
        or len(_REPEATS.findall(pattern)) > _MOST_REPEATS
        or pattern.count("|") > _MOST_CHOICES
    )


def _pattern_of(patterns: dict[str, Any], module: str) -> str:
    """The first pattern that a module's name ends with, as PEFT finds it; empty for none."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def _refuse_other_kinds(where: str, stored: dict[str, Any]) -> None:
    """Refuse what is no LoRA, and what does more than add low-rank products to weights."""
    kind = stored.get("peft_type")
    if kind != _LORA:
        raise CheckpointError(
            f"{where!r} is an adapter of the kind {kind!r:.40}, and of adapters only LoRA is read; merge it into its "
            "base (peft: merge_and_unload) where that can be done, and give the merged model's folder"
        )
    for key, words in _REFUSED.items():
        if stored.get(key):
            raise CheckpointError(
                f"{where!r} {words} ({ADAPTER_CONFIG}: {key}), which is not read; merge it into its base (peft: "
                "merge_and_unload), and give the merged model's folder"
            )
    begun = stored.get("init_lora_weights", True)
    if begun is not None and begun not in _KEEPS_THE_BASE:
        raise CheckpointError(
            f"{where!r} was begun with init_lora_weights {begun!r:.40}, which changes its base's weights as well; save "
            "it again as a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion), or merge "
            "it (peft: merge_and_unload)"
        )
