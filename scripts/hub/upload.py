"""Upload to the Hub: allow-listed files, staged at save time and pushed in one commit.

Used by train_hf.py (through scripts/hub/pusher.py) and by scripts/push_to_hub.py.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory  # not exported; respects offline mode

from modeling import hierarchical_roberta
from modeling.file_utils import is_disk_full
from modeling.training.checkpointing import STAGING_DIR, checkpoint_problem, commit_checkpoint

LAST_CHECKPOINT = "last-checkpoint"
# The model's code; the last three are module names of earlier exports.
MODEL_MODULES = [path.stem for path in Path(hierarchical_roberta.__file__).parent.glob("[a-z]*.py")]
MODEL_MODULES += ["contributions", "lexical", "micro_batches"]
# Allow-list of the files that are pushed from the root of a run.
MODEL_FILES = re.compile(
    r"(config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(sentencepiece\.bpe|spiece|tokenizer)\.model"
    rf"|({'|'.join(MODEL_MODULES)})\.py)"
)
RECORDS = re.compile(r"(README\.md|training\.tex|training_history\.json|metrics\.json|report\.html)")
ONNX_FILES = re.compile(
    r"(encoder|head)\.onnx(\.data)?|(config|tokenizer)\.json|lexical\.npz|predict_onnx\.py|requirements\.txt"
    r"|hierarchical_roberta/[a-z_]+\.py"
)
CHECKPOINT_FILES = re.compile(
    rf"({MODEL_FILES.pattern}|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
    r"|checkpoint_manifest\.json)"
)


def files_of(folder: Path | None, names: re.Pattern[str]) -> Iterator[Path]:
    """Files directly in `folder` whose names fully match `names`."""
    for path in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        if path.is_file() and names.fullmatch(path.name):
            yield path


def stage(target: Path, model: Path, output_dir: Path, checkpoint: Path | None, keeps_checkpoint: bool = False) -> None:
    """Stage the files of one commit in `target` as hard links, unaffected by later deletions and replacements.

    Args:
        model: directory with the weights for the root of the repo (the best checkpoint, or output_dir at the end).
        output_dir: the run's directory, for its records and TensorBoard files.
        checkpoint: the latest checkpoint, for last-checkpoint/; None if the strategy pushes none.
        keeps_checkpoint: also push the checkpoint under its own name, which later pushes keep.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in [*files_of(model, MODEL_FILES), *files_of(output_dir, RECORDS)]:
        _link(path, target / path.name)
    for path in files_of(output_dir / "report", re.compile(r"report\.html")):
        _link(path, target / path.name)
    for path in sorted((output_dir / "runs").glob("*/events.out.tfevents.*")):
        # Copied, as TensorBoard keeps writing to it; renamed, as the name contains the hostname.
        name = re.sub(r"^(events\.out\.tfevents\.\d+)\..*?((\.\d+)*)$", r"\1.run\2", path.name)
        copy = target / "runs" / path.parent.name / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for name in [LAST_CHECKPOINT, *([checkpoint.name] if keeps_checkpoint else [])] if checkpoint else []:
        (target / name).mkdir()
        for path in files_of(checkpoint, CHECKPOINT_FILES):
            _link(path, target / name / path.name)


def stage_onnx(target: Path, export: Path) -> None:
    """Stage an export of scripts.export_onnx as onnx/.

    Raises:
        ValueError: `export` is none.
    """
    if not (export / "predict_onnx.py").is_file():
        raise ValueError(
            f"--onnx {export} is no export: run python -m scripts.export_onnx --output_dir {export} first."
        )
    for path in sorted(export.rglob("*")):
        name = path.relative_to(export).as_posix()
        if path.is_file() and ONNX_FILES.fullmatch(name):
            copy = target / "onnx" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(path, copy)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)


def configure_client_timeout(seconds: float) -> None:
    """Set the timeout of the Hub client, which has none by default."""

    def factory() -> Any:
        client = default_client_factory()
        client.timeout = seconds
        return client

    huggingface_hub.set_client_factory(factory)


def ensure_repo(
    repo_id: str,
    private: bool | None,
    allow_public: bool,
    revision: str | None,
    license: str | None = None,
    repo_type: str = "model",
) -> str:
    """Check before training that the repo can be pushed to; create it and its branch if missing.

    Args:
        private: visibility of a new repo (None: private).
        license: license in the model card; the Hub rejects every push with an unknown one.

    Returns:
        The full repo id, including the namespace.

    Raises:
        ValueError: missing or invalid token, no write access, a public repo without `allow_public`, an unknown license,
            or the Hub cannot be reached.
    """
    api = HfApi()
    try:
        user = api.whoami()["name"]
        if license is not None:
            check_license(license)
        if "/" not in repo_id:
            repo_id = f"{user}/{repo_id}"
        info = _info_of(api, repo_id, repo_type)
        if info is None:
            sdk = "gradio" if repo_type == "space" else None
            api.create_repo(repo_id, private=private is not False, repo_type=repo_type, space_sdk=sdk)
        elif not info.private and not allow_public:
            raise ValueError(
                f"{repo_id} on the Hub is public, so anyone could see what is pushed. Pass --hub_allow_public to push "
                "anyway, or choose another --hub_model_id."
            )
        else:
            api.auth_check(repo_id, write=True, repo_type=repo_type)
        if revision and revision not in [branch.name for branch in api.list_repo_refs(repo_id).branches]:
            api.create_branch(repo_id, branch=revision)
    except (
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        huggingface_hub.errors.LocalTokenNotFoundError,
    ) as error:
        raise ValueError(f"Cannot push to {repo_id}: {reason_of(error)}") from None
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id}: {error}") from None
    return repo_id


def check_license(license: str) -> None:
    """Raises ValueError if the Hub rejects a model card with this license."""
    card = {"repoType": "model", "content": f"---\n{yaml.safe_dump({'license': license})}---\n"}
    # As RepoCard.validate does, which in huggingface_hub 1.x asks huggingface.co whatever HF_ENDPOINT says.
    url = f"{huggingface_hub.constants.ENDPOINT}/api/validate-yaml"
    response = huggingface_hub.get_session().post(url, json=card, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise ValueError(
            f"The Hub rejects --license {license}: {' '.join(response.text.split())} Use one of its identifiers, e.g. "
            "apache-2.0 or other."
        )
    huggingface_hub.utils.hf_raise_for_status(response)


def _info_of(api: HfApi, repo_id: str, repo_type: str) -> ModelInfo | SpaceInfo | None:
    try:
        return api.space_info(repo_id) if repo_type == "space" else api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def reason_of(error: BaseException) -> str:
    """Why a Hub request failed and how to fix it, without secrets."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, huggingface_hub.errors.LocalTokenNotFoundError):
        return "no token found. Log in (hf auth login), or set HF_TOKEN to a token with write access."
    if is_disk_full(error):
        return "the disk is full. Free some space and retry."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, or remove --push_to_hub."
    if status == 401:
        return "the Hub rejected the token (401). Log in again (hf auth login), or set HF_TOKEN to a valid one."
    if status == 403:
        return "the token has no write access (403). Use a namespace that you own, or a token with write access."
    if status is not None:
        message = getattr(error, "server_message", None)
        return f"the Hub returned status {status}{f' ({message})' if message else ''}."
    return f"the Hub at {huggingface_hub.constants.ENDPOINT} cannot be reached ({type(error).__name__})."


def push_staged(staged: Path, repo_id: str, revision: str | None, message: str, repo_type: str = "model") -> None:
    """Push `staged` in one atomic commit, which also deletes stale files of an earlier last-checkpoint/."""
    api = HfApi()
    paths = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    if not paths:
        raise ValueError(f"Nothing to push: {staged} is empty.")
    existing = set(api.list_repo_files(repo_id, revision=revision, repo_type=repo_type))
    old = {name for name in existing - set(paths) if name.startswith(f"{LAST_CHECKPOINT}/")}
    if not any(name.startswith(f"{LAST_CHECKPOINT}/") for name in paths):
        old = set()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in paths.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(old)]
    api.create_commit(repo_id, operations, commit_message=message, revision=revision, repo_type=repo_type)


def fetch_last_checkpoint(repo_id: str, revision: str | None, output_dir: Path) -> Path:
    """Download the repo's last-checkpoint/ to `output_dir/checkpoint-N`, and the best model so far (the root of the
    repo) to its own checkpoint directory, so that the run resumes as on the original machine.

    Raises:
        ValueError: the repo cannot be read or has no checkpoint.
    """
    download = output_dir / ".hub" / "download"
    patterns = [f"{LAST_CHECKPOINT}/*", "*.json", "*.safetensors"]
    try:
        huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            local_dir=download,
            allow_patterns=patterns,
            ignore_patterns=["checkpoint-*/*", "runs/*"],
        )
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise ValueError(f"Cannot resume from {repo_id}: {reason_of(error)}") from None
    downloaded = download / LAST_CHECKPOINT
    if not (downloaded / "trainer_state.json").is_file():
        raise ValueError(
            f"Cannot resume from {repo_id}: it has no {LAST_CHECKPOINT}/, which requires --hub_strategy checkpoint or "
            "all_checkpoints."
        )
    state = json.loads((downloaded / "trainer_state.json").read_text(encoding="utf-8"))
    checkpoint = output_dir / f"checkpoint-{state['global_step']}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    downloaded.rename(checkpoint)
    best = output_dir / Path(state.get("best_model_checkpoint") or checkpoint.name).name
    if checkpoint_problem(best):  # keep a valid local one
        partial = output_dir / STAGING_DIR / best.name
        partial.mkdir(parents=True, exist_ok=True)
        for path in files_of(download, MODEL_FILES):
            shutil.copyfile(path, partial / path.name)
        commit_checkpoint(partial, best)
    shutil.rmtree(download, ignore_errors=True)
    return checkpoint
