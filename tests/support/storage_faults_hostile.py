"""Well sealed caches that lie: every checksum matches, as docs/format.md says how, and the content is hostile.

Each is read, verified, converted and extended in a child process that may take 1 GiB more than it has, and 15 seconds
an operation. What is expected of all is a `CacheError`. The forgeries themselves are in storage_faults_forgeries.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from support.storage_faults import (
    KINDS,
    SAME,
    Counts,
    Seen,
    Tally,
    attempt,
    fork,
    make_cache,
    read_all,
    status_of,
    tree,
)

from logitcache.storage import CacheWriter, LogitCache, convert, verify
from logitcache.storage.identity import digest
from logitcache.storage.index import DTYPE, npy_header

MORE_BYTES, MORE_SECONDS = 2**30, 15
Body = dict[str, Any]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sealed(body: bytes) -> bytes:
    return b'{"body":' + body + b',"checksum":"' + digest(body).encode() + b'"}\n'


class Forged:
    """A cache taken apart, to be changed and sealed again.

    `unit` is its largest shard, of two blocks. last: changes of the contents after sealing; raw: whole files that are
    written as they are; after: changes of the folder.
    """

    def __init__(self, path: Path) -> None:
        files = tree(path)
        self.manifest: Body = json.loads(files["manifest.json"])["body"]
        self.contents: Body = json.loads(files["contents.json"])["body"]
        self.commits: dict[str, Body] = {
            e["unit"]: json.loads(files[f"shards/{e['unit']}.json"])["body"] for e in self.contents["shards"]
        }
        self.data = {
            unit: {n.split("/", 2)[2]: d for n, d in files.items() if n.startswith(f"shards/{unit}-")}
            for unit in self.commits
        }
        self.groups = files.get("token_groups.npy")
        index = files[self.contents["index"]["name"]]
        self.rows: NDArray[Any] = np.frombuffer(index[-DTYPE.itemsize * self.contents["num_samples"] :], DTYPE).copy()
        self.index: bytes | None = None
        self.last: list[Callable[[Body], object]] = []
        self.raw: dict[str, bytes] = {}
        self.after: list[Callable[[Path], object]] = []
        self.unit = max(self.commits, key=lambda unit: int(self.commits[unit]["num_positions"]))

    @property
    def commit(self) -> Body:
        return self.commits[self.unit]

    @property
    def folder(self) -> str:
        return f"shards/{self.unit}-{digest(canonical(self.commit['files']))[:16]}"

    @property
    def row(self) -> NDArray[Any]:
        """The row in the index of the only sample of the largest shard."""
        (number,) = np.flatnonzero(self.rows["shard"] == sorted(self.commits).index(self.unit))
        row: NDArray[Any] = self.rows[number : number + 1]
        return row

    def put(self, name: str, data: bytes) -> None:
        """Replace a file of the shard."""
        self.data[self.unit][name] = data
        for entry in self.commit["files"]:
            if entry["name"] == name:
                entry |= {"size": len(data), "checksum": digest(data)}

    def recode(self, stream: str, change: Callable[[bytes], bytes], number: int = 0) -> None:
        """Replace a block, with its crc32c, and move those behind it."""
        name = next(n for n in self.data[self.unit] if n == stream or n.startswith(f"{stream}/c/"))
        blocks, data = self.commit["blocks"][stream], self.data[self.unit][name]
        at, length, _ = blocks[number]
        new = change(data[at : at + length])
        self.put(name, data[:at] + new + data[at + length :])
        blocks[number] = [at, len(new), google_crc32c.value(new)]
        for later in blocks[number + 1 :]:
            later[0] += len(new) - length

    def write(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        (path / "shards").mkdir(parents=True)
        index = npy_header(DTYPE, len(self.rows)) + self.rows.tobytes() if self.index is None else self.index
        manifest = self.raw.get("manifest.json", sealed(canonical(self.manifest)))
        contents = self.contents | {"manifest": digest(manifest)}
        contents["index"] = {"name": f"index-{digest(index)}.npy", "size": len(index), "checksum": digest(index)}
        (path / contents["index"]["name"]).write_bytes(index)
        for entry, (unit, commit) in zip(contents["shards"], self.commits.items(), strict=True):
            data = self.raw.get("commit") if unit == self.unit else None
            data = data or sealed(canonical(commit))
            entry["checksum"] = digest(data)
            (path / "shards" / f"{unit}.json").write_bytes(data)
            folder = path / "shards" / f"{unit}-{digest(canonical(commit['files']))[:16]}"
            for name, content in self.data[unit].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        for change in self.last:
            change(contents)
        (path / "manifest.json").write_bytes(manifest)
        (path / "contents.json").write_bytes(self.raw.get("contents.json", sealed(canonical(contents))))
        if self.groups is not None:
            (path / "token_groups.npy").write_bytes(self.groups)
        for alter in self.after:
            alter(path)


@dataclass
class Case:
    """A forgery. kind: of the cache it is made of; by: who must refuse it, "" where it may be taken for what it was."""

    name: str
    forge: Callable[[Forged], object]
    store: str = ""
    kind: tuple[str, bool] = KINDS[1]
    by: str = "read"
    without: tuple[str, ...] = field(default=())


# --- in a child process -----------------------------------------------------------------------------------------------


def examine(path: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What each operation on a cache says, in a child of limited memory and time: {operation: [kind, what, messages]}.

    An operation during which the child died is "crash".
    """
    reading, writing = os.pipe()

    def run() -> None:
        limit()
        for name, operation in OPERATIONS.items():
            if name in without:
                continue
            os.write(writing, f"{json.dumps([name])}\n".encode())
            signal.alarm(MORE_SECONDS)
            seen, found = attempt(lambda operation=operation: operation(path), path)  # type: ignore[misc]
            kind = "bad" if name == "verify" and found else seen.kind
            messages = dict(list(seen.messages.items())[:1])
            os.write(writing, f"{json.dumps([name, kind, seen.what[:400], messages])}\n".encode())

    child = fork(run)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as lines:
        said = [json.loads(line) for line in lines]
    status = status_of(child)
    results = {line[0]: line[1:] for line in said}
    if status:
        why = (
            "it hangs"
            if status == -signal.SIGALRM
            else f"the process dies: {signal.Signals(-status).name}"
            if status < 0
            else "the process fails"
        )
        results[said[-1][0] if said else "start"] = ["crash", why, {}]
    return results


def limit() -> None:
    """Bound the memory and the time of this process from now on."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    pa.set_memory_pool(pa.system_memory_pool())  # the other ones reserve gigabytes that they do not use
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _convert(path: Path) -> object:
    target = path.with_name("converted")
    shutil.rmtree(target, ignore_errors=True)
    store = "zarr" if LogitCache.open(path).manifest.store == "arrow" else "arrow"
    return len(convert(path, target, store, "compact"))


def _extend(path: Path) -> object:
    cache = LogitCache.open(path)
    with CacheWriter(path, cache.manifest, cache.token_groups()) as writer:
        writer.captured()
        writer.finalize()
    return None


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "read": read_all,
    "verify": lambda path: verify(path).problems,
    "convert": _convert,
    "extend": _extend,
}


def verdict(results: dict[str, Any], by: str) -> Seen:
    """Refused by who must, and nothing but refusals and success of the others."""
    messages = {key: lack for _, _, m in results.values() for key, lack in m.items()}
    bad = [f"{name}: {what}" for name, (kind, what, _) in results.items() if kind in ("crash", "defect")]
    bad += [f"{name}: {what}, not a CacheError" for name, (_, what, _) in results.items() if what.startswith("OSError")]
    if bad:
        return Seen("defect", "; ".join(bad)[:600])
    if not by and {kind for kind, _, _ in results.values()} == {"same"}:
        return SAME
    if by and results[by][0] == "same":
        return Seen("defect", f"{by} accepts it; " + ", ".join(f"{n}: {k}" for n, (k, _, _) in results.items()))
    if by and results.get("verify", ["bad"])[0] == "same":
        return Seen("defect", f"verify calls it intact, reading says {results['read'][1]}"[:300])
    return Seen("refused", results[by or "read"][1], messages)


def hostile(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """Each forgery of this store, and of those that do not mind a few, in the short version."""
    from support.storage_faults_forgeries import CASES

    tally = Tally("well sealed and hostile", store)
    sources = {kind: make_cache(folder / f"{store}-{kind[0]}", store, *kind) for kind in KINDS}
    for number, case in enumerate(CASES):
        quick = counts.stride > 1 and (" MB" in case.name or (not case.store and number % 4 != 2 * (store == "zarr")))
        if case.store not in ("", store) or quick:
            continue
        tally.add(case.name, seen_of(case, sources[case.kind], folder / "cache"))
    yield tally


def seen_of(case: Case, source: Path, path: Path) -> Seen:
    forged = Forged(source)
    case.forge(forged)
    forged.write(path)
    return verdict(examine(path, case.without), case.by)


def mutations(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """Noise in blocks, records and index, sealed: the decoders get to see it. Refused, or another valid record."""
    tally = Tally("noise under valid checksums", store)
    done = 0
    while done < counts.mutations:
        reading, writing = os.pipe()
        child = fork(partial(_mutate, store, folder, done, counts.mutations, writing))
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as lines:
            for line in lines:
                number, label, kind, what = json.loads(line)
                if kind == "begun":
                    last = label
                    continue
                done = number + 1
                tally.add(f"{number}: {label}", Seen(kind, what))
        status = status_of(child)
        if status:
            tally.add(f"{done}: {last}", Seen("defect", f"the process dies of {status}"))
            done += 1
    tally.notes["accepted as another valid record"] = tally.without_effect
    yield tally


def _mutate(store: str, folder: Path, start: int, stop: int, writing: int) -> None:
    sources = [make_cache(folder / f"{os.getpid()}-{kind[0]}", store, *kind) for kind in KINDS]
    limit()
    for number in range(start, stop):
        signal.alarm(MORE_SECONDS)
        rng = np.random.default_rng([9, number])
        forged = Forged(sources[number % len(sources)])
        stream = str(rng.choice(sorted(forged.commit["blocks"])))
        forged.recode(stream, partial(_noise, rng=rng), int(rng.integers(len(forged.commit["blocks"][stream]))))
        path = folder / "mutated"
        forged.write(path)
        os.write(writing, f"{json.dumps([number, stream, 'begun', ''])}\n".encode())
        seen = attempt(partial(read_all, path), path)[0]
        other = attempt(partial(verify, path), path)[0]
        seen = other if other.kind == "defect" else seen
        os.write(writing, f"{json.dumps([number, stream, seen.kind, seen.what[:300]])}\n".encode())


def _noise(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bits, bytes or words changed, or a part taken out or doubled; mostly near the start, where lengths are."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        reach = len(changed) if rng.random() < 0.4 else min(len(changed), 900)
        at = int(rng.integers(0, reach))
        kind = int(rng.integers(0, 6))
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
        elif kind == 2:
            word = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 255, 256, 2**20])).to_bytes(4, "little")
            changed[at & ~3 : (at & ~3) + 4] = word
        elif kind == 3:
            word = int(rng.choice([1, 2**32, 2**62, 2**40, 10**6])).to_bytes(8, "little")
            changed[at & ~7 : (at & ~7) + 8] = word
        elif kind == 4:
            del changed[at : at + int(rng.integers(1, 17))]
        else:
            changed[at:at] = changed[at : at + int(rng.integers(1, 33))]
    return bytes(changed) or b"\0"


FAULTS = (hostile, mutations)
