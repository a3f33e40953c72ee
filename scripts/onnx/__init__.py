"""Export to ONNX, and the module that predicts with what was exported."""

from pathlib import Path


def is_export(model: str) -> bool:
    """Whether a model's name is that of a folder written by scripts.export_onnx."""
    return (Path(model) / "encoder.onnx").is_file()
