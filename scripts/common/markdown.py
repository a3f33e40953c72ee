"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table, with the bars and line breaks in its cells escaped.

    >>> print(markdown_table(["", "macro-F1"], [["tfidf", 0.5]]))
    |  | macro-F1 |
    |---|---|
    | tfidf | 0.5 |
    """
    lines = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in (head, *rows)]
    return "\n".join([f"| {lines[0]} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines[1:])])
