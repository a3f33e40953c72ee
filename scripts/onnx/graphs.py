"""A classifier as two ONNX graphs: chunks → chunk vectors, and chunk vectors of a document → logits of subsets of its chunks.

C chunks of a document, S subsets of them, D hidden, K labels; (n, l): chunks and tokens of an encoder batch.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from torch import nn

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.pooling import pool_tokens

# All of onnxruntime's fused operators match what opset 18 decomposes to.
OPSET = 18
# Files of protobuf end at 2 GiB: beyond this, weights go to a file beside the graph.
MAX_INLINE_BYTES = 1_900_000_000


class EncoderGraph(nn.Module):
    """`encode_batch` of the model: `input_ids` and `attention_mask` (n, l) → chunk vectors (n, D)."""

    def __init__(self, model: HierarchicalRobertaForSequenceClassification):
        super().__init__()
        self.encoder, self.token_pooling = model.encoder, model.config.token_pooling

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return pool_tokens(output.last_hidden_state, self.token_pooling, attention_mask)


class HeadGraph(nn.Module):
    """`classify_subsets` of the model: `chunk_vectors` (C, D) and `kept` (S, C) → logits (S, K)."""

    def __init__(self, model: HierarchicalRobertaForSequenceClassification):
        super().__init__()
        self.model = model

    def forward(self, chunk_CD: torch.Tensor, kept_SC: torch.Tensor) -> torch.Tensor:
        return self.model.classify_subsets(chunk_CD, kept_SC)


def write_head(model: HierarchicalRobertaForSequenceClassification, path: Path) -> None:
    """Write the graph of pooling and head."""
    inputs = torch.randn(3, model.config.hidden_size), ~torch.eye(4, 3, dtype=torch.bool)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no ONNX form
    try:
        _save(_graph_of(HeadGraph(model), inputs, ["chunk_vectors", "kept"], "logits"), path)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def write_encoder(model: HierarchicalRobertaForSequenceClassification, path: Path) -> None:
    """Write the encoder's graph, as the exporter leaves it."""
    # Neither 1, which exporters take for a constant, nor longer than what the encoder reads.
    length = min(model.config.chunk_length, 24)
    ids_nl = torch.arange(3 * length).remainder(model.config.encoder_config.vocab_size).view(3, length)
    mask_nl = torch.ones_like(ids_nl)
    mask_nl[1, length // 2 :] = 0
    try:
        graph = _graph_of(EncoderGraph(model), (ids_nl, mask_nl), ["input_ids", "attention_mask"], "chunk_vectors")
    except Exception as error:  # torch's exporter raises what the encoder's code raises while it is traced
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(
            f"The encoder ({model.config.encoder_config.model_type}) cannot be exported to ONNX ({reason[:200]}): use "
            "scripts.predict, or train with another encoder."
        ) from error
    _save(graph, path)


def quantize(source: Path, path: Path) -> None:
    """Quantize the matrix products with weights: int8 weights, a scale a column; activations as they come, in uint8.

    The second product of a feed-forward layer, whose weights have more rows than columns, stays fp32: in int8 it
    costs most of the accuracy (docs/log.md, 2026-11-28), probably since its activations have outliers.
    """
    graph = onnx.load(source, load_external_data=False).graph
    is_tall = {weight.name: len(weight.dims) == 2 and weight.dims[0] > weight.dims[1] for weight in graph.initializer}
    kept = [node.name for node in graph.node if any(is_tall.get(name) for name in node.input)]
    options = {"DisableShapeInference": True, "DefaultTensorType": 1}
    large = source.stat().st_size + sum(each.stat().st_size for each in source.parent.glob(f"{source.name}.data"))
    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=kept,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=large > MAX_INLINE_BYTES,
        extra_options=options,
    )


def fuse(source: Path, path: Path) -> None:
    """Replace what onnxruntime has an operator for (attention, GELU, normalization of a sum). After quantization, which would
    leave fused attention as it is."""
    graph, _ = optimize_for_ort(onnx_ir.load(source))
    # The joint weights of queries, keys and values.
    fold_constants(graph, input_size_limit=2**40, output_size_limit=2**40)
    remove_unused_nodes(graph)
    _save(graph, path)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what exporter and quantizer say and warn of: their own code, and whole graphs where they fail."""
    previous, unread = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(unread), redirect_stderr(unread):
            yield
    finally:
        logging.disable(previous)


def _graph_of(module: nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str], output: str) -> onnx_ir.Model:
    # All sizes are dynamic but D, the second of the chunk vectors.
    is_fixed = [each.is_floating_point() for each in inputs]
    dynamic = [{0: torch.export.Dim.DYNAMIC, 1: None if fixed else torch.export.Dim.DYNAMIC} for fixed in is_fixed]
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=tuple(dynamic),
            opset_version=OPSET,
            input_names=names,
            output_names=[output],
            verbose=False,
        )
    assert program is not None
    return program.model


def _save(graph: onnx_ir.Model, path: Path) -> None:
    # Stack traces with the paths of this machine.
    parts: list[Any] = [graph, graph.graph, *graph.graph.all_nodes(), *graph.functions.values()]
    for part in parts:
        part.metadata_props.clear()
    num_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    onnx_ir.save(graph, path, external_data=f"{path.name}.data" if num_bytes > MAX_INLINE_BYTES else None)
