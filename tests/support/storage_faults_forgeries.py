"""The forgeries of storage_faults_hostile: JSON, names, counts, blocks, indexes, and files that are none."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support import storage_faults_bombs as bombs
from support.storage_faults import GROUPS, KINDS
from support.storage_faults_hostile import Body, Case, Forged, canonical, sealed

from logitcache.storage.identity import digest
from logitcache.storage.index import npy_header

EXACT, FINE, COMPACT = KINDS
HUGE = (2**31, 2**32 - 1, 2**32, 2**63, -1, 1.5, True, None, float("nan"))
NAMES = ("../x", "/etc/passwd", "a\0b", "a\\b", "", ".", "..", "a/../b", "x" * 300, "a//b", "\ud800", "é", 7)


def with_value(part: str, path: str, value: object) -> Callable[[Forged], None]:
    """Set one value, by its path, of the manifest, the contents (after sealing) or the commit."""

    def change(body: Any) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        for parent in parents:
            body = body[parent]
        body[last] = value

    def forge(forged: Forged) -> None:
        if part == "contents":
            forged.last.append(change)
        else:
            change(getattr(forged, part))

    return forge


def _values() -> list[Case]:
    values: dict[tuple[str, str], Sequence[object]] = {
        ("manifest", "model.vocab_size"): (1, 6, 2**24, *HUGE, "40"),
        ("manifest", "capture.top_k"): (0, 4, 6, 40, *HUGE),
        ("manifest", "capture.max_length"): (1, *HUGE[4:]),
        ("manifest", "capture.min_mass"): (0.0, 2.0, float("nan"), float("inf"), 1),
        ("manifest", "capture.precision"): ("finest", "exact", "compact", 7, None),
        ("manifest", "capture.max_error"): (0.0, 0.6, -1.0, float("nan"), 1),
        ("manifest", "capture.num_tail_groups"): (0, 1, 2, 4, 257, *HUGE),
        ("manifest", "capture.group_steps_per_nat"): (-1, 2, 3, 8, *HUGE),
        ("manifest", "capture.num_tail_samples"): (0, 1, 4096, 4097, *HUGE),
        ("manifest", "capture.tail_partition"): ("", "0" * 32, 7),
        ("manifest", "store"): ("parquet", "../zarr", 1, None),
        ("manifest", "format_version"): (0, 1, 3, True, 2.0, "2", None),
        ("manifest", "reader_features"): (["new"], ["tail-groups", "new"], [], "tail-groups", [["x"]], [1, "x"], None),
        ("manifest", "tokenizer"): (1, {}, {"fingerprint": 1}),
        ("manifest", "model.config"): ("", "{", "[]", '{"b":1,"a":1}', '{"a": 1}', "[" * 10_000, "9" * 5000, 7),
        ("manifest", "model.tf32"): (0, None, "false"),
        ("manifest", "unknown"): (1,),
        ("contents", "num_samples"): HUGE,
        ("contents", "index.size"): (0, 2**31, 2**40, 2**49, 2**50, -1, 1.5, True),
        ("contents", "index.name"): (*NAMES, "shards", "writer.lock", "manifest.json"),
        ("contents", "index.checksum"): ("0" * 32, "", 7),
        ("contents", "shards"): ([], None, {}, [1], [{"unit": "0" * 32, "checksum": "0" * 32}]),
        ("contents", "shards.0.unit"): ("../" + "0" * 29, "0" * 32, "A" * 32, "", "0" * 33, "/" * 32, 7),
        ("contents", "manifest"): ("0" * 32, None),
        ("commit", "num_samples"): (0, 2, *HUGE),
        ("commit", "num_positions"): (0, 255, *HUGE),
        ("commit", "num_tokens"): (0, 299, *HUGE),
        ("commit", "num_tokens_cut"): (-1, 2**40, 2**63, 1.5),
        ("commit", "kept_mass"): (-1.0, 1e9, float("inf"), float("nan"), 1),
        ("commit", "unit"): ("0" * 32, "../x", None),
        ("commit", "identity"): ("0" * 32, "../x", None),
        ("commit", "files.0.name"): NAMES,
        ("commit", "files.0.size"): (2**31, 2**40, 2**49, 2**50, -1, 1.5),
        ("commit", "files.0.checksum"): ("0" * 32, 7),
        ("commit", "blocks"): ({}, [], None, {"../x": [[0, 1, 0]]}),
        ("commit", "chat_template"): ("x", "A" * 32, "0" * 33, None, 7),
        ("commit", "unknown"): (1,),
    }
    in_files = {"commit.files.0.checksum", "commit.files.0.size"}
    return [
        Case(
            f"{part}.{path} = {value!r:.40}",
            with_value(part, path, value),
            by="verify" if f"{part}.{path}" in in_files and value != 7 else "read",
        )
        for (part, path), some in values.items()
        for value in some
        if not (part == "manifest" and path == "capture.max_length" and value in (2**63,))
    ]


# --- JSON -------------------------------------------------------------------------------------------------------------


def raw(part: str, data: Callable[[Body], bytes]) -> Callable[[Forged], None]:
    """The whole file from the body that it should have."""

    def forge(forged: Forged) -> None:
        if part == "contents.json":
            forged.last.append(lambda contents: forged.raw.__setitem__(part, data(contents)))
        else:
            forged.raw[part] = data(forged.manifest if part == "manifest.json" else forged.commit)

    return forge


def _deep(_: Body) -> bytes:
    return b'{"body":' + b"[" * 100_000 + b"]" * 100_000 + b',"checksum":""}'


def _twice(body: Body) -> bytes:
    key, value = next((k, v) for k, v in body.items() if isinstance(v, (int, str)))
    return sealed(canonical(body)).replace(
        b'{"body":{', b'{"body":{' + json.dumps({key: value}).encode()[1:-1] + b",", 1
    )


JSON_FORMS: dict[str, Callable[[Body], bytes]] = {
    "100,000 levels": _deep,
    "100,000 levels of objects": lambda _: (
        b'{"body":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b',"checksum":""}'
    ),
    "100 MB": lambda _: b'{"body":"' + b"x" * 10**8 + b'","checksum":""}',
    "60 MB of empty lists": lambda _: b'{"body":[' + b"[]," * (20 * 2**20) + b'0],"checksum":""}',
    "60 MB of one string": lambda _: b'{"body":"' + b"x" * (60 * 2**20) + b'","checksum":""}',
    "60 MB of white space": lambda body: b" " * (60 * 2**20) + sealed(canonical(body))[:-3],
    "a key twice": _twice,
    "body twice": lambda body: sealed(canonical(body))[:-2] + b',"body":' + canonical(body) + b"}\n",
    "an unknown key beside the body": lambda body: sealed(canonical(body))[:-2] + b',"more":1}\n',
    "a number of 100,000 digits": lambda _: b'{"body":' + b"9" * 100_000 + b',"checksum":""}',
    "1e400": lambda _: sealed(b'{"a":1e400}'),
    "not UTF-8": lambda body: sealed(canonical(body)).replace(b'"body"', b'"b\xff\xfedy"'),
    "UTF-16": lambda body: sealed(canonical(body)).decode().encode("utf-16"),
    "null": lambda _: b"null",
    "a list": lambda _: b"[1]",
    "a checksum that is null": lambda body: b'{"body":' + canonical(body) + b',"checksum":null}',
    "a checksum of 1 MB": lambda body: b'{"body":' + canonical(body) + b',"checksum":"' + b"0" * 2**20 + b'"}',
    "another after it": lambda body: sealed(canonical(body)) * 2,
    "binary zeros": lambda _: bytes(1000),
}


def _json_forms() -> list[Case]:
    parts = ("manifest.json", "contents.json", "commit")
    return [
        Case(f"{part}: {form}", raw(part, data), without=("verify", "convert", "extend") if "MB of" in form else ())
        for form, data in JSON_FORMS.items()
        for part in parts
    ]


# --- blocks and counts ------------------------------------------------------------------------------------------------


def in_blocks(change: Callable[[list[list[Any]]], object], stream: int = 0) -> Callable[[Forged], None]:
    def forge(forged: Forged) -> None:
        names = sorted(s for s in forged.commit["blocks"] if s in ("logprobs.arrow", "label_steps", "alternative_ids"))
        change(forged.commit["blocks"][names[stream % len(names)]])

    return forge


def _set(index: int, value: object) -> Callable[[list[list[Any]]], object]:
    return lambda blocks: blocks[0].__setitem__(index, value)


BLOCKS: dict[str, Callable[[list[list[Any]]], object]] = {
    "2^60 long": _set(1, 2**60),
    "2^31 - 1 long": _set(1, 2**31 - 1),
    "of no length": _set(1, 0),
    "of negative length": _set(1, -5),
    "at 2^60": _set(0, 2**60),
    "at 2^49": _set(0, 2**49),
    "at -1": _set(0, -1),
    "behind the end": _set(0, 10**6),
    "of another crc32c": _set(2, 0),
    "of a crc32c of 2^32": _set(2, 2**32),
    "at a float": _set(0, 0.0),
    "at true": _set(0, False),
    "of two numbers": lambda blocks: blocks[0].pop(),
    "of four numbers": lambda blocks: blocks[0].append(0),
    "missing": lambda blocks: blocks.pop(),
    "all missing": lambda blocks: blocks.clear(),
    "one too many": lambda blocks: blocks.append(blocks[0]),
    "exchanged": lambda blocks: blocks.reverse(),
    "the first twice": lambda blocks: blocks.__setitem__(1, blocks[0]),
    "a hundred thousand too many": lambda blocks: blocks.extend([[0, 1, 0]] * 10**5),
    "no list": lambda blocks: blocks.__setitem__(0, 7),  # type: ignore[call-overload]
}


def _blocks() -> list[Case]:
    return [Case(f"blocks {name}", in_blocks(change)) for name, change in BLOCKS.items()]


def claims(**counts: int) -> Callable[[Forged], None]:
    """Counts of the largest shard, which has one sample, with an index that agrees."""

    def forge(forged: Forged) -> None:
        for name, count in counts.items():
            forged.commit[name] = count
            if name in (forged.rows.dtype.names or ()):
                forged.row[name] = count

    return forge


def claims_overlapping(forged: Forged) -> None:
    """4 million positions in 16,000 blocks, all of them the first one: 50 GB as records, if K were 4,096."""
    positions = 256 * 16_000
    for stream, blocks in forged.commit["blocks"].items():
        rows = 16 if stream == "samples.arrow" else 4096 if stream in ("token_ids", "positions") else 256
        per_sample = stream in ("sample_ids", "num_tokens", "num_positions", "num_tokens_cut", "samples.arrow")
        blocks[:] = blocks[:1] if per_sample else blocks[:1] * (positions // rows + 1)
    claims(num_positions=positions, num_tokens=positions + 1)(forged)


def _counts() -> list[Case]:
    return [
        Case("counts of 2^31 positions, and the index agrees", claims(num_positions=2**31, num_tokens=2**31 + 1)),
        Case("counts of 2^32 - 2 positions, and so on", claims(num_positions=2**32 - 2, num_tokens=2**32 - 1)),
        Case("counts of 2^32 - 1 tokens, and the index agrees", claims(num_tokens=2**32 - 1)),
        Case("counts of 2^31 samples", claims(num_samples=2**31, num_positions=2**31, num_tokens=2**32 - 1)),
        Case("counts of 2^27 samples", claims(num_samples=2**27, num_positions=2**27, num_tokens=2**28)),
        Case("counts of 4 million positions in one block said 16,000 times", claims_overlapping),
        Case("one position less than there is", claims(num_positions=200)),
        Case("one row more than there is", claims(num_positions=280)),
        Case("more tokens than there are", claims(num_tokens=310)),
        Case("fewer tokens than there are", claims(num_tokens=290)),
    ]


# --- the index and the partition --------------------------------------------------------------------------------------


def in_rows(change: Callable[[Any], object]) -> Callable[[Forged], None]:
    return lambda forged: change(forged.rows)  # type: ignore[return-value]


def _swap(name: str, rows: Any) -> None:
    """Of two samples of one shard, whose sum stays."""
    for shard in np.unique(rows["shard"]):
        of_shard = np.flatnonzero(rows["shard"] == shard)
        if len(set(rows[name][of_shard].tolist())) > 1:
            rows[name][of_shard] = np.roll(rows[name][of_shard], 1)


def pickled(forged: Forged) -> None:
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    forged.index = out.getvalue()


def bad_groups(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[[Forged], None]:
    def forge(forged: Forged) -> None:
        groups = change(GROUPS.copy())
        forged.groups = npy_header(groups.dtype, len(groups)) + groups.tobytes()
        forged.manifest["capture"]["tail_partition"] = digest(groups.tobytes())

    return forge


def _indexes() -> list[Case]:
    def index(data: bytes) -> Callable[[Forged], None]:
        return lambda forged: setattr(forged, "index", data)

    return [
        Case("index: shard 2^32 - 1", in_rows(lambda rows: rows["shard"].__setitem__(-1, 2**32 - 1))),
        Case("index: shard 3 of 3", in_rows(lambda rows: rows["shard"].__setitem__(-1, 3))),
        Case("index: unsorted", in_rows(lambda rows: rows["shard"].__setitem__(0, 2))),
        Case("index: all in one shard", in_rows(lambda rows: rows["shard"].fill(0))),
        Case("index: 2^32 - 1 tokens", in_rows(lambda rows: rows["num_tokens"].fill(2**32 - 1))),
        Case("index: 2^32 - 1 positions", in_rows(lambda rows: rows["num_positions"].fill(2**32 - 1))),
        Case("index: no positions", in_rows(lambda rows: rows["num_positions"].fill(0))),
        Case("index: lengths exchanged", in_rows(lambda rows: _swap("num_tokens", rows))),
        Case("index: numbers of positions exchanged", in_rows(lambda rows: _swap("num_positions", rows))),
        Case(
            "index: ids exchanged",
            in_rows(lambda rows: rows["sample_id"].__setitem__(slice(None), rows["sample_id"][::-1].copy())),
            by="verify",
        ),
        Case("index: one id for all", in_rows(lambda rows: rows["sample_id"].fill(7))),
        Case("index: other numbers of tokens cut", in_rows(lambda rows: rows["num_cut"].fill(2**32 - 1)), by="verify"),
        Case("index: pickled objects", pickled),
        Case("index: empty", index(b"")),
        Case("index: a header alone", index(npy_header(np.dtype("u1"), 2**40))),
        Case("index: noise", index(np.random.default_rng(0).bytes(1000))),
        Case("partition: a group beyond G", bad_groups(lambda groups: np.where(groups == 2, 200, groups).astype("u1"))),
        Case("partition: longer than V", bad_groups(lambda groups: np.concatenate([groups, groups]))),
        Case("partition: shorter than V", bad_groups(lambda groups: groups[:-1])),
        Case("partition: empty", bad_groups(lambda groups: groups[:0])),
        Case("partition: of int64", bad_groups(lambda groups: groups.astype("<i8"))),
        Case("partition: missing", lambda forged: setattr(forged, "groups", None)),
    ]


# --- files that are none ----------------------------------------------------------------------------------------------


def instead(pattern: str, make: Callable[[Path], object]) -> Callable[[Forged], None]:
    """Something else where a file or a folder of the cache is."""

    def alter(path: Path) -> None:
        found = sorted(p for p in path.glob(pattern) if p.name != "zarr.json")[-1]
        kept = path.with_name("kept")
        if kept.is_dir() and not kept.is_symlink():
            shutil.rmtree(kept)
        kept.unlink(missing_ok=True)
        found.rename(kept)
        make(found)

    return lambda forged: forged.after.append(alter)


def _links(store: str, data: str) -> list[Case]:
    def link(path: Path) -> None:
        kept = next(p / "kept" for p in path.parents if (p / "kept").exists())
        path.symlink_to(kept)

    kinds: dict[str, Callable[[Path], object]] = {
        "a link": link,
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a pipe that nobody writes": os.mkfifo,
        "a folder": Path.mkdir,
    }
    files = {
        "manifest.json": "",
        "contents.json": "",
        "index-*": "",
        "token_groups.npy": "",
        "shards/*.json": "",
        data: "",
    }
    cases = [
        Case(f"{what} instead of {pattern}", instead(pattern, make), store)
        for pattern in files
        for what, make in kinds.items()
    ]
    folders = ["shards", "shards/*-*"] + ([str(Path(data).parent)] if store == "zarr" else [])
    by = {"shards": ""}  # which may be a link, to a folder of this cache alone
    return cases + [
        Case(f"a link instead of the folder {pattern}", instead(pattern, link), store, by=by.get(pattern, "read"))
        for pattern in folders
    ]


CASES: list[Case] = [
    *_values(),
    *_json_forms(),
    *_blocks(),
    *_counts(),
    *_indexes(),
    *_links("zarr", "shards/*-*/label_steps/c/0"),
    *_links("arrow", "shards/*-*/logprobs.arrow"),
    *bombs.CASES,
]
