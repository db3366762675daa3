"""Runs `logitcache VERB` in this process, and what its tests share: rows of every kind, snapshots and damage."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from support.tiny_model import text_rows

from logitcache.cli import cli, run
from logitcache.storage.checked_json import sealed
from logitcache.storage.job_status import status

Rows = list[dict[str, Any]]
Edit = Callable[[Path], object]

ROWS: dict[str, Rows] = {
    "text": [{"text": "abcdef"}, {"text": "ab"}],
    "completion": [{"prompt": "abc", "completion": "def"}, {"prompt": "a", "completion": "b"}],
    "messages": [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "dd"},
            ]
        },
    ],
    "input_ids": [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}],
    "labels": [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}],
}
NUM_POSITIONS = {"text": 6 + 2, "completion": 4 + 2, "messages": 3 + (2 + 3), "input_ids": 3 + 1, "labels": 2 + 1}
"""Counted by hand: the tokenizer gives one token a character, and the end of text to text and completions."""


@dataclass(frozen=True)
class CliResult:
    """Exit status, stdout and stderr of a verb."""

    status: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def later_wins(arguments: Sequence[object]) -> list[str]:
    """The arguments without a flag that a later one overrides: lines of tests have defaults, and verbs refuse two."""
    words = [str(a) for a in arguments]
    verb = cli.commands.get(words[0]) if words else None
    options = [p for p in verb.params if isinstance(p, click.Option) and not p.is_flag] if verb is not None else []
    names = {opt: str(option.name) for option in options for opt in option.opts}
    kept: list[tuple[str | None, list[str]]] = []
    rest = iter(words)
    for word in rest:
        value = next(rest, None) if word in names else None
        kept.append((names.get(word), [word] if value is None else [word, value]))
    several = {str(option.name) for option in options if option.multiple}
    last = {name: number for number, (name, _) in enumerate(kept) if name is not None and name not in several}
    return [w for number, (name, part) in enumerate(kept) if last.get(str(name), number) == number for w in part]


def logitcache(*arguments: object, stderr: io.StringIO | None = None) -> CliResult:
    """`logitcache ARGUMENTS...`, run here; of a flag that is given twice, the later one."""
    out, err = io.StringIO(), stderr or io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(later_wins(arguments))
    return CliResult(status, out.getvalue(), err.getvalue())


def done(*arguments: object) -> CliResult:
    """`logitcache ARGUMENTS...`, which must succeed."""
    outcome = logitcache(*arguments)
    assert outcome.status == 0, outcome.err
    return outcome


def refused(status: int, *arguments: object) -> str:
    """The sentence of a verb that must refuse: one last line on stderr, nothing on stdout, no traceback."""
    outcome = logitcache(*arguments)
    assert outcome.status == status, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith(("logitcache: ", "Error: "))
    assert last.endswith(".") or last.startswith("Error: "), last
    assert sum(line.startswith(("logitcache: ", "Error: ")) for line in outcome.err.splitlines()) == 1
    return last


def precompute(model: Path, data: Path, cache: Path, *more: object) -> CliResult:
    """A small cache in the Arrow store, unless `more` says otherwise."""
    return done(*precompute_line(model, data, cache, *more))


def precompute_line(model: Path, data: Path, cache: Path, *more: object) -> list[object]:
    """The arguments of `precompute`."""
    return ["precompute", "--model", model, "--data", data, "--cache", cache, "--top-k", 8, "--store", "arrow", *more]


def train_line(model: Path, cache: Path, out: Path, *more: object) -> list[object]:
    """The arguments of one step of `train`."""
    return ["train", "--model", model, "--cache", cache, "--out", out, "--rank", 2, "--max-steps", 1, *more]


def text_data(folder: Path, start: int = 0, stop: int = 12) -> Path:
    """A file with some of 12 text rows of growing length."""
    path = folder / f"text-{start}-{stop}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(12)[start:stop]), encoding="utf-8")
    return path


def facts(cache: object) -> dict[str, Any]:
    """`inspect --json`."""
    found: dict[str, Any] = json.loads(done("inspect", cache, "--json").out)
    return found


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in paths}


def cache_bytes(cache: Path) -> dict[str, bytes | None]:
    """What a cache is made of: manifest, contents, index, data sets, shards; without what `status` calls left over."""
    names = ("manifest.json", "contents.json", "index-", "data-", "shards")
    left = status(cache).leftovers if (cache / "manifest.json").is_file() else ()
    gone = {n for n in snapshot(cache) for name in left if n == name or n.startswith(f"{name}/")}
    return {n: b for n, b in snapshot(cache).items() if n.startswith(names) and n not in gone}


def commits(cache: Path) -> list[Path]:
    """The commit records of the shards, by unit."""
    return sorted(cache.glob("shards/*.json"))


def shard_folders(cache: Path) -> list[Path]:
    """The folders of the committed shards, in the same order."""
    found = []
    for path in commits(cache):
        (folder,) = path.parent.glob(f"{path.stem}-*")
        found.append(folder)
    return found


def unit_of(folder: Path) -> str:
    """The unit of a shard from the name of its folder."""
    return folder.name.split("-")[0]


def flip_byte(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


def cut_short(name: str, size: int) -> Edit:
    """Leaves of a file so many bytes; if negative, takes so many off its end."""

    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return edit


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Fails where the body changes one byte below these folders."""
    before = [snapshot(f) for f in folders]
    yield
    assert [snapshot(f) for f in folders] == before


def copy_of(folder: Path, to: Path, edit: Edit = lambda _: None) -> Path:
    """A copy of a folder, edited."""
    shutil.copytree(folder, to)
    edit(to)
    return to


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_sealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file that carries a checksum, and gives it the right one: a value that was written so."""
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["checksum"]
    change(value)
    path.write_bytes(sealed(value))
