"""Legacy format of prepared documents: one tensor file per split (read-only support)."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data.source_files import SPLITS
from data.tokenization import TOKEN_FEATURES

LEGACY_FILES = {split: f"{name}_dataset.pt" for split, name in zip(SPLITS, ("train", "val", "test"), strict=True)}


def read_legacy(
    folder: Path, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None
) -> datasets.DatasetDict:
    """Read the legacy format: `train_dataset.pt`, `val_dataset.pt` and `test_dataset.pt`.

    Each is a dict of tensors `input_ids` and `attention_mask` (documents, chunks, tokens) and `labels` (documents).
    Special and padding tokens are removed, and chunk starts become paragraph starts. The text is decoded from the
    tokens; character offsets are unknown (token_start and token_end are -1).

    Raises:
        ValueError: a file is not such a dict (only tensors are unpickled).
    """
    parts = {}
    names = list(labels) if labels else None
    for split, file in LEGACY_FILES.items():
        if not (folder / file).is_file():
            continue
        tensors = _load_tensors(folder / file)
        ids_DCL, mask_DCL, labels_D = (tensors[key] for key in ("input_ids", "attention_mask", "labels"))
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        real_DCL = mask_DCL.bool() & ~torch.isin(ids_DCL, torch.tensor(sorted(special), dtype=ids_DCL.dtype))
        if names is None:
            names = [f"LABEL_{i}" for i in range(int(labels_D.max()) + 1)]
        rows = []
        for index, (ids_CL, real_CL) in enumerate(zip(ids_DCL, real_DCL, strict=True)):
            tokens = ids_CL[real_CL].numpy().astype(np.int32)
            starts = np.cumsum(real_CL.sum(dim=1).numpy())[:-1]
            breaks = np.zeros(len(tokens) + 1, dtype=np.int8)
            breaks[starts] = 2
            unknown = np.full(len(tokens), -1, dtype=np.int32)
            rows.append(
                {
                    "id": f"{split}-{index}",
                    "text": tokenizer.decode(tokens),
                    "label": int(labels_D[index]),
                    "input_ids": tokens,
                    "token_start": unknown,
                    "token_end": unknown,
                    "token_break": breaks[:-1],
                }
            )
            if not 0 <= rows[-1]["label"] < len(names):
                raise ValueError(
                    f"{folder / file}: document {index} has label {rows[-1]['label']}, expected 0 to {len(names) - 1}."
                )
        parts[split] = rows
    features = datasets.Features(
        {
            "id": datasets.Value("large_string"),
            "text": datasets.Value("large_string"),
            "label": datasets.ClassLabel(names=names),
            **TOKEN_FEATURES,
        }
    )
    for split in ("train", "validation"):
        if split not in parts:
            raise ValueError(f"{folder}: {LEGACY_FILES[split]} is missing.")
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=features) for split, rows in parts.items()}
    )


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a tensor file (pickles that could execute code are not loaded): {str(error).splitlines()[0]}"
        ) from error
    shapes = {"input_ids": 3, "attention_mask": 3, "labels": 1}
    for key, dims in shapes.items():
        value = tensors.get(key) if isinstance(tensors, dict) else None
        if not isinstance(value, torch.Tensor) or value.dim() != dims:
            raise ValueError(
                f"{path}: expected a dict with input_ids and attention_mask (documents, chunks, tokens) and labels "
                f"(documents); {key} is {tuple(value.shape) if isinstance(value, torch.Tensor) else 'missing'}."
            )
    if not tensors["input_ids"].shape == tensors["attention_mask"].shape or len(tensors["labels"]) != len(
        tensors["input_ids"]
    ):
        raise ValueError(
            f"{path}: input_ids {tuple(tensors['input_ids'].shape)}, attention_mask "
            f"{tuple(tensors['attention_mask'].shape)} and labels {tuple(tensors['labels'].shape)} do not match."
        )
    return tensors
