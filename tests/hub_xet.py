"""The Xet part of our hub double: xorbs (runs of compressed chunks) and shards (which chunks make which file).

Written from xet-core's open specification (its spec/xorb.md, spec/shard.md and spec/api.md). Uploaded xorbs are kept
as they came and downloads are answered with ranges of them, so the client unpacks its own bytes; we unpack only when
a test reads a file or looks for bytes. Two things are taken on trust, because they need BLAKE3, which is not in the
standard library: that a xorb and a file hash to the names that the client gave them.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

SHARD_HEADER = 48
SHARD_ENTRY = struct.Struct("<32s4I")  # a hash and four numbers: the shape of every entry of a shard
SHARD_END = b"\xff" * 32
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
XORB_FOOTER = b"XETBLOB"


def hex_of(raw: bytes) -> str:
    """A 32-byte hash as the protocol writes it: four little-endian numbers, not 32 bytes."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _lz4_length(block: bytes, at: int, length: int) -> tuple[int, int]:
    """A length of 15 goes on in the bytes that follow, up to one that is not 255."""
    more = 255 if length == 15 else 0
    while more == 255:
        more, at = block[at], at + 1
        length += more
    return length, at


def _unpack_lz4_block(block: bytes, out: bytearray) -> None:
    at = 0
    while True:
        token = block[at]
        length, at = _lz4_length(block, at + 1, token >> 4)
        out += block[at : at + length]
        at += length
        if at >= len(block):  # the last sequence is literals only
            return
        start = len(out) - int.from_bytes(block[at : at + 2], "little")
        length, at = _lz4_length(block, at + 2, token & 15)
        length += 4
        while length:  # a match may reach into what it is itself writing
            piece = out[start : start + length]
            out += piece
            length -= len(piece)


def unpack_lz4(frame: bytes) -> bytes:
    if frame[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("not an LZ4 frame")
    flags = frame[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        length = size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + length]
        if size >> 31:
            out += block
        else:
            _unpack_lz4_block(block, out)
        at += 4 + length + (4 if flags & 16 else 0)
    return bytes(out)


def _ungroup(grouped: bytes) -> bytes:
    """Undo byte grouping: first every fourth byte from 0, then from 1, 2 and 3."""
    out, at = bytearray(len(grouped)), 0
    for first in range(4):
        count = len(range(first, len(grouped), 4))
        out[first::4] = grouped[at : at + count]
        at += count
    return bytes(out)


class Xorb:
    """An uploaded run of chunks, each `version, packed size (3 bytes), scheme, size (3 bytes)` and its data."""

    def __init__(self, packed: bytes):
        self.packed = packed
        self.chunks: list[tuple[int, int, int, int]] = []  # where the header is, where the data ends, scheme, size
        at = 0
        while at < len(packed) and packed[at : at + len(XORB_FOOTER)] != XORB_FOOTER:
            version, scheme = packed[at], packed[at + 4]
            end = at + 8 + int.from_bytes(packed[at + 1 : at + 4], "little")
            if version != 0 or scheme > 2 or end > len(packed):
                raise ValueError(f"chunk {len(self.chunks)} of the xorb is malformed")
            self.chunks.append((at, end, scheme, int.from_bytes(packed[at + 5 : at + 8], "little")))
            at = end

    @cached_property
    def unpacked(self) -> list[bytes]:
        return list(self._unpack())

    def _unpack(self) -> Iterator[bytes]:
        for at, end, scheme, size in self.chunks:
            data = self.packed[at + 8 : end]
            if scheme:
                data = unpack_lz4(data)
            if scheme == 2:
                data = _ungroup(data)
            if len(data) != size:
                raise ValueError(f"a chunk unpacks to {len(data)} bytes and its header says {size}")
            yield data


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` (not included) of a xorb, `size` bytes unpacked."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class XetFile:
    hash: str
    sha256: str
    terms: list[Term]
    xorbs: dict[str, Xorb]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)

    def read(self) -> bytes:
        data = b"".join(b"".join(self.xorbs[term.xorb].unpacked[term.start : term.end]) for term in self.terms)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"the chunks of {self.hash} make another file than its sha256 {self.sha256}")
        return data


class XetStore:
    """What was uploaded. Malformed input is a ValueError."""

    def __init__(self) -> None:
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, XetFile] = {}

    def put_xorb(self, xorb: str, packed: bytes) -> bool:
        if xorb in self.xorbs:
            return False
        self.xorbs[xorb] = Xorb(packed)
        return True

    def put_shard(self, shard: bytes) -> list[XetFile]:
        """The files that a shard lists, once all of them are found whole."""
        files, at = [], SHARD_HEADER
        while True:
            file, flags, num_terms, _, _ = SHARD_ENTRY.unpack_from(shard, at)
            at += SHARD_ENTRY.size
            if file == SHARD_END:
                break
            terms = []
            for _ in range(num_terms):
                xorb, _, size, start, end = SHARD_ENTRY.unpack_from(shard, at)
                at += SHARD_ENTRY.size
                terms.append(self._checked(Term(hex_of(xorb), start, end, size)))
            if flags & WITH_VERIFICATION:
                at += num_terms * SHARD_ENTRY.size
            if not flags & WITH_METADATA:
                raise ValueError(f"the shard names no sha256 for file {hex_of(file)}")
            sha256 = hex_of(shard[at : at + 32])
            at += SHARD_ENTRY.size
            files.append(XetFile(hex_of(file), sha256, terms, self.xorbs))
        self.files.update({file.hash: file for file in files})
        return files

    def _checked(self, term: Term) -> Term:
        if term.xorb not in self.xorbs:
            raise ValueError(f"the shard uses xorb {term.xorb}, which was never uploaded")
        chunks = self.xorbs[term.xorb].chunks
        if not term.start < term.end <= len(chunks):
            raise ValueError(f"the shard uses chunks {term.start} to {term.end} of a xorb of {len(chunks)}")
        if sum(size for _, _, _, size in chunks[term.start : term.end]) != term.size:
            raise ValueError(f"the shard and xorb {term.xorb} disagree on the size of a term")
        return term

    def reconstruction(self, file: XetFile, first: int, end: int, url_of) -> dict:
        """Which terms hold bytes `first` to `end` (not included), and where each xorb's bytes lie: one range a xorb."""
        terms, offset, at = [], 0, 0
        for term in file.terms:
            if at < end and at + term.size > first:
                if not terms:
                    offset = first - at
                terms.append(term)
            at += term.size
        xorbs = {}
        for name in {term.xorb for term in terms}:
            start = min(term.start for term in terms if term.xorb == name)
            stop = max(term.end for term in terms if term.xorb == name)
            chunks = self.xorbs[name].chunks
            place = {"start": chunks[start][0], "end": chunks[stop - 1][1] - 1}
            xorbs[name] = [{"url": url_of(name), "ranges": [{"chunks": {"start": start, "end": stop}, "bytes": place}]}]
        return {
            "offset_into_first_range": offset,
            "terms": [
                {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.start, "end": term.end}}
                for term in terms
            ],
            "xorbs": xorbs,
        }
