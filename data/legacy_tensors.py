"""The older form of prepared documents: one file of tensors a split. Read, never written."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data.documents import SPLITS
from data.tokenization import TOKEN_FEATURES

LEGACY_FILES = {split: f"{name}_dataset.pt" for split, name in zip(SPLITS, ("train", "val", "test"), strict=True)}


def read_legacy(
    folder: Path, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None
) -> datasets.DatasetDict:
    """The older form of such data: `train_dataset.pt`, `val_dataset.pt`, `test_dataset.pt`, each a dict of tensors
    `input_ids` and `attention_mask` (documents, chunks, tokens) and `labels` (documents).

    Special and padding tokens are taken off and a chunk's start is kept as a paragraph's. The text is decoded from the
    tokens; the characters of each token are not known (token_start and token_end are -1).

    Raises:
        ValueError: a file that is not such a dict (nothing but tensors is ever unpickled).
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
                    f"{folder / file}: document {index} has label {rows[-1]['label']}, and there are {len(names)} labels."
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
            raise ValueError(f"{folder}: there is no {LEGACY_FILES[split]}.")
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=features) for split, rows in parts.items()}
    )


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a file of tensors (a pickle that would run code is never loaded): "
            f"{str(error).splitlines()[0]}"
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
            f"{tuple(tensors['attention_mask'].shape)} and labels {tuple(tensors['labels'].shape)} do not fit together."
        )
    return tensors
