"""Every parser of what others wrote, each with a valid input, what it may answer, and how its answer is checked.

Owns what counts: a refusal is one sentence of a class that this program knows, an answer is held against what the bytes
say, and anything else is a traceback. A case that takes more CPU than `MOST_SECONDS` is a hang.
"""

from __future__ import annotations

import json
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from support import fuzz_inputs as inputs
from support.storage_samples import SHARDS, write_cache
from support.sweep_folders import write_sweep

from logitcache.adapters.saved_files import about_of, fault_of, seal
from logitcache.data.rows import read_rows
from logitcache.errors import InvalidData, PipelineError
from logitcache.evaluation.against import read_plain
from logitcache.hub.dataset_card import is_licence, licences_in
from logitcache.hub.pulling import _read_marker
from logitcache.json_files import CheckedJson, read_lines
from logitcache.reports.csv_file import write_csv
from logitcache.reports.page import Table, as_html, as_markdown
from logitcache.reports.results import read_sweep
from logitcache.reports.tables import equal_learning_sentences, main_rows, method_rows, run_rows, setting_rows, view_of
from logitcache.storage import CacheError
from logitcache.storage.checked_json import MAX_SEALED_BYTES, unsealed
from logitcache.storage.files import open_files
from logitcache.storage.index import SampleIndex
from logitcache.storage.job_status import RUNNING, WorkerRecord, read_records, write_record
from logitcache.storage.manifest import Contents, Manifest, ShardCommit, from_bytes, to_bytes
from logitcache.storage.plain_text import safe
from logitcache.sweeps.config import read_config
from logitcache.training import run_folder
from logitcache.yaml_files import read_yaml

MOST_SECONDS = 10.0
"""Of CPU, for one input."""
LARGE = 2**16
"""Bytes of an input from which its memory is measured; of the others, that of the first."""
LONGEST = 4000
"""Characters of a refusal."""

REFUSALS = (CacheError, PipelineError)

ENVELOPED_BOMBS = partial(inputs.json_bombs, inputs.enveloped)
SEALED_BOMBS = partial(inputs.json_bombs, inputs.sealed_again, MAX_SEALED_BYTES)
PLAIN_BOMBS = partial(inputs.json_bombs, inputs.plain_json)


class Hang(BaseException):
    """A case took too much CPU. No Exception: a parser that catches much would make a refusal of it."""


@dataclass(frozen=True)
class Parser:
    """A parser with what it is given."""

    name: str
    change: inputs.Change
    #: Reads the bytes, and asserts that its answer is what they say.
    read: Callable[[bytes], object]
    #: Large ones, made when they are needed.
    bombs: Callable[[], Iterable[bytes]] = tuple
    #: Share of the inputs of all parsers.
    share: float = 1.0
    refusals: tuple[type[Exception], ...] = REFUSALS


@dataclass
class Tally:
    """What came of the inputs of a parser."""

    parser: str
    inputs: int = 0
    refused: int = 0
    right_value: int = 0
    tracebacks: int = 0
    hangs: int = 0
    peak_mb: float = 0.0
    slowest_cpu_s: float = 0.0
    examples: list[str] = field(default_factory=list)


def run(parser: Parser, count: int, seed: int, bombs: bool = True) -> Tally:
    """Give a parser so many inputs; with bombs, the large ones first."""
    tally, rng = Tally(parser.name), random.Random(f"{parser.name} {seed}")
    for data in parser.bombs() if bombs else ():
        _try(parser, data, tally)
    while tally.inputs < count:
        _try(parser, parser.change(rng), tally)
    return tally


def _try(parser: Parser, data: bytes, tally: Tally) -> None:
    tally.inputs += 1
    before = _peak_mb(reset=True) if len(data) > LARGE or tally.inputs == 1 else None
    started = time.process_time()
    try:
        with _limited():
            parser.read(data)
        tally.right_value += 1
    except parser.refusals as error:
        said = safe(str(error))
        lines = [line for line in said.split("\n") if line.strip()]
        if len(lines) == 1 and len(said) <= LONGEST and "Traceback" not in said:
            tally.refused += 1
        else:
            tally.tracebacks += 1
            tally.examples.append(f"no sentence ({len(said)} characters): {said[:300]!r} of {data[:300]!r}")
    except Hang:
        tally.hangs += 1
        tally.examples.append(f"hang: {data[:300]!r}")
    except Exception as error:
        tally.tracebacks += 1
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        tally.examples.append(f"{type(error).__name__}: {str(error)[:200]} at {where} of {data[:400]!r}")
    tally.slowest_cpu_s = max(tally.slowest_cpu_s, time.process_time() - started)
    if before is not None:
        tally.peak_mb = max(tally.peak_mb, _peak_mb() - before)


def _peak_mb(reset: bool = False) -> float:
    """The most memory of this process, in MB, since the last reset; after a reset, what it holds now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024 / 1e6


@contextmanager
def _limited() -> Iterator[None]:
    """A limit of CPU, not of time: the machine may be busy with something else."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def parsers(folder: Path) -> list[Parser]:
    """All of them, with their valid files in a folder."""
    return [
        *_of_caches(folder / "caches"),
        *_of_runs(folder / "runs"),
        *_of_sweeps(folder / "sweep"),
        *_of_users(folder),
        _parquet(folder),
    ]


def _of_caches(folder: Path) -> Iterator[Parser]:
    cache = folder / "cache"
    write_cache(cache, "zarr", SHARDS)
    (record,) = list((cache / "shards").glob("*.json"))[:1]
    files = {"manifest.json": (Manifest, cache / "manifest.json"), "contents.json": (Contents, cache / "contents.json")}
    files["commit record"] = (ShardCommit, record)
    for name, (kind, path) in files.items():
        data = path.read_bytes()

        def read(changed: bytes, kind: Any = kind) -> None:
            assert to_bytes(from_bytes(kind, changed, "the file")) == changed

        change = inputs.of_json(data, json.loads(data)["body"], inputs.enveloped)
        yield Parser(name, change, read, ENVELOPED_BOMBS, 1.2)
    (folder / "workers").mkdir()
    workers = open_files(folder / "workers")
    write_record(workers, 0, 2, WorkerRecord(RUNNING, "j", "host", 7, 1e9, 2e9, 3, 4, 5, 6, 7, ("It failed.",)))
    (path,) = (folder / "workers").iterdir()
    data = path.read_bytes()

    def worker(changed: bytes) -> None:
        path.write_bytes(changed)
        (found,) = read_records(workers).values()
        assert to_bytes(found) == changed

    change = inputs.of_json(data, json.loads(data)["body"], inputs.enveloped)
    yield Parser("worker file", change, worker, ENVELOPED_BOMBS)
    yield _of_index(cache, folder / "index")


def _of_index(cache: Path, folder: Path) -> Parser:
    """With the checksum that the contents would have: somebody meant it."""
    contents = from_bytes(Contents, (cache / "contents.json").read_bytes(), "contents")
    data = (cache / contents.index.name).read_bytes()
    folder.mkdir()

    def index(changed: bytes) -> None:
        from dataclasses import replace

        from logitcache.storage.identity import digest

        (folder / contents.index.name).write_bytes(changed)
        stated = replace(contents.index, size=len(changed), checksum=digest(changed))
        found = SampleIndex.read(open_files(folder), replace(contents, index=stated))
        assert found._rows.tobytes() == changed[-len(found._rows) * found._rows.dtype.itemsize :]
        for number in range(len(found)):
            assert number in found.find(found.sample_id(number))

    return Parser("index", lambda rng: inputs.changed_bytes(data, rng), index, share=0.6)


def _of_runs(folder: Path) -> Iterator[Parser]:
    folder.mkdir(parents=True)
    description = {"model": {"name": "m", "weights": "0" * 32}, "data": {"num_samples": 3}, "settings": {"lr": 0.001}}
    path = folder / "run.json"

    def run_json(changed: bytes) -> None:
        path.write_bytes(changed)
        run_folder.check_out(folder, resume=True)
        found = CheckedJson.of(path)
        assert found.values == unsealed(changed)
        run_folder.look(folder, description)

    whole = {**description, "status": "started"}
    bombs = SEALED_BOMBS
    change = inputs.of_json(inputs.sealed_again(whole), whole, inputs.sealed_again)
    yield Parser("run.json", change, run_json, bombs)
    listed = folder.parent / "listed"
    listed.mkdir()
    (listed / "adapter.bin").write_bytes(b"x" * 100)
    seal(listed, {"run": description, "result": {"steps": 3}})
    data = (listed / "files.json").read_bytes()

    def files_json(changed: bytes) -> None:
        (listed / "files.json").write_bytes(changed)
        fault, about = fault_of(listed), about_of(listed)
        if about is None:
            raise InvalidData(f"reading files.json: {fault}.")
        found = json.loads(changed)
        assert about == found["about"] and (fault is not None or found["files"].keys() <= {"adapter.bin"})
        run_folder.look(listed, description)

    plain = {k: v for k, v in json.loads(data).items() if k != "checksum"}
    yield Parser("files.json", inputs.of_json(data, plain, inputs.sealed_again), files_json, bombs, 0.6)


def _of_sweeps(folder: Path) -> Iterator[Parser]:
    write_sweep(folder, lrs=(1e-3,), seeds=(0, 1), failed=("m0-lr0.001-seed1",))
    run = folder / "runs" / "m1-lr0.001-seed0"
    paths = {
        "sweep.json": folder / "sweep.json",
        "result.json": run / "result.json",
        "status of a run": run / "run.json",
    }
    paths["failed.json"] = folder / "runs" / "m0-lr0.001-seed1" / "failed.json"
    for name, path in paths.items():
        data = path.read_bytes()

        def read(changed: bytes, path: Path = path, data: bytes = data) -> None:
            path.write_bytes(changed)
            try:
                _report(folder)
            finally:
                path.write_bytes(data)

        plain = {k: v for k, v in json.loads(data).items() if k != "checksum"}
        bombs = SEALED_BOMBS if name == "sweep.json" else tuple
        yield Parser(name, inputs.of_json(data, plain, inputs.sealed_again), read, bombs, 0.3)
    log = run / "train_log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)

    def changed_log(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return inputs.changed_bytes(b"".join(lines), rng)
        entry = {k: v for k, v in json.loads(lines[0]).items() if k != "checksum"}
        line = inputs.sealed_again(inputs.changed_value(entry, rng)).replace(b"\n", b"")
        return b"".join([*lines[:2], line + b"\n", *lines[3:]])

    def read_log(changed: bytes) -> None:
        log.write_bytes(changed)
        try:
            assert all(isinstance(entry, dict) for entry in read_lines(log, unfinished=True))
            _report(folder)
        except ValueError as error:
            raise InvalidData(f"reading {log.name}: {error}") from error
        finally:
            log.write_bytes(b"".join(lines))

    yield Parser("train_log.jsonl", changed_log, read_log, SEALED_BOMBS, 0.3)


def _report(folder: Path) -> None:
    """All of the report but the pictures."""
    sweep = read_sweep(folder)
    write_csv(sweep, folder.parent / "results.csv")
    rows = [method_rows(sweep), run_rows(sweep)]
    if sweep.finished:
        view = view_of(sweep)
        rows += [main_rows(view), setting_rows(view), [equal_learning_sentences(view) or ["none"]]]
    blocks = [Table(table) for table in rows]
    for page in (as_markdown(blocks), as_html(blocks)):
        assert "\x1b" not in page and "‮" not in page
        page.encode()


SWEEP_YAML = b"""
model: base
cache: cache
new: new.jsonl
prior: prior.jsonl
grid: {lr: [1.0e-4, 2.0e-4], seed: [0, 1]}
methods:
  plain CE: {regularizer: none}
  masked KL: {regularizer: masked-kl, weight: [1.0, 2.0]}
  full: &full {regularizer: full-kl}
  full again: {<<: *full, weight: 3.0}
"""

CARD = b"""---
license: [apache-2.0, cc-by-4.0]
pretty_name: Logit cache of x
tags: [logitcache]
logitcache: {model_license: [apache-2.0], data_license: [other]}
license_name: mine
license_link: https://example.org/licence
---
# Text
"""

ROWS = b"""{"text": "Some text."}
{"prompt": "What?", "completion": "That."}
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
"""

EVALUATION = {
    "model": {"name": "base", "weights": "0" * 32, "config": "1" * 32},
    "prior": {"samples": "2" * 32, "drift_percent": 3.5, "kl_nats": 0.25, "top_k": 64, "before": {"ce_nats": 3.0}},
}

YAML_BOMBS = [
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % p] * 9)) for p, c in zip(b"abcdefgh", b"bcdefghi", strict=True)
    ),
    b"[" * 200_000,
    b"- " * 100_000,
    b"{" + b"a: " * 100_000,
    b"&a [*a]",
    b"grid: {seed: [" + b",".join(b"%d" % i for i in range(30_000)) + b"]}",
    b"x: 1" + b":59" * 80_000,
    b"# " * 1_000_000,
    b"'" + b"\n" * 250_000 + b"'",
    b'"' + b"\\x41" * 60_000 + b'"',
    b"{" + b"a:," * 60_000 + b"}",
    b"? " * 50_000,
    b"\0" * 1_000_000,
]


def _of_users(folder: Path) -> Iterator[Parser]:
    sweep, config, rows, card = folder / "sweep.yaml", folder / "config.yaml", folder / "rows.jsonl", folder / "x.json"

    def sweep_yaml(changed: bytes) -> None:
        sweep.write_bytes(changed)
        found = read_config(sweep)
        assert found.runs and all(run.method.isprintable() for run in found.runs)

    head = b"model: m\ncache: c\nnew: n\nprior: p\n"
    yield Parser(
        "sweep YAML", _yaml(SWEEP_YAML), sweep_yaml, lambda: [*YAML_BOMBS, *(head + bomb for bomb in YAML_BOMBS)], 0.8
    )

    def config_yaml(changed: bytes) -> None:
        config.write_bytes(changed)
        try:
            found = read_yaml(config)
        except yaml.YAMLError as error:
            raise InvalidData(f"reading config.yaml: {error}") from error
        repr(found).encode()

    flags = b"top-k: 64\nmin_mass: 0.99\nprecision: fine\ndtype: 'auto'\nresume: true\nlr: 1.0e-3\n"
    yield Parser("--config YAML", _yaml(flags), config_yaml, YAML_BOMBS.copy, 0.8)

    def card_text(changed: bytes) -> None:
        for licence in licences_in(changed.decode(errors="replace")):
            assert all(is_licence(name) for name in licence.ids) and str(licence).isprintable()

    yield Parser(
        "data card", _yaml(CARD), card_text, lambda: [b"---\n" + bomb + b"\n---\n" for bomb in YAML_BOMBS], 0.6
    )

    def jsonl(changed: bytes) -> None:
        rows.write_bytes(changed)
        found = [row for _, row in read_rows(str(rows))]
        assert json.dumps(found) == json.dumps([json.loads(line) for line in changed.split(b"\n") if line.strip()])

    yield Parser("rows, JSONL", lambda rng: inputs.changed_bytes(ROWS, rng), jsonl, PLAIN_BOMBS)

    def evaluation(changed: bytes) -> None:
        card.write_bytes(changed)
        found, prior = read_plain(card), json.loads(changed)["prior"]
        assert (found.percent, found.kl_nats) == (float(prior["drift_percent"]), float(prior["kl_nats"]))
        assert found.top_k == prior["top_k"]

    change = inputs.of_json(inputs.plain_json(EVALUATION), EVALUATION, inputs.plain_json)
    yield Parser("evaluation, --against", change, evaluation, PLAIN_BOMBS, 0.6)
    pull = folder / "pull"
    pull.mkdir()
    names = {"format": "logitcache pull 1", "names": ["manifest.json", "shards/x.json"]}

    def marker(changed: bytes) -> None:
        (pull / ".logitcache-pull.json").write_bytes(changed)
        try:
            found = _read_marker(pull)
        except ValueError as error:
            raise InvalidData("reading the marker: no pull wrote it.") from error
        assert found == frozenset(json.loads(changed)["names"])

    change = inputs.of_json(inputs.plain_json(names), names, inputs.plain_json)
    yield Parser("marker of a pull", change, marker, PLAIN_BOMBS, 0.4)


def _yaml(data: bytes) -> inputs.Change:
    return lambda rng: inputs.changed_yaml(data, rng)


def _parquet(folder: Path) -> Parser:
    """No checksum tells which value is right: any row is one."""
    path = folder / "rows.parquet"
    table = pa.table(
        {"text": ["one", "two", None] * 20, "input_ids": [[1, 2, 3], [4], None] * 20, "n": list(range(60))}
    )
    pq.write_table(table, path, row_group_size=25)
    data = path.read_bytes()

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        for _, row in read_rows(str(path)):
            assert isinstance(row, dict)

    return Parser("rows, Parquet", lambda rng: inputs.changed_bytes(data, rng), read, share=0.2)
