"""What `--source` names: files, folders, globs, archives, saved `datasets` and datasets on the hub.

Layouts of a folder that are recognized:

    train.csv, test.csv                       tables; splits by their names, also in shards (train-00000-of-00004.parquet)
    train/part-1.parquet, test/part-1.parquet tables; splits by their folders
    pos/1.txt, neg/2.txt                      one folder per label, with any folders below
    train/pos/1.txt, test/neg/2.txt           the same per split (or splits in labels: pos/train/1.txt)
    1.txt, 2.txt                              documents without labels
    list.csv, texts/1.txt                     a table that lists documents in the column `path`

Every file in the folder that is not read is in `SourceFiles.unread`.
"""

import glob
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.document_files import DOCUMENT_SUFFIXES
from data.text_files import suffix_of

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Kinds of tables by suffix. A folder's tables must be of one kind.
TABLES = {
    ".csv": "CSV",
    ".tsv": "CSV",
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".parquet": "Parquet",
    ".xlsx": "spreadsheet",
    ".xls": "spreadsheet",
    ".xlsb": "spreadsheet",
    ".ods": "spreadsheet",
}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Args:
        name: what messages call it: its path from the source on.
        id: of a document: its path in the folder, without suffix.
        split, label: those that the layout gives, or "".
    """

    path: Path
    name: str
    id: str = ""
    split: str = ""
    label: str = ""

    @property
    def is_document(self) -> bool:
        return suffix_of(self.path) in DOCUMENT_SUFFIXES


@dataclass
class SourceFiles:
    """The files of the sources in order, and the names of those that are not read (as keys, in order)."""

    files: list[SourceFile] = field(default_factory=list)
    unread: dict[str, None] = field(default_factory=dict)
    # Folders with the content of archives, deleted with this object.
    extracted: list[tempfile.TemporaryDirectory] = field(default_factory=list, repr=False)


def describe_unread(names: Sequence[str]) -> str:
    """A sentence about the files that are not read, or ""."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"Not read ({len(names)}): {', '.join(names[:5])}{rest}." if names else ""


def to_split(name: str) -> str:
    """The split that a name stands for (`val` → validation), else the name in lower case."""
    name = name.strip().lower()
    return SPLIT_ALIASES.get(name, name)


def is_split(name: str) -> bool:
    return to_split(name) in SPLITS


def find_source_files(sources: Sequence[str], has_documents: Callable[[Path], bool]) -> SourceFiles | None:
    """The files of sources that are on this machine; None if a single source is no path (but perhaps on the hub).

    Args:
        has_documents: whether a table has a text column, or one with the paths of documents.

    Raises:
        ValueError: no such file, an unsupported one, or a folder whose layout is not clear.
    """
    result = SourceFiles()
    for source in sources:
        for path in _paths(source, is_single=len(sources) == 1):
            if path is None:
                return None
            _add(path, path.name, result, has_documents)
    tables = [file for file in result.files if not file.is_document]
    if len({file.split for file in tables}) < 2:  # train.csv alone is a table whose splits are still to be made
        result.files = [file if file.is_document else SourceFile(file.path, file.name) for file in result.files]
    repeated = Counter(file.id for file in result.files if file.is_document)
    result.files = [
        SourceFile(file.path, file.name, file.name, file.split, file.label) if repeated[file.id] > 1 else file
        for file in result.files
    ]
    return result


def _paths(source: str, is_single: bool) -> list[Path | None]:
    path = Path(source)
    if path.exists():
        return [path]
    if glob.has_magic(source):
        if matches := sorted(glob.glob(source, recursive=True)):
            return [Path(match) for match in matches]
        raise ValueError(f"{source}: no file matches.")
    if is_single and suffix_of(path) not in {*TABLES, *DOCUMENT_SUFFIXES} and not source.endswith(ARCHIVES):
        return [None]
    raise ValueError(f"{source}: no such file or folder.")


def _add(path: Path, name: str, result: SourceFiles, has_documents: Callable[[Path], bool]) -> None:
    if path.is_dir():
        _add_folder(path, name, result, has_documents)
    elif path.name.lower().endswith(ARCHIVES):
        _add_folder(_extract(path, result), name, result, has_documents)
    elif suffix_of(path) in TABLES:
        result.files.append(SourceFile(path, name, split=_split_of_name(path.stem)))
    elif suffix_of(path) in DOCUMENT_SUFFIXES:
        result.files.append(SourceFile(path, name, id=_without_suffix(Path(path.name))))
    else:
        raise ValueError(
            f"{path}: expected a table ({', '.join(TABLES)}), a document ({', '.join(sorted(DOCUMENT_SUFFIXES))}) or an archive "
            f"({', '.join(ARCHIVES)}), got {suffix_of(path) or 'no suffix'}."
        )


def _extract(path: Path, result: SourceFiles) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="documents-")
    result.extracted.append(folder)
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder.name)  # noqa: S202 (members outside of the folder are put inside)
        else:
            with tarfile.open(path) as tar:
                tar.extractall(folder.name, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, RuntimeError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path}: cannot be extracted ({error}). Extract it, and give the folder.") from error
    return Path(folder.name)


def _add_folder(folder: Path, name: str, result: SourceFiles, has_documents: Callable[[Path], bool]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    hidden = [path for path in paths if _is_hidden(path.relative_to(folder))]
    visible = [path for path in paths if path not in set(hidden)]
    documents = [path for path in visible if suffix_of(path) in DOCUMENT_SUFFIXES]
    tables = [path for path in visible if suffix_of(path) in TABLES]
    if documents:
        tables = [path for path in tables if has_documents(path)]
    if tables:
        files = _tables_of(folder, tables, name)
    elif documents:
        files = _documents_of(folder, documents, name)
    else:
        raise ValueError(
            f"{name}: no documents found; expected tables ({', '.join(TABLES)}), documents "
            f"({', '.join(sorted(DOCUMENT_SUFFIXES))}), or folders with documents named after the labels."
        )
    result.files += files
    read = {file.path for file in files}
    result.unread |= dict.fromkeys(
        f"{name}/{path.relative_to(folder).as_posix()}" for path in paths if path not in read
    )


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)


def _tables_of(folder: Path, paths: Sequence[Path], name: str) -> list[SourceFile]:
    kinds = {TABLES[suffix_of(path)] for path in paths}
    if len(kinds) > 1:  # JSON files beside tables are usually their descriptions
        kinds -= {"JSON"}
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: tables of several kinds ({', '.join(sorted(kinds))}), which may be the same documents twice. Name those to "
            "read: --source A --source B, or a pattern such as 'folder/*.csv'."
        )
    files = []
    for path in paths:
        relative = path.relative_to(folder)
        split = next(filter(None, map(_split_of_name, [*relative.parts[:-1], path.stem])), "")
        if TABLES[suffix_of(path)] in kinds:
            files.append(SourceFile(path, f"{name}/{relative.as_posix()}", split=split))
    if any(file.split for file in files):
        files = [file for file in files if file.split]
    return files


def _split_of_name(name: str) -> str:
    """The split that a file's or folder's name holds as a word, or "".

    >>> _split_of_name("train-00000-of-00004"), _split_of_name("my_val.data"), _split_of_name("trained")
    ('train', 'validation', '')
    """
    splits = {to_split(word) for word in re.split(r"[^a-z]+", name.lower())} & set(SPLITS)
    return splits.pop() if len(splits) == 1 else ""


def _documents_of(folder: Path, paths: Sequence[Path], name: str) -> list[SourceFile]:
    """Documents with splits and labels by their folders. Those that stand beside the folders are left out."""
    parts = {path: path.relative_to(folder).parts for path in paths}
    root = 0
    # A single folder around folders, as archives have it.
    while len({part[root] for part in parts.values() if len(part) > root}) == 1 and not any(
        is_split(part[root]) or len(part) < root + 3 for part in parts.values()
    ):
        root += 1
    folders = {path: part[root:-1] for path, part in parts.items()}
    nested = {path: own for path, own in folders.items() if own}
    tops = {own[0] for own in nested.values()}
    splits = {top for top in tops if is_split(top)}
    has_labels_in_splits = any(len(own) > 1 for own in nested.values() if own[0] in splits)
    if splits and tops - splits and has_labels_in_splits:
        raise ValueError(
            f"{name}: the folders {', '.join(sorted(splits))} are named after splits, and {', '.join(sorted(tops - splits))} "
            "are not: give a folder that holds only splits, or only labels."
        )
    label_of: dict[Path, tuple[str, str]] = {}
    if not nested:
        label_of = dict.fromkeys(paths, ("", ""))
    elif splits and splits == tops:
        for path, own in nested.items():
            if not has_labels_in_splits or len(own) > 1:
                label_of[path] = (to_split(own[0]), own[1] if has_labels_in_splits else "")
    elif all(len(own) > 1 and is_split(own[1]) for own in nested.values()):
        label_of = {path: (to_split(own[1]), own[0]) for path, own in nested.items()}
    else:
        label_of = {path: ("", own[0]) for path, own in nested.items()}
    if len({split for split, _ in label_of.values()}) < 2:
        label_of = {path: ("", label) for path, (_, label) in label_of.items()}
    files = []
    for path, (split, label) in label_of.items():
        relative = path.relative_to(folder)
        files.append(
            SourceFile(
                path, f"{name}/{relative.as_posix()}", _without_suffix(Path(*relative.parts[root:])), split, label
            )
        )
    return files


def _without_suffix(path: Path) -> str:
    return path.with_suffix("").as_posix()
