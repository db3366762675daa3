"""A sample of `scripts/fuzz_parsers.py`: no input of anybody ends in a traceback, another value, or no end at all."""

from pathlib import Path

import pytest
from support.fuzz_parsers import parsers, run

COUNT = 60
NAMES = (
    *("manifest.json", "contents.json", "commit record", "worker file", "index", "run.json", "files.json"),
    *("sweep.json", "result.json", "status of a run", "failed.json", "train_log.jsonl", "sweep YAML", "--config YAML"),
    *("data card", "rows, JSONL", "evaluation, --against", "marker of a pull", "rows, Parquet"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_parser_answers_with_a_sentence_or_a_value(name: str, tmp_path: Path) -> None:
    found = {parser.name: parser for parser in parsers(tmp_path)}
    assert tuple(found) == NAMES
    tally = run(found[name], COUNT, seed=1, bombs=False)
    assert not tally.examples and tally.refused + tally.right_value == COUNT
    assert found[name].bombs is tuple or next(iter(found[name].bombs()))


def test_the_fuzz_sees_what_it_is_for(tmp_path: Path) -> None:
    """A parser that lets an error through, one that gives another value, and one that says too much, are counted."""
    from dataclasses import replace

    from logitcache.errors import InvalidData

    parser = next(parser for parser in parsers(tmp_path) if parser.name == "manifest.json")

    def raises(_: bytes) -> None:
        raise KeyError("x")

    def misread(_: bytes) -> None:
        raise AssertionError

    def talks(_: bytes) -> None:
        raise InvalidData("two\nlines")

    for read in (raises, misread, talks):
        tally = run(replace(parser, read=read), 5, seed=0, bombs=False)
        assert tally.tracebacks == 5 and not tally.refused
