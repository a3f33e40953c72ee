"""Cache of a frozen encoder's chunk embeddings, as Arrow files next to the prepared dataset.

The cache key covers everything that the embeddings depend on: the encoder's weights, the data (with its tokenizer), the
chunk geometry and prefix, the pooling of tokens and the precision. Used by train_hf.py with --freeze_encoder.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data.chunk_dataset import ChunkedDocuments, ChunkVectorDocuments
from data.collator import DocumentCollator
from modeling.file_utils import sync_to_disk
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.data_loading import ignore_signals

logger = logging.getLogger(__name__)

FEATURES = datasets.Features({"chunk_vectors": datasets.List(datasets.Value("float32"))})
DOCUMENTS_AT_ONCE = {"cuda": 32}  # elsewhere 4, so that chunks of similar length are found among several documents
MIN_PER_FILE, MAX_FILES = 16, 256


def cache_key(model: HierarchicalRobertaForSequenceClassification, manifest: dict[str, Any], precision: str) -> str:
    """Hash of everything the embeddings depend on. With the policy `random`, all chunks are cached, whatever max_chunks is;
    with `lexical`, those that the fitted features select in evaluation."""
    digest = hashlib.sha256()
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    config = model.config
    if config.chunk_policy == "lexical" and model.lexical is not None:
        for value in model.lexical.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    cut = None if config.chunk_policy == "random" else (config.max_chunks, config.chunk_policy)
    geometry = [config.chunk_length, config.chunk_overlap, cut, config.chunk_prefix, config.token_pooling]
    encoder = config.encoder_config.to_dict()
    rest = [manifest["data_fingerprint"], precision, geometry, encoder.get("hidden_act"), encoder.get("model_type")]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:20]


def cached_chunk_vectors(
    model: HierarchicalRobertaForSequenceClassification,
    splits: dict[str, ChunkedDocuments],
    collator: DocumentCollator,
    cache_dir: Path,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> dict[str, ChunkVectorDocuments]:
    """Splits with cached embeddings in place of tokens; missing ones are encoded.

    Files hold a few documents each, are distributed over the processes, and are renamed when complete, so that a killed run
    continues, also with another number of processes.
    """
    result = {}
    for name, chunked in splits.items():
        if chunked.chunk_policy == "lexical":
            chunked.training = False  # what is cached does not change from epoch to epoch
        folder = cache_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        files = vector_files(folder, len(chunked))
        mine = list(files.items())[accelerator.process_index :: accelerator.num_processes]
        missing = {rows: path for rows, path in mine if not path.is_file()}
        if missing:
            encode_files(model, chunked, collator, missing, accelerator, name, num_workers)
        else:
            logger.info(f"Using cached embeddings of {name} from {folder}.")
        accelerator.wait_for_everyone()
        vectors: Any = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files.values()])
        if len(vectors) != len(chunked):
            raise ValueError(f"{folder} has {len(vectors)} of {len(chunked)} documents: delete it, and run again.")
        with_tokens = model.lexical is not None and name != "train"  # in training the features are not counted
        result[name] = ChunkVectorDocuments(chunked, vectors, model.config.hidden_size, with_tokens)
    return result


def vector_files(folder: Path, num_documents: int) -> dict[range, Path]:
    """Files of a split's embeddings, by range of documents."""
    size = max(MIN_PER_FILE, -(-num_documents // MAX_FILES))
    starts = range(0, num_documents, size)
    return {range(start, min(start + size, num_documents)): folder / f"{start:09d}.arrow" for start in starts}


def write_vectors(path: Path, documents: Iterable[np.ndarray]) -> None:
    """Write the embeddings (C, D) of documents atomically."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with ArrowWriter(path=str(partial), features=FEATURES, writer_batch_size=16) as writer:
            for chunk_CD in documents:
                writer.write({"chunk_vectors": chunk_CD.ravel()})
            writer.finalize()
        sync_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def document_means(documents: ChunkVectorDocuments) -> torch.Tensor:
    """Mean chunk embedding of each document, (B, D), over all its cached chunks."""
    return torch.stack([documents.document_mean(index) for index in range(len(documents))])


def encode_files(
    model: HierarchicalRobertaForSequenceClassification,
    chunked: ChunkedDocuments,
    collator: DocumentCollator,
    files: dict[range, Path],
    accelerator: Accelerator,
    name: str,
    num_workers: int,
) -> None:
    """Encode documents into one Arrow file per range."""
    max_chunks = chunked.max_chunks
    if chunked.chunk_policy == "random":
        chunked.max_chunks = 2**31  # every epoch samples from all chunks
    model = model.eval().to(accelerator.device)
    hidden = None if accelerator.is_main_process else True  # None: where there is no terminal
    progress = tqdm(total=sum(map(len, files)), desc=f"Encoding {name}", unit=" documents", disable=hidden)
    on_cuda = accelerator.device.type == "cuda"
    at_once = DOCUMENTS_AT_ONCE.get(accelerator.device.type, 4)
    # Batches do not span files: rounding would differ after a resume.
    batches: list[Any] = [rows[start : start + at_once] for rows in files for start in range(0, len(rows), at_once)]
    loader = DataLoader(
        chunked,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=on_cuda,
        worker_init_fn=ignore_signals,
    )

    def encoded() -> Iterator[np.ndarray]:
        for batch in loader:
            ids_NL, mask_NL = (
                batch[key].to(accelerator.device, non_blocking=on_cuda) for key in ("input_ids", "attention_mask")
            )
            lengths = [length for document in batch["chunk_lengths"] for length in document]
            with torch.no_grad(), accelerator.autocast():
                chunk_ND = model.encode_chunks(ids_NL, mask_NL, lengths).float().cpu()
            for chunk_CD in chunk_ND.split([len(document) for document in batch["chunk_lengths"]]):
                progress.update()  # before the yield: the generator is not resumed after the last document
                yield chunk_CD.numpy()

    documents = encoded()
    for rows, path in files.items():
        write_vectors(path, islice(documents, len(rows)))
    progress.close()
    chunked.max_chunks = max_chunks
