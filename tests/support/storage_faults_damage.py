"""Faults of the disk and of people: bits flipped, files cut, zeroed, swapped, deleted, put back from another day.

The trade-off: caches are of 6 samples in 3 shards, so that thousands of cases are read in full, by reader and verify.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from support.storage_faults import (
    KINDS,
    Bits,
    Counts,
    Seen,
    Tally,
    attempt,
    judge,
    make_cache,
    manifest_for,
    read_all,
    samples_of,
    tree,
    write,
)

from logitcache.storage import repair

Damage = Callable[[Path], object]


def class_of(name: str) -> str:
    """Which kind of file this is: its name without units and checksums."""
    parts = name.split("/")
    if parts[0] == "shards":
        return "commit record" if len(parts) == 2 else "/".join(parts[2:])
    return "index" if name.startswith("index-") else name


def by_class(files: dict[str, bytes]) -> dict[str, list[str]]:
    classes: dict[str, list[str]] = {}
    for name in sorted(files):
        classes.setdefault(class_of(name), []).append(name)
    return classes


def restore(path: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def bit_flips(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """One bit a case, of a file of each class in turn, at every precision, with tail groups and without."""
    tally = Tally("single bit flipped", store)
    for kind, (precision, groups) in enumerate(KINDS):
        path = make_cache(folder / f"{store}-{precision}", store, precision, groups)
        expected, files = read_all(path), tree(path)
        rng, classes = np.random.default_rng(kind), by_class(files)
        turns = itertools.cycle(sorted(classes))
        for _ in range(-(-counts.flips // len(KINDS))):
            name = str(rng.choice(classes[next(turns)]))
            bit = int(rng.integers(0, 8 * len(files[name])))
            changed = bytearray(files[name])
            changed[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(changed)
            seen = judge(path, expected)
            tally.add(f"{precision}, bit {bit} of {class_of(name)}", seen)
            tally.notes["reported by verify"] += seen.what == "bad"
            if seen.kind == "same":
                tally.notes[f"harmless in {class_of(name)}"] += 1
            (path / name).write_bytes(files[name])
    yield tally


def damaged_files(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """Every file cut, zeroed, emptied, grown, deleted, replaced by a folder; every folder emptied and deleted."""
    for precision, groups in KINDS[: 2 if counts.stride > 1 else 3]:
        path = make_cache(folder / f"{store}-{precision}", store, precision, groups)
        expected, files = read_all(path), tree(path)
        tallies = {fault: Tally(f"file {fault}", store) for fault, _ in _alterations(b"0")}
        tallies |= {fault: Tally(f"file {fault}", store) for fault in ("deleted", "replaced by a folder")}
        part = 1 if counts.stride == 1 else 5
        for number, (name, data) in enumerate(files.items()):
            for fault, changed in _alterations(data)[number % part :: part]:
                (path / name).write_bytes(changed)
                tallies[fault].add(f"{precision}, {class_of(name)}", judge(path, expected))
            (path / name).unlink()
            tallies["deleted"].add(f"{precision}, {class_of(name)}", judge(path, expected))
            (path / name).mkdir()
            tallies["replaced by a folder"].add(f"{precision}, {class_of(name)}", judge(path, expected))
            (path / name).rmdir()
            (path / name).write_bytes(data)
        folders = Tally("folder deleted or emptied", store)
        for gone in sorted(p for p in path.rglob("*") if p.is_dir())[::part]:
            for kept in (True, False):
                shutil.rmtree(gone)
                if kept:
                    gone.mkdir()
                folders.add(f"{precision}, {class_of(gone.relative_to(path).as_posix())}", judge(path, expected))
                restore(path, files)
        yield from (*tallies.values(), folders)


def _alterations(data: bytes) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(len(data))
    at = int(rng.integers(0, len(data)))
    return [
        ("truncated", data[: len(data) // 2]),
        ("truncated", data[:-1]),
        ("truncated", data[:at]),
        ("emptied", b""),
        ("zeroed", bytes(len(data))),
        ("zeroed", data[:at] + bytes(len(data) - at)),
        ("zeroed", bytes(at) + data[at:]),
        ("grown", data + b"\0"),
        ("grown", data + data),
        ("grown", b"\0" + data),
        ("overwritten with noise", rng.bytes(len(data))),
    ]


def exchanges(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """Files and shards swapped or copied, within a cache, and with one of the same tokens and other numbers."""
    for precision, groups in KINDS[:: 2 if counts.stride > 1 else 1]:
        lengths = ((6,), (6,), (6,))  # of equal sizes, as far as a codec allows
        manifest = manifest_for(store, precision, groups)
        path = write(folder / f"{store}-{precision}", manifest, samples_of(3, 0, groups, lengths))
        other = write(folder / f"{store}-{precision}-other", manifest, samples_of(3, 1, groups, lengths))
        expected, files, others = read_all(path), tree(path), tree(other)
        for fault, cases in _exchanges(files, others).items():
            tally = Tally(fault, store)
            for label, changed in cases[:: 1 if counts.stride == 1 else 1 + len(cases) // 20]:
                names = files.keys() | changed.keys()
                after = {n: data for n in sorted(names) if (data := changed.get(n, files.get(n))) is not None}
                if after == files:
                    continue
                tally.notes["of equal size"] += {n: len(d) for n, d in after.items()} == {
                    n: len(d) for n, d in files.items()
                }
                restore(path, after)
                tally.add(f"{precision}, {label}", judge(path, expected))
            restore(path, files)
            yield tally


Changes = dict[str, bytes | None]
"""What files become; None: they are deleted."""


def _exchanges(files: dict[str, bytes], others: dict[str, bytes]) -> dict[str, list[tuple[str, Changes]]]:
    names = sorted(files)
    swapped = {
        "files swapped between shards": [(a, b) for a, b in _pairs(names) if class_of(a) == class_of(b)],
        "files swapped between columns": [(a, b) for a, b in _pairs(names) if a.split("/")[:2] == b.split("/")[:2]],
    }
    cases: dict[str, list[tuple[str, Changes]]] = {
        fault: [(f"{class_of(a)} and {class_of(b)}", {a: files[b], b: files[a]}) for a, b in pairs]
        for fault, pairs in swapped.items()
    }
    cases["file duplicated over another"] = [
        (f"{class_of(a)} over {class_of(b)}", {b: files[a]}) for pair in swapped.values() for a, b in pair
    ]
    cases["file of another cache"] = [
        (class_of(name), {name: data})
        for name in names
        for theirs, data in others.items()
        if class_of(name) == class_of(theirs)
    ]
    cases["file of another cache"] += [
        (
            f"all of {'/'.join(prefix)}",
            {**dict.fromkeys(n for n in names if n.startswith(prefix)), **_only(others, prefix)},
        )
        for prefix in (("contents.json", "index-"), ("shards/",), ("contents.json",), ("index-",), ("manifest.json",))
    ]
    shards = sorted({name.split("/")[1].split("-")[0].removesuffix(".json") for name in names if "/" in name})
    whole = {shard: {n: d for n, d in files.items() if n.startswith(f"shards/{shard}-")} for shard in shards}
    commits = {shard: files[f"shards/{shard}.json"] for shard in shards}
    cases["whole shards"] = []
    for a, b in itertools.permutations(shards, 2):
        as_b = {_folder(whole[b]) + name.split("/", 2)[2]: data for name, data in whole[a].items()}
        as_a = {_folder(whole[a]) + name.split("/", 2)[2]: data for name, data in whole[b].items()}
        gone: Changes = dict.fromkeys(whole[b])
        cases["whole shards"] += [
            ("folder exchanged", {**as_a, **as_b}),
            ("folder duplicated over another", {**gone, **as_b}),
            ("folder and commit duplicated over another", {**gone, **as_b, f"shards/{b}.json": commits[a]}),
            ("commit exchanged", {f"shards/{a}.json": commits[b], f"shards/{b}.json": commits[a]}),
            ("commit duplicated as a new one", {f"shards/{'0' * 32}.json": commits[a]}),
            ("folder deleted", gone),
            ("commit deleted", {f"shards/{b}.json": None}),
            ("folder and commit deleted", {**gone, f"shards/{b}.json": None}),
        ]
    return cases


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    shard_files = [name for name in names if name.startswith("shards/")]
    return list(itertools.combinations(shard_files, 2))


def _only(files: dict[str, bytes], prefix: tuple[str, ...]) -> Changes:
    return {name: data for name, data in files.items() if name.startswith(prefix)}


def _folder(shard: dict[str, bytes]) -> str:
    return "/".join(next(iter(shard)).split("/")[:2]) + "/"


def old_files(store: str, folder: Path, _: Counts) -> Iterator[Tally]:
    """A cache that grew, with files of before put back: it is what it was then, what it is now, or refused."""
    tally = Tally("older file put back", store)
    shards = samples_of(4, groups=True)
    path, manifest = folder / f"{store}-grown", manifest_for(store, "fine", groups=True)
    states: list[tuple[dict[str, bytes], Bits]] = []
    for shard in shards:
        write(path, manifest, [shard])
        states.append((tree(path), read_all(path)))
    accepted = [bits for _, bits in states]
    for (now, old), with_index in itertools.product(itertools.permutations(range(len(states)), 2), (True, False)):
        files = states[now][0] | {"contents.json": states[old][0]["contents.json"]}
        if with_index:
            files |= {n: d for n, d in states[old][0].items() if n.startswith("index-")}
        restore(path, files)
        tally.add(f"contents of {old + 1} shards in {now + 1}, index {with_index}", judge(path, *accepted))
    yield tally


def linked(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """Every file and folder moved away, with a link left in its place; repair must then leave all as it is.

    Only shards/ may be moved so: everything is read as before, unless the link leads nowhere or into another cache.
    """
    tally = Tally("file or folder moved behind a link", store)
    for precision, groups in KINDS[: 2 if counts.stride > 1 else 3]:
        path = make_cache(folder / f"{store}-{precision}", store, precision, groups)
        other = make_cache(folder / f"{store}-{precision}-other", store, precision, groups, seed=2)
        expected, files, theirs, away = read_all(path), tree(path), tree(other), folder / "away"
        found = sorted(p for p in path.rglob("*") if p.name != "writer.lock")
        targets = [(p, away) for p in found[:: 1 if counts.stride == 1 else 5]]
        targets += [(path / "shards", to) for to in (away, folder / "none", path / "shards", other, other / "shards")]
        for moved, target in targets:
            moved.rename(away)
            moved.symlink_to(target)
            seen = judge(path, expected)
            said = attempt(partial(repair, path), path)[0]
            moved.unlink()
            away.rename(moved)
            followed = moved.name == "shards" and target == away
            if said.kind != ("same" if followed else "refused") or (followed and seen.kind != "same"):
                seen = Seen("defect", f"{seen.kind} {seen.what}, and repair {said.kind} {said.what}"[:300])
            if (tree(path), tree(other)) != (files, theirs):
                seen = Seen("wrong", "repair changed a cache")
            tally.notes["read as before"] += seen.kind == "same"
            tally.add(f"{precision}, {class_of(moved.relative_to(path).as_posix())} to {target.name}", seen)
    yield tally


FAULTS = (bit_flips, damaged_files, exchanges, old_files, linked)
