"""Checkpoints of the Hugging Face hub by name, and what to do where there is no network."""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import quote

from advtransfer.torch_checkpoint.catalogue import KNOWN_MODELS, KnownModel, find_known
from advtransfer.torch_reader import CheckpointError

_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@?#\\\x00-\x1f]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXAMPLE = "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt"


class Fetched(NamedTuple):
    """A file of the hub on this machine."""

    path: Path
    repo: str  # OWNER/NAME
    file: str  # its path in the repository
    revision: str  # the commit; of a file fetched by hand what was asked for, "" if nothing was


def fetch(name: str, folder: str | Path | None = None) -> Fetched:
    """Finds a file of the hub on this machine, or downloads it.

    A file that was fetched by hand comes first, then the hub's cache, then the network; a name without a
    revision means the newest commit at the time of the download. HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE and the other variables of huggingface_hub have their effect. A file in the cache is
    compared with the hash that the hub announced for it, which is the name of its blob there. A cache that
    was copied without its refs/ is enough without a network, if it holds one commit with the file.

    Args:
        name: hf:OWNER/NAME/FILE or hf:OWNER/NAME/FILE@REVISION (a branch, tag or commit).
        folder: of files fetched by hand, as OWNER/NAME/FILE or OWNER/NAME@REVISION/FILE; None:
            `$XDG_CACHE_HOME/advtransfer/checkpoints` or `~/.cache/advtransfer/checkpoints`.

    Raises:
        CheckpointError: a malformed name, or a file that cannot be had or is not the one that the hub
            announced, with what to do about it.
    """
    repo, file, revision = _parse(name)
    by_hand = _by_hand(repo, file, revision, folder)
    if by_hand.is_file():
        return Fetched(by_hand, repo, file, revision)
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{base}/{repo}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"
    instead = f"or fetch {url} by hand, put it at {by_hand}, and run the same command again"
    try:
        import huggingface_hub  # an extra, and slow to import
    except ImportError as error:
        raise CheckpointError(
            f"{name} needs huggingface_hub: pip install huggingface_hub, {instead}"
        ) from error
    try:
        path = _cached(huggingface_hub, repo, file, revision)
        path, announced = (path, "") if path else _download(huggingface_hub, repo, file, revision or "main")
    except Exception as error:  # the hub's HTTP client, its storage and the file system each raise their own
        there = _commits(huggingface_hub, repo, file)
        if revision or len(there) != 1 or not _is_unreachable(error):
            problem = _problem(error, name, f"{base}/{repo}", instead)
            cached = f"; in the cache: {', '.join(f'@{commit}' for commit in there)}" if there else ""
            raise CheckpointError(f"{name} {problem}{cached}") from error
        (commit, path), announced = there.popitem(), ""
        _log.warning("%s: the hub cannot be asked, so the commit in the cache is taken: %s", name, commit)
    _check_announced(path, announced, name)
    return Fetched(path, repo, file, path.parents[file.count("/")].name)  # .../snapshots/COMMIT/FILE


def is_on_this_machine(name: str, folder: str | Path | None = None) -> bool:
    """Whether `fetch` finds a file of the hub without the network.

    Raises:
        CheckpointError: a malformed name.
    """
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


def known_on_hub(name: str) -> KnownModel | None:
    """The known model that a name of the hub means, in any revision.

    Raises:
        CheckpointError: a malformed name.
    """
    repo, file, _ = _parse(name)
    known = find_known(file, repo=repo)
    return known if known and known.repo == repo else None


def check_hub_name(name: str) -> None:
    """Raises a CheckpointError if this is not hf:OWNER/NAME/FILE[@REVISION]."""
    _parse(name)


def _parse(name: str) -> tuple[str, str, str]:
    """(repo, file, revision); revision is "" if there is none."""
    match = _NAME.fullmatch(name)
    repo, file, revision = match.group("repo", "file", "revision") if match else ("", "", None)
    # No part may leave the folder that the file is looked for in.
    parts = f"{repo}/{file}/{revision or 'main'}".split("/")
    if not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(f"{name!r} is not hf:OWNER/NAME/FILE[@REVISION], such as {_EXAMPLE}")
    return repo, file, revision or ""


def _by_hand(repo: str, file: str, revision: str, folder: str | Path | None) -> Path:
    if folder is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "advtransfer" / "checkpoints"
    return Path(folder).absolute() / (f"{repo}@{revision}" if revision else repo) / file


def _cached(hub: ModuleType, repo: str, file: str, revision: str) -> Path | None:
    """The file in the hub's cache, of a branch, a tag, or a commit or its first digits; None: not there."""
    path = hub.try_to_load_from_cache(repo, file, revision=revision or "main")
    if isinstance(path, str):  # otherwise None, or a mark that the file was not there
        return Path(path)
    reference = _repo_folder(hub, repo) / "refs" / (revision or "main")
    # Copying can leave an end of line behind the commit.
    digits = reference.read_text().strip() if reference.is_file() else revision
    if not re.fullmatch("[0-9a-f]{7,40}", digits):
        return None
    found = [path for commit, path in _commits(hub, repo, file).items() if commit.startswith(digits)]
    return found[0] if len(found) == 1 else None


def _commits(hub: ModuleType, repo: str, file: str) -> dict[str, Path]:
    """The file in the hub's cache, by commit."""
    snapshots = _repo_folder(hub, repo) / "snapshots"
    paths = {folder.name: folder / file for folder in sorted(snapshots.glob("*"))}
    return {commit: path for commit, path in paths.items() if path.is_file()}


def _repo_folder(hub: ModuleType, repo: str) -> Path:
    return Path(hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _download(hub: ModuleType, repo: str, file: str, revision: str) -> tuple[Path, str]:
    """Where the file is in the cache now, and the ETag that the hub announced."""
    # One request in advance: it fails at once where hf_hub_download tries again for half a minute.
    metadata = hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision))
    return Path(hub.hf_hub_download(repo, file, revision=revision)), metadata.etag or ""


def _check_announced(path: Path, announced: str, name: str) -> None:
    """Compares a file in the cache with the ETag that the hub announced for it: the name of its blob there.

    It is the SHA-256 of a large file and git's SHA-1 of a small one; a mirror's may be the bytes' SHA-1. In a
    cache without links to blobs, and of a mirror with other ETags, there is nothing to compare with.

    Args:
        path: of the file.
        announced: the ETag of a file that has just been downloaded, which is not kept if it differs; "":
            it was there.
        name: for the message.
    """
    blob = path.resolve()
    expected = blob.name if blob.parent.name == "blobs" else announced
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return
    starts = (b"",) if len(expected) == 64 else (f"blob {blob.stat().st_size}\0".encode(), b"")
    kind = hashlib.sha256 if len(expected) == 64 else hashlib.sha1
    found = []
    for start in starts:
        with blob.open("rb") as file:
            found.append(hashlib.file_digest(file, lambda start=start: kind(start)).hexdigest())
    if expected in found:
        return
    mend = f"delete {blob} and run the same command again"
    if announced:
        path.unlink()
        blob.unlink(missing_ok=True)
        mend = "it is not kept: run the same command again, without HF_ENDPOINT if that is set"
    raise CheckpointError(
        f"{name}: the file is damaged or another one: its hash is {found[0][:16]}, the hub announced "
        f"{expected[:16]}; {mend}"
    )


def _is_unreachable(error: Exception) -> bool:
    """Whether no hub has answered."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return True
    answers = errors.HfHubHTTPError | errors.HFValidationError | errors.EntryNotFoundError
    return not isinstance(error, answers) and getattr(error, "errno", None) not in _FULL


def _problem(error: Exception, name: str, page: str, instead: str) -> str:
    """What went wrong and how to mend it, as the rest of a sentence that starts with the name."""
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return f"is not a valid name on the hub: write one such as {_EXAMPLE}"
    if isinstance(error, errors.GatedRepoError):
        return f"asks for its terms to be accepted: do that at {page} and {login}, {instead}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is in no public repository: check the name{_nearest(name)}; if it is private, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"names a revision that the repository does not have: see {page}/commits/main"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"is not in the repository: see {page}/tree/main{_nearest(name)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"is not in the cache and HF_HUB_OFFLINE is set: unset it, {instead}"
    if getattr(error, "errno", None) in _FULL:
        return f"does not fit on the disk: make room or set HF_HOME to a folder on another one, {instead}"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return f"cannot be fetched ({reason}): check the network, {instead}"


def _nearest(name: str) -> str:
    names = [f"hf:{known.repo}/{known.file}" for known in KNOWN_MODELS if known.repo]
    near = difflib.get_close_matches(name.partition("@")[0], names, n=3)
    return f"; nearest known: {', '.join(near)}" if near else ""
