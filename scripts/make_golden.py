"""Write the golden caches of format version 2, which every later reader must read: tests/golden; tests/golden_draws
with draws from the tail, of the feature `tail-samples`, and tail groups in steps of 1/4 nat; tests/golden_label with
nothing but label and tail.

    python scripts/make_golden.py [--replace] [--draws | --label] [folder]

They are made once. Once the format is released they are never made again: a reader that cannot read them is wrong.
expected.json holds the numbers that were given to the writer, so it does not depend on any decoder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheWriter,
    CaptureIdentity,
    DataSet,
    Manifest,
    ModelIdentity,
    TokenizerIdentity,
)
from logitcache.storage import sample_id as id_of
from logitcache.storage.data_sets import joined, runs_of
from logitcache.storage.layout import LOCK

VOCAB, TOP_K, NUM_GROUPS, NUM_DRAWS = 40, 5, 2, 6
ABSENT = 2**32 - 1
MIN_MASS = 0.75
CONFIG = '{"model_type":"golden","rope_theta":10000.0,"vocab_size":40}'
TEMPLATES = ("", "ffeeddccbbaa99887766554433221100")
"""Of the two shards: the second one's samples are as if a chat template had rendered them."""
GROUPS = (np.arange(VOCAB) % NUM_GROUPS).astype(np.uint8)
PRECISIONS = {"exact": 0.0, "fine": 1 / 64}
CACHES = {f"{store}{'' if p == 'fine' else '-' + p}": (store, p) for p in PRECISIONS for store in ("zarr", "arrow")}

README = """# Golden caches of format version 2{title}

Written once by `python scripts/make_golden.py{option}` with
{versions}.
They are never written again for version 2, since caches of users cannot be either: what
`tests/storage/test_golden.py` finds wrong is wrong in the reader. `SHA256SUMS` (`sha256sum -c SHA256SUMS`) fixes
their bytes; other versions of the codecs may write the same numbers as other bytes.

`zarr`, `arrow` are `fine`, `zarr-exact`, `arrow-exact` are `exact`; V = 40, {kept},
two shards, the second as if a chat template had rendered it, a sample captured in both, {rows};
two data sets that share a sample, one with positions of a prompt at which cross-entropy does not count.
`expected.json` holds the tokens and the log-probabilities that were given to the writer, a list of captures for each
`CacheWriter.commit`; null is -inf, and each alternative is a pair of id and log-probability.
"""
OF_ALTERNATIVES = {
    "kept": "K = 5, two tail groups (even and odd ids) in steps of {step} nat",
    "rows": "rows with fewer than K alternatives or none, tails and groups of nothing",
}
OF_LABELS = {"kept": "K = 0, no tail groups", "rows": "tails of nothing"}
OF_DRAWS = """Each row has six draws from its tail, with replacement (feature `tail-samples`), or none where it has no
tail. In `expected.json` a draw is a pair of id and log-probability, too.
"""


def make_manifest(store: str, precision: str, num_draws: int, label_alone: bool) -> Manifest:
    manifest = _manifest(store, precision, num_draws)
    if not label_alone:
        return manifest
    nothing = {"top_k": 0, "min_mass": 1.0, "num_tail_groups": 0, "tail_partition": "", "group_steps_per_nat": 0}
    return replace(manifest, capture=replace(manifest.capture, **nothing), reader_features=())


def _manifest(store: str, precision: str, num_draws: int) -> Manifest:
    return Manifest(
        store=store,
        model=ModelIdentity("0123456789abcdef" * 2, CONFIG, VOCAB, "bfloat16", "sdpa"),
        tokenizer=TokenizerIdentity("00112233445566778899aabbccddeeff"),
        capture=CaptureIdentity(
            top_k=TOP_K,
            max_length=64,
            min_mass=MIN_MASS,
            precision=precision,
            max_error=PRECISIONS[precision],
            num_tail_groups=NUM_GROUPS,
            tail_partition=hashlib.blake2b(GROUPS.tobytes(), digest_size=16).hexdigest(),
            group_steps_per_nat=4 if num_draws else 1,
            num_tail_samples=num_draws,
        ),
        model_name="golden/modèle",
        created_with={"logitcache": "golden"},
        reader_features=("tail-groups", "tail-samples") if num_draws else ("tail-groups",),
    )


def make_logits(rng: np.random.Generator, token_ids: NDArray[np.uint32]) -> NDArray[np.float64]:
    """A row a token, flat or peaked. Some have no mass but on the label, or on it and three others, or none on odd ids
    other than the label."""
    logits = rng.normal(size=(len(token_ids), VOCAB)) * rng.choice([0.3, 2.0, 12.0], size=(len(token_ids), 1))
    for row, label in enumerate(token_ids[1:]):
        others = np.setdiff1d(np.argsort(-logits[row])[:4], label)[:3]
        keep = {3: [], 4: others, 6: np.arange(0, VOCAB, 2)}.get(row % 10, np.arange(VOCAB))
        logits[row, np.setdiff1d(np.arange(VOCAB), np.append(keep, label))] = -np.inf
    return logits


def make_sample(
    token_ids: NDArray[np.uint32], logits: NDArray[np.float64], positions: list[int], cut: int, num_draws: int
) -> CachedSample:
    """The records of these positions: the fewest alternatives that hold MIN_MASS of 1 - p(label), K at most."""
    tails = []
    at = np.array(positions, dtype=np.int32)
    labels = token_ids[at + 1]
    n = len(at)
    alternatives = np.full((n, TOP_K), ABSENT, dtype=np.uint32)
    record = {
        "label_logprobs": np.empty(n),
        "alternative_logprobs": np.full((n, TOP_K), -np.inf),
        "tail_logprobs": np.empty(n),
        "tail_group_logprobs": np.empty((n, NUM_GROUPS)),
    }
    for row, (t, label) in enumerate(zip(positions, labels, strict=True)):
        p = np.exp(logits[t] - logits[t].max())
        p /= p.sum()
        rest = p.copy()
        rest[label] = 0.0
        ranked = np.argsort(-rest, kind="stable")
        enough = 1 + np.searchsorted(np.cumsum(rest[ranked]), MIN_MASS * rest.sum())
        kept = ranked[: min(enough, TOP_K)]
        kept = kept[rest[kept] > 0]
        alternatives[row, : len(kept)] = kept
        rest[kept] = 0.0
        tails.append(rest)
        groups = np.array([rest[g == GROUPS].sum() for g in range(NUM_GROUPS)])
        with np.errstate(divide="ignore"):
            record["label_logprobs"][row] = np.log(p[label])
            record["alternative_logprobs"][row, : len(kept)] = np.log(p[kept])
            record["tail_logprobs"][row] = np.log(rest.sum())
            record["tail_group_logprobs"][row] = np.log(groups)
    columns: dict[str, Any] = {name: values.astype(np.float32) for name, values in record.items()}
    if num_draws:
        columns |= make_draws(np.stack(tails), at, num_draws)
    return CachedSample(token_ids, BaseLogprobs(at, labels, alternative_ids=alternatives, **columns), cut)


def make_draws(tails: NDArray[np.float64], positions: NDArray[np.int32], num_draws: int) -> dict[str, Any]:
    """Draws from these masses [n, V], the same ones for the same tail, most probable first, then ascending."""
    ids = np.full((len(tails), num_draws), ABSENT, dtype=np.uint32)
    logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)
    for row in np.flatnonzero(tails.any(axis=1)):
        rng = np.random.default_rng((int(positions[row]), int(tails[row].view(np.uint64).sum())))
        drawn = rng.choice(VOCAB, size=num_draws, p=tails[row] / tails[row].sum())
        found = np.log(tails[row, drawn]).astype(np.float32)
        order = np.lexsort((drawn, -found))
        ids[row], logprobs[row] = drawn[order], found[order]
    return {"tail_sample_ids": ids, "tail_sample_logprobs": logprobs}


def without_alternatives(sample: CachedSample) -> CachedSample:
    """The record of label and tail alone, from the masses of the whole one."""
    record = sample.logprobs
    with np.errstate(divide="ignore"):
        rest = np.exp(record.alternative_logprobs.astype(np.float64)).sum(axis=1) + np.exp(
            record.tail_logprobs.astype(np.float64)
        )
        tail = np.log(rest).astype(np.float32)
    none = np.zeros((len(record), 0))
    kept = {"alternative_ids": none.astype(np.uint32), "alternative_logprobs": none.astype(np.float32)}
    return replace(sample, logprobs=replace(record, **kept, tail_logprobs=tail, tail_group_logprobs=None))


def make_shards(num_draws: int) -> list[list[CachedSample]]:
    rng = np.random.default_rng(20240229)
    tokens = [rng.integers(0, VOCAB, size=n, dtype=np.uint32) for n in (24, 18, 2, 30)]
    logits = [make_logits(rng, t) for t in tokens]
    return [
        [
            make_sample(tokens[0], logits[0], list(range(0, 12)), 0, num_draws),
            make_sample(tokens[1], logits[1], list(range(3, 17)), 7, num_draws),
        ],
        [
            make_sample(tokens[2], logits[2], [0], 0, num_draws),
            make_sample(tokens[0], logits[0], list(range(8, 23, 2)), 0, num_draws),
            make_sample(tokens[3], logits[3], [1, 2, 4, 9, 13, 19, 20, 27, 28], 0, num_draws),
        ],
    ]


def make_data_sets(shards: list[list[CachedSample]]) -> list[dict[str, Any]]:
    """Two that share a sample; in one, positions of a prompt at which cross-entropy does not count."""
    (first, second), (short, again, last) = shards
    union = np.union1d(first.logprobs.positions, again.logprobs.positions)
    parts = {
        "golden/données.jsonl": [(first, union, union >= 4), (second, second.logprobs.positions, None)],
        "owner/prompts": [(s, s.logprobs.positions, None) for s in (last, second, short)],
    }
    return [
        {
            "name": name,
            "samples": [
                {
                    "token_ids": s.token_ids.tolist(),
                    "positions": at.tolist(),
                    "cross_entropy": [True] * len(at) if counts is None else counts.tolist(),
                }
                for s, at, counts in samples
            ],
        }
        for name, samples in parts.items()
    ]


def packed(plain_set: dict[str, Any]) -> DataSet:
    """As the writer takes it."""
    samples = plain_set["samples"]
    ids = [id_of(np.array(s["token_ids"], dtype=np.uint32)) for s in samples]
    runs = runs_of(ids, [np.array(s["positions"]) for s in samples], [np.array(s["cross_entropy"]) for s in samples])
    return joined(plain_set["name"], [runs])


def numbers(values: NDArray[np.float32]) -> list[Any]:
    return [numbers(v) if isinstance(v, np.ndarray) else None if np.isneginf(v) else float(v) for v in values]


def plain(sample: CachedSample) -> dict[str, Any]:
    """What is given to the writer, as plain numbers."""
    record = sample.logprobs
    groups = record.tail_group_logprobs
    rows = {
        "token_ids": sample.token_ids.tolist(),
        "num_tokens_cut": sample.num_tokens_cut,
        "positions": record.positions.tolist(),
        "label_logprobs": numbers(record.label_logprobs),
        "alternatives": pairs(record.alternative_ids, record.alternative_logprobs),
        "tail_logprobs": numbers(record.tail_logprobs),
        **({} if groups is None else {"tail_group_logprobs": numbers(groups)}),
    }
    if record.tail_sample_ids is None or record.tail_sample_logprobs is None:
        return rows
    return rows | {"draws": pairs(record.tail_sample_ids, record.tail_sample_logprobs)}


def pairs(ids: NDArray[np.uint32], logprobs: NDArray[np.float32]) -> list[list[list[Any]]]:
    """Of each row, [id, log-probability] of what is not absent."""
    return [
        [[int(i), float(x)] for i, x in zip(*row, strict=True) if i != ABSENT]
        for row in zip(ids, logprobs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="tests/golden, tests/golden_draws or tests/golden_label")
    parser.add_argument("--replace", action="store_true", help="only before the format is released")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--draws", action="store_true", help="with draws from the tail")
    kinds.add_argument("--label", action="store_true", help="of label and tail alone")
    arguments = parser.parse_args()
    label = arguments.label
    name = "golden_draws" if arguments.draws else "golden_label" if label else "golden"
    folder: Path = arguments.folder or Path(__file__).resolve().parents[1] / "tests" / name
    num_draws = NUM_DRAWS if arguments.draws else 0
    if any((folder / name).exists() for name in ("SHA256SUMS", *CACHES)) and not arguments.replace:
        parser.error(f"{folder} has golden caches, which are made once. See its README.md.")
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_shards(num_draws)
    data_sets = make_data_sets(shards)
    if label:
        shards = [[without_alternatives(sample) for sample in shard] for shard in shards]
    groups = None if label else GROUPS
    for name, (store, precision) in CACHES.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        with CacheWriter(folder / name, make_manifest(store, precision, num_draws, label), groups) as writer:
            for shard, template in zip(shards, TEMPLATES, strict=True):
                writer.commit(shard, template)
            writer.finalize([packed(data_set) for data_set in data_sets])
        (folder / name / LOCK).unlink(missing_ok=True)
    expected = {
        "vocab_size": VOCAB,
        "top_k": 0 if label else TOP_K,
        "token_groups": None if groups is None else groups.tolist(),
        "shards": [[plain(sample) for sample in shard] for shard in shards],
        "data_sets": data_sets,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    (folder / ".gitattributes").write_text("* -text\n", encoding="utf-8")
    packages = ("numpy", "zarr", "numcodecs", "pcodec", "pyarrow")
    versions = f"Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages)
    title, option = (", with draws from the tail", " --draws") if num_draws else ("", "")
    title, option = (", of label and tail alone", " --label") if label else (title, option)
    kept = OF_LABELS if label else {n: s.format(step="1/4" if num_draws else "1") for n, s in OF_ALTERNATIVES.items()}
    text = README.format(versions=versions, title=title, option=option, **kept) + (OF_DRAWS if num_draws else "")
    (folder / "README.md").write_text(text, encoding="utf-8")
    files = [folder / "expected.json", *(p for name in CACHES for p in (folder / name).rglob("*") if p.is_file())]
    sums = sorted((p.relative_to(folder).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files)
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums), encoding="utf-8")
    for name in CACHES:
        size = sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
        print(f"{folder / name}: {size} bytes")


if __name__ == "__main__":
    main()
