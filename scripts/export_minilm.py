"""Export the packaged MiniLM (see scripts/common/packaged_encoder.py) to a directory for --encoder and --tokenizer.

python -m scripts.export_minilm --output_dir outputs/minilm
"""

import argparse
import sys
from pathlib import Path

from scripts.common.cli import UserParser, run_main
from scripts.common.packaged_encoder import copy_packaged_encoder


def main() -> None:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/minilm"))
    print(f"Saved the encoder to {copy_packaged_encoder(parser.parse_args().output_dir)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
