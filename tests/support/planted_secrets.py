"""A password and a signed query in every place where a verb takes a URL, and where they turn up again.

Owns the command lines, and what counts as a hit: what a verb prints, a file it writes, an object it stores. The drivers
are tests/cli/test_secrets.py and scripts/fault_suite.py.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from .cli_harness import CliResult, logitcache
from .storage_faults import SAME, Counts, Seen, Tally
from .tiny_model import make_model, make_tokenizer, text_rows

PASSWORD, SIGNATURE = "hunter2hunter2", "5f0c1gn4tur3"

SWEEP = """
model: {model}
cache: "{url}/cache"
data: "{url}/train.jsonl"
new: "{url}/train.jsonl"
prior: "{url}/prior.jsonl"
grid: {{lr: [1.0e-3], rank: [2], max_steps: [1]}}
methods: {{plain: {{regularizer: none}}, masked: {{}}, broken: {{lr: 1e35, max_steps: 2}}}}
"""


VERBS = {
    *("precompute", "status", "inspect", "verify", "repair", "prune", "convert", "merge", "export", "nullspace"),
    *("train", "evaluate", "sweep", "report", "calibrate", "push", "pull", "demo"),
}


@contextmanager
def planted() -> Iterator[str]:
    """A prefix of memory:// with a password and a signature in it, and data below it."""
    prefix = f"user{uuid.uuid4().hex[:6]}:{PASSWORD}@host"
    made = f"memory://{prefix}/x?X-Amz-Signature={SIGNATURE}"
    rows = [json.dumps(row) + "\n" for row in text_rows(12)]
    for name, lines in {"train.jsonl": rows[:8], "prior.jsonl": rows[8:], "broken.jsonl": [*rows[:2], "{\n"]}.items():
        fsspec.filesystem("memory").pipe_file(f"{made}/{name}", "".join(lines).encode())
    yield made
    fsspec.filesystem("memory").rm(f"/{prefix}", recursive=True)


def command_lines(url: str, model: Path, folder: Path) -> list[tuple[int | None, list[object]]]:
    """Every verb with its exit status, in an order in which they find what they need; None: any but a success."""
    cache, data, prior = f"{url}/cache", f"{url}/train.jsonl", f"{url}/prior.jsonl"
    capture = ["precompute", "--model", model, "--top-k", 8, "--store", "arrow"]
    training = ["train", "--model", model, "--rank", 2, "--max-steps", 1]
    evaluation = ["evaluate", "--model", model, "--adapter", folder / "adapter"]
    return [
        (0, [*capture, "--data", data, "--cache", cache]),
        (0, [*capture, "--data", data, "--cache", cache, "--plan"]),
        (0, [*capture, "--data", data, "--cache", folder / "copied", "--samples-from", cache, "--log-json"]),
        (0, [*capture, "--data", prior, "--cache", f"{url}/prior"]),
        (None, [*capture, "--data", f"{url}/broken.jsonl", "--cache", folder / "none"]),
        (None, [*capture, "--data", f"{url}/missing.jsonl", "--cache", folder / "none"]),
        (None, [*capture, "--data", data, "--cache", f"nosuch{url}"]),
        (None, [*capture[:1], "--model", url, "--data", data, "--cache", folder / "none"]),
        (None, [*capture, "--top-k", 9, "--data", data, "--cache", cache]),
        (0, ["status", cache]),
        (0, ["status", cache, "--json"]),
        (0, ["inspect", cache, "--plot", folder / "cache.svg"]),
        (0, ["inspect", cache, "--json"]),
        (0, ["verify", cache]),
        (0, ["verify", cache, "--json"]),
        (0, ["repair", cache]),
        (0, ["prune", cache, "--model", model, "--data", data, "--dry-run"]),
        (0, ["convert", cache, f"{url}/converted", "--precision", "compact"]),
        (0, ["merge", f"{url}/all", cache, f"{url}/prior"]),
        (None, ["merge", f"{url}/mixed", cache, f"{url}/converted"]),
        (0, ["export", cache, "--to", "parquet", "--out", folder / "cache.parquet"]),
        (0, ["nullspace", "--model", model, "--data", data, "--out", folder / "space", "--rank", 2]),
        (0, [*training, "--cache", cache, "--data", data, "--out", folder / "adapter"]),
        (None, [*training, "--cache", cache, "--data", prior, "--out", folder / "other"]),
        (0, [*training, "--cache", cache, "--out", folder / "adapter", "--data", data, "--resume"]),
        (0, [*evaluation, "--data", data, "--prior", prior, "--json"]),
        (0, [*evaluation, "--new-cache", cache, "--prior-cache", f"{url}/prior"]),
        (None, [*evaluation, "--data", f"{url}/missing.jsonl", "--prior", prior]),
        (1, ["sweep", "--config", folder / "sweep.yaml", "--out", folder / "sweep"]),
        (0, ["report", folder / "sweep"]),
        (None, ["calibrate", "--model", url, "--data", data, "--out", folder / "calibration.json"]),
        (None, ["push", cache, "owner/name"]),
        (None, ["push", folder / "copied", url]),
        (None, ["pull", url, folder / "pulled"]),
        (None, ["pull", "owner/name", cache]),
        (None, ["report", url]),
        (None, ["demo", "--out", url, "--config", url]),
        (None, ["verify", f"{url}/nothing"]),
    ]


def run_all(url: str, model: Path, folder: Path) -> list[tuple[list[object], CliResult]]:
    """Every command line, run in its order, and what it said. Asserts its exit status."""
    config = folder.parent / f"{folder.name}.yaml"  # the user's own file, which may hold what it likes
    config.write_text(SWEEP.format(model=model, url=url), encoding="utf-8")
    said: list[tuple[list[object], CliResult]] = []
    for status, line in command_lines(url, model, folder):
        words = [config if word == folder / "sweep.yaml" else word for word in line]
        found = logitcache(*words)
        assert found.status == status or (status is None and found.status != 0), (line, found.err)
        said.append((line, found))
    config.unlink()
    return said


def hits(said: list[tuple[list[object], CliResult]], folder: Path) -> list[str]:
    """Where a secret is: command lines whose output has it, files below the folder, objects of the store."""
    memory, found = fsspec.filesystem("memory"), []
    for secret in (PASSWORD, SIGNATURE):
        found += [" ".join(map(str, line[:1])) for line, result in said if secret in result.out + result.err]
        written = [path for path in folder.rglob("*") if path.is_file()]
        found += [path.name for path in written if secret.encode() in path.read_bytes()]
        found += [Path(path).name for path in memory.find("/") if secret.encode() in memory.cat_file(path)]
    return found


def secrets(_: str, folder: Path, __: Counts) -> Iterator[Tally]:
    """A case a command line, and one for all that they left."""
    tally = Tally("secret planted in a URL", "both")
    model = folder / "model"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    (folder / "work").mkdir()
    with planted() as url:
        said = run_all(url, model, folder / "work")
        for line, result in said:
            shows = [s for s in (PASSWORD, SIGNATURE) if s in result.out + result.err]
            tally.add(f"{line[0]}", Seen("wrong", "prints it") if shows else SAME)
        left = hits([], folder / "work")
        tally.add("files", Seen("wrong", f"hold it: {left[:3]}") if left else SAME)
    tally.notes["verbs"] = len({str(line[0]) for line, _ in said})
    yield tally
