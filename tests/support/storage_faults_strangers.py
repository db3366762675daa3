"""Faults of people who mix caches up: shards, contents, indexes and manifests of another base or another capture.

Both caches are of the same tokens and positions, so that only their numbers tell them apart. Each case does what its
errors say to do: read, go on writing as the owner would, repair, go on writing. Whatever of that succeeds, a reader
must find the owner's numbers, or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from support.storage_faults import (
    GROUPS,
    SAME,
    Bits,
    Counts,
    Seen,
    Tally,
    attempt,
    judge,
    manifest_for,
    read_all,
    samples_of,
    tree,
    write,
)
from support.storage_faults_damage import Changes, restore
from support.storage_forging import body_of_bytes, canonical, folder_of, sealed
from support.storage_samples import identity_of

from logitcache.storage import CachedSample, CacheWriter, Manifest, repair

Files = dict[str, bytes]


class Owner:
    """A cache as its owner makes it: the manifest, the shards, and what reading it gives."""

    def __init__(self, path: Path, manifest: Manifest, shards: list[list[CachedSample]]) -> None:
        self.manifest, self.shards = manifest, shards
        write(path, manifest, shards)
        self.bits, self.files = read_all(path), tree(path)

    def write(self, path: Path) -> None:
        """The same precompute again: it reads what is there, makes what is missing and finishes."""
        with CacheWriter(path, self.manifest, GROUPS if self.manifest.capture.num_tail_groups else None) as writer:
            writer.captured()
            for shard in self.shards:
                writer.commit(shard)
            if not writer.is_final:
                writer.finalize()

    @property
    def unfinished(self) -> Files:
        """Killed after the first shard."""
        first = units_of(self.files)[0]
        own = (f"shards/{first}", "manifest.json", "token_groups.npy")
        return {name: data for name, data in self.files.items() if name.startswith(own)}


def strangers(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """Parts of a cache of another base, or of another capture of the base, in a finished and in an unfinished cache."""
    base = manifest_for(store, "fine", groups=True)
    pairs = {
        "another base": replace(base, model=replace(base.model, weights="e" * 32)),
        "another capture": replace(base, capture=replace(base.capture, max_length=2048)),
    }
    for what, manifest in pairs.items():
        tally = Tally(f"files of {what}, both ways", store)
        mine = Owner(folder / what / "a", base, samples_of(8, 0, groups=True))
        theirs = Owner(folder / what / "b", manifest, samples_of(8, 1, groups=True))
        path = folder / what / "cache"
        for way, own, other in (("there", mine, theirs), ("back", theirs, mine)):
            for start, files in (("finished", own.files), ("unfinished", own.unfinished)):
                cases = list(mixtures(files, other.files, own.manifest).items())
                for label, changes in cases[tally.cases % 5 :: 5] if counts.stride > 1 else cases:
                    after = {n: data for n in {*files, *changes} if (data := changes.get(n, files.get(n))) is not None}
                    tally.add(f"{way}, {start}, {label}", settled(path, after, own, tally))
        yield tally


def settled(path: Path, files: Files, owner: Owner, tally: Tally) -> Seen:
    """What a reader sees at first, unless something went wrong on the ways back to a whole cache."""
    restore(path, files)
    first = judge(path, owner.bits)
    if first.kind in ("wrong", "defect"):
        return first
    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("writing", partial(owner.write, path)),
        ("repair", partial(repair, path)),
        ("writing after repair", partial(owner.write, path)),
        ("repair again", partial(repair, path)),
    )
    ways = (steps, steps[1:])
    for way in ways:
        restore(path, files)
        bad = walked(path, way, owner.bits, tally)
        if bad is not None:
            return bad
    return first


def walked(path: Path, way: tuple[tuple[str, Callable[[], object]], ...], bits: Bits, tally: Tally) -> Seen | None:
    """Step after step, with a reader after each; None where all that was seen was right or refused."""
    done = SAME
    for name, step in way:
        done, _ = attempt(step, path)
        seen = judge(path, bits)
        for found in (done, seen):
            if found.kind in ("wrong", "defect"):
                return replace(found, what=f"after {name}: {found.what}")
            lacking = {text: lack for text, lack in found.messages.items() if lack}
            if lacking:
                return Seen("defect", f"after {name}: {lacking}")
        if name == "writing after repair" and done is SAME and seen.kind != "same":
            return Seen("defect", f"{name} succeeded, and reading says {seen.what}"[:300])
    whole = judge(path, bits).kind == "same"
    tally.notes["ways that ended whole" if whole else "ways that ended refused"] += 1
    return None


def mixtures(mine: Files, theirs: Files, manifest: Manifest) -> dict[str, Changes]:
    """What comes into a cache of `mine` from one of `theirs`."""
    own = units_of(mine)[0]
    (other,) = (unit for unit in units_of(theirs) if counts_of(theirs, unit) == counts_of(mine, own))
    record, folder = {f"shards/{other}.json": theirs[f"shards/{other}.json"]}, below(theirs, f"shards/{other}-")
    over = {f"shards/{own}.json": theirs[f"shards/{other}.json"]}
    gone: Changes = dict.fromkeys(below(mine, "shards/"))
    contents, index = below(theirs, "contents.json"), below(theirs, "index-")
    renamed = moved(folder, folder_name(folder), folder_name(folder).replace(other, own))
    as_mine = moved(folder, folder_name(folder), folder_name(below(mine, f"shards/{own}-")))
    head = {"manifest.json": theirs["manifest.json"]}
    no_manifest: Changes = {"manifest.json": None}
    cases: dict[str, Changes] = {
        "a shard beside": {**record, **folder},
        "a shard renamed": {**over, **renamed},
        "a shard renamed, its folder too": {**over, **as_mine},
        "a record over one, the folder beside": {**over, **folder},
        "a record alone": {**record},
        "a record over one": {**over},
        "a folder alone": {**folder},
        "a folder over one": {**dict.fromkeys(below(mine, f"shards/{own}-")), **as_mine},
        "all of shards/": {**gone, **below(theirs, "shards/")},
        "all of shards/ beside": {**below(theirs, "shards/")},
        "all of shards/ and contents": {**gone, **below(theirs, "shards/"), **contents, **index},
        "all but the manifest": {**dict.fromkeys(mine), **theirs, "manifest.json": mine["manifest.json"]},
        "contents": {**contents},
        "contents and index": {**contents, **index},
        "index": {**index},
        "manifest": {**head},
        "manifest, contents and index": {**head, **contents, **index},
        "no manifest, a shard beside": {**no_manifest, **record, **folder},
        "no manifest, all of shards/": {**no_manifest, **gone, **below(theirs, "shards/")},
        "no manifest": {**no_manifest},
    }
    for name in below(mine, "index-"):
        cases["index under the other's name"] = {name: next(iter(index.values()))}
    if "contents.json" in mine:
        cases["a shard that says it is the owner's"] = forged(theirs, own, other, manifest)
    return cases


def forged(theirs: Files, own: str, other: str, manifest: Manifest) -> Changes:
    """The stranger's numbers under the owner's identity and unit, every checksum right: only contents.json knows."""
    body: dict[str, Any] = body_of_bytes(theirs[f"shards/{other}.json"])
    body |= {"unit": own, "identity": identity_of(manifest)}
    folder = below(theirs, f"shards/{other}-")
    files = moved(folder, folder_name(folder), f"shards/{folder_of(body)}/")
    return {f"shards/{own}.json": sealed(canonical(body)), **files}


def units_of(files: Files) -> list[str]:
    parts = [name.split("/") for name in files]
    return sorted(part[1].removesuffix(".json") for part in parts if part[0] == "shards" and len(part) == 2)


def counts_of(files: Files, unit: str) -> tuple[int, ...]:
    """By which a shard of the same samples is known."""
    body = body_of_bytes(files[f"shards/{unit}.json"])
    return body["num_samples"], body["num_positions"], body["num_tokens"]


def below(files: Files, prefix: str) -> Files:
    return {name: data for name, data in files.items() if name.startswith(prefix)}


def folder_name(shard: Files) -> str:
    return "/".join(next(iter(shard)).split("/")[:2]) + "/"


def moved(files: Files, before: str, after: str) -> Files:
    return {after + name.removeprefix(before): data for name, data in files.items()}


FAULTS = (strangers,)
