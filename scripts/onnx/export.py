"""A folder that predicts with onnxruntime alone, written completely or not at all, and checked against the model.

Used by scripts/export_onnx.py.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling import hierarchical_roberta
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from scripts.common.loading import load_classifier
from scripts.onnx import predict_onnx
from scripts.onnx.graphs import fuse, quantize, quietly, write_encoder, write_head

logger = logging.getLogger("export_onnx")

# Largest difference of a score from the pipeline's, before quantization.
TOLERANCE = 1e-4
# What predict_onnx.py imports of the model's package.
MODULES = ("chunking", "decision", "encoder_batches", "prefetch", "results")
REQUIREMENTS = "numpy>=1.26\ntokenizers>=0.22\nonnxruntime>=1.22\n"
FIELDS = (
    *("chunk_length", "chunk_overlap", "chunk_prefix", "max_chunks", "chunk_policy", "equal_lengths"),
    *("encoder_weight", "lexical_weight", "pooling", "chunk_transformer_layers"),
    # What `decision_of` reads.
    *("problem_type", "temperature", "class_biases", "label_calibration", "thresholds"),
)


def export_onnx(model_name: str, output_dir: Path, int8: bool = False) -> None:
    """Export a model, and check the result on a few documents.

    Args:
        int8: quantize the encoder's matrix products.

    Raises:
        ValueError: the output directory is not empty, the encoder cannot be exported, or its scores are not those of the
            model. Nothing is left in the output directory.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir} already exists: choose another, or delete it.")
    model, tokenizer = load_classifier(model_name)
    partial = output_dir.resolve().with_name(f".{output_dir.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_export(model, tokenizer, partial, int8)
        for name in ("exported.onnx", "quantized.onnx"):
            for leftover in partial.glob(f"{name}*"):
                leftover.unlink()
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file()) / 2**20
    logger.info(f"{output_dir} has {size:.0f} MiB. Try it: echo 'A text.' | python {output_dir / 'predict_onnx.py'}")


def write_export(
    model: HierarchicalRobertaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path, int8: bool
) -> None:
    """Write and check the files of an export; `exported.onnx` and `quantized.onnx` are not part of it."""
    pipeline = HierarchicalClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    write_predictor(model, tokenizer, folder)
    texts = sample_texts(pipeline)
    expected = pipeline(texts)
    with quietly():
        write_head(model, folder / "head.onnx")
        write_encoder(model, folder / "exported.onnx")
        fuse(folder / "exported.onnx", folder / "encoder.onnx")
    exported = predict_onnx.OnnxClassifier(folder)(texts)
    difference = largest_difference(expected, exported)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The export's scores differ from the model's by {difference:.1e} (at most {TOLERANCE:.0e} is accepted): the "
            f"encoder ({model.config.encoder_config.model_type}) cannot be exported to ONNX; use scripts.predict."
        )
    logger.info(f"Scores of {len(texts)} documents differ from the pipeline's by {difference:.1e} at the most.")
    if int8:
        with quietly():
            quantize(folder / "exported.onnx", folder / "quantized.onnx")
            for path in folder.glob("encoder.onnx*"):
                path.unlink()
            fuse(folder / "quantized.onnx", folder / "encoder.onnx")
        exported = predict_onnx.OnnxClassifier(folder)(texts)
        difference = largest_difference(expected, exported)
        if not difference <= 1:
            raise ValueError("The quantized encoder gives non-finite scores: export without --quantize.")
        logger.info(
            f"Quantized to int8: they differ by {difference:.3f} at the most. Compare the metrics on documents of your "
            "own before you use it."
        )


def write_predictor(
    model: HierarchicalRobertaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write all but the graphs: code, config, tokenizer, lexical features."""
    package = Path(hierarchical_roberta.__file__).parent
    (folder / package.name).mkdir()
    (folder / package.name / "__init__.py").write_text('"""Copied from hierarchical-roberta."""\n', encoding="utf-8")
    for name in MODULES:
        shutil.copyfile(package / f"{name}.py", folder / package.name / f"{name}.py")
    code = Path(predict_onnx.__file__).read_text(encoding="utf-8")
    (folder / "predict_onnx.py").write_text(code.replace("from modeling.", "from "), encoding="utf-8")
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    config: dict[str, Any] = {name: getattr(model.config, name) for name in FIELDS}
    config["labels"] = [model.config.id2label[k] for k in range(model.config.num_labels)]
    config["pad_token_id"] = tokenizer.pad_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    if (lexical := model.lexical_features_on_host()) is not None:
        arrays: dict[str, Any] = {name: buffer.numpy() for name, buffer in lexical.named_buffers()}
        np.savez(folder / "lexical.npz", **arrays)


def sample_texts(pipeline: HierarchicalClassificationPipeline) -> list[str]:
    """Texts of random tokens: none, a few, about a chunk, a few chunks, and more than are read (or eight chunks)."""
    tokenizer, body_length = pipeline.tokenizer, pipeline.chunker.body_length
    rng = np.random.default_rng(0)
    most = min(pipeline.model.config.max_chunks + 2, 8)
    counts = [5, body_length // 2, 2 * body_length + 3, most * body_length]
    ids = [rng.integers(len(tokenizer), size=count).tolist() for count in counts]
    return ["", *(tokenizer.decode(each, skip_special_tokens=True) for each in ids)]


def largest_difference(expected: list[dict[str, Any]], exported: list[dict[str, Any]]) -> float:
    """Largest absolute difference of a score.

    Raises:
        ValueError: other chunks were read.
    """
    for ours, theirs in zip(expected, exported, strict=True):
        if any(ours[name] != theirs[name] for name in ("num_chunks", "num_encoded_chunks", "truncated")):
            raise ValueError(
                "The export splits documents into other chunks than the model: its tokenizer cannot be used."
            )
    one, other = (np.array([list(result["scores"].values()) for result in results]) for results in (expected, exported))
    return float(np.abs(one - other).max())
