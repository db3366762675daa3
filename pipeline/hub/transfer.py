"""A cache to the Hugging Face Hub and back: `prepare` and `send`, `pull`.

Owns what goes out (a cache that was verified, exactly the files that contents.json names, and its card) and what comes
in (verified before it has its name; until then its folder is `pulling`'s). Commits follow the order of the format:
shards first, then contents.json with everything that replaces. Must not print; what the Hub is, huggingface_hub knows.
"""

import errno
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from logitcache.errors import HubFailed, InputNotFound, PipelineError
from logitcache.storage import (
    CacheError,
    CorruptCache,
    IdentityMismatch,
    LinkRefused,
    LogitCache,
    NotACache,
    VerifyReport,
    verify,
)
from logitcache.storage.files import open_files
from logitcache.storage.inventory import Inventory, take_inventory
from logitcache.storage.layout import (
    CONTENTS,
    DATA_PATTERNS,
    INDEX_PATTERN,
    MANIFEST,
    TOKEN_GROUPS,
    is_data_file,
    is_data_record,
    is_index,
    shard_path,
    unit_of_path,
)
from logitcache.storage.manifest import MAX_JSON_BYTES, Contents, Manifest, read_json

from .dataset_card import (
    CARD,
    Licence,
    head_of,
    is_hub_id,
    licences_in,
    make_card,
    model_licence,
    public_data_names,
    public_name,
)
from .pulling import Download, claim, release

MAX_FILES_A_COMMIT = 2000
"""Of those that only add; the Hub allows 25,000 and asks for fewer."""

_WANTED = [MANIFEST, CONTENTS, TOKEN_GROUPS, CARD, INDEX_PATTERN, *DATA_PATTERNS, shard_path("*")]


@dataclass(frozen=True)
class Upload:
    """A verified cache, ready to go."""

    repo_id: str
    cache: LogitCache
    inventory: Inventory
    #: All but the card, by name, a path or the bytes themselves.
    files: dict[str, Path | bytes]
    #: Of its base, as it may be said.
    name: str
    #: Licence of the base, as far as it is known.
    model: Licence
    #: Licence of the data, as far as it is known.
    data: Licence

    @property
    def card(self) -> str:
        """README.md, with the licences as they are known."""
        return make_card(self.cache, self.repo_id, self.name, self.model, self.data)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is sent, by its name."""
        heads = {name: len(data) for name, data in self.files.items() if isinstance(data, bytes)}
        return {**self.inventory.sizes, **heads, CARD: len(self.card.encode())}


@dataclass(frozen=True)
class UploadReport:
    """What the Hub has now."""

    #: As it went.
    upload: Upload
    #: Where.
    url: str
    #: Whether everybody can read it.
    is_public: bool
    #: The last commit.
    commit: str
    #: The names that were not there before.
    new_files: tuple[str, ...]


@dataclass(frozen=True)
class Pulled:
    """A cache in its place."""

    #: What verifying it read.
    report: VerifyReport
    #: The commit it is of.
    commit: str
    #: False if it was there already.
    is_new: bool


def prepare(
    path: str, repo_id: str, *, model: Licence | None = None, data: Licence | None = None, base_model: str | None = None
) -> Upload:
    """Read every byte of a cache, check it, and write its card. Nothing is sent, and no network is used.

    model, data: licences; without them, of the base the one beside its weights. A README.md in the cache's folder is of
    whoever the cache was pulled from, and is not read. base_model: the hub id of the base, where the manifest does not
    have it. Raises `InputNotFound` for names that the Hub cannot have, what opening a cache raises, `CorruptCache`
    where a byte is wrong, OSError where somebody writes to it.
    """
    for name in (repo_id, base_model or repo_id):
        if not is_hub_id(name):
            raise InputNotFound(f"pushing {path}: expected a name such as owner/name on the Hub, found {name!r:.80}.")
    root = _folder(path)
    cache = LogitCache.open(root)
    inventory = take_inventory(root)
    report = verify(root)
    if report.problems and not report.is_corrupt:
        raise LinkRefused(
            f"pushing {path}: {report.problems[0].what}. Nothing was sent. Run `logitcache verify`, which names every "
            "such link, and put what they lead to in their place."
        )
    if not report.is_intact:
        raise CorruptCache(
            f"pushing {path}: expected a cache without damage, found {len(report.problems)} problems "
            f"({report.problems[0].what}). Nothing was sent. Run `logitcache repair` and precompute again."
        )
    if take_inventory(root) != inventory or cache.contents_checksum != LogitCache.open(root).contents_checksum:
        raise OSError(errno.EBUSY, "another process is writing to this cache", str(root))
    name = public_name(inventory.manifest.model_name, base_model)
    files: dict[str, Path | bytes] = {entry: root / entry for entry in inventory.sizes}
    files |= inventory.heads(name, public_data_names([entry.name for entry in inventory.contents.data_sets]))
    upload = Upload(repo_id, cache, inventory, files, name, model or Licence(), data or Licence())
    if model is None:
        upload = replace(upload, model=model_licence(inventory.manifest))
    return upload


def send(
    upload: Upload, *, private: bool = False, revision: str | None = None, endpoint: str | None = None
) -> UploadReport:
    """Make a data set repository hold this cache, and compare what it holds then. Files that it has are not sent again.

    A licence that is not known is that of the card that is there. private: of a repository that is made now; one that
    is public already is refused. revision: a branch, made if need be. Raises `IdentityMismatch` where another cache is
    there, `HubFailed` where it holds shards that this one lacks, or where the Hub refuses, is out of reach, or does not
    keep what it was sent.
    """
    api, repo_id = _api(endpoint), upload.repo_id
    with _asking(f"pushing to {repo_id}"):
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        info = _branch(api, repo_id, revision)
        if private and not info.private:
            raise HubFailed(
                f"pushing to {repo_id}: expected a private repository, found a public one. Nothing was sent. "
                "Make it private in its settings on the Hub, or choose another name."
            )
        there = _sizes(api, repo_id, info.sha)
        _check_same(upload.inventory, _heads(api, repo_id, info.sha, there), repo_id)
        if CARD in there:
            with tempfile.TemporaryDirectory() as folder:
                upload = _with_licences(upload, _fetched(api, repo_id, info.sha, CARD, folder))
        commit = _commit(api, repo_id, revision, info.sha, upload, there)
        found = _sizes(api, repo_id, commit)
    sizes = upload.sizes
    wrong = sorted(name for name, size in sizes.items() if found.get(name) != size)
    if wrong:
        raise HubFailed(
            f"pushing to {repo_id}: expected {len(sizes)} files on the Hub, found {len(wrong)} missing or of "
            f"another size ({wrong[0]}). Nobody can pull it like this. Look for a .gitignore there, and push again."
        )
    new = tuple(name for name in sizes if name not in there)
    return UploadReport(upload, f"{api.endpoint}/datasets/{repo_id}", not info.private, commit, new)


def pull(repo_id: str, path: str, *, revision: str | None = None, endpoint: str | None = None) -> Pulled:
    """Download a cache beside its place, verify every byte, and only then give it its name.

    What was interrupted goes on. Raises `InputNotFound` where there is no such repository or revision, `NotACache`,
    `CorruptCache` for a damaged download (of which the damaged files are removed), FileExistsError where something
    else is at `path`, or where it would be downloaded to (`pulling`), `HubFailed`.
    """
    if not is_hub_id(repo_id):
        raise InputNotFound(f"pulling {repo_id!r:.80}: expected a name such as owner/name on the Hub.")
    target, api = _folder(path), _api(endpoint)
    with _asking(f"pulling {repo_id}"):
        # asked first: without a network huggingface_hub takes whatever lies in the folder for the answer
        commit = api.dataset_info(repo_id, revision=revision).sha
        sizes = _sizes(api, repo_id, commit)
        _check_names(sizes, repo_id)
        there = _heads(api, repo_id, commit, sizes)
    if there is None:
        raise NotACache(
            f"pulling {repo_id}: expected a logit cache, found no {MANIFEST} and {CONTENTS} in commit {commit}. "
            "Nothing was downloaded. Check the name and --revision; `logitcache push` puts a cache there."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return Pulled(_check_there(target, there, repo_id), commit, False)
    download = claim(repo_id, target, filter_repo_objects(sizes, allow_patterns=_WANTED))
    with _asking(f"pulling {repo_id}"):
        snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=commit,
            local_dir=download.folder,
            allow_patterns=_WANTED,
            endpoint=endpoint,
            library_name="logitcache",
            library_version=version("logitcache"),
        )
    with suppress(CacheError):  # of what is damaged the check says more
        download.drop(download.names - _of_the_cache(download.folder))  # files of others in the repository
    report = _checked(download)
    download.finish(_of_the_cache(download.folder))
    return Pulled(report, commit, True)


def _of_the_cache(folder: Path) -> set[str]:
    """The files of a finished cache and its card, and nothing else that lies there. Raises as `take_inventory`."""
    inventory = take_inventory(folder)
    return {MANIFEST, CONTENTS, CARD, *inventory.records, *inventory.sizes}


def _api(endpoint: str | None) -> HfApi:
    return HfApi(endpoint=endpoint, library_name="logitcache", library_version=version("logitcache"))


def _folder(path: str) -> Path:
    """The Hub's client reads and writes files of a disk."""
    files = open_files(path)
    if not files.is_local:
        raise InputNotFound(
            f"using {path}: expected a local folder, found the URL of a store. The Hub's client cannot read it. "
            "Copy the cache with `logitcache merge FOLDER URL`, and use the folder."
        )
    return Path(files.root)


@contextmanager
def _asking(doing: str) -> Iterator[None]:
    """What the Hub's client raises of its own becomes one sentence; what a local disk refuses stays an OSError."""
    try:
        yield
    except (CacheError, PipelineError):
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputNotFound(
            f"{doing}: the Hub has no such data set or revision, or shows it to others only ({_said(error)}). "
            "Check the spelling, and `hf auth whoami`."
        ) from error
    except Exception as error:  # httpx's, huggingface_hub's, RuntimeError around either
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, HfHubHTTPError):
            raise
        raise HubFailed(
            f"{doing}: the Hub refused or cannot be reached ({_said(error)}). What was transferred is kept. "
            "Check the network and `hf auth whoami`, and run the same command again."
        ) from error


def _said(error: BaseException) -> str:
    """The first sentences of a library's message, and of what caused it."""
    text = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
    cause = error.__cause__
    return f"{text}: {_said(cause)}" if isinstance(error, RuntimeError) and cause is not None else text


def _branch(api: HfApi, repo_id: str, revision: str | None) -> Any:
    """What the Hub says of the branch, which is made where there is none."""
    try:
        return api.dataset_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, repo_type="dataset", branch=revision or "main", exist_ok=True)
        return api.dataset_info(repo_id, revision=revision)


def _sizes(api: HfApi, repo_id: str, commit: str) -> dict[str, int]:
    """Names and sizes of the files of a commit."""
    tree = api.list_repo_tree(repo_id, repo_type="dataset", revision=commit, recursive=True)
    return {entry.path: entry.size for entry in tree if hasattr(entry, "size")}


def _heads(api: HfApi, repo_id: str, commit: str, sizes: dict[str, int]) -> tuple[Manifest, Contents] | None:
    """Manifest and contents of the cache in a commit; None where there is none that is finished."""
    if not {MANIFEST, CONTENTS} <= sizes.keys():
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in (MANIFEST, CONTENTS):
                if sizes[name] <= MAX_JSON_BYTES:  # else it is not there to be read, which is said
                    _fetched(api, repo_id, commit, name, folder)
            files = open_files(folder)
            return read_json(Manifest, files, MANIFEST), read_json(Contents, files, CONTENTS)
        except CorruptCache as error:
            raise CorruptCache(
                f"reading {MANIFEST} and {CONTENTS} of {repo_id}, commit {commit}: what the Hub has is damaged. "
                "Nothing can be told of the cache there. Use an earlier commit (--revision), or push to another name."
            ) from error


def _fetched(api: HfApi, repo_id: str, commit: str, name: str, folder: str) -> Path:
    """One file of a commit, in a folder of its own: the client would take one that is there for it."""
    return Path(api.hf_hub_download(repo_id, name, repo_type="dataset", revision=commit, local_dir=folder))


def _with_licences(upload: Upload, card: Path) -> Upload:
    """What is not known, from an earlier card of the cache."""
    if not card.is_file() or (upload.model.ids and upload.data.ids):
        return upload
    model, data = licences_in(head_of(card))
    return replace(
        upload, model=upload.model if upload.model.ids else model, data=upload.data if upload.data.ids else data
    )


def _check_same(mine: Inventory, there: tuple[Manifest, Contents] | None, repo_id: str) -> None:
    """A repository may hold nothing, or an earlier state of this cache."""
    if there is None:
        return
    differences = mine.manifest.differences(there[0], "here", "on the Hub")
    if differences:
        raise IdentityMismatch(
            f"pushing to {repo_id}: another cache is there ({'; '.join(differences)}). Nothing was sent. "
            "Push to another name or --revision."
        )
    lost = {entry.unit for entry in there[1].shards} - {entry.unit for entry in mine.contents.shards}
    if lost:
        raise HubFailed(
            f"pushing to {repo_id}: the cache there has {len(lost)} shards that this one lacks. They would be lost; "
            "nothing was sent. Pull it, join the two with `logitcache merge`, and push that; or choose another name."
        )


def _commit(api: HfApi, repo_id: str, revision: str | None, head: str, upload: Upload, there: dict[str, int]) -> str:
    """Commit what only adds, part by part, then what replaces, in one commit. Returns the last one.

    Each names the commit before it, so that another push in between is refused by the Hub and not overwritten.
    """
    heads = {name: data for name, data in upload.files.items() if isinstance(data, bytes)}
    added = [name for name in upload.files if name not in heads]
    parts = [added[at : at + MAX_FILES_A_COMMIT] for at in range(0, len(added), MAX_FILES_A_COMMIT)]
    kinds = (is_index, is_data_file, is_data_record)
    old = [name for name in there if any(is_one(name) for is_one in kinds) and name not in upload.files]
    last: list[Any] = [CommitOperationAdd(CARD, upload.card.encode())]
    last += [CommitOperationAdd(name, data) for name, data in heads.items()]
    last += [CommitOperationDelete(name) for name in old]
    for operations in [*([CommitOperationAdd(n, upload.files[n]) for n in part] for part in parts), last]:
        head = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Logit cache: {len(operations)} files",
            repo_type="dataset",
            revision=revision,
            parent_commit=head,
        ).oid
    return head


def _check_names(names: Iterable[str], repo_id: str) -> None:
    """Each is joined to the folder of the download, by a client that has not always looked at it."""
    for name in names:
        if name.startswith("/") or {".", ".."} & set(name.split("/")):
            raise CorruptCache(
                f"pulling {repo_id}: expected names that stay in their folder, found {name!r:.80}. Nothing was "
                "downloaded. Do not trust this repository; tell who pushed it."
            )


def _check_there(target: Path, there: tuple[Manifest, Contents], repo_id: str) -> VerifyReport:
    """What lies at the target already may be that very cache, whole."""
    try:
        here = take_inventory(target)
        is_it = not here.manifest.differences(there[0]) and here.contents.shards == there[1].shards
    except LinkRefused:
        raise
    except CacheError:
        is_it = False
    report = verify(target) if is_it else None
    if report is None or not report.is_intact:
        raise FileExistsError(
            errno.EEXIST,
            f"pulling {repo_id}: expected a new folder, found that {target} exists and is not that cache, whole. "
            "Nothing was changed. Choose another folder; `logitcache merge` joins two caches.",
        )
    release(target)
    return report


def _checked(download: Download) -> VerifyReport:
    """The report of a download without damage; of another one, the damaged files are removed, to be had anew."""
    try:
        report = verify(download.folder)
        what = [problem.what for problem in report.problems]
        units = {problem.shard for problem in report.problems}
        damaged = [name for name in download.names if _part_of(name) in units]
    except CacheError as error:
        what, damaged = [str(error)], [MANIFEST, CONTENTS]
    if not what:
        return report
    download.drop(damaged)
    raise CorruptCache(
        f"pulling {download.repo_id}: expected what its checksums say, found {len(what)} problems ({what[0]}). "
        f"Nothing was put at {download.target}. Pull again, which downloads the damaged files anew; if it is the same "
        "then, tell who pushed it."
    )


def _part_of(name: str) -> str | None:
    """Of a file of a cache, the unit of the shard that it belongs to; "" for those that belong to none."""
    unit = unit_of_path(name)
    return "" if unit is None and (name.endswith(".npy") or is_data_record(name)) else unit
