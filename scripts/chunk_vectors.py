"""What a frozen encoder makes of every chunk, computed once and kept as Arrow beside the prepared data.

The key of the cache is everything that the vectors depend on: the encoder's weights, the data (with its tokenizer), the
chunk geometry, and the precision. Used by train_hf.py with --freeze_encoder.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from data.chunked import ChunkedDocuments, ChunkVectorDocuments
from data.collator import DocumentCollator
from modeling.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification

logger = logging.getLogger(__name__)

FEATURES = datasets.Features({"chunk_vectors": datasets.List(datasets.Value("float32"))})
DOCUMENTS_AT_ONCE = 4  # so that chunks of like length are found among several documents


def cache_key(model: HierarchicalRobertaForSequenceClassification, data_fingerprint: str, precision: str) -> str:
    """Names what the vectors depend on. Where all chunks are kept (policy `random`) max_chunks is not part of it."""
    digest = hashlib.sha256()
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    config = model.config
    cut = None if config.chunk_policy == "random" else (config.max_chunks, config.chunk_policy)
    geometry = [config.chunk_length, config.chunk_overlap, cut]
    encoder = config.encoder_config.to_dict()
    rest = [data_fingerprint, precision, geometry, encoder.get("hidden_act"), encoder.get("model_type")]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:20]


def cached_chunk_vectors(
    model: HierarchicalRobertaForSequenceClassification,
    splits: dict[str, ChunkedDocuments],
    collator: DocumentCollator,
    cache_dir: Path,
    accelerator: Accelerator,
) -> dict[str, ChunkVectorDocuments]:
    """The splits with vectors in place of tokens, encoded now where the cache does not have them.

    Each process encodes a contiguous share of the documents. A folder gets its name when it is whole.
    """
    size = model.config.hidden_size
    result = {}
    for name, chunked in splits.items():
        folder = cache_dir / name
        if not folder.is_dir():
            # Named after the first process: another run may be filling the same cache.
            [pid] = broadcast_object_list([os.getpid()])
            partial = cache_dir / f"{name}.partial-{pid}"
            partial.mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            encode_share(model, chunked, collator, partial, accelerator, name)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                if folder.is_dir():
                    shutil.rmtree(partial)
                else:
                    partial.rename(folder)
            accelerator.wait_for_everyone()
        else:
            logger.info(f"Chunk vectors of {name} are taken from {folder}.")
        parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]
        vectors: Any = datasets.concatenate_datasets(parts)
        result[name] = ChunkVectorDocuments(chunked, vectors, size)
    return result


def document_means(documents: ChunkVectorDocuments) -> torch.Tensor:
    """The mean chunk vector of each document, (B, D), over all the chunks that are kept of it."""
    return torch.stack([documents.document_mean(index) for index in range(len(documents))])


def encode_share(
    model: HierarchicalRobertaForSequenceClassification,
    chunked: ChunkedDocuments,
    collator: DocumentCollator,
    folder: Path,
    accelerator: Accelerator,
    name: str,
) -> None:
    """Encode this process's share of a split's documents into an Arrow file of its own."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = range(rank * len(chunked) // processes, (rank + 1) * len(chunked) // processes)
    max_chunks = chunked.max_chunks
    if chunked.chunk_policy == "random":
        chunked.max_chunks = 2**31  # every epoch draws among all of a document's chunks
    loader = DataLoader(Subset(chunked, share), DOCUMENTS_AT_ONCE, collate_fn=collator)
    model = model.eval().to(accelerator.device)
    progress = tqdm(
        total=len(share), desc=f"Encoding {name}", unit=" documents", disable=not accelerator.is_main_process
    )
    with ArrowWriter(path=str(folder / f"{rank:05d}.arrow"), features=FEATURES, writer_batch_size=16) as writer:
        for batch in loader:
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            with torch.no_grad(), accelerator.autocast():
                chunk_ND = model.encode_chunks(batch["input_ids"], batch["attention_mask"]).float().cpu()
            for chunk_CD in chunk_ND.split(batch["num_chunks"].tolist()):
                writer.write({"chunk_vectors": chunk_CD.numpy().ravel()})
                progress.update()
        writer.finalize()
    progress.close()
    chunked.max_chunks = max_chunks
