"""Push a finished run to the Hub, to publish it or to complete a push that failed during training.

    python -m scripts.push_to_hub --output_dir outputs/run --hub_model_id ORG/NAME

Pushes weights, config, tokenizer, the model's code, model card, history, metrics, report and TensorBoard files, with
--last_checkpoint the latest complete checkpoint as last-checkpoint/, and with --onnx an export as onnx/. With --space it
also pushes a Space that serves the model with the page of scripts.app. The token comes from HF_TOKEN or the login.
"""

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from scripts.common.cli import UserParser, run_main
from scripts.hub.space import write_space
from scripts.hub.upload import configure_client_timeout, ensure_repo, push_staged, reason_of, stage, stage_onnx

logger = logging.getLogger("push_to_hub")


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="output_dir of a finished run")
    parser.add_argument("--hub_model_id", required=True, help="repo id, ORG/NAME")
    parser.add_argument(
        "--hub_private_repo", default="True", choices=("True", "False"), help="whether a new repo is private"
    )
    parser.add_argument("--hub_allow_public", action="store_true", help="allow pushing to an existing public repo")
    parser.add_argument("--hub_revision", help="branch to push to; created if it does not exist")
    parser.add_argument("--hub_timeout", type=float, default=300.0, help="timeout of Hub requests in seconds")
    parser.add_argument(
        "--last_checkpoint", action="store_true", help="also push the latest complete checkpoint, to resume from"
    )
    parser.add_argument(
        "--onnx", type=Path, metavar="DIR", help="also push this export of scripts.export_onnx, as onnx/"
    )
    parser.add_argument("--space", metavar="ORG/NAME", help="also push a Space with a page that classifies texts")
    parser.add_argument("--message", default="Model", help="commit message")
    # Set by a training run, which has already staged the files and checked the repo.
    parser.add_argument("--staged", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attempts", type=int, default=5, help="number of attempts")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    configure_client_timeout(arguments.hub_timeout)
    repo_id = arguments.hub_model_id
    staged: Path | None = arguments.staged
    if staged is None:
        staged = arguments.output_dir / ".hub" / "by-hand"
        private = arguments.hub_private_repo == "True"
        if not (arguments.output_dir / "model.safetensors").is_file():
            raise ValueError(f"{arguments.output_dir} is not a finished run: it has no model.safetensors.")
        if arguments.space and "chunks: bool" not in (arguments.output_dir / "pipeline.py").read_text(encoding="utf-8"):
            raise ValueError(
                f"{arguments.output_dir} has the code of an earlier version, whose results have no chunks to show: copy "
                "modeling/hierarchical_roberta/*.py to it for --space."
            )
        repo_id = ensure_repo(repo_id, private, arguments.hub_allow_public, arguments.hub_revision)
        stage(staged, arguments.output_dir, arguments.output_dir, newest_checkpoint(arguments))
        if arguments.onnx is not None:
            stage_onnx(staged, arguments.onnx)
    push(staged, repo_id, arguments)
    if arguments.staged is None:
        shutil.rmtree(staged, ignore_errors=True)
    logger.info(f"Pushed to {repo_id}.")
    if arguments.space:
        push_space(arguments, repo_id)


def push_space(arguments: argparse.Namespace, model_id: str) -> None:
    private = arguments.hub_private_repo == "True"
    space_id = ensure_repo(arguments.space, private, arguments.hub_allow_public, None, repo_type="space")
    staged = arguments.output_dir / ".hub" / "space"
    write_space(staged, model_id)
    push(staged, space_id, arguments, repo_type="space")
    shutil.rmtree(staged, ignore_errors=True)
    logger.info(f"Pushed the Space {space_id}.")


def push(staged: Path, repo_id: str, arguments: argparse.Namespace, repo_type: str = "model") -> None:
    """Push with retries. Raises ValueError if none succeeds."""
    revision = arguments.hub_revision if repo_type == "model" else None
    for attempt in range(1, arguments.attempts + 1):
        try:
            push_staged(staged, repo_id, revision, arguments.message, repo_type)
            return
        except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if attempt == arguments.attempts or status in (400, 401, 403):
                raise ValueError(f"Push to {repo_id} failed: {reason_of(error)}") from None
            logger.warning(f"Push {attempt} to {repo_id} failed, retrying in {2**attempt} s: {reason_of(error)}")
            time.sleep(2**attempt)


def newest_checkpoint(arguments: argparse.Namespace) -> Path | None:
    """The checkpoint for --last_checkpoint. Raises ValueError if there is no complete one."""
    if not arguments.last_checkpoint:
        return None
    from modeling.training.checkpointing import find_checkpoint

    checkpoint = find_checkpoint(str(arguments.output_dir), "auto")
    if checkpoint is None:
        raise ValueError(f"{arguments.output_dir} has no complete checkpoint: remove --last_checkpoint.")
    return Path(checkpoint)


if __name__ == "__main__":
    sys.exit(run_main(main))
