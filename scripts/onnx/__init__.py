"""Export to ONNX, and the module that predicts with what was exported."""
