"""`logitcache evaluate` with caches in place of the base, against another adapter, and with tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_harness import done, precompute, refused, text_data, train_line
from support.tiny_model import make_model

import logitcache.models.loading as models

WriteRows = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text rows of growing length."""
    return text_data(tmp_path_factory.mktemp("evaluate-data"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the base itself would say, so that whatever is learnt instead raises its perplexity."""
    path = tmp_path_factory.mktemp("evaluate-prior") / "prior.jsonl"
    base = make_model()
    rows = []
    for i in range(5):
        tokens = [40 + i]
        while len(tokens) < 12 + 4 * i:
            with torch.no_grad():
                tokens.append(int(base(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        rows.append({"input_ids": tokens})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path, prior: Path) -> dict[str, Path]:
    """A cache of each, cut at 40 tokens, with nearly the whole vocabulary."""
    folder = tmp_path_factory.mktemp("evaluate-caches")
    for name, text in (("new", data), ("prior", prior)):
        precompute(tiny_model, text, folder / name, "--top-k", 259, "--max-length", 40)
    return {name: folder / name for name in ("new", "prior")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, caches: dict[str, Path]) -> dict[str, Path]:
    """Trained a little with and without the regulariser, to be read only."""
    folder = tmp_path_factory.mktemp("evaluate-adapters")
    for name, flags in (("kl", ["--weight", 3]), ("plain", ["--regularizer", "none"])):
        more = [*flags, "--max-steps", 4, "--lr", "1e-2"]
        done(*train_line(tiny_model, caches["new"], folder / name, *more))
    return {name: folder / name for name in ("kl", "plain")}


@pytest.fixture
def num_loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry a model that is loaded."""
    loaded: list[Any] = []
    original = models.load_base

    def counted(*arguments: Any, device_map: Any = None) -> Any:
        loaded.append(arguments)
        return original(*arguments, device_map=device_map)

    monkeypatch.setattr(models, "load_base", counted)
    return loaded


def found(*arguments: object) -> dict[str, Any]:
    """`evaluate --json`."""
    parsed: dict[str, Any] = json.loads(done("evaluate", *arguments, "--json").out)
    return parsed


def test_two_caches_need_no_base_and_say_the_same(
    tiny_model: Path, data: Path, prior: Path, caches: dict[str, Path], adapters: dict[str, Path], num_loaded: list[Any]
) -> None:
    start = ["--model", tiny_model, "--adapter", adapters["plain"]]
    live = found(*start, "--data", data, "--prior", prior, "--max-length", 40)
    assert len(num_loaded) == 2
    num_loaded.clear()
    cached = found(*start, "--new-cache", caches["new"], "--prior-cache", caches["prior"])
    assert len(num_loaded) == 1
    for side in ("new", "prior"):
        assert (live[side]["before_from"], cached[side]["before_from"]) == ("base", "cache")
        assert cached[side]["samples"] == live[side]["samples"]
        assert cached[side]["after"] == pytest.approx(live[side]["after"], rel=1e-5)
        assert cached[side]["before"]["ce_nats"] == pytest.approx(live[side]["before"]["ce_nats"], abs=1 / 2048)
        assert cached[side]["kl_nats"] == pytest.approx(live[side]["kl_nats"], rel=0.05, abs=1e-3)
        assert cached[side]["num_documents"] == live[side]["num_documents"] > 1
    num_loaded.clear()
    mixed = found(*start, "--new-cache", caches["new"], "--prior", prior, "--max-length", 40)
    assert len(num_loaded) == 2
    assert mixed["new"] == cached["new"] and mixed["prior"] == live["prior"]
    table = done("evaluate", *start, "--new-cache", caches["new"], "--prior", prior).out
    assert "new: KL(base || adapted), nats a token, at least" in table
    assert "prior: KL(base || adapted), nats a token  " in table


def test_text_with_a_cache_is_cut_as_the_cache_was(
    tiny_model: Path, data: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    start = ["--model", tiny_model, "--adapter", adapters["plain"], "--prior-cache", caches["prior"]]
    whole = found(*start, "--new-cache", caches["new"])
    again = found(*start, "--data", data, "--new-cache", caches["new"])
    assert (whole["new"].pop("text"), again["new"].pop("text")) == ("the cache new", data.name)
    assert again == whole
    shorter = found(*start, "--data", data, "--new-cache", caches["new"], "--max-length", 10)
    assert 0 < shorter["new"]["before"]["num_positions"] < whole["new"]["before"]["num_positions"]
    message = refused(4, "evaluate", *start, "--data", data, "--new-cache", caches["new"], "--max-length", 60)
    assert f"pairing {caches['new']} with --max-length 60: expected at most the 40 tokens" in message


def test_drift_prevented_against_a_plain_adapter(
    tmp_path: Path, tiny_model: Path, data: Path, prior: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    texts = ["--data", data, "--prior", prior, "--max-length", 40]
    plain = done("evaluate", "--model", tiny_model, "--adapter", adapters["plain"], *texts, "--json").out
    (tmp_path / "plain.json").write_text(plain)
    start = ["--model", tiny_model, "--adapter", adapters["kl"]]
    result = found(*start, *texts, "--against", tmp_path / "plain.json")
    drifts = [r["prior"]["drift_percent"] for r in (result, json.loads(plain))]
    assert drifts[1] > 0
    assert result["drift_prevented"] == pytest.approx(1 - drifts[0] / drifts[1])
    table = done("evaluate", *start, *texts, "--against", tmp_path / "plain.json").out
    (line,) = (row for row in table.splitlines() if row.startswith("prior: drift of the plain adapter"))
    assert line.split()[-1] == f"{100 * result['drift_prevented']:.1f}"
    cached = ["--new-cache", caches["new"], "--prior-cache", caches["prior"]]
    assert found(*start, *cached, "--against", tmp_path / "plain.json")["drift_prevented"] == pytest.approx(
        result["drift_prevented"], abs=0.01
    )
    assert "drift_prevented" not in found(*start, *texts)
    kls = [r["prior"]["kl_nats"] for r in (result, json.loads(plain))]
    assert 0 < result["kl_prevented"] < 1 and result["kl_prevented"] == pytest.approx(1 - kls[0] / kls[1])
    (line,) = (row for row in table.splitlines() if row.startswith("prior: KL of the plain adapter"))
    assert line.split()[-1] == f"{100 * result['kl_prevented']:.1f}"


def test_kls_over_other_outcomes_are_not_compared(
    tmp_path: Path, tiny_model: Path, prior: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    line = ["--model", tiny_model, "--adapter", adapters["kl"]]
    (tmp_path / "plain.json").write_text(json.dumps(found(*line, "--prior-cache", caches["prior"])))
    live = [*line, "--prior", prior, "--max-length", 40, "--against", tmp_path / "plain.json"]
    outcome = done("evaluate", *live, "--json")
    assert json.loads(outcome.out)["kl_prevented"] is None
    assert "The KL here is over the whole vocabulary, the plain adapter's over 259 alternatives" in outcome.err
    again = found(*line, "--prior-cache", caches["prior"], "--against", tmp_path / "plain.json")
    assert again["kl_prevented"] == 0


def test_where_the_plain_adapter_did_not_drift_nothing_was_prevented(
    tmp_path: Path, tiny_model: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    line = ["--model", tiny_model, "--adapter", adapters["kl"]]
    line += ["--new-cache", caches["new"], "--prior-cache", caches["prior"]]
    earlier = found(*line)
    earlier["prior"]["drift_percent"] = -0.5
    (tmp_path / "plain.json").write_text(json.dumps(earlier))
    outcome = done("evaluate", *line, "--against", tmp_path / "plain.json", "--json")
    assert json.loads(outcome.out)["drift_prevented"] is None
    told = [line for line in outcome.err.splitlines() if "The samples are those" not in line]
    assert told == ["The plain adapter's perplexity did not drift on this text (-0.5 %): none was prevented."]
    assert json.loads(outcome.out)["kl_prevented"] == 0
    assert "drift of the plain adapter" not in done("evaluate", *line, "--against", tmp_path / "plain.json").out


def test_either_text_alone_will_do_and_one_sentence_says_what_it_came_to(
    tiny_model: Path, data: Path, prior: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    start = ["--model", tiny_model, "--adapter", adapters["plain"], "--max-length", 40]
    both = found(*start, "--data", data, "--prior", prior)
    for name, flag, text in (("prior", "--prior", prior), ("new", "--data", data)):
        alone = found(*start, flag, text)
        assert alone.keys() == {"model", name} and alone[name] == both[name]
        assert alone[name]["text"] == text.name
        *table, empty, sentence = done("evaluate", *start, flag, text).out.splitlines()
        assert all(not line or line.startswith((f"{name}: ", "-", " ")) for line in table) and not empty
        assert f" on {text.name}" in sentence and sentence.endswith(".")
    kl, flips = both["prior"]["kl_nats"], both["prior"]["num_first_changed"]
    sentence = done("evaluate", *start, "--prior", prior).out.splitlines()[-1]
    assert sentence.startswith(f"Forgot {kl:.3f} nats a token on prior.jsonl (KL to the base; cross-entropy ")
    assert sentence.endswith(f"; {flips} of 5 first tokens changed.") and flips > 0
    cached = ["--model", tiny_model, "--adapter", adapters["plain"], "--prior-cache", caches["prior"]]
    said = done("evaluate", *cached).out.splitlines()[-1]
    assert said.startswith("Forgot at least ") and " on the cache prior (KL" in said
    said = done("evaluate", "--model", tiny_model, "--prior", prior).out.splitlines()[-1]
    assert said.startswith("The base alone was measured.")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], str]:
    def edit(plain: dict[str, Any]) -> str:
        change(plain)
        return json.dumps(plain)

    return edit


BAD_AGAINST: dict[str, tuple[int, Callable[[dict[str, Any]], str], str]] = {
    "not JSON": (1, lambda _: "before  after", "expected what `logitcache evaluate --json` prints"),
    "a list": (1, lambda _: "[]", "expected what `logitcache evaluate --json` prints"),
    "no prior text": (1, edited(lambda p: p.pop("prior")), "with prior text"),
    "the base alone": (
        1,
        edited(lambda p: p["prior"].update(drift_percent=None)),
        "expected the drift and the KL of an adapter",
    ),
    "no KL": (1, edited(lambda p: p["prior"].update(kl_nats=None)), "expected the drift and the KL of an adapter"),
    "half an alternative": (1, edited(lambda p: p["prior"].update(top_k=1.5)), "a number of alternatives at top_k"),
    "a word for a number": (
        1,
        edited(lambda p: p["prior"].update(drift_percent="9")),
        "the drift and the KL of an adapter",
    ),
    "other prior text": (4, edited(lambda p: p["prior"].update(samples="0")), "another prior text"),
    "another base": (4, edited(lambda p: p["model"].update(weights="0")), "another base"),
}


@pytest.mark.parametrize("name", BAD_AGAINST)
def test_an_evaluation_that_cannot_be_compared_is_refused(
    name: str, tmp_path: Path, tiny_model: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    status, edit, expected = BAD_AGAINST[name]
    line = ["--model", tiny_model, "--adapter", adapters["kl"]]
    line += ["--new-cache", caches["new"], "--prior-cache", caches["prior"]]
    (tmp_path / "plain.json").write_text(edit(found(*line)))
    message = refused(status, "evaluate", *line, "--against", tmp_path / "plain.json")
    assert expected in message and str(tmp_path / "plain.json") in message


def test_a_cache_of_another_model_is_4(other_model: Path, caches: dict[str, Path], adapters: dict[str, Path]) -> None:
    line = ["--model", other_model, "--adapter", adapters["kl"], "--new-cache", caches["new"]]
    message = refused(4, "evaluate", *line, "--prior-cache", caches["prior"])
    assert "differs in weights" in message


def test_text_that_is_not_cached_is_4(
    tiny_model: Path, prior: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    line = ["--model", tiny_model, "--adapter", adapters["kl"], "--data", prior, "--new-cache", caches["new"]]
    message = refused(4, "evaluate", *line, "--prior-cache", caches["prior"])
    assert f"{prior}:1: looking up a sample" in message


def test_another_number_format_than_the_caches_is_told(
    tiny_model: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    line = ["evaluate", "--model", tiny_model, "--adapter", adapters["kl"], "--dtype", "bfloat16"]
    outcome = done(*line, "--new-cache", caches["new"], "--prior-cache", caches["prior"])
    assert "new: the cache was made in float32, the model runs in bfloat16" in outcome.err
    assert "prior: the cache was made in float32" in outcome.err


def test_scales_go_from_the_base_to_the_adapter(
    tiny_model: Path, data: Path, prior: Path, caches: dict[str, Path], adapters: dict[str, Path]
) -> None:
    line = ["--model", tiny_model, "--adapter", adapters["plain"], "--max-length", 40, "--scales", "0,.5,1"]
    texts = ["--data", data, "--prior", prior]
    live = found(*line, *texts)
    cached = found(*line[:-2], "--new-cache", caches["new"], "--prior-cache", caches["prior"], "--scales", "0,.5,1")
    for result, rounding in ((live, 1e-6), (cached, 1e-4)):
        assert [point["scale"] for point in result["scales"]] == [0, 0.5, 1]
        first, middle, last = (point["prior"] for point in result["scales"])
        assert abs(first["kl_nats"]) < rounding < middle["kl_nats"] < last["kl_nats"]
        for text in ("new", "prior"):
            point = result["scales"][2][text]
            assert point["kl_nats"] == pytest.approx(result[text]["kl_nats"], rel=1e-4)
            assert point["after"]["ce_nats"] == pytest.approx(result[text]["after"]["ce_nats"], abs=1e-5)
    shown = done("evaluate", *line, *texts).out
    assert "scale  learnt  forgot (KL)  first tokens changed  new CE  prior CE" in shown
    middle = live["scales"][1]["new"]
    assert f"\n0.5     {middle['before']['ce_nats'] - middle['after']['ce_nats']:.3f} " in shown
    alone = done("evaluate", *line, "--prior", prior).out
    assert "scale  forgot (KL)  first tokens changed  prior CE" in alone


BAD_USAGE: dict[str, tuple[list[str], str]] = {
    "no text": (["--adapter", "a"], "--prior for what was forgotten, --data for what was learnt, or a cache of either"),
    "a cache without an adapter": (
        ["--data", "d", "--prior-cache", "c"],
        "--prior-cache stands for the base beside an adapter",
    ),
    "against without an adapter": (
        ["--data", "d", "--prior", "p", "--against", __file__],
        "--against compares the drift of two adapters",
    ),
    "scales without an adapter": (["--data", "d", "--scales", "0,1"], "--scales are parts of an adapter's change"),
    "scales that are none": (
        ["--data", "d", "--adapter", "a", "--scales", "0,x"],
        "'--scales': expected a number, such as 8, .5, 1e-4 or 1_000, found '0,x'.",
    ),
    "a negative scale": (["--data", "d", "--adapter", "a", "--scales=-1"], "each of 0 or more and of 2 or less"),
    "a scale twice": (["--data", "d", "--adapter", "a", "--scales", "1,1.0"], "expected different numbers"),
    "no task": (["--data", "d", "--prior", "p", "--tasks", " ,"], "--tasks names no task"),
    "a folder of tasks alone": (["--data", "d", "--prior", "p", "--tasks-path", "."], "Give --tasks"),
    "against without prior text": (
        ["--adapter", "a", "--tasks", "t", "--against", __file__],
        "--against compares the drift of two adapters",
    ),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_usage_that_means_nothing_is_2(name: str) -> None:
    flags, expected = BAD_USAGE[name]
    assert expected in refused(2, "evaluate", "--model", "m", *flags)
