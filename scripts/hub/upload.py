"""What goes to the hub, and how: an allow-list, staged as it was saved, pushed in one commit.

Used by train_hf.py (through scripts/hub/pusher.py) and by scripts/push_to_hub.py.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, RepoCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory  # not exported, and it keeps the client offline

from modeling import hierarchical_roberta
from modeling.file_utils import is_disk_full
from modeling.training.checkpointing import STAGING_DIR, checkpoint_problem, commit_checkpoint

LAST_CHECKPOINT = "last-checkpoint"
# The model's own code; the last three are names of models exported earlier.
MODEL_MODULES = [path.stem for path in Path(hierarchical_roberta.__file__).parent.glob("[a-z]*.py")]
MODEL_MODULES += ["contributions", "lexical", "micro_batches"]
# Names at the top of a finished folder that travel; nothing else does.
MODEL_FILES = re.compile(
    r"(config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(sentencepiece\.bpe|spiece|tokenizer)\.model"
    rf"|({'|'.join(MODEL_MODULES)})\.py)"
)
RECORDS = re.compile(r"(README\.md|training\.tex|training_history\.json|metrics\.json|report\.html)")
CHECKPOINT_FILES = re.compile(
    rf"({MODEL_FILES.pattern}|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
    r"|checkpoint_manifest\.json)"
)


def files_of(folder: Path | None, names: re.Pattern[str]) -> Iterator[Path]:
    """The files right in a folder whose whole names are allowed."""
    for path in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        if path.is_file() and names.fullmatch(path.name):
            yield path


def stage(target: Path, model: Path, output_dir: Path, checkpoint: Path | None, keeps_checkpoint: bool = False) -> None:
    """Lay out in `target` what one commit shall hold, by hard links: what is deleted or replaced afterwards stays here.

    Args:
        model: the folder with the weights for the repo's root (the best checkpoint, or output_dir when the run is over).
        output_dir: the run's, for its records and its TensorBoard files.
        checkpoint: the newest one, for last-checkpoint/; None where the strategy pushes none.
        keeps_checkpoint: it goes under its own name too, where the next push leaves it.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in [*files_of(model, MODEL_FILES), *files_of(output_dir, RECORDS)]:
        _link(path, target / path.name)
    for path in files_of(output_dir / "report", re.compile(r"report\.html")):
        _link(path, target / path.name)
    for path in sorted((output_dir / "runs").glob("*/events.out.tfevents.*")):
        # Copied, since TensorBoard goes on writing to it; and without the machine's name.
        name = re.sub(r"^(events\.out\.tfevents\.\d+)\..*?((\.\d+)*)$", r"\1.run\2", path.name)
        copy = target / "runs" / path.parent.name / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for name in [LAST_CHECKPOINT, *([checkpoint.name] if keeps_checkpoint else [])] if checkpoint else []:
        (target / name).mkdir()
        for path in files_of(checkpoint, CHECKPOINT_FILES):
            _link(path, target / name / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def configure_client_timeout(seconds: float) -> None:
    """No call of the hub's client waits longer than this for an answer. (By itself it would wait without end.)"""

    def factory() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = httpx2.Timeout(seconds)
        return client

    huggingface_hub.set_client_factory(factory)


def ensure_repo(
    repo_id: str, private: bool | None, allow_public: bool, revision: str | None, license: str | None = None
) -> str:
    """See, before anything is trained, that the repo can be pushed to; it and its branch are made where they are not.

    Args:
        private: of a new repo (None: private).
        license: the card's; the hub would refuse every push with a name that it does not know.

    Returns:
        The repo's whole id, namespace included.

    Raises:
        ValueError: no token, a refused one, no right to write, a public repo without `allow_public`, an unknown licence,
            no hub in reach.
    """
    api = HfApi()
    try:
        user = api.whoami()["name"]
        if license is not None:
            check_license(license)
        if "/" not in repo_id:
            repo_id = f"{user}/{repo_id}"
        info = _info_of(api, repo_id)
        if info is None:
            api.create_repo(repo_id, private=private is not False)
        elif not info.private and not allow_public:
            raise ValueError(
                f"The repo {repo_id} on the hub is public, and everybody would see what is pushed. If that is meant, say "
                "--hub_allow_public; else name another --hub_model_id."
            )
        else:
            api.auth_check(repo_id, write=True)
        if revision and revision not in [branch.name for branch in api.list_repo_refs(repo_id).branches]:
            api.create_branch(repo_id, branch=revision)
    except (
        HfHubHTTPError,
        httpx2.HTTPError,
        OfflineModeIsEnabled,
        huggingface_hub.errors.LocalTokenNotFoundError,
    ) as error:
        raise ValueError(f"{repo_id} cannot be pushed to: {reason_of(error)}") from None
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id}: {error}") from None
    return repo_id


def check_license(license: str) -> None:
    """Raises ValueError where the hub does not take a card with this licence."""
    try:
        RepoCard(f"---\n{yaml.safe_dump({'license': license})}---\n").validate(repo_type="model")
    except ValueError as error:
        raise ValueError(
            f"The hub does not take --license {license}: {' '.join(str(error).split())} Give one of its identifiers, "
            "apache-2.0 or other for example."
        ) from None


def _info_of(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def reason_of(error: BaseException) -> str:
    """Why the hub could not be used, and what to do, without anything secret in it."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, huggingface_hub.errors.LocalTokenNotFoundError):
        return "there is no token. Log in (hf auth login), or put one that may write into HF_TOKEN."
    if is_disk_full(error):
        return "the disk is full: make room, and do it again."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, or leave --push_to_hub out."
    if status == 401:
        return "the hub refuses the token (401). Log in again (hf auth login), or put a valid one into HF_TOKEN."
    if status == 403:
        return "the token has no right to write there (403). Name a namespace of yours, or take a token that may write."
    if status is not None:
        said = getattr(error, "server_message", None)
        return f"the hub answered {status}{f' ({said})' if said else ''}."
    return f"the hub at {huggingface_hub.constants.ENDPOINT} cannot be reached ({type(error).__name__})."


def push_staged(staged: Path, repo_id: str, revision: str | None, message: str) -> None:
    """One commit with everything in `staged`; files of an earlier checkpoint that are not in it go.

    A reader of the repo sees the state before or the state after, and nothing between.
    """
    api = HfApi()
    paths = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    if not paths:
        raise ValueError(f"There is nothing in {staged} to push.")
    there = set(api.list_repo_files(repo_id, revision=revision))
    old = {name for name in there - set(paths) if name.startswith(f"{LAST_CHECKPOINT}/")}
    if not any(name.startswith(f"{LAST_CHECKPOINT}/") for name in paths):
        old = set()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in paths.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(old)]
    api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def fetch_last_checkpoint(repo_id: str, revision: str | None, output_dir: Path) -> Path:
    """The repo's last-checkpoint/ as `output_dir/checkpoint-N`, and the best model so far (the repo's root) as the
    checkpoint that it was, so that a run goes on as if it had never left its machine.

    Raises:
        ValueError: the repo cannot be read, or has no checkpoint.
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
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} cannot be gone on from: {reason_of(error)}") from None
    found = download / LAST_CHECKPOINT
    if not (found / "trainer_state.json").is_file():
        raise ValueError(
            f"{repo_id} has no {LAST_CHECKPOINT}/: only --hub_strategy checkpoint (or all_checkpoints) leaves one there."
        )
    state = json.loads((found / "trainer_state.json").read_text(encoding="utf-8"))
    checkpoint = output_dir / f"checkpoint-{state['global_step']}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    found.rename(checkpoint)
    best = output_dir / Path(state.get("best_model_checkpoint") or checkpoint.name).name
    if checkpoint_problem(best):  # a whole one of this machine's stays
        partial = output_dir / STAGING_DIR / best.name
        partial.mkdir(parents=True, exist_ok=True)
        for path in files_of(download, MODEL_FILES):
            shutil.copyfile(path, partial / path.name)
        commit_checkpoint(partial, best)
    shutil.rmtree(download, ignore_errors=True)
    return checkpoint
