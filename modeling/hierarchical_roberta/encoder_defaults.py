"""How an encoder was pretrained to be used: how its tokens become one vector, and what its texts begin with.

Pushed to the hub with the model; imports only its siblings.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig
from transformers.utils import cached_file

from .encoders import trained_config

logger = logging.getLogger(__name__)

GIVEN, DEFAULT = "given", "default"
# sentence-transformers' names, also those of its older boolean fields (`pooling_mode_cls_token`).
POOLING_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
# Of several prompts: the one for features of a classifier, else the one that `encode_document` of sentence-transformers takes.
PROMPTS = ("classification", "document", "passage", "corpus")
# Encoders whose model cards ask for something else than the mean and no prefix, for copies of them without the files of
# sentence-transformers: start of the name, token_pooling, chunk_prefix. Of several prefixes it is the one for features of a
# classifier: E5 ("query: "), Nomic Embed.
KNOWN_ENCODERS = (
    (r"bge-(small|base|large|m3)", "cls", ""),
    (r"snowflake-arctic-embed", "cls", ""),
    (r"mxbai-embed-large", "cls", ""),
    (r"granite-embedding", "cls", ""),
    (r"gte-(modernbert|multilingual)-base|gte-(base|large)-en-v1\.5", "cls", ""),
    (r"(multilingual-)?e5-(small|base|large)(?!.*instruct)", "mean", "query: "),
    (r"nomic-embed-text", "mean", "classification: "),
    (r"modernbert-embed", "mean", "search_document: "),
)


def with_encoder_defaults(
    options: dict[str, Any], name_or_path: str, revision: str, encoder_config: PreTrainedConfig
) -> dict[str, Any]:
    """`options` of a model, with the encoder's own `token_pooling` and `chunk_prefix` where they are missing or None.

    Both are logged with their origin.

    Raises:
        ValueError: a file of the encoder is not valid JSON.
    """
    names = ("token_pooling", "chunk_prefix")
    chosen = {name: (options[name], GIVEN) for name in names if options.get(name) is not None}
    if len(chosen) < len(names):
        chosen = encoder_defaults(name_or_path, revision, encoder_config) | chosen
    said = ", ".join(f"{name} {chosen[name][0]!r} ({chosen[name][1]})" for name in names)
    is_detail = all(origin in (GIVEN, DEFAULT) for _, origin in chosen.values())
    logger.info(f"Chunks of {name_or_path}: {said}.", extra={"detail": is_detail})
    return options | {name: value for name, (value, _) in chosen.items()}


def encoder_defaults(name_or_path: str, revision: str, encoder_config: PreTrainedConfig) -> dict[str, tuple[str, str]]:
    """`token_pooling` and `chunk_prefix` that an encoder was pretrained with, each as value and origin.

    In this order: those of a trained classifier, the files of sentence-transformers in the encoder's folder or repository, the
    table `KNOWN_ENCODERS`, the last token of a causal decoder (no other has seen the whole chunk), the mean and no prefix.
    Files that are missing or cannot be reached count as saying nothing.

    Raises:
        ValueError: a file is not valid JSON, or has other content than sentence-transformers writes.
    """
    if trained := trained_config(name_or_path, revision):
        return {name: (getattr(trained, name), "inherited") for name in ("token_pooling", "chunk_prefix")}
    try:
        pooling, prefix = _saved_pooling(name_or_path, revision), _saved_prefix(name_or_path, revision)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"modules.json or config_sentence_transformers.json of {name_or_path} is not as sentence-transformers writes it "
            f"({type(error).__name__}: {error}): repair or delete it."
        ) from error
    for pattern, known_pooling, known_prefix in KNOWN_ENCODERS:
        if re.match(pattern, Path(name_or_path).name.lower()):
            pooling = pooling or (known_pooling, "by its name")
            prefix = prefix or (known_prefix, "by its name")
    kind = type(encoder_config)
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if is_decoder and not encoder_config.is_encoder_decoder:
        pooling = pooling or ("last", "a decoder")
    return {"token_pooling": pooling or ("mean", DEFAULT), "chunk_prefix": prefix or ("", DEFAULT)}


def _saved_pooling(name_or_path: str, revision: str) -> tuple[str, str] | None:
    """The pooling of a sentence-transformers model; the mean, with the reason, for one that is not supported."""
    modules = _read_json(name_or_path, revision, "modules.json") or []
    folder = next((module["path"] for module in modules if module["type"].split(".")[-1] == "Pooling"), None)
    content = folder and _read_json(name_or_path, revision, f"{folder}/config.json")
    if not content:
        return None
    old = [
        re.sub("^pooling_mode_|_tokens?$", "", name)
        for name in content
        if name.startswith("pooling_mode_") and content[name]
    ]
    modes = content.get("pooling_mode", old)
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) == 1 and modes[0] in POOLING_MODES:
        return POOLING_MODES[modes[0]], f"{folder}/config.json"
    return "mean", f"{folder}/config.json has {' and '.join(modes) or 'none'}, which is not supported"


def _saved_prefix(name_or_path: str, revision: str) -> tuple[str, str] | None:
    """The first of `PROMPTS` that a sentence-transformers model has; empty ones are what it saves for models without any."""
    content = _read_json(name_or_path, revision, "config_sentence_transformers.json") or {}
    prompts = {name.lower(): prompt for name, prompt in (content.get("prompts") or {}).items()}
    return next(((prompts[name], f"its prompt for {name}") for name in PROMPTS if prompts.get(name)), None)


def _read_json(name_or_path: str, revision: str, file: str) -> Any:
    """A file of a folder or repository, found as `AutoTokenizer` finds its own; None if there is none."""
    try:
        path = cached_file(name_or_path, file, revision=revision)
    except OSError:
        return None
    try:
        return json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} of {name_or_path} is not valid JSON ({error}): repair or delete it.") from error
