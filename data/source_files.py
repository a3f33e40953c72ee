"""What `--source` names: files, folders, globs, archives, saved `datasets` and datasets on the hub.

Layouts of a folder that are recognized:

    train.csv, test.csv                       tables; splits by their names, also in shards (train-00000-of-00004.parquet)
    train/part-1.parquet, test/part-1.parquet tables; splits by their folders
    pos/1.txt, neg/2.txt                      one folder per label, with any folders below
    train/pos/1.txt, test/neg/2.txt           the same per split (or splits in labels: pos/train/1.txt)
    1.txt, 2.txt                              documents without labels
    corpus/…                                  any of these in a folder of its own
    list.csv, texts/1.txt                     a table that lists documents in the column `path`

Every file in the folder that is not read is in `SourceFiles.unread`.
"""

import glob
import os
import re
import stat
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from data.document_files import DOCUMENT_SUFFIXES
from data.text_files import BROKEN_ARCHIVE, OPENERS, open_bytes, suffix_of

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
    ".xlsm": "spreadsheet",
    ".xls": "spreadsheet",
    ".xlsb": "spreadsheet",
    ".ods": "spreadsheet",
}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SHARD = re.compile(r"(.*)-\d+-of-(\d+)")  # train-00000-of-00004
# Documents beside tables that are not meant to be read.
NOTES = ("readme", "license", "licence", "copying", "changelog", "citation")


@dataclass
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


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Join the first few names, and count the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe_unread(names: Sequence[str]) -> str:
    """A sentence about the files that are not read, or ""."""
    return f"Not read ({len(names)}): {shorten(names)}." if names else ""


def is_saved(path: Path) -> bool:
    """Whether a folder was saved by `datasets`."""
    return (path / "dataset_dict.json").exists() or (
        (path / "state.json").exists() and (path / "dataset_info.json").exists()
    )


def to_split(name: str) -> str:
    """The split that a name stands for (`val` → validation), else the name in lower case."""
    name = name.strip().lower()
    return SPLIT_ALIASES.get(name, name)


def find_source_files(
    sources: Sequence[str], has_documents: Callable[[Path], bool], by_folder: bool = True
) -> SourceFiles | None:
    """The files of sources that are on this machine; None if a single source is no path (but perhaps on the hub).

    Args:
        has_documents: whether a table has a text column, or one with the paths of documents.
        by_folder: folders give documents labels and splits. False: every document is read, with neither.

    Raises:
        ValueError: no such file, an unsupported one, or a folder whose layout is not clear.
    """
    result = SourceFiles()
    for source in sources:
        for path in _paths(source, is_single=len(sources) == 1):
            if path is None:
                return None
            _add(path, result, has_documents, by_folder)
    by_path: dict[Path, SourceFile] = {}  # each once
    for file in result.files:
        first = by_path.setdefault(file.path.resolve(), file)
        if os.path.abspath(first.path) != os.path.abspath(file.path):  # a link
            result.unread[file.name] = None
    result.files = list(by_path.values())
    with_splits = {file.path.parent for file in result.files if file.split}
    names = Counter(file.name for file in result.files)
    if repeated := [file for file in result.files if names[file.name] > 1]:
        parent = os.path.commonpath([file.path.absolute() for file in repeated])
        for file in repeated:
            file.name = file.path.absolute().relative_to(parent).as_posix()
    for file in result.files:
        if not (file.split or file.is_document or file.path.parent in with_splits):
            file.split = split_of_name(file.path.absolute().parent.name)
    # Of train.csv alone the splits are still to be made.
    has_splits = len({file.split for file in result.files} - {""}) > 1
    ids = Counter(file.id for file in result.files if file.is_document)
    for file in result.files:
        file.split = file.split if has_splits else ""
        file.id = file.name if ids[file.id] > 1 else file.id
    return result


def _paths(source: str, is_single: bool) -> list[Path | None]:
    path = Path(source)
    if source and path.exists():
        return [path]
    if glob.has_magic(source):
        if matches := sorted(glob.glob(source, recursive=True)):
            return [Path(match) for match in matches]
        raise ValueError(f"{source}: no file matches.")
    if source and is_single and suffix_of(path) not in {*TABLES, *DOCUMENT_SUFFIXES} and not source.endswith(ARCHIVES):
        return [None]
    raise ValueError(f"{source or 'An empty --source'}: no such file or folder.")


def _add(path: Path, result: SourceFiles, has_documents: Callable[[Path], bool], by_folder: bool) -> None:
    name = path.name or str(path)
    if path.is_dir():
        _add_folder(path, name, result, has_documents, by_folder)
    elif not path.is_file():
        raise ValueError(f"{path}: not a regular file.")
    elif name.lower().endswith(ARCHIVES):
        _add_folder(_extract(path, result), name, result, has_documents, by_folder)
    elif suffix_of(path) in TABLES:
        result.files.append(SourceFile(path, name, split=split_of_name(path.stem)))
    elif suffix_of(path) in DOCUMENT_SUFFIXES:
        result.files.append(SourceFile(path, name, id=_without_suffix(Path(name))))
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
                for member in archive.infolist():
                    member.filename = _name_in_zip(member)
                    archive.extract(member, folder.name)  # members outside of the folder are put inside
        else:
            with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                tar.extractall(folder.name, filter="data")
                while file.read(1 << 20):  # to the end, where the checksum is compared
                    pass
            if path.suffix.lower() == ".tar" and _tail(path).strip(b"\0"):  # has no checksum, but an end
                raise tarfile.ReadError("it is cut off")
    except (*BROKEN_ARCHIVE, zipfile.BadZipFile, tarfile.TarError, RuntimeError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: cannot be extracted ({error}). Extract it, and give the folder.") from error
    return Path(folder.name)


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read()


def _name_in_zip(member: zipfile.ZipInfo) -> str:
    """The path of a member. macOS writes UTF-8 without the flag for it, old Windows programs write backslashes.

    Raises:
        BadZipFile: a link, or a name in another encoding, which the archive does not name.
    """
    name = member.filename
    if stat.S_ISLNK(member.external_attr >> 16):
        raise zipfile.BadZipFile(f"{name!r} is a link")
    if not member.flag_bits & 0x800 and name == member.orig_filename:
        try:
            name = name.encode("cp437").decode()
        except UnicodeDecodeError as error:
            raise zipfile.BadZipFile(f"the name {name!r} is in an unknown encoding") from error
    return name.replace("\\", "/")


def _add_folder(
    folder: Path, name: str, result: SourceFiles, has_documents: Callable[[Path], bool], by_folder: bool
) -> None:
    paths, others = _files_below(folder)
    visible = [path for path in paths if not _is_hidden(path.relative_to(folder))]
    if saved := next(filter(is_saved, sorted({path.parent for path in visible})), None):
        raise ValueError(
            f"{name}: saved by datasets is the folder {saved.relative_to(folder)} in it: give only that one."
        )
    documents = [path for path in visible if suffix_of(path) in DOCUMENT_SUFFIXES]
    tables = [path for path in visible if suffix_of(path) in TABLES and not path.name.startswith("dataset_info")]
    if any(not path.stem.lower().startswith(NOTES) for path in documents):
        tables = [path for path in tables if has_documents(path)]
    if tables:
        files = _tables_of(folder, tables, name, has_documents)
    elif documents:
        files = _documents_of(folder, documents, name, by_folder)
    else:
        raise ValueError(
            f"{name}: no documents found; expected tables ({', '.join(TABLES)}), documents "
            f"({', '.join(sorted(DOCUMENT_SUFFIXES))}), or folders with documents named after the labels."
            f" {describe_unread([path.relative_to(folder).as_posix() for path in paths])}".rstrip()
        )
    own_split = split_of_name(folder.resolve().name) if by_folder else ""
    for file in files:
        file.split = file.split or own_split
    result.files += files
    read = {file.path for file in files}
    unread = sorted([*others, *(path for path in paths if path not in read)])
    result.unread |= dict.fromkeys(f"{name}/{path.relative_to(folder).as_posix()}" for path in unread)


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Regular files, also behind links to folders, and whatever else there is (broken and repeated links, pipes)."""

    def fail(error: OSError) -> NoReturn:
        raise error

    files: list[Path] = []
    others: list[Path] = []
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that is read already
            others.append(Path(parent))
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            path = Path(parent, name)
            (files if path.is_file() else others).append(path)
    return sorted(files), others


def _is_hidden(relative: Path) -> bool:
    """Hidden files, what macOS adds to archives, and what Office programs write beside an open file."""
    return any(part.startswith((".", "~$")) or part == "__MACOSX" for part in relative.parts)


def _tables_of(
    folder: Path, paths: Sequence[Path], name: str, has_documents: Callable[[Path], bool]
) -> list[SourceFile]:
    if len({TABLES[suffix_of(path)] for path in paths}) > 1:  # JSON files beside tables are usually their descriptions
        paths = [path for path in paths if TABLES[suffix_of(path)] != "JSON" or has_documents(path)]
    kinds = {TABLES[suffix_of(path)] for path in paths}
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: tables of several kinds ({', '.join(sorted(kinds))}), which may be the same documents twice. Name those to "
            "read: --source A --source B, or a pattern such as 'folder/*.csv'."
        )
    by_name = Counter(path.with_suffix("") if path.suffix.lower() in OPENERS else path for path in paths)
    if twice := [path.name for path, count in by_name.items() if count > 1]:
        raise ValueError(f"{name}: {shorten(twice)} is there compressed and not, the same documents twice: remove one.")
    shards = Counter(match.groups() for path in paths if (match := SHARD.match(path.relative_to(folder).as_posix())))
    if incomplete := [
        f"{prefix} ({count} of {int(total)})" for (prefix, total), count in shards.items() if count < int(total)
    ]:
        raise ValueError(
            f"{name}: shards are missing of {shorten(incomplete)}: add them, or name those to read with --source."
        )
    files = []
    for path in paths:
        relative = path.relative_to(folder)
        split = next(filter(None, map(split_of_name, [*relative.parts[:-1], path.stem])), "")
        files.append(SourceFile(path, f"{name}/{relative.as_posix()}", split=split))
    named = [file for file in files if file.split]
    others = [file for file in files if not file.split]
    if len({file.split for file in named}) == 1 and any(has_documents(file.path) for file in others):
        raise ValueError(
            f"{name}: {shorten([file.name for file in named])} is named after a split, and "
            f"{shorten([file.name for file in others])} is not: rename the others to train, validation or test, or name "
            "those to read: --source A --source B."
        )
    return named or files


def _exact_split(name: str) -> str:
    """The split that a name stands for, or ""."""
    return split if (split := to_split(name)) in SPLITS else ""


def split_of_name(name: str) -> str:
    """The split that a file's or folder's name holds as a word, or "".

    >>> split_of_name("train-00000-of-00004"), split_of_name("my_val.data"), split_of_name("reviewsTestset"), split_of_name("trained")
    ('train', 'validation', 'test', '')
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    splits = {to_split(re.sub("(set|data)$", "", word.lower())) for word in words} & set(SPLITS)
    return splits.pop() if len(splits) == 1 else ""


def _documents_of(folder: Path, paths: Sequence[Path], name: str, by_folder: bool) -> list[SourceFile]:
    """Documents with splits and labels by their folders. Those that stand beside such folders are left out."""
    parts = {path: path.relative_to(folder).parts for path in paths}
    root = _root(list(parts.values())) if by_folder else 0
    folders = {path: part[root:-1] for path, part in parts.items() if len(part) > root}
    nested = {path: own for path, own in folders.items() if own} if by_folder else {}
    tops = {own[0] for own in nested.values()}
    # As a word of a longer name, a split is one only if all folders have one, and not the same.
    words = set(map(split_of_name, tops))
    split_of = split_of_name if len(words) > 1 and "" not in words else _exact_split
    splits = {top for top in tops if split_of(top)}
    below = {own[1] for own in nested.values() if len(own) > 1}
    splits_below = {part for part in below if _exact_split(part)}
    has_labels_in_splits = any(len(own) > 1 for own in nested.values() if own[0] in splits)
    label_of: dict[Path, tuple[str, str]] = {}
    if not nested:
        label_of = dict.fromkeys(folders, ("", ""))
    elif splits == tops:
        for path, own in nested.items():
            if not has_labels_in_splits or len(own) > 1:
                label_of[path] = (split_of(own[0]), own[1] if has_labels_in_splits else "")
    elif splits and has_labels_in_splits:
        raise _unclear(name, splits, tops - splits)
    elif splits_below and splits_below != below:
        raise _unclear(name, splits_below, below - splits_below)
    elif splits_below:
        label_of = {path: (_exact_split(own[1]), own[0]) for path, own in nested.items() if len(own) > 1}
    else:
        label_of = {path: ("", own[0]) for path, own in nested.items()}
    files = []
    for path, (split, label) in label_of.items():
        relative = path.relative_to(folder)
        id_ = _without_suffix(Path(*relative.parts[root:]))
        files.append(SourceFile(path, f"{name}/{relative.as_posix()}", id_, split, label))
    return files


def _root(parts: Sequence[tuple[str, ...]]) -> int:
    """How many folders stand around the labels: a single one around others, as archives have it."""
    root = 0
    while True:
        inner = [part for part in parts if len(part) > root + 1]
        tops = {part[root] for part in inner}
        if len(tops) != 1 or _exact_split(*tops) or all(len(part) < root + 3 for part in inner):
            return root
        parts, root = inner, root + 1


def _unclear(name: str, splits: set[str], others: set[str]) -> ValueError:
    return ValueError(
        f"{name}: the folders {', '.join(sorted(splits))} are named after splits, and {', '.join(sorted(others))} not: give a "
        "folder that holds only splits, or only labels."
    )


def _without_suffix(path: Path) -> str:
    return path.with_suffix("").as_posix()
