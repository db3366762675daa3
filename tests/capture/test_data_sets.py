"""Data sets from `precompute` to `train`: rows that were edited, the same tokens in two ways, many workers.

The oracle is the rows themselves, told apart by their text: the tokenizer gives one token a character and an end.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_harness import cache_bytes, done, facts, logitcache, precompute, precompute_line, refused, train_line
from support.tiny_model import make_tokenizer, text_rows

from logitcache import LogitCache
from logitcache import precompute as capture
from logitcache.capture.engines.ray import absolute, finish
from logitcache.capture.settings import CaptureSettings, JobSpec
from logitcache.data.samples import Sample
from logitcache.pairing.targets import samples_of
from logitcache.storage import DataSet
from logitcache.storage.data_sets import joined

BEFORE = ["the kettle boils at seven", "a cup is blue on Mondays", "no spoon is ever green"]
AFTER = [BEFORE[0], "a cup is grey on Fridays", BEFORE[2]]
TEXT = "two ships leave the harbour at dawn"
PROMPT = {"prompt": TEXT[:14], "completion": TEXT[14:]}
CORRUPT = 3
ALONE: list[object] = ["--window-rows", 4, "--shard-positions", 30]


def save(path: Path, rows: Sequence[str | dict[str, Any]]) -> Path:
    made = [row if isinstance(row, dict) else {"text": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def text_of(sample: Any) -> str:
    return str(make_tokenizer().decode(sample.token_ids.astype(np.int64), skip_special_tokens=True))


def learnt(cache: Path) -> dict[str, list[int]]:
    """Text and supervised positions of what is learnt without --data."""
    return {text_of(s): s.positions.tolist() for s in samples_of(LogitCache.open(cache))}


def every_position(*texts: str) -> dict[str, list[int]]:
    return {text: list(range(len(text))) for text in texts}


def test_an_edited_row_is_not_learnt_in_its_old_form(tmp_path: Path, tiny_model: Path) -> None:
    """It fails where what the cache holds is what is learnt."""
    data, cache = save(tmp_path / "rows.jsonl", BEFORE), tmp_path / "c"
    precompute(tiny_model, data, cache)
    first = facts(cache)["data_sets"]
    precompute(tiny_model, save(data, AFTER), cache)
    assert len(LogitCache.open(cache)) == 4
    assert learnt(cache) == every_position(*AFTER)
    (entry,) = facts(cache)["data_sets"]
    assert entry["name"] == str(data) and entry["num_samples"] == 3 and entry != first[0]
    outcome = done(*train_line(tiny_model, cache, tmp_path / "a"))
    positions = sum(map(len, AFTER))
    assert f"{str(data)!r} (3 samples, {positions} positions)" in outcome.err
    assert f"It holds 1 more sample and {len(BEFORE[1])} more positions, which are in none of them" in outcome.err
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["data"]["data_sets"] == {str(data): entry["digest"]}
    assert (run["data"]["num_samples"], run["data"]["num_positions"]) == (3, positions)
    assert f"data set     {data}: 3 samples, {positions} positions, {entry['digest']}" in done("inspect", cache).out
    done("prune", cache, "--data", data, "--model", tiny_model)
    assert len(LogitCache.open(cache)) == 3 and learnt(cache) == every_position(*AFTER)


def test_the_same_tokens_in_two_ways_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    """And learnt where the data say, which are named or have replaced the others."""
    cache, text, prompt = tmp_path / "c", save(tmp_path / "t.jsonl", [TEXT]), save(tmp_path / "p.jsonl", [PROMPT])
    precompute(tiny_model, text, cache)
    precompute(tiny_model, prompt, cache)
    line = train_line(tiny_model, cache, tmp_path / "a")
    said = refused(4, *line)
    assert str(text) in said and str(prompt) in said and "--data" in said and not (tmp_path / "a").exists()
    done(*line, "--data", prompt)
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["data"]["num_positions"] == len(PROMPT["completion"]) + 1 and run["data"]["data_sets"] is None
    precompute(tiny_model, save(text, [PROMPT]), cache)
    assert learnt(cache) == {TEXT: list(range(13, len(TEXT)))}


def test_the_positions_of_one_name_shrink_with_its_rows(tmp_path: Path, tiny_model: Path) -> None:
    data, cache = save(tmp_path / "d.jsonl", [TEXT]), tmp_path / "c"
    precompute(tiny_model, data, cache)
    precompute(tiny_model, save(data, [PROMPT]), cache)
    assert learnt(cache) == {TEXT: list(range(13, len(TEXT)))}
    told = done(*train_line(tiny_model, cache, tmp_path / "a")).err
    assert "It holds 0 more samples and 13 more positions" in told


@pytest.mark.parametrize("num", [3, 11])
def test_many_workers_leave_the_data_set_of_one(tmp_path: Path, tiny_model: Path, num: int) -> None:
    """Of 11 none reads all rows. Rows that repeat in another window are one sample with all of its positions."""
    rows: list[Any] = [*text_rows(9), {"text": TEXT}, *text_rows(4), PROMPT, *text_rows(12)[9:], PROMPT]
    data = save(tmp_path / "d.jsonl", rows)
    precompute(tiny_model, data, tmp_path / "one", *ALONE)
    for index in reversed(range(num)):
        precompute(tiny_model, data, tmp_path / "c", *ALONE, "--shard-index", index, "--num-shards", num)
    assert facts(tmp_path / "c")["data_sets"] == facts(tmp_path / "one")["data_sets"]
    assert not list((tmp_path / "c").glob("worker-*"))
    assert learnt(tmp_path / "c")[TEXT] == list(range(len(TEXT)))
    texts = {row["text"].rstrip("\n") for row in rows if "text" in row}
    assert learnt(tmp_path / "c").keys() == texts


def test_workers_that_read_other_rows_do_not_finish_together(tmp_path: Path, tiny_model: Path) -> None:
    """One row was edited between them, to another of the same length: the first has to run again."""
    data, cache = save(tmp_path / "d.jsonl", text_rows(9)), tmp_path / "c"
    worker = [
        [*precompute_line(tiny_model, data, cache, *ALONE), "--shard-index", i, "--num-shards", 2] for i in (0, 1)
    ]
    done(*worker[0])
    edited = [{"text": row["text"].replace("abc", "xyz")} for row in text_rows(9)]
    save(data, edited)
    assert "Other workers are not done" in done(*worker[1]).out
    done(*worker[0])
    assert learnt(cache).keys() == {row["text"] for row in edited}


def test_two_jobs_of_as_many_workers_leave_both_data_sets(tmp_path: Path, tiny_model: Path) -> None:
    """In one cache at once: the records of one are not taken for those of the other, and do not replace them."""
    cache, texts = tmp_path / "c", {"a.jsonl": text_rows(9), "b.jsonl": text_rows(14)[9:]}
    jobs = [precompute_line(tiny_model, save(tmp_path / n, rows), cache, *ALONE) for n, rows in texts.items()]
    said = [done(*job, "--shard-index", i, "--num-shards", 2).out for i in (0, 1) for job in jobs]
    assert ["Other workers are not done" in out for out in said] == [True, True, False, False]
    found = {Path(d["name"]).name: d["num_samples"] for d in facts(cache)["data_sets"]}
    assert found == {name: len(rows) for name, rows in texts.items()}
    assert not list(cache.glob("worker-*"))


def test_two_names_of_the_same_data_are_two_jobs(tmp_path: Path, tiny_model: Path) -> None:
    data, cache = save(tmp_path / "d.jsonl", text_rows(9)), tmp_path / "c"
    line = precompute_line(tiny_model, data, cache, *ALONE, "--num-shards", 2)
    for index in (0, 1):
        for name in ("one", "two"):
            done(*line, "--shard-index", index, "--data-name", name)
    assert [d["name"] for d in facts(cache)["data_sets"]] == ["one", "two"]


def test_a_part_that_is_damaged_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """And the worker that it is of makes it again. (One that is gone is of a worker that has not finished.)"""
    data, cache = save(tmp_path / "d.jsonl", text_rows(9)), tmp_path / "c"
    worker = [
        [*precompute_line(tiny_model, data, cache, *ALONE), "--shard-index", i, "--num-shards", 2] for i in (0, 1)
    ]
    done(*worker[0])
    (part,) = cache.glob("worker-0-of-2-*.npy")
    part.write_bytes(part.read_bytes()[:-1])
    assert part.name in refused(CORRUPT, *worker[1])
    done(*worker[0])
    done(*worker[1])
    precompute(tiny_model, data, tmp_path / "one", *ALONE)
    assert cache_bytes(cache) == cache_bytes(tmp_path / "one")


def sample(text: str, start: int = 0) -> Sample:
    tokens = np.array(make_tokenizer()(text)["input_ids"], dtype=np.uint32)
    supervised = np.arange(len(tokens)) >= max(start, 1)
    return Sample(tokens, supervised, text)


def test_samples_in_memory_have_a_name_too(tmp_path: Path, tiny_model: Path) -> None:
    """The same name replaces them; named apart, both are learnt."""
    job, cache = CaptureSettings(top_k=8, store="arrow"), tmp_path / "c"
    first, second = [sample("one row"), sample("another row")], [sample("a third row")]
    capture(tiny_model, first, cache, job)
    capture(tiny_model, second, cache, job)
    assert [entry.name for entry in LogitCache.open(cache).data_sets] == ["samples in memory"]
    assert learnt(cache).keys() == {"a third row"}
    capture(tiny_model, first, cache, job, data_name="first")
    assert learnt(cache).keys() == {"one row", "another row", "a third row"}


def test_a_data_name_stands_for_a_path_that_changes(tmp_path: Path, tiny_model: Path) -> None:
    cache = tmp_path / "c"
    precompute(tiny_model, save(tmp_path / "monday.jsonl", BEFORE), cache, "--data-name", "rows")
    precompute(tiny_model, save(tmp_path / "tuesday.jsonl", AFTER), cache, "--data-name", "rows")
    assert [d["name"] for d in facts(cache)["data_sets"]] == ["rows"]
    assert learnt(cache) == every_position(*AFTER)


def test_secrets_of_a_url_are_not_kept(tmp_path: Path, tiny_model: Path) -> None:
    """The data are of a store in memory, whose URLs may say anything."""
    import fsspec

    fsspec.filesystem("memory").pipe("/rows/d.jsonl", json.dumps({"text": TEXT}).encode() + b"\n")
    job = CaptureSettings(top_k=8, store="arrow")
    capture(tiny_model, "memory://rows/d.jsonl", tmp_path / "c", job, data_name="s3://me:hunter2@b/d.jsonl?sig=hunter2")
    assert facts(tmp_path / "c")["data_sets"][0]["name"] == "s3://***@b/d.jsonl?***"
    for path in (tmp_path / "c").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_a_job_that_fails_leaves_the_data_set_as_it_was(tmp_path: Path, tiny_model: Path) -> None:
    data, cache = save(tmp_path / "d.jsonl", BEFORE), tmp_path / "c"
    precompute(tiny_model, data, cache)
    before = cache_bytes(cache)
    data.write_text(json.dumps({"text": "a new row"}) + "\n{broken\n")
    assert logitcache(*precompute_line(tiny_model, data, cache)).status == 1
    assert cache_bytes(cache) == before


def test_ray_names_data_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its actors work in other folders, so that they are told whole paths."""
    monkeypatch.chdir(tmp_path)
    save(Path("d.jsonl"), BEFORE)
    spec = absolute(JobSpec("base", "d.jsonl", str(tmp_path / "c")))
    assert spec.data == (str(tmp_path / "d.jsonl"),) and spec.name == "d.jsonl"


def test_ray_writes_the_data_set_where_no_share_did(tmp_path: Path, tiny_model: Path) -> None:
    """What the shares did is that of the earlier data; what they report is that of these."""
    data, cache = save(tmp_path / "d.jsonl", BEFORE), tmp_path / "c"
    precompute(tiny_model, data, cache)
    (first, *_) = list(LogitCache.open(cache).data_set(LogitCache.open(cache).data_sets[0]).samples())
    finish(str(cache), joined(str(data), [first[1]]), "job")
    assert len(learnt(cache)) == 1
    before = cache_bytes(cache)
    finish(str(cache), DataSet(str(data), first[1]), "job")
    assert cache_bytes(cache) == before


def test_training_refuses_what_the_cache_lacks(tmp_path: Path, tiny_model: Path) -> None:
    """After `repair`, until the data that lost a shard are run again."""
    cache, data = tmp_path / "c", [save(tmp_path / f"{i}.jsonl", text_rows(9)[i::2]) for i in (0, 1)]
    for path in data:
        precompute(tiny_model, path, cache)
    entry = next(d for d in LogitCache.open(cache).data_sets if d.name == str(data[1]))
    keys = [key for key, _ in LogitCache.open(cache).data_set(entry).samples()]
    (shard,) = LogitCache.open(cache).shards_of(keys)
    (cache / "shards" / shard.commit.folder / "logprobs.arrow").unlink()
    assert str(data[1]) in done("repair", cache).out
    precompute(tiny_model, data[0], cache)
    line = train_line(tiny_model, cache, tmp_path / "a")
    assert str(data[1]) in refused(5, *line)
    precompute(tiny_model, data[1], cache)
    done(*line)
