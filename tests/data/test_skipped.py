"""Rows without labels, and rows that cannot be used: counted, listed, and never learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import make_tokenizer

from logitcache.data.rows import read_rows
from logitcache.data.samples import SampleSet, make_samples, read_samples
from logitcache.data.settings import DataSettings
from logitcache.data.skipped import list_skipped, listed_beside
from logitcache.errors import InvalidData
from logitcache.pairing.samples import samples_for

INPUTS = Path(__file__).parent / "inputs" / "json-files"


def made(rows: list[Any], **how: Any) -> SampleSet:
    named = ((f"row {i}", row) for i, row in enumerate(rows))
    return make_samples(named, make_tokenizer(), 32, 260, DataSettings(**how))


def test_a_row_without_labels_is_counted_and_left_out() -> None:
    found = make_samples(read_rows(INPUTS / "allmasked.jsonl"), make_tokenizer(), 32, 260)
    assert [s.token_ids.tolist() for s in found.samples] == [[1, 2, 3, 5]]
    assert (found.num_rows, found.num_unlabelled, found.num_without_labels) == (2, 1, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"text": ""},
        {"input_ids": []},
        {"input_ids": [1]},
        {"input_ids": [1, 2], "labels": [1, -100]},
        {"input_ids": [1, 2], "completion_mask": [0, 0]},
    ],
)
def test_what_has_nothing_to_learn_is_no_fault(row: dict[str, Any]) -> None:
    found = made([row, {"text": "a"}])
    assert (found.num_unlabelled, [s.origin for s in found.samples]) == (1, ["row 1"])
    with pytest.raises(InvalidData, match="no supervised token is left in any of 1 rows"):
        made([row])


def test_what_a_template_renders_to_nothing_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    rows = [("row 0", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})]
    with pytest.raises(InvalidData, match="row 0: ") as told:
        make_samples(rows, tokenizer, 32, 260)
    assert "Remove the row" not in str(told.value)


def test_rows_that_cannot_be_used_are_skipped_where_that_is_asked() -> None:
    rows = [{"text": "a"}, {"body": "b"}, {"input_ids": [300]}, {"text": "c"}]
    with pytest.raises(InvalidData, match="row 1: expected text, prompt"):
        made(rows)
    found = made(rows, skip_bad_rows=True)
    assert [s.origin for s in found.samples] == ["row 0", "row 3"]
    assert [s.origin for s in found.skipped] == ["row 1", "row 2"]
    assert "token id 300 is outside" in found.skipped[1].reason
    assert found.num_rows == 4
    with pytest.raises(InvalidData, match=r"of 2 rows none is left, and 2 or more could not .*row 0"):
        made(rows[1:3], skip_bad_rows=True)


def test_the_list_stands_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = DataSettings(skip_bad_rows=True)
    assert listed_beside(how, f"{tmp_path}/cache/").skipped_file == f"{tmp_path}/cache.skipped.jsonl"
    assert listed_beside(how, f"{tmp_path}/c.d", ".1-of-4").skipped_file == f"{tmp_path}/c.d.skipped.1-of-4.jsonl"
    assert listed_beside(how, "s3://bucket/c").skipped_file == "c.skipped.jsonl"
    named = DataSettings(skip_bad_rows=True, skipped_file=f"{tmp_path}/mine.jsonl")
    assert listed_beside(named, "elsewhere") == named
    assert listed_beside(DataSettings(), "c") == DataSettings()
    monkeypatch.chdir(tmp_path)
    found = read_samples([("row 0", {})], None, 32, 260, how)
    assert list_skipped(how, found.skipped) == "rows.skipped.jsonl"


def test_the_list_of_an_earlier_run_is_gone(tmp_path: Path) -> None:
    how = listed_beside(DataSettings(skip_bad_rows=True), str(tmp_path / "o"))
    bad = read_samples([("row 0", {}), ("row 1", {"input_ids": 7})], None, 32, 260, how).skipped
    list_skipped(how, bad[:1])
    list_skipped(how, bad[1:], more=True)
    path = tmp_path / "o.skipped.jsonl"
    assert [json.loads(line)["origin"] for line in path.read_text(encoding="utf-8").splitlines()] == ["row 0", "row 1"]
    listed_beside(DataSettings(skip_bad_rows=True), str(tmp_path / "o"))
    assert not path.exists()


def test_who_reads_rows_is_told_of_both(tmp_path: Path) -> None:
    rows = iter([("row 0", {"text": "a"}), ("row 1", {"text": ""}), ("row 2", {"body": "b"})])
    told: list[str] = []
    how = listed_beside(DataSettings(skip_bad_rows=True), str(tmp_path / "o"))
    assert len(samples_for(rows, None, make_tokenizer(), 260, 32, told.append, how)) == 1  # type: ignore[arg-type]
    assert told == [
        "1 rows have no supervised token (labels of -100 alone, or no text) and are left out.",
        f"1 rows could not be used and were skipped: {tmp_path}/o.skipped.jsonl says why.",
    ]
    assert json.loads((tmp_path / "o.skipped.jsonl").read_text(encoding="utf-8"))["origin"] == "row 2"
