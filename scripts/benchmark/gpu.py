"""Run the GPU benchmark in minutes: exactness, precision, memory, speed, multiple processes.

    python -m scripts.benchmark.gpu --output_dir outputs/gpu --encoder outputs/minilm

Each check runs in a separate process with a time limit. OUTPUT_DIR gets checks.jsonl with a line per finished check,
the output of each check as NAME.log, and the tables as gpu.md. `--device cpu --tiny` tests the checks on a CPU with
tiny models.
"""

import argparse
import sys
from pathlib import Path

from scripts.benchmark.gpu_runner import Check, Runner, Settings
from scripts.benchmark.gpu_table import markdown, read_lines
from scripts.common.cli import UserParser, run_main

# In order of importance; the last argument is the time limit in seconds, for an H100.
CHECKS = (
    Check("environment", "gpu_checks:environment", 30),
    Check("exactness", "gpu_checks:exactness", 50),
    Check("memory", "gpu_checks_memory:memory", 50),
    Check("speed", "gpu_checks_speed:speed", 80),
    Check("small_cards", "gpu_checks_memory:small_cards", 60),
    Check("length", "gpu_checks_memory:length", 45),
    Check("precision", "gpu_checks:precision", 50),
    Check("budgets", "gpu_checks_speed:budgets", 40),
    Check("attention", "gpu_checks_kernels:attention", 30),
    Check("synchronizations", "gpu_checks_kernels:synchronizations", 25),
    Check("gradients", "gpu_checks:gradients", 40),
    Check("predict", "gpu_checks_runs:predict", 50),
    Check("compile", "gpu_checks_kernels:compile_layers", 75),
    Check("ranks", "gpu_checks_runs:ranks", 50),
    Check("demo", "gpu_checks_runs:demo", 90),
)


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="directory for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of all checks together")
    parser.add_argument(
        "--only", help=f"comma-separated checks to run, from {', '.join(check.name for check in CHECKS)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tests the checks")
    parser.add_argument("--tiny", action="store_true", help="use tiny models and few steps, to test the checks")
    parser.add_argument("--encoder", type=Path, help="directory of an encoder and its tokenizer, for the check demo")
    arguments = parser.parse_args()
    names = [check.name for check in CHECKS]
    arguments.only = names if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in arguments.only if name not in names]:
        raise ValueError(f"--only got unknown checks: {', '.join(unknown)}. Available: {', '.join(names)}.")
    if arguments.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {arguments.minutes:g}.")
    if arguments.encoder is not None and not (arguments.encoder / "config.json").is_file():
        raise ValueError(f"--encoder {arguments.encoder} has no config.json: pass the directory of an encoder.")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.device, arguments.tiny, folder.resolve(), arguments.encoder)

    def write_tables() -> str:
        text = markdown(read_lines(folder / "checks.jsonl"), [check.name for check in CHECKS])
        (folder / "gpu.md").write_text(text, encoding="utf-8")
        return text

    runner = Runner(
        settings, arguments.minutes * 60, write_tables
    )  # starts importing now, in parallel with this process
    if settings.is_cuda:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "There is no GPU that torch can use. Run this on a machine with one, or test the checks with "
                "--device cpu --tiny."
            )
    try:
        runner.run([check for check in CHECKS if check.name in arguments.only])
    finally:
        print(write_tables(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
