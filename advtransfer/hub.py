"""Files and model folders of the Hugging Face hub: by name, from the cache, and offline; and uploads."""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import quote

from advtransfer.torch_reader import CheckpointError

_REPO, _REVISION = r"hf:(?P<repo>[\w.-]+/[\w.-]+)", r"(?:@(?P<revision>[\w./-]+))?"
_NAME = re.compile(rf"{_REPO}/(?P<file>[^@?#\\\x00-\x1f]+){_REVISION}", re.ASCII)
_FOLDER = re.compile(_REPO + _REVISION, re.ASCII)
_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_EXAMPLE = "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt"


class Fetched(NamedTuple):
    """A local copy of a file of the hub."""

    path: Path
    repo: str  # OWNER/NAME
    file: str  # path in the repository
    revision: str  # the commit; of a manually downloaded file the requested revision, or ""


def fetch(name: str, folder: str | Path | None = None, known: Sequence[str] = ()) -> Fetched:
    """Finds a file of the hub: downloaded manually, in the hub's cache, or on the network, in this order.

    A name without a revision means the newest commit at the time of the download. The environment variables
    of huggingface_hub apply (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ...). A file in the cache is
    verified against the hash that the hub announced for it. Offline, a cache without refs/ suffices if it
    contains exactly one commit with the file.

    Args:
        name: hf:OWNER/NAME/FILE or hf:OWNER/NAME/FILE@REVISION (a branch, tag or commit).
        folder: of manually downloaded files, as OWNER/NAME/FILE or OWNER/NAME@REVISION/FILE; None:
            `$XDG_CACHE_HOME/advtransfer/checkpoints` or `~/.cache/advtransfer/checkpoints`.
        known: names of which a message about a wrong one may name the nearest.

    Raises:
        CheckpointError: the name is malformed, or the file is unavailable or damaged.
    """
    repo, file, revision = _parse(name)
    by_hand = _by_hand(repo, file, revision, folder)
    if by_hand.is_file():
        return Fetched(by_hand, repo, file, revision)
    base = _base()
    url = f"{base}/{repo}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"
    instead = f"or download {url} manually, save it as {by_hand}, and run the same command again"
    huggingface_hub = _huggingface_hub(f"{name} needs", instead)
    try:
        path = _cached(huggingface_hub, repo, file, revision)
        path, announced = (path, "") if path else _download(huggingface_hub, repo, file, revision or "main")
    except Exception as error:  # of the hub's HTTP client, its storage, or the file system
        commits = _commits(huggingface_hub, repo, file)
        if revision or len(commits) != 1 or not _is_unreachable(error):
            problem = _problem(error, name, f"{base}/{repo}", instead, known)
            cached = f"; in the cache: {', '.join(f'@{commit}' for commit in commits)}" if commits else ""
            raise CheckpointError(f"{name} {problem}{cached}") from error
        (commit, path), announced = commits.popitem(), ""
        _log.warning("%s: the hub cannot be reached; using the cached commit %s", name, commit)
    _check_announced(path, announced, name)
    return Fetched(path, repo, file, path.parents[file.count("/")].name)  # .../snapshots/COMMIT/FILE


def names_folder(name: str) -> bool:
    """Whether a name is hf:OWNER/NAME[@REVISION], of a whole repository."""
    return _FOLDER.fullmatch(name) is not None


def fetch_folder(name: str, patterns: Sequence[str], folder: str | Path | None = None) -> Path:
    """Finds files of a repository of the hub: downloaded manually, or from the hub or its cache.

    Args:
        name: hf:OWNER/NAME or hf:OWNER/NAME@REVISION (a branch, tag or commit).
        patterns: of the files; the first is that of a file which has to be there.
        folder: of manually downloaded repositories, as for `fetch`.

    Raises:
        CheckpointError: as `fetch`.
    """
    repo, revision = _parse_folder(name)
    by_hand = _by_hand(repo, "", revision, folder)
    if (by_hand / patterns[0]).is_file():
        return by_hand
    page = f"{_base()}/{repo}"
    instead = f"or download the files of {page} manually to {by_hand}, and run the same command again"
    hub = _huggingface_hub(f"{name} needs", instead)
    try:
        path = Path(hub.snapshot_download(repo, revision=revision or None, allow_patterns=[*patterns]))
    except Exception as error:  # of the hub's HTTP client, its storage, or the file system
        raise CheckpointError(f"{name} {_problem(error, name, page, instead)}") from error
    if not (path / patterns[0]).is_file():
        raise CheckpointError(
            f"{name} has no {patterns[0]}, so it is not a model folder: to import one of its files, name it, "
            f"{name.partition('@')[0]}/FILE; see {page}/tree/main"
        )
    return path


def upload(folder: Path, repo: str, *, message: str, replaced: Sequence[str], private: bool) -> str:
    """Uploads a folder as one commit to a repository of the hub, which is made if there is none.

    Args:
        folder: whose files are uploaded.
        repo: OWNER/NAME.
        message: of the commit.
        replaced: patterns of files there that are deleted if they are not in the folder.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no such name, no token, no right, no network; a repository that was there is as it was, a
            new one may have been made, and is empty.
    """
    hub = _huggingface_hub("uploading needs", "or upload the files in a browser")
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=[*replaced]
        ).commit_url
    except Exception as error:  # of the hub's HTTP client, or the file system
        raise ValueError(f"{repo} {_upload_problem(error)}") from error


def _upload_problem(error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return "is not a valid name on the hub: use OWNER/NAME, in letters, digits, -, _ and ."
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return f"cannot be written without a valid token: {_LOGIN} to one with the right to write"
    if status in (403, 404):
        return f"cannot be written with this token: {_LOGIN} to one with the right to write there"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "cannot be written as HF_HUB_OFFLINE is set: unset it"
    return f"was not written ({_cause(error)}): check the network and call it again"


def is_on_this_machine(name: str, folder: str | Path | None = None) -> bool:
    """Whether `fetch`, or `fetch_folder` of a model, needs no network for this name. A malformed one is a
    CheckpointError."""
    if names_folder(name):
        (repo, revision), file = _parse_folder(name), "model.json"
    else:
        repo, file, revision = _parse(name)
    if _by_hand(repo, file, revision, folder).is_file():
        return True
    try:
        import huggingface_hub
    except ImportError:
        return False
    try:
        return _cached(huggingface_hub, repo, file, revision) is not None
    except huggingface_hub.errors.HFValidationError as error:
        raise CheckpointError(f"{name} {_problem(error, name, '', '')}") from error


def check_hub_name(name: str) -> None:
    """Raises a CheckpointError unless `name` has the form hf:OWNER/NAME/FILE[@REVISION]."""
    _parse(name)


def _parse(name: str) -> tuple[str, str, str]:
    """(repo, file, revision); revision is "" if there is none."""
    match = _NAME.fullmatch(name)
    repo, file, revision = match.group("repo", "file", "revision") if match else ("", "", None)
    # No part may lead out of the folder of manually downloaded files.
    parts = f"{repo}/{file}/{revision or 'main'}".split("/")
    if not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(
            f"{name!r} is not of the form hf:OWNER/NAME/FILE[@REVISION], such as {_EXAMPLE}"
        )
    return repo, file, revision or ""


def _parse_folder(name: str) -> tuple[str, str]:
    """(repo, revision); revision is "" if there is none."""
    match = _FOLDER.fullmatch(name)
    parts = f"{match['repo']}/{match['revision'] or 'main'}".split("/") if match else [""]
    if not match or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(
            f"{name!r} is not of the form hf:OWNER/NAME[@REVISION]; a file is read by import_torch_checkpoint"
        )
    return match["repo"], match["revision"] or ""


def _base() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _huggingface_hub(what: str, instead: str) -> ModuleType:
    try:
        import huggingface_hub  # optional, and slow to import
    except ImportError as error:
        raise CheckpointError(f"{what} huggingface_hub: pip install huggingface_hub, {instead}") from error
    return huggingface_hub


def _by_hand(repo: str, file: str, revision: str, folder: str | Path | None) -> Path:
    if folder is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "advtransfer" / "checkpoints"
    return Path(folder).absolute() / (f"{repo}@{revision}" if revision else repo) / file


def _cached(hub: ModuleType, repo: str, file: str, revision: str) -> Path | None:
    """The file in the hub's cache, at a branch, tag or (abbreviated) commit; None: not in the cache."""
    path = hub.try_to_load_from_cache(repo, file, revision=revision or "main")
    if isinstance(path, str):  # otherwise None, or a marker that the file does not exist
        return Path(path)
    reference = _repo_folder(hub, repo) / "refs" / (revision or "main")
    # A copied file may end in a newline.
    digits = reference.read_text().strip() if reference.is_file() else revision
    if not re.fullmatch("[0-9a-f]{7,40}", digits):
        return None
    found = [path for commit, path in _commits(hub, repo, file).items() if commit.startswith(digits)]
    return found[0] if len(found) == 1 else None


def _commits(hub: ModuleType, repo: str, file: str) -> dict[str, Path]:
    """The cached copies of the file, by commit."""
    snapshots = _repo_folder(hub, repo) / "snapshots"
    paths = {folder.name: folder / file for folder in sorted(snapshots.glob("*"))}
    return {commit: path for commit, path in paths.items() if path.is_file()}


def _repo_folder(hub: ModuleType, repo: str) -> Path:
    return Path(hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _download(hub: ModuleType, repo: str, file: str, revision: str) -> tuple[Path, str]:
    """Downloads the file; returns its path in the cache and the ETag that the hub announced."""
    # This request fails at once where hf_hub_download would retry for half a minute.
    metadata = hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision))
    return Path(hub.hf_hub_download(repo, file, revision=revision)), metadata.etag or ""


def _check_announced(path: Path, announced: str, name: str) -> None:
    """Verifies a file in the cache, and deletes it if it was downloaded now, with `announced` as its ETag."""
    # The ETag, which is the name of the blob, is the SHA-256 of a large file and git's SHA-1 of a small one;
    # mirrors may use the plain SHA-1. A cache without links to blobs, or with other ETags of a mirror, cannot
    # be verified.
    blob = path.resolve()
    expected = blob.name if blob.parent.name == "blobs" else announced
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return
    sha1s = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode()), hashlib.sha1()
    found = []
    for sha in sha1s if len(expected) == 40 else [hashlib.sha256()]:
        with blob.open("rb") as file:
            found.append(hashlib.file_digest(file, lambda sha=sha: sha).hexdigest())
    if expected in found:
        return
    fix = f"delete {blob} and run the same command again"
    if announced:
        path.unlink()
        blob.unlink(missing_ok=True)
        fix = "it was deleted: run the same command again, without HF_ENDPOINT if that is set"
    raise CheckpointError(
        f"{name}: the file is damaged or a different one: its hash is {found[0][:16]}, the hub announced "
        f"{expected[:16]}; {fix}"
    )


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub did not respond."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return True
    answers = errors.HfHubHTTPError | errors.HFValidationError | errors.EntryNotFoundError
    return not isinstance(error, answers) and getattr(error, "errno", None) not in _FULL


def _problem(error: Exception, name: str, page: str, instead: str, known: Sequence[str] = ()) -> str:
    """The problem and its remedy, as the predicate of a sentence whose subject is the name."""
    from huggingface_hub import errors

    near = difflib.get_close_matches(name.partition("@")[0], known, n=3)
    nearest = f"; similar known names: {', '.join(near)}" if near else ""
    other = f"cannot be downloaded ({_cause(error)}): check the network, {instead}"
    problems = {  # of an error of several kinds the first
        errors.HFValidationError: f"is not a valid name on the hub: use one such as {_EXAMPLE}",
        errors.GatedRepoError: f"is gated: accept its terms at {page} and {_LOGIN}, {instead}",
        errors.RepositoryNotFoundError: "is not in a public repository: check the name"
        f"{nearest}; if it is private, {_LOGIN}",
        errors.RevisionNotFoundError: f"names a revision that does not exist: see {page}/commits/main",
        errors.LocalEntryNotFoundError: other,
        errors.EntryNotFoundError: f"is not in the repository: see {page}/tree/main{nearest}",
        errors.OfflineModeIsEnabled: f"is not in the cache and HF_HUB_OFFLINE is set: unset it, {instead}",
    }
    if getattr(error, "errno", None) in _FULL:
        return f"does not fit on the disk: free space or set HF_HOME to a folder on another disk, {instead}"
    return next((text for kind, text in problems.items() if isinstance(error, kind)), other)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
