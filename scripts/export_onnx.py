"""Export a model to a folder that predicts with onnxruntime alone, without torch, transformers or this project.

    python -m scripts.export_onnx --model outputs/run --output_dir outputs/onnx
    python outputs/onnx/predict_onnx.py story.txt

Its scores are compared with the model's on a few documents before the folder is written. With --quantize int8 the encoder is
smaller and faster, and scores are less exact.
"""

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

from scripts.common.cli import UserParser, run_main

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output_dir of a run, or a model id on the Hub")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--quantize", choices=("int8",), help="quantize the encoder's matrix products dynamically")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"The export needs {' and '.join(missing)}: pip install -e '.[onnx]'.")
    from scripts.onnx.export import export_onnx

    export_onnx(arguments.model, arguments.output_dir, int8=arguments.quantize == "int8")


if __name__ == "__main__":
    sys.exit(run_main(main))
