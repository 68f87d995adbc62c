"""Proving that a checkpoint is the model in memory: read again the plain way, and compared.

A difference is an error, because weights that are published and do not compute what was measured are worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tmerge.errors import CheckpointError, SavedModelMismatchError, UnsupportedModelError
from tmerge.models.blocks import run_passes
from tmerge.models.checkpoint import read_config, read_headers, weight_files
from tmerge.models.configs import set_to_compute, stored_dtype
from tmerge.models.device import fits, memory_errors
from tmerge.models.loading import LoadedModel, open_by_blocks, read_weights, runs_own_code
from tmerge.models.quiet import quiet
from tmerge.models.reference import one_line
from tmerge.models.tokenizers import unusable_ids

__all__ = ["verify_checkpoint"]

# Of each text that the logits are compared on.
_TOKENS = 32


def verify_checkpoint(folder: Path, loaded: LoadedModel, texts: list[str]) -> None:
    """Read a saved checkpoint the plain way, and compare it with the model in memory.

    Checked: the files are whole; embeddings tied in memory are tied in the file, and stored once; the tokenizer gives
    the same ids, each with a row in the embedding; the logits of every text are the same. On the CPU in the same dtype
    the same is bit for bit, or every tensor is, and the logits differ by no more than sums in another order do. On an
    accelerator the order may differ between two runs of one kernel, and in another dtype the weights are rounded: there
    the logits may differ by a few units of the coarser dtype.

    Where there is no room for a second copy of the weights beside the first it is read block by block.

    Args:
        folder: As `save_checkpoint` wrote it.
        loaded: The model in memory.
        texts: A few; the first 32 tokens of each are run.

    Raises:
        SavedModelMismatchError: They differ; the message says in what.
        NotEnoughMemoryError: The second copy does not fit.
    """
    where = folder.name
    headers = read_headers(weight_files(folder))
    sequences = _compare_tokenizers(folder, loaded, texts)
    expected = _logits(loaded, sequences, loaded.pad_id)
    if not torch.isfinite(expected).all():
        raise SavedModelMismatchError(f"the model in memory gives logits that are not finite, so {where} was not kept")
    # What the files hold, whatever the config says: that of the target may be wrong about them.
    dtype = stored_dtype(read_config(folder / "config.json"), headers)
    with _no_whole_model(where):
        again = _by_blocks(folder, loaded, dtype) or _whole(folder, loaded, dtype)
    model = again.model
    _compare_ties(where, loaded.model, model, set(headers))
    same = dtype == loaded.dtype
    if same and again.block_weights is None and loaded.model.dtype != loaded.dtype:
        # The model was widened when it was loaded: the same values in the same number of digits. Of any other model
        # this would round the buffers that it holds in float32, such as the frequencies of rotary positions.
        model.to(dtype=loaded.model.dtype)  # type: ignore[call-arg]
    try:
        with _no_whole_model(where):
            logits = _logits(again, sequences, loaded.pad_id)
    except UnsupportedModelError:
        if again.block_weights is None:
            raise
        # It does not run its blocks in order: then there has to be room for all of it.
        again = _whole(folder, loaded, dtype)
        logits = _logits(again, sequences, loaded.pad_id)
    if torch.equal(logits, expected):
        return
    difference = (logits.float() - expected.float()).abs().max().item()
    changed = _first_changed(loaded.model, again)
    # Not "greater than": a NaN is not close to anything.
    if not difference <= _tolerance(loaded, dtype, same and changed is not None) * expected.abs().max().item():
        what = "no tensor differs, so what is lost is a setting of the config"
        if changed is not None:
            what = f"the first tensor that differs is {changed}"
        raise SavedModelMismatchError(
            f"{where}: read again, its logits differ from those of the model in memory by up to {difference:.3g}; "
            f"{what}"
        )


@contextmanager
def _no_whole_model(where: str) -> Iterator[None]:
    """What is refused of a model that somebody names is our fault in one that was just written."""
    try:
        yield
    except CheckpointError as error:
        raise SavedModelMismatchError(f"{where}: {error}") from error


def _fits_beside(loaded: LoadedModel, dtype: torch.dtype) -> bool:
    """Whether there is room for a second copy of the weights."""
    if loaded.device.type == "cpu" and loaded.model.dtype == dtype:
        return True  # mapped from the files, which is no memory
    second = sum(parameter.numel() for parameter in loaded.model.parameters()) * loaded.model.dtype.itemsize
    return fits(second, loaded.device)


def _by_blocks(folder: Path, loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel | None:
    """The checkpoint to be read block by block; None where all of it fits beside the model, or it cannot be."""
    if runs_own_code(loaded.model) or _fits_beside(loaded, dtype):
        return None
    asked = dtype if loaded.model.dtype == dtype else "auto"  # which widens as the model in memory was widened
    with quiet():
        again = open_by_blocks(str(folder), dtype=asked, device=loaded.device, widen=True, tokenizer=loaded.tokenizer)
    if again is not None:
        # Eager and fused attention round differently; the comparison is of weights, not of those.
        again.model.set_attn_implementation(loaded.model.config._attn_implementation)
    return again


def _whole(folder: Path, loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """The checkpoint in memory, read as anybody reads it."""
    options: dict[str, Any] = {} if loaded.device.type == "cpu" else {"device_map": {"": loaded.device}}
    with quiet(), memory_errors(f"reading {folder.name} again", loaded.device):
        model, report = read_weights(
            str(folder),
            config=set_to_compute(AutoConfig.from_pretrained(folder, trust_remote_code=runs_own_code(loaded.model))),
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=loaded.model.config._attn_implementation,
            trust_remote_code=runs_own_code(loaded.model),
            **options,
        )
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(report[kind]):
            raise SavedModelMismatchError(
                f"{folder.name}: {len(names)} {kind.replace('_', ' ')} in its weights: {names[0]}"
            )
    return replace(loaded, model=model, dtype=dtype, block_weights=None)


def _compare_tokenizers(folder: Path, loaded: LoadedModel, texts: list[str]) -> list[list[int]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=runs_own_code(loaded.tokenizer))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise SavedModelMismatchError(f"{folder.name}: its tokenizer cannot be read: {one_line(error)}") from error
    rows = loaded.embedding_rows
    if unusable_ids(tokenizer, rows) != unusable_ids(loaded.tokenizer, rows):
        raise SavedModelMismatchError(f"{folder.name}: its tokenizer has ids beyond the {rows} rows of the embedding")
    if tokenizer.chat_template != loaded.tokenizer.chat_template:
        raise SavedModelMismatchError(f"{folder.name}: its chat template is not that of the model in memory")
    sequences = []
    for number, text in enumerate(texts):
        ids, expected = (t(text, truncation=False)["input_ids"] for t in (tokenizer, loaded.tokenizer))
        if ids != expected:
            raise SavedModelMismatchError(
                f"{folder.name}: its tokenizer reads text {number + 1} as other tokens than before"
            )
        if ids and max(ids) >= rows:
            raise SavedModelMismatchError(
                f"{folder.name}: text {number + 1} has the token id {max(ids)}, and the embedding {rows} rows"
            )
        if ids:
            sequences.append(ids[:_TOKENS])
    # Without a text that gives a token, the first ids of the vocabulary are as good as any.
    return sequences or [list(range(min(rows, _TOKENS)))]


def _logits(read: LoadedModel, sequences: list[list[int]], pad_id: int) -> Tensor:
    """Logits at every token of all sequences, `(tokens, vocabulary)`, on the CPU; one batch, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    logits: list[Tensor] = []

    def run() -> None:
        made = read.model(ids.to(read.device), attention_mask=mask.to(read.device), use_cache=False).logits
        logits.append(made[mask.bool().to(read.device)].cpu())

    training = read.model.training
    read.model.eval()
    try:
        with torch.inference_mode():
            run_passes(read, [run], [ids.numel()])
    finally:
        read.model.train(training)
    return logits[0]


def _tied(model: PreTrainedModel) -> bool:
    head, body = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is body.weight:
        return head is not None
    return not head.weight.is_meta and cast(Tensor, head.weight).data_ptr() == cast(Tensor, body.weight).data_ptr()


def _compare_ties(where: str, expected: PreTrainedModel, saved: PreTrainedModel, stored: set[str]) -> None:
    if _tied(expected) != _tied(saved):
        states = ("tied", "not tied") if _tied(expected) else ("not tied", "tied")
        raise SavedModelMismatchError(
            f"{where}: embeddings are {states[0]} in memory and {states[1]} in the checkpoint"
        )
    shared: dict[int, list[str]] = {}
    for name, parameter in saved.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    for names in shared.values():
        if len(twice := sorted(set(names) & stored)) > 1:
            raise SavedModelMismatchError(f"{where}: one tied tensor is stored under several names: {', '.join(twice)}")


def _tolerance(loaded: LoadedModel, dtype: torch.dtype, exact: bool) -> float:
    """How far logits may be apart, relative to the largest; `exact` where a tensor differs that should not.

    The same values give sums in another order where they lie otherwise in memory, or on an accelerator.
    """
    if exact and loaded.device.type == "cpu":
        return 0.0
    # Rounding errors of the coarser dtype, grown through the layers; a wrong tensor is off by the order of 1.
    return 16 * max(torch.finfo(dtype).eps, torch.finfo(loaded.dtype).eps)


def _first_changed(expected: PreTrainedModel, saved: LoadedModel) -> str | None:
    """The first tensor, buffers that no file holds among them, that is not what it was; None where all are."""
    parts = saved.block_weights
    for name, tensor in [*saved.model.named_parameters(), *saved.model.named_buffers()]:
        other, again = _tensor(expected, name), tensor if parts is None or not tensor.is_meta else parts.read(name)
        if other is None or other.shape != again.shape or not torch.equal(other.to(again.dtype), again):
            return name
    return None


def _tensor(model: PreTrainedModel, name: str) -> Tensor | None:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(module), attribute)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
