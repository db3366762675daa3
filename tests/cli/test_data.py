"""Data as people have them, on the command line: splits said aloud, several --data, rows that are skipped."""

import json
from pathlib import Path

import pytest
from support.cli_harness import cache_bytes, done, facts, precompute, precompute_line, refused, train_line

from logitcache.cli import run
from logitcache.sweeps.config import make_config

INPUTS = Path(__file__).parents[1] / "data" / "inputs"
SPLITS = INPUTS / "splits"
ONE = [{"text": "abc"}, {"text": "de"}]


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bad_rows(path: Path) -> Path:
    """Two that are good, one that is no JSON, one of no known field, one without a label."""
    path.write_text('{"text": "abc"}\n{"text": \n{"body": "b"}\n{"text": ""}\n{"text": "de"}\n', encoding="utf-8")
    return path


def test_precompute_reads_train_aloud_and_train_learns_another_split_where_it_is_asked(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"{SPLITS}: reading split train: train.jsonl; not read: test.jsonl (--split test)."
    assert said in precompute(tiny_model, SPLITS, tmp_path / "c").err
    assert facts(tmp_path / "c")["contents"]["num_samples"] == 2
    of_test = ["--data", SPLITS, "--split", "test"]
    assert "not cached" in refused(4, *train_line(tiny_model, tmp_path / "c", tmp_path / "o", *of_test))
    precompute(tiny_model, SPLITS, tmp_path / "c", "--split", "test")
    assert [found["name"] for found in facts(tmp_path / "c")["data_sets"]] == [str(SPLITS), f"{SPLITS} (test)"]
    trained = done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", *of_test))
    assert "reading split test: test.jsonl; not read: train.jsonl" in trained.err
    told = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))["data"]
    assert (told["num_samples"], told["how"]["split"]) == (1, "test")
    assert "skipped_file" not in told["how"] and "streaming" not in told["how"]
    both = ["--data", str(SPLITS / "train.jsonl"), "--data", str(SPLITS / "test.jsonl")]
    line = [*map(str, train_line(tiny_model, tmp_path / "c", tmp_path / "p")), *both]
    assert run(line) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "p" / "run.json").read_text(encoding="utf-8"))["data"]["num_samples"] == 3


def test_several_data_are_one_data_set_whose_name_is_theirs(tmp_path: Path, tiny_model: Path) -> None:
    """Twice on the line, as a list of a file, and their rows in one file."""
    names = [str(SPLITS / "test.jsonl"), str(SPLITS / "train.jsonl")]
    start = ["precompute", "--model", str(tiny_model), "--top-k", "8", "--store", "arrow"]
    assert run([*start, "--cache", str(tmp_path / "a"), "--data", names[0], "--data", names[1]]) == 0
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {json.dumps(names)}\n", encoding="utf-8")
    done(*start, "--cache", tmp_path / "b", "--config", config)
    joined = tmp_path / "joined.jsonl"
    joined.write_text("".join(Path(name).read_text(encoding="utf-8") for name in names), encoding="utf-8")
    precompute(tiny_model, joined, tmp_path / "c", "--data-name", " + ".join(names))
    assert cache_bytes(tmp_path / "a") == cache_bytes(tmp_path / "b") == cache_bytes(tmp_path / "c")
    assert [found["name"] for found in facts(tmp_path / "a")["data_sets"]] == [" + ".join(names)]
    for value in ("[]", "[[a]]", "[null]", "{a: b}"):
        config.write_text(f"data: {value}\n", encoding="utf-8")
        assert "expected one plain value for 'data'" in refused(
            2, *start, "--cache", tmp_path / "d", "--config", config
        )


def test_skipped_rows_are_counted_and_listed_beside_the_output(tmp_path: Path, tiny_model: Path) -> None:
    data = bad_rows(tmp_path / "d.jsonl")
    assert "line 2 is not JSON" in refused(1, *precompute_line(tiny_model, data, tmp_path / "c"))
    told = precompute(tiny_model, data, tmp_path / "c", "--skip-bad-rows").err
    listed = tmp_path / "c.skipped.jsonl"
    plan = done(*precompute_line(tiny_model, data, tmp_path / "p", "--skip-bad-rows", "--plan")).out
    assert "1 of them without a supervised token, 2 that cannot be used" in plan
    assert not (tmp_path / "p.skipped.jsonl").exists()  # a plan writes nothing
    assert f"2 rows could not be used and were skipped: {listed} says why." in told
    assert "1 rows have no supervised token" in told and "5 rows: 2 distinct samples" in told
    assert [row["origin"] for row in lines_of(listed)] == [f"{data}:2", f"{data}:3"]
    assert "is not JSON" in lines_of(listed)[0]["reason"] and "expected text" in lines_of(listed)[1]["reason"]
    done("verify", tmp_path / "c")
    line = train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--data", data)
    assert "line 2 is not JSON" in refused(1, *line)
    assert f"skipped: {tmp_path / 'o'}.skipped.jsonl says why" in done(*line, "--skip-bad-rows").err
    assert lines_of(tmp_path / "o.skipped.jsonl") == lines_of(listed)
    done("prune", tmp_path / "c", "--data", data, "--model", tiny_model, "--skip-bad-rows")
    precompute(tiny_model, SPLITS, tmp_path / "c", "--skip-bad-rows")
    assert not listed.exists()  # of an earlier run


def test_each_worker_lists_its_own(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [json.dumps({"text": f"row {i}"} if i % 4 else {"body": i}) for i in range(40)]
    data.write_text("\n".join(rows), encoding="utf-8")
    line = precompute_line(tiny_model, data, tmp_path / "c", "--skip-bad-rows", "--window-rows", 2, "--num-shards", 12)
    for index in range(12):
        done(*line, "--shard-index", index)
    files = sorted(tmp_path.glob("c.skipped.*-of-12.jsonl"))
    assert len(files) > 1
    origins = {row["origin"] for file in files for row in lines_of(file)}
    assert origins == {f"{data}:{i + 1}" for i in range(0, 40, 4)}
    assert all(len({row["origin"] for row in lines_of(file)}) == len(lines_of(file)) for file in files)
    done("verify", tmp_path / "c")


def test_flags_of_rows_have_no_place_where_none_are_read(tmp_path: Path, tiny_model: Path) -> None:
    precompute(tiny_model, SPLITS, tmp_path / "c")
    for flag in (["--split", "train"], ["--skip-bad-rows"], ["--config-name", "a"]):
        message = refused(2, *train_line(tiny_model, tmp_path / "c", tmp_path / "o", *flag))
        assert f"{flag[0]} is for rows that are read: give --data, or leave it out." in message


def test_evaluate_asks_those_texts_for_a_split_that_have_some(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = bad_rows(tmp_path / "prior.jsonl")
    line = ["evaluate", "--model", tiny_model, "--data", SPLITS, "--prior", bad, "--json"]
    outcome = done(*line, "--split", "test", "--skip-bad-rows")
    assert f"new: {SPLITS}: reading split test: test.jsonl" in outcome.err
    assert "prior: 2 rows could not be used and were skipped: evaluate-prior.skipped.jsonl" in outcome.err
    assert len(lines_of(tmp_path / "evaluate-prior.skipped.jsonl")) == 2
    assert not (tmp_path / "evaluate-new.skipped.jsonl").exists()
    found = json.loads(outcome.out)
    assert found["prior"]["before"]["num_positions"] == 3 + 2
    alone = ["evaluate", "--model", tiny_model, "--data", bad, "--prior", bad]
    assert "found files by themselves" in refused(2, *alone, "--split", "test")


def test_home_is_where_a_shell_has_it(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ONE), encoding="utf-8")
    config = tmp_path / "c.yaml"
    config.write_text("data: [~/d.jsonl]\ncache: ~/c\n", encoding="utf-8")
    done("precompute", "--config=~/c.yaml", "--model", tiny_model)
    assert facts(tmp_path / "c")["contents"]["num_samples"] == 2
    config.write_text("data: ~/d.jsonl\ncache: ~/c\n", encoding="utf-8")
    done("precompute", "--config", config, "--model", tiny_model)
    made = make_config({"model": "~/m", "cache": "~/c", "new": ["~/n", "n"], "prior": "~/p"}, "a file")
    assert (made.model, made.cache, made.new, made.prior) == (
        *(str(tmp_path / name) for name in ("m", "c")),
        (str(tmp_path / "n"), "n"),
        (str(tmp_path / "p"),),
    )


def test_names_that_are_no_utf8_go_through_and_are_spelt_out(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / b"caf\xe9".decode(errors="surrogateescape")
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "abc"}\n{"body": 1}\n', encoding="utf-8")
    message = refused(1, *precompute_line(tiny_model, folder / "a.jsonl", tmp_path / "c"))
    assert "caf\\udce9/a.jsonl:2: expected text" in message
    told = precompute(tiny_model, folder, tmp_path / "c", "--skip-bad-rows").err
    assert "1 rows could not be used" in told
    assert lines_of(tmp_path / "c.skipped.jsonl")[0]["origin"].endswith("/a.jsonl:2")
    assert facts(tmp_path / "c")["data_sets"][0]["name"].count("caf") == 1
    done("verify", tmp_path / "c")


def test_a_run_that_is_refused_leaves_the_list_of_the_one_before(tmp_path: Path, tiny_model: Path) -> None:
    """The folder is in use: what was left out of the adapter in it is still listed."""
    data = bad_rows(tmp_path / "rows.jsonl")
    precompute(tiny_model, data, tmp_path / "c", "--skip-bad-rows")
    line = train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--data", data, "--skip-bad-rows")
    done(*line)
    listed = lines_of(tmp_path / "o.skipped.jsonl")
    assert len(listed) == 2
    refused(1, *line)
    assert lines_of(tmp_path / "o.skipped.jsonl") == listed
