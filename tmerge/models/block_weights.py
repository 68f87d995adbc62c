"""A model's weights that come and go: read from its files part by part, when a part's turn has come.

The modules are built once, without values: parameters on the meta device, buffers that no file holds for real. A part
is a block, an embedding or the head; ``transformers`` loads it into these modules as it loads a whole model,
renaming, stacking, unpacking and rounding as it does, so that there is no code per architecture. When the part's work
is done, its parameters are empty again. While one block is at work the next is being read. What is neither (norms
outside the blocks) is small, and stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tmerge.errors import CheckpointError, UnsupportedModelError
from tmerge.models.discovery import find_block_list
from tmerge.models.reference import ModelReference

__all__ = ["BlockWeights", "StoredParts"]

Part = int | str
"""A block's number; `_EMBEDDING`, `_HEAD` or the name of another embedding; `_REST`."""

_EMBEDDING, _HEAD, _REST = "embedding", "head", "rest"

# One part of any model is read at a time: transformers' switches are the process's.
_READING = threading.Lock()


@dataclass(frozen=True)
class StoredParts:
    """What a file, or several, hold of a model.

    Attributes:
        parameters: Stored name -> the parameter or buffer of the model that it becomes, or becomes a part of.
        open: Gives the tensors of these stored names, each read when ``transformers`` asks for it.
        load: Puts such tensors into the model, as it loads a whole one.
    """

    parameters: Mapping[str, str]
    open: Callable[[Collection[str]], AbstractContextManager[Mapping[str, Any]]]
    load: Callable[[PreTrainedModel, Mapping[str, Any]], None]


@dataclass
class _Place:
    """One parameter of a part: where it goes, and what is there while the part is away."""

    name: str
    module: nn.Module
    own_name: str
    empty: nn.Parameter


@dataclass
class _Contents:
    """A part: its parameters, its modules' buffers, and the names under which it is stored."""

    places: list[_Place] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)


class BlockWeights:
    """The parts of a model.

    Args:
        reference: Named in errors.
        model: Its modules, parameters on the meta device.
        stored: Where they are read from.
        device: Where they go.
        dtype: In which floating-point values are held there; None as they are loaded.
        reading: What is open around each read: it says in our words what goes wrong there.
        check: Called with the (name, parameter) pairs of each part when it is first read; refuses what is not finite.

    Attributes:
        dtype: As given.

    Raises:
        TmergeError: As `enter_block`, of what stays.
    """

    def __init__(
        self,
        reference: ModelReference,
        model: PreTrainedModel,
        stored: StoredParts,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        reading: Callable[[], AbstractContextManager[None]],
        check: Callable[[list[tuple[str, Tensor]]], None],
    ) -> None:
        self._reference, self._model, self._stored = reference, model, stored
        self._device, self.dtype, self._check, self._open_reading = device, dtype, check, reading
        self._parts = self._divided()
        self._part_of = {place.name: part for part, contents in self._parts.items() for place in contents.places}
        self._present: set[Part] = set()
        self._checked: set[Part] = set()
        self._ahead: dict[Part, Future[None]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._enter(_REST)
        for part, module in self._ends.items():
            module.register_forward_pre_hook(lambda module, inputs, part=part: self._called(part, inputs))

    def enter_block(self, block: int) -> None:
        """Have a block's weights in memory, and begin to read the next one's.

        Raises:
            TmergeError: A file is damaged, another by now, or gone; a weight is not finite; it does not fit.
        """
        ahead = self._ahead.pop(block, None)
        if ahead is not None:
            ahead.result()
        self._enter(block)
        following = block + 1
        if following in self._parts and following not in self._ahead and following not in self._present:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "tmerge-read")
            self._ahead[following] = self._reader.submit(self._enter, following)

    def leave_block(self, block: int) -> None:
        """Let a block's weights go."""
        self._leave(block)

    def read(self, name: str) -> Tensor:
        """A parameter by its name, in memory until one of another part is read, or `close`.

        Raises:
            TmergeError: As `enter_block`.
        """
        part = self._part_of[name]
        for other in self._present - {part, _REST}:
            self._leave(other)
        self._enter(part)
        return self._model.get_parameter(name)

    def enter_embeddings(self) -> None:
        """Have what comes before the blocks in memory: models ask where it is before they call it."""
        for part in self._ends:
            if part != _HEAD:
                self._enter(part)

    def leave_ends(self) -> None:
        """Let embeddings and head go; each comes back by itself when it is called."""
        for part in self._ends:
            self._leave(part)

    def close(self) -> None:
        """Let everything go that comes and goes."""
        for ahead in self._ahead.values():
            ahead.cancel()
        if self._reader is not None:
            self._reader.shutdown(wait=True)
        self._ahead, self._reader = {}, None
        for part in [part for part in self._present if part != _REST]:
            self._leave(part)

    def _called(self, part: Part, inputs: tuple[Any, ...]) -> None:
        self._enter(part)
        if any(isinstance(each, Tensor) and each.device.type == "meta" for each in inputs):
            # The model moved what it gives to where it took the weights to be; what comes of it would be anything.
            raise UnsupportedModelError(
                f"{self._reference.text!r}: {type(self._model).__name__} looks at its weights before they are needed, "
                "so it cannot be read block by block; set memory: resident"
            )

    def _divided(self) -> dict[Part, _Contents]:
        """Every module of the model by its part."""
        list_name, blocks = find_block_list(self._model)
        names = {id(module): name for name, module in self._model.named_modules()}
        self._ends = self._end_modules()
        ends = {names[id(module)]: part for part, module in self._ends.items()}
        parts: dict[Part, _Contents] = {part: _Contents() for part in [*range(len(blocks)), *self._ends, _REST]}

        def part_of(name: str) -> Part:
            if name.startswith(f"{list_name}."):
                return int(name.removeprefix(f"{list_name}.").partition(".")[0])
            for prefix, part in ends.items():
                if name == prefix or name.startswith(f"{prefix}."):
                    return part
            return _REST

        for name, module in self._model.named_modules(remove_duplicate=False):
            contents = parts[part_of(name)]
            contents.modules.append(module)
            for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                full = f"{name}.{own_name}" if name else own_name
                contents.places.append(_Place(full, module, own_name, parameter))
        for stored, parameter_name in self._stored.parameters.items():
            parts[part_of(parameter_name)].stored.append(stored)
        if self._is_tied(parts):
            # One matrix serves both, stored under either name.
            parts[_EMBEDDING].places += parts[_HEAD].places
            parts[_EMBEDDING].stored += parts[_HEAD].stored
            parts[_HEAD] = parts[_EMBEDDING]
        return parts

    def _end_modules(self) -> dict[Part, nn.Module]:
        """Embeddings (one of all layers together may be the largest matrix of a model) and the head."""
        named = {_EMBEDDING: self._model.get_input_embeddings(), _HEAD: self._model.get_output_embeddings()}
        ends: dict[Part, nn.Module] = {part: module for part, module in named.items() if isinstance(module, nn.Module)}
        inside = {id(module) for module in find_block_list(self._model)[1].modules()}
        for name, module in self._model.named_modules():
            known = id(module) in inside or any(module is end for end in ends.values())
            if isinstance(module, nn.Embedding) and not known:
                ends[name] = module
        return ends

    def _is_tied(self, parts: Mapping[Part, _Contents]) -> bool:
        if not {_EMBEDDING, _HEAD} <= parts.keys():
            return False
        stored = set(self._stored.parameters.values())
        embedding = {id(place.empty): place.name for place in parts[_EMBEDDING].places}
        for place in parts[_HEAD].places:
            # Where both are stored they may differ, and transformers ties them only if they do not.
            if id(place.empty) in embedding and not {place.name, embedding[id(place.empty)]} <= stored:
                return True
        return False

    def _enter(self, part: Part) -> None:
        with _READING:
            if part in self._present:
                return
            contents = self._parts[part]
            try:
                with self._open_reading(), self._stored.open(contents.stored) as tensors, torch.no_grad():
                    self._stored.load(self._model, tensors)
                    if part not in self._checked:
                        parameters = [(place.name, getattr(place.module, place.own_name)) for place in contents.places]
                        self._check([(name, read) for name, read in parameters if read.device.type != "meta"])
                        self._checked.add(part)
                    self._take(contents)
            except BaseException:
                self._empty(contents)
                raise
            # A head that is tied has come with the embedding.
            self._present |= {name for name, other in self._parts.items() if other is contents}

    def _take(self, contents: _Contents) -> None:
        """Put what was just read where it is computed with; of a matrix that serves twice, both its places."""
        taken: dict[int, nn.Parameter] = {}
        for place in contents.places:
            read = getattr(place.module, place.own_name)
            if read.device.type != "meta":
                taken[id(place.empty)] = place.module._parameters[place.own_name] = self._held(read)
        for place in contents.places:
            if getattr(place.module, place.own_name).device.type != "meta":
                continue
            if id(place.empty) not in taken:
                raise self._lacks(place.name)
            place.module._parameters[place.own_name] = taken[id(place.empty)]
        for module in contents.modules:
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if buffer.device.type == "meta":
                    raise self._lacks(name)
                module._buffers[name] = buffer.to(self._device, self.dtype if buffer.is_floating_point() else None)

    def _lacks(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._reference.text!r} lacks {name} of {type(self._model).__name__}; download the model again, or use "
            "another file of it"
        )

    def _held(self, read: nn.Parameter) -> nn.Parameter:
        dtype = self.dtype if read.is_floating_point() else None
        return nn.Parameter(read.detach().to(self._device, dtype), requires_grad=False)

    def _leave(self, part: Part) -> None:
        with _READING:
            contents = self._parts[part]
            # A head that is tied goes with the embedding.
            gone = [name for name in self._present if self._parts[name] is contents]
            if gone:
                self._empty(contents)
            self._present.difference_update(gone)

    @staticmethod
    def _empty(contents: _Contents) -> None:
        for place in contents.places:
            place.module._parameters[place.own_name] = place.empty
