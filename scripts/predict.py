"""Classify texts from files, directories, tables or standard input; writes JSON Lines.

    python -m scripts.predict --model outputs/run --source stories.csv
    cat story.txt | python -m scripts.predict --model ORG/NAME
    accelerate launch --quiet --multi_gpu --num_processes 2 -m scripts.predict --model outputs/run \\
        --source big.parquet --output out.jsonl

With --output, documents are distributed over the processes, and an interrupted run resumes where it stopped. --multi_gpu
starts several processes on a CPU too; --cpu would start one. --model may also be a folder of scripts.export_onnx, which is
faster on a CPU.
"""

import argparse
import importlib.util
from pathlib import Path

from scripts.common.cli import UserParser, run_and_exit
from scripts.common.preparation_options import add_reading_options, reading_options
from scripts.onnx import is_export


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output_dir of a run, a model id on the Hub, or an ONNX export")
    parser.add_argument(
        "--source",
        action="append",
        help="table, document (text, PDF, DOCX, EPUB, HTML, subtitles), directory or archive of documents, or dataset on the Hub; "
        "may be repeated (default: text on standard input)",
    )
    parser.add_argument("--text_column", default="text", help="name of the text column, or of several: title,body")
    parser.add_argument("--id_column", default="id", help="name of the id column; without one, documents are numbered")
    parser.add_argument("--output", type=Path, help="output file (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--evidence", type=int, default=3, help="maximum number of chunks returned as evidence")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "int8"),
        default="fp32",
        help="bf16 and fp16 are faster on a GPU; scores are less exact. int8, for a CPU, is a --model of its own: "
        "scripts.export_onnx --quantize int8",
    )
    parser.add_argument(
        "--fail_on_error",
        action="store_true",
        help="end with exit status 1 if a document could not be classified (it has an `error` in place of scores)",
    )
    add_reading_options(parser)
    parser.add_argument("--cpu_threads", type=int, default=0, help="number of CPU threads; 0 uses all cores")
    arguments = parser.parse_args()
    if arguments.cpu_threads < 0:
        raise ValueError(f"--cpu_threads must be 0 or more, got {arguments.cpu_threads}.")
    if arguments.evidence < 0:
        raise ValueError(f"--evidence must be 0 or more, got {arguments.evidence}.")
    reading_options(arguments)  # refuses wrong values
    if arguments.source is None and arguments.output is not None:
        raise ValueError("--output requires --source: a run on standard input cannot be resumed.")
    check_export(arguments)
    return arguments


def check_export(arguments: argparse.Namespace) -> None:
    """Raises ValueError where model, precision and installed packages do not fit together."""
    model, precision = arguments.model, arguments.precision
    if not is_export(model):
        if precision == "int8":
            raise ValueError(
                f"--precision int8 needs an export: run python -m scripts.export_onnx --model {model} --quantize int8 "
                "--output_dir DIR, then pass --model DIR without --precision."
            )
        return
    if precision != "fp32":
        raise ValueError(f"{model} is an ONNX export, whose precision is fixed: remove --precision {precision}.")
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError(f"{model} is an ONNX export, which needs onnxruntime: pip install -e '.[onnx]'.")


def main() -> int:
    arguments = parse_arguments()
    from scripts.common.prediction import predict  # the libraries are imported once the options are known to be right

    return predict(arguments)


if __name__ == "__main__":
    run_and_exit(main)
