"""Streaming of training documents, from prepared datasets or directly from a source, repeated endlessly."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from data.chunk_dataset import ChunkedDocuments
from data.documents import (
    Columns,
    check_surrogates,
    joined_text,
    look_alike_key,
    normalize_sections,
    rows_with_columns,
    to_name,
)
from data.labels import MULTI, SINGLE
from data.readers import ReadOptions, Row, Source
from data.source_files import shorten
from modeling.hierarchical_roberta.chunking import tokenize_batch


class StreamedDocuments(IterableDataset):
    """This process's share of an endless stream; each document goes to exactly one process.

    Each pass is shuffled within a buffer, depending on seed and pass number only. With W processes the documents of a
    step are the next B × W of the stream, as with one process and W times the batch size.

    Args:
        rows: returns the rows of a pass, given its number, in source order.
        cut: converts a row to a training item (see ChunkedDocuments).
        buffer_size: number of rows in the shuffle buffer; 1 preserves the source order.
    """

    def __init__(
        self,
        rows: Callable[[int], Iterable[Any]],
        cut: Callable[[Any], dict[str, Any]],
        *,
        seed: int,
        buffer_size: int = 1000,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.rows, self.cut, self.seed, self.buffer_size = rows, cut, seed, buffer_size
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.cut(row) for row in islice(self._all_rows(), self.process_index, None, self.num_processes))

    def _all_rows(self) -> Iterator[Any]:
        number = 0
        while True:
            was_empty = True
            for row in shuffled(self.rows(number), self.buffer_size, f"{self.seed}-{number}"):
                was_empty = False
                yield row
            if was_empty:
                raise ValueError("The stream of training documents is empty.")
            number += 1


def shuffled(rows: Iterable[Any], buffer_size: int, seed: str) -> Iterator[Any]:
    """Shuffle rows within a buffer: each new row replaces a random one, which is yielded.

    >>> sorted(shuffled(range(5), 2, "0"))
    [0, 1, 2, 3, 4]
    """
    rng = random.Random(seed)  # noqa: S311 (not for cryptography)
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        index = rng.randrange(buffer_size)
        yield buffer[index]
        buffer[index] = row
    rng.shuffle(buffer)
    yield from buffer


def prepared_stream(chunked: ChunkedDocuments, **options: Any) -> StreamedDocuments:
    """Stream prepared training documents in disk order."""

    def rows(number: int) -> Iterable[int]:
        chunked.set_epoch(number)
        return range(len(chunked))

    return StreamedDocuments(rows, chunked.__getitem__, **options)


def source_stream(
    source: str,
    chunked: ChunkedDocuments,
    labels: Sequence[str],
    columns: Columns | None = None,
    merge_labels: bool = False,
    read_options: ReadOptions | None = None,
    **options: Any,
) -> StreamedDocuments:
    """Stream the rows of a source, tokenized on the fly and cut like `chunked`.

    Args:
        columns: of the source; default: those named text and label, with a list of labels where `chunked` has several.
        merge_labels: count labels that look alike as one (see `look_alike_key`).
        read_options: how the source is read.

    Raises:
        ValueError: during iteration, for a missing column, a row without text or label, or a label that is not in `labels`.
    """
    ids = {label: i for i, label in enumerate(labels)}
    columns = columns or Columns(problem_type=MULTI if chunked.is_multi_label else SINGLE)
    needed = replace(columns, id="none", split="none", group="none", evidence="none", keep=())
    alike = {look_alike_key(label): label for label in labels} if merge_labels else {}
    read_options = replace(read_options or ReadOptions(), text_columns=columns.texts)
    documents = Source([source], read_options)

    def rows(number: int) -> Iterator[tuple[int, Row]]:
        chunked.set_epoch(number)
        return enumerate(rows_with_columns(documents, needed), 1)

    def cut(numbered: tuple[int, Row]) -> dict[str, Any]:
        number, row = numbered
        try:
            if row.error:
                raise ValueError(row.error)
            own, (text, _) = columns.labels_of(row.values), joined_text(row, columns)
            if text is None:
                raise ValueError("no text")
            if own is None:
                raise ValueError("no label")
            own = list(dict.fromkeys(alike.get(look_alike_key(label), label) for label in own))
            if unknown := [label for label in own if label not in ids]:
                raise ValueError(f"label {unknown[0]!r}, expected one of {shorten(list(ids), 20)}")
            text, _ = normalize_sections(check_surrogates(text, read_options.encoding_errors), [])
        except ValueError as error:
            raise ValueError(f"{source}: {row.location}: {error}.") from error
        tokens = tokenize_batch([text], chunked.tokenizer)
        [input_ids], [breaks] = tokens["input_ids"], tokens["token_break"]
        label = [ids[name] for name in own] if chunked.is_multi_label else ids[own[0]]
        item = {"label": label, "id": to_name(row.values.get(columns.id)) or f"row-{number}"}
        return chunked.item(number, {**item, "input_ids": input_ids, "token_break": breaks})

    return StreamedDocuments(rows, cut, **options)
