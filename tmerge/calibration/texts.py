"""The texts that both models read, and the held-out ones that neither sees before the verdict."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tmerge.calibration.columns import Renderer, choose_column
from tmerge.calibration.files import Row, local_file, read_file, refuse_unreadable
from tmerge.calibration.identity import file_identity
from tmerge.calibration.samples import SAMPLES_PREFIX, sample_texts
from tmerge.documents import parse_json
from tmerge.errors import DatasetError, TooFewTextsError
from tmerge.recipe import CalibrationSettings
from tmerge.store import write_text

AnyRow = TypeVar("AnyRow", bound=dict[str, Any])

__all__ = [
    "MINIMUM_CALIBRATION",
    "MINIMUM_HELD_OUT",
    "TextSet",
    "is_held_out",
    "normalise",
    "of_another",
    "read_texts",
    "text_digest",
]

MINIMUM_CALIBRATION = 16
"""Fewest calibration texts: a correlation over less says nothing."""

MINIMUM_HELD_OUT = 8
"""Fewest held-out texts: an interval over less says nothing."""

_EXAMPLES = 20  # rows looked at to find the column
_ROWS_PER_TEXT = 50  # rows read at most per text asked for, so that an endless stream of empty rows ends


@dataclass(frozen=True)
class TextSet:
    """Texts read once, for both models, in one order.

    Attributes:
        texts: To calibrate on.
        held_out: Kept away from calibration.
        dataset: Hub id, ``samples:LANGUAGE``, or the file's name without its folders.
        revision: Commit hash of a Hub dataset.
        config: Configuration of a Hub dataset.
        split: Split of a Hub dataset; None for others.
        column: What was read of each row; several joined by a newline as ``a+b``.
        read: Rows read.
        empty: Rows without text, dropped.
        duplicates: Rows whose text had been read before, dropped.
        sha256: Hex digest over the calibration texts, then the held-out ones, in order.
        notes: Sentences for the report.
        prompts: Per calibration text, how many of its characters come before what answers; 0 where nothing does.
        choosing: Kept away from both, to choose settings on; empty unless something is chosen.
        other: Of another dataset (``calibration.match_on``): its features are read, and not those of `texts`.
        other_dataset: Its name, with its commit if it is of the Hub.
        file_sha256: Hex digest over the bytes of the local file that the texts are of; None for other datasets.
        other_sha256: Likewise, of `other_dataset`.
        ends: Per text of `matched_on`, the characters after which a token of both models ends and is read; empty where
            features are means over texts.
    """

    texts: tuple[str, ...]
    held_out: tuple[str, ...]
    dataset: str
    revision: str | None
    config: str | None
    split: str | None
    column: str
    read: int
    empty: int
    duplicates: int
    sha256: str
    notes: tuple[str, ...] = ()
    choosing: tuple[str, ...] = ()
    prompts: tuple[int, ...] = ()
    ends: tuple[tuple[int, ...], ...] = ()
    other: tuple[str, ...] = ()
    other_dataset: str | None = None
    file_sha256: str | None = None
    other_sha256: str | None = None

    @property
    def matched_on(self) -> tuple[str, ...]:
        """The texts whose features are read."""
        return self.other or self.texts

    def without(self, apart: Iterable[str], most: int | None = None) -> TextSet:
        """Fewer to calibrate and choose on: not those that, white space and Unicode form apart, are among others.

        Args:
            apart: The others.
            most: So many to calibrate on, the first; None for all that are left.
        """
        away = {normalise(text) for text in apart}
        choosing = tuple(text for text in self.choosing if normalise(text) not in away)
        kept = [number for number, text in enumerate(self.texts) if normalise(text) not in away][:most]
        texts = tuple(self.texts[number] for number in kept)
        prompts = tuple(self.prompts[number] for number in kept)
        digest = _digest(texts, self.held_out, choosing)
        return replace(self, texts=texts, prompts=prompts, choosing=choosing, sha256=digest)

    def to_dict(self) -> dict[str, Any]:
        """What the report records: everything but the texts, which are given by their number; JSON-serialisable."""
        data = asdict(self)
        data.pop("ends")
        data["other"] = len(self.other)
        counts = {"texts": len(self.texts), "held_out": len(self.held_out), "choosing": len(self.choosing)}
        return {**data, **counts, "prompts": sum(map(bool, self.prompts)), "notes": list(self.notes)}

    def save(self, path: Path) -> None:
        """Write it, texts and all, as one JSON file; a reader never sees half of it."""
        write_text(path, json.dumps(asdict(self), ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: Path) -> TextSet:
        """Read what `save` wrote.

        Raises:
            DatasetError: The file is missing, or its texts are not those that its digest is of.
        """
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
            tuples: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
            tuples["ends"] = tuple(map(tuple, tuples.get("ends", ())))
            loaded = cls(**tuples)
        except FileNotFoundError:
            raise DatasetError(f"{path.name}: no texts are kept under this name; start the run again") from None
        except (ValueError, TypeError, AttributeError, OSError):
            loaded = None
        if loaded is None or loaded.sha256 != _digest(loaded.texts, loaded.held_out, loaded.choosing):
            raise DatasetError(f"{path.name}: the kept texts are damaged; delete the file and start the run again")
        return loaded


def normalise(text: str) -> str:
    """The text as it is compared with others: Unicode NFC, runs of white space as one space.

    Only for comparing; the models read the text as it was written.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_digest(text: str) -> str:
    """By which a text is known again, without being told: of SHA-256 (hex) of how it is compared, the first 16."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def is_held_out(text: str, seed: int, share: float) -> bool:
    """Which side a text is on: True with probability `share`, decided by the text and the seed alone.

    So a text's side does not depend on its place, on how many texts are read or on which others there are, and
    texts that differ in white space or in Unicode form only are on one side.
    """
    digest = hashlib.sha256(f"{seed}\n{normalise(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_texts(
    settings: CalibrationSettings,
    *,
    seed: int,
    choosing: float = 0.0,
    chat_tokenizer: Any | None = None,
    progress: Callable[[int, int], None] | None = None,
    key: str = "calibration.texts",
    whole: bool = False,
    further: bool = False,
) -> TextSet:
    """Read, de-duplicate and split the calibration texts.

    Rows are taken from a shuffle buffer with the seed until ``settings.texts`` distinct, non-empty texts are found,
    or the dataset ends. A Hub dataset is streamed, from its shards in shuffled order.

    Args:
        settings: The recipe's ``calibration`` section.
        seed: Of the shuffling and of the split.
        choosing: Share of the texts that are not held out to keep for choosing settings on.
        chat_tokenizer: The target's tokenizer, whose chat template writes conversations for both models.
        progress: Called with texts found and texts asked for.
        key: Where the recipe says how many texts; named where they are too few.
        whole: All texts serve one purpose, however they fall on the sides: a side may be empty.
        further: It is not the recipe's own dataset (`of_another`): no key says its configuration, split or column.

    Raises:
        DatasetError: The dataset, its configuration, split or column cannot be found or read.
        TooFewTextsError: Fewer than `MINIMUM_CALIBRATION` calibration texts, or than `MINIMUM_HELD_OUT` held-out
            ones, or ones to choose on; of a whole set, fewer than `MINIMUM_HELD_OUT` in all.
    """
    buffer = max(1000, 4 * settings.texts)
    source = _open(settings, seed, buffer, further)
    rows = iter(source.rows)
    examples = list(itertools.islice(rows, _EXAMPLES))
    if not examples:
        raise DatasetError(f"dataset {source.name!r} is empty; choose another dataset or split")
    # Rows of one file need not have the same keys.
    columns = source.columns or tuple(dict.fromkeys(name for row in examples for name in row))
    column = choose_column(settings.column, columns, examples, repr(source.name), further=further)
    render = Renderer(column, repr(source.name), chat_tokenizer)
    kept: list[str] = []
    before: dict[str, int] = {}
    seen: set[bytes] = set()
    read = empty = 0
    for row in itertools.chain(examples, itertools.islice(rows, _ROWS_PER_TEXT * settings.texts)):
        read += 1
        # A Hub dataset's rows come in an order of their own, and have no numbers.
        text = render(row, row.where if isinstance(row, Row) else f"the {read}. row read")
        compared = hashlib.sha256(normalise(text).encode()).digest()
        if not text:
            empty += 1
        elif compared not in seen:
            seen.add(compared)
            kept.append(text)
            before[text] = render.prompt(row, text)
            if progress is not None:
                progress(len(kept), settings.texts)
            if len(kept) == settings.texts:
                break
    # The rows are read as they are asked for, after the file was hashed.
    if source.path is not None and file_identity(source.path) != f"sha256:{source.file_sha256}":
        raise DatasetError(f"dataset {source.name!r} changed while it was read; start again when it is written")
    sides: tuple[list[str], list[str], list[str]] = ([], [], [])
    for text in kept:
        # A seed of its own: the texts to choose on are drawn among those that are not held out.
        side = 1 if is_held_out(text, seed, settings.held_out) else 2 * is_held_out(text, ~seed, choosing)
        sides[side].append(text)
    texts, held_out, to_choose = map(tuple, sides)
    text_set = TextSet(
        texts=texts,
        held_out=held_out,
        dataset=source.name,
        revision=source.revision,
        config=source.config,
        split=settings.split if source.revision else None,
        column=str(column),
        read=read,
        empty=empty,
        duplicates=read - empty - len(kept),
        sha256=_digest(texts, held_out, to_choose),
        notes=tuple(render.notes()),
        choosing=to_choose,
        prompts=tuple(before[text] for text in texts),
        file_sha256=source.file_sha256,
    )
    if not whole:
        _check_enough(text_set, settings, choosing, key)
    elif len(kept) < MINIMUM_HELD_OUT:
        raise TooFewTextsError(
            f"dataset {text_set.dataset!r}: {read} rows read, {empty} empty, {text_set.duplicates} duplicates; that "
            f"leaves {len(kept)} texts ({MINIMUM_HELD_OUT} needed): use a dataset with more texts"
        )
    return text_set


@dataclass(frozen=True)
class _Source:
    name: str
    rows: Iterable[dict[str, Any]]
    revision: str | None = None
    config: str | None = None
    columns: tuple[str, ...] | None = None
    path: Path | None = None
    file_sha256: str | None = None


def _open(settings: CalibrationSettings, seed: int, buffer: int, further: bool) -> _Source:
    name = settings.dataset.strip()
    is_sample = name.startswith(SAMPLES_PREFIX)
    path = None if is_sample else local_file(name)
    if not is_sample and path is None:
        # The library behind it takes a second to import, and samples and files do without.
        from tmerge.calibration.remote import open_remote

        remote = open_remote(name, settings.config, settings.split, seed=seed, buffer=buffer, further=further)
        return _Source(remote.repo, remote, remote.revision, remote.config, remote.columns)
    if settings.config is not None:
        raise DatasetError(
            f"calibration.config is {settings.config!r}, but {name!r} is no Hub dataset; only those have configurations"
        )
    if path is None:
        rows: Iterable[dict[str, Any]] = ({"text": text} for text in sample_texts(name.removeprefix(SAMPLES_PREFIX)))
        return _Source(name, _shuffled(rows, seed, buffer))
    refuse_unreadable(path)
    digest = file_identity(path).removeprefix("sha256:")
    return _Source(path.name, _shuffled(read_file(path), seed, buffer), path=path, file_sha256=digest)


def _shuffled(rows: Iterable[AnyRow], seed: int, size: int) -> Iterator[AnyRow]:
    """The rows in an order drawn with the seed, holding at most `size` of them at a time."""
    draw = random.Random(seed)
    held: list[AnyRow] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        index = draw.randrange(size)
        yield held[index]
        held[index] = row
    draw.shuffle(held)
    yield from held


def of_another(settings: CalibrationSettings, dataset: str) -> CalibrationSettings:
    """How another dataset is read: as the calibration's own, but for its configuration, split and column."""
    return settings.model_copy(
        update={"dataset": dataset, "config": None, "split": "train", "column": None, "match_on": None}
    )


def other_texts(
    settings: CalibrationSettings, apart: Iterable[str], *, seed: int, chat_tokenizer: Any | None = None
) -> dict[str, Any]:
    """What ``calibration.match_on`` adds to a `TextSet`: ``other``, ``other_dataset`` and ``other_sha256``.

    Args:
        settings: ``match_on`` names the dataset.
        apart: Texts that nothing may be matched on, since they decide alpha or the verdict.
        seed: As for `read_texts`.
        chat_tokenizer: As for `read_texts`.

    Raises:
        DatasetError, TooFewTextsError: As `read_texts`.
    """
    another = of_another(settings, str(settings.match_on))
    text_set = read_texts(another, seed=seed, chat_tokenizer=chat_tokenizer, whole=True, further=True)
    # As it was named, and a Hub dataset with the commit that was read.
    name = settings.match_on or ""
    if text_set.revision is not None:
        name = f"{name.partition('@')[0]}@{text_set.revision}"
    kept_apart = {normalise(text) for text in apart}
    matched_on = tuple(text for text in text_set.texts + text_set.held_out if normalise(text) not in kept_apart)
    if len(matched_on) < MINIMUM_CALIBRATION:
        raise TooFewTextsError(
            f"calibration.match_on {settings.match_on!r} has {len(matched_on)} texts beside those that are held out or "
            f"choose alpha, and {MINIMUM_CALIBRATION} are needed; name another dataset there, or null for the "
            "calibration set's own texts"
        )
    return {"other": matched_on, "other_dataset": name, "other_sha256": text_set.file_sha256}


def _digest(*text_lists: Iterable[str]) -> str:
    # As JSON, so that no two lists of texts have the same bytes.
    listed = json.dumps([list(text_list) for text_list in text_lists], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(listed.encode()).hexdigest()


def _check_enough(text_set: TextSet, settings: CalibrationSettings, choosing: float, key: str) -> None:
    enough = not choosing or len(text_set.choosing) >= MINIMUM_HELD_OUT
    if len(text_set.texts) >= MINIMUM_CALIBRATION and len(text_set.held_out) >= MINIMUM_HELD_OUT and enough:
        return
    short = []
    if len(text_set.texts) < MINIMUM_CALIBRATION:
        short.append(f"{len(text_set.texts)} to calibrate on ({MINIMUM_CALIBRATION} needed)")
    if len(text_set.held_out) < MINIMUM_HELD_OUT:
        short.append(f"{len(text_set.held_out)} held out ({MINIMUM_HELD_OUT} needed)")
    if not enough:
        short.append(f"{len(text_set.choosing)} to choose fusion.alpha or fusion.ridge on ({MINIMUM_HELD_OUT} needed)")
    # Whether the dataset or the recipe is what ran out decides the remedy.
    if len(text_set.texts) + len(text_set.held_out) + len(text_set.choosing) == settings.texts:
        remedy = f"raise {key} (now {settings.texts})"
    else:
        remedy = "use a dataset with more texts"
    if not enough:
        remedy += f", raise calibration.choosing (now {settings.choosing}), give what is auto a number"
    remedy += f", or change calibration.held_out (now {settings.held_out})"
    raise TooFewTextsError(
        f"dataset {text_set.dataset!r}: {text_set.read} rows read, {text_set.empty} empty, "
        f"{text_set.duplicates} duplicates; that leaves {' and '.join(short)}: {remedy}"
    )
