"""`logitcache calibrate`: two engines over the same positions, a bound, a file that says which engine it is of."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_harness import done, edit_sealed, logitcache, precompute, refused, snapshot
from support.hidden_engine import in_place_of_vllm
from support.tiny_model import text_rows

from logitcache.capture.calibration import (
    BOUNDS,
    Bounds,
    Calibration,
    Differences,
    Run,
    bounds_of,
    check_bounds,
    check_calibration,
    choose,
    compare,
    read_calibration,
    write_calibration,
)
from logitcache.data.samples import Sample
from logitcache.errors import NotCalibrated, install_line
from logitcache.models import loading as models
from logitcache.storage import BaseLogprobs, ModelIdentity


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,400 supervised tokens or so."""
    path = tmp_path_factory.mktemp("calibrate-data") / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(40)), encoding="utf-8")
    return path


def line(model: Path, out: Path, *more: object) -> list[object]:
    return ["calibrate", "--model", model, "--out", out, "--top-k", 8, *more]


# --- differences, by hand ---------------------------------------------------------------------------------------------


def record(label: float, alternatives: dict[int, float], tail: float) -> BaseLogprobs:
    """One position of label 9, from probabilities."""
    with np.errstate(divide="ignore"):
        return BaseLogprobs(
            positions=np.array([0], np.int32),
            label_ids=np.array([9], np.uint32),
            label_logprobs=np.log(np.array([label], np.float32)),
            alternative_ids=np.array([list(alternatives)], np.uint32),
            alternative_logprobs=np.log(np.array([list(alternatives.values())], np.float32)),
            tail_logprobs=np.log(np.array([tail], np.float32)),
        )


def test_differences_by_hand() -> None:
    """Token 3 is kept by both, 5 and 2 by one each: those are lumped with the tails."""
    a, b = record(0.5, {3: 0.2, 5: 0.1}, 0.2), record(0.4, {2: 0.3, 3: 0.1}, 0.2)
    found = compare([a], [b])
    assert found.max_label_nats == pytest.approx(np.log(0.5 / 0.4))
    assert found.max_alternative_nats == found.mean_alternative_nats == pytest.approx(np.log(2))
    assert (found.mean_overlap, found.num_positions, found.num_samples) == (0.5, 1, 1)
    assert found.max_tail_nats == found.mean_tail_nats == 0
    assert compare([a], [record(0.5, {3: 0.2, 5: 0.1}, 0.1)]).max_tail_nats == pytest.approx(np.log(2))
    least = record(0.5, {3: 0.5}, 0.5e-4)
    assert compare([least], [record(0.5, {3: 0.5}, 1e-4)]).max_tail_nats == 0
    expected = 0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.1) + 0.3 * np.log(0.3 / 0.5)
    assert found.mean_kl_nats == pytest.approx(expected, rel=1e-5)


def test_of_no_alternatives_all_are_shared() -> None:
    """Label and tail alone, of both or of one."""
    a, b = record(0.5, {}, 0.5), record(0.4, {}, 0.6)
    found = compare([a], [b])
    assert (found.mean_overlap, found.max_alternative_nats) == (1.0, 0.0)
    assert found.mean_kl_nats == pytest.approx(0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.6), rel=1e-5)
    assert compare([a], [record(0.4, {3: 0.2}, 0.4)]).mean_kl_nats == pytest.approx(found.mean_kl_nats)


def test_kl_where_the_other_has_no_mass_is_infinite() -> None:
    a, b = record(0.5, {3: 0.2, 5: 0.1}, 0.2), record(0.5, {3: 0.4, 5: 0.1}, 0.0)
    assert compare([a], [b]).mean_kl_nats == np.inf
    assert np.isfinite(compare([b], [a]).mean_kl_nats)
    assert compare([a, b], [a, b]).max_kl_nats == 0


def test_other_positions_are_no_comparison() -> None:
    a = record(0.5, {3: 0.2, 5: 0.1}, 0.2)
    with pytest.raises(ValueError, match="same positions"):
        compare([a], [replace(a, positions=np.array([1], np.int32))])


def calibration(dtype: str = "float32", rounding: float = 0.0, **found: float) -> Calibration:
    identity = ModelIdentity("a" * 32, "c" * 32, 260, dtype, "vllm")
    same: dict[str, Any] = dict.fromkeys(Differences.__dataclass_fields__, 0.0)
    same |= {"num_samples": 10, "num_positions": 1000, "mean_overlap": 1.0} | found
    engine, reference = Run("vllm", "0.33.0", identity), Run("transformers", "5", replace(identity, dtype="float32"))
    return Calibration(engine, reference, 8, Differences(**same), rounding)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("max_label_nats", "max_nats"),
        ("mean_label_nats", "mean_nats"),
        ("max_alternative_nats", "max_nats"),
        ("mean_alternative_nats", "mean_nats"),
        ("max_tail_nats", "max_nats"),
        ("mean_tail_nats", "mean_nats"),
        ("mean_kl_nats", "mean_kl_nats"),
    ],
)
def test_each_difference_has_a_bound(dtype: str, name: str, bound: str) -> None:
    most = getattr(bounds_of(calibration(dtype)), bound)
    check_bounds(calibration(dtype, **{name: most}))
    for value in (most * 1.001, np.inf, np.nan):
        with pytest.raises(NotCalibrated, match="at most"):
            check_bounds(calibration(dtype, **{name: value}))


def test_too_few_positions_and_too_little_in_common_are_refused() -> None:
    for found, said in (({"num_positions": 999}, "at least 1000"), ({"mean_overlap": 0.79}, "shared alternatives")):
        with pytest.raises(NotCalibrated, match=said):
            check_bounds(calibration(**found))


def test_rounding_of_a_cache_widens_the_bounds() -> None:
    assert bounds_of(calibration(rounding=0.5)) == Bounds(0.501, 0.5001, 5e-6 + 0.25 / 3)


def test_samples_are_chosen_by_content_until_there_are_enough() -> None:
    samples = [Sample(np.array([i, 1, 2], np.uint32), np.ones(3, np.bool_), f"{i}") for i in range(9)]
    chosen = choose(samples, 7, "here")
    assert len(chosen) == 4
    assert {s.origin for s in choose(samples[::-1], 7, "here")} == {s.origin for s in chosen} != {"0", "1", "2", "3"}
    with pytest.raises(NotCalibrated, match=r"calibrating on here: expected at least 19 .* found 18"):
        choose(samples * 2, 19, "here")  # each counts once


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_transformers_is_within_the_bounds_of_itself(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    out = tmp_path / "c.json"
    outcome = done(*line(tiny_model, out, "--data", data, "--engine", "transformers"))
    assert outcome.out.splitlines()[-1] == f"Within the bounds: {out}"
    found = read_calibration(out)
    assert found.found.max_label_nats == found.found.max_alternative_nats == found.found.mean_kl_nats == 0
    assert 1000 <= found.found.num_positions < 1100
    assert found.engine == found.reference and found.engine.model.attention == "sdpa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_attention_or_dtype_is_noise(tmp_path: Path, tiny_model: Path, data: Path, dtype: str) -> None:
    out = tmp_path / "c.json"
    how = ["--engine", "transformers", "--engine-dtype", dtype, "--engine-attention", "eager"]
    text = done(*line(tiny_model, out, "--data", data, *how)).out
    found = read_calibration(out)
    assert (found.engine.model.dtype, found.engine.model.attention) == (dtype, "eager")
    assert found.found.max_label_nats > 0
    assert f"{found.found.max_label_nats:.3g}" in text and f"{found.found.mean_alternative_nats:.3g}" in text


def test_another_model_is_refused(
    tmp_path: Path, tiny_model: Path, other_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that runs other weights than it says."""
    load, loaded = models.load_base, []

    def second_is_other(source: Any, *how: Any, **more: Any) -> Any:
        base = load(source, *how, **more)
        loaded.append(base)
        return base if len(loaded) == 1 else replace(base, model=load(models.find_model(str(other_model)), *how).model)

    monkeypatch.setattr(models, "load_base", second_is_other)
    how = ["--data", data, "--engine", "transformers", "--engine-dtype", "bfloat16"]
    outcome = _fails(*line(tiny_model, tmp_path / "c.json", *how))
    assert "mean difference of log p(label)" in outcome and "shared alternatives" in outcome
    assert len(loaded) == 2 and not list(tmp_path.iterdir())


def _fails(*arguments: object) -> str:
    """What it says on stderr; the numbers are on stdout."""
    outcome = logitcache(*arguments)
    assert outcome.status == 1 and "KL(reference || engine)" in outcome.out
    (said,) = outcome.err.splitlines()
    assert said.startswith("logitcache: comparing ") and "Within" not in outcome.out
    return said


def test_vllm_passes_and_a_noisy_one_does_not(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an engine in its place (tests/support/hidden_engine.py)."""
    in_place_of_vllm(monkeypatch)
    out = tmp_path / "c.json"
    outcome = done(*line(tiny_model, out, "--data", data, "--max-length", 100))
    assert outcome.out.startswith("vllm 0.32.0, float32, vllm attention\nagainst transformers ")
    found = read_calibration(out)
    assert 0 < found.found.max_label_nats < 1e-4 and found.found.mean_overlap == 1
    assert found.found.max_tail_nats < 1e-5 and found.found.mean_kl_nats < 1e-10
    before = snapshot(tmp_path)
    in_place_of_vllm(monkeypatch, "noise 0.05")
    assert "max difference of log p(label)" in _fails(*line(tiny_model, out, "--data", data, "--max-length", 100))
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(find_spec("vllm") is not None, reason="it is here")
def test_vllm_where_it_is_not(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    assert install_line("vllm") in refused(2, *line(tiny_model, tmp_path / "c.json", "--data", data))


@pytest.mark.parametrize("precision", ["exact", "fine"])
def test_a_cache_is_compared_with_its_base(tmp_path: Path, tiny_model: Path, data: Path, precision: str) -> None:
    precompute(tiny_model, data, tmp_path / "cache", "--precision", precision)
    outcome = done(*line(tiny_model, tmp_path / "c.json", "--cache", tmp_path / "cache"))
    assert outcome.out.splitlines()[-1] == "Within the bounds."
    assert outcome.out.startswith("cache ") and not (tmp_path / "c.json").exists()


def test_a_cache_of_another_model_is_refused(tmp_path: Path, tiny_model: Path, other_model: Path, data: Path) -> None:
    precompute(other_model, data, tmp_path / "cache")
    said = refused(4, *line(tiny_model, tmp_path / "c.json", "--cache", tmp_path / "cache"))
    assert "weights" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --data"),
        (["--cache", "C", "--engine-dtype", "bfloat16"], "--engine-dtype is of an engine that runs"),
        (["--cache", "C", "--tensor-parallel", 2], "--tensor-parallel is of an engine that runs"),
        (["--data", "D", "--engine", "transformers", "--engine-arg", "a=1"], "are for --engine vllm"),
        (["--data", "D", "--cache", "C"], "give either --data"),
        (["--data", "D", "--engine-attention", "eager"], "vLLM chooses its own"),
        (["--data", "D", "--num-positions", 999], "999 is not in the range"),
        (["--data", "D", "--out", "none/such.json"], "is no folder"),
    ],
)
def test_wrong_usage(arguments: list[object], said: str, tiny_model: Path) -> None:
    assert said in refused(2, "calibrate", "--model", tiny_model, *arguments)


def test_too_little_data_is_refused(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    few = ["--data", data, "--engine", "transformers", "--num-positions", 5000]
    assert "expected at least 5,000" in refused(1, *line(tiny_model, tmp_path / "c.json", *few))


def test_commands_of_the_page_run(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_place_of_vllm(monkeypatch)
    (tmp_path / "base").symlink_to(tiny_model)
    (tmp_path / "train.jsonl").symlink_to(data)
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "engines.md").read_text(encoding="utf-8")
    lines = [text for text in page.splitlines() if text.startswith("logitcache ")]
    assert len(lines) == 6
    for text in lines:
        done(*shlex.split(text)[1:])
    bounds = [f"| {dtype} | {_short(b.max_nats)} | {_short(b.mean_nats)} |" for dtype, b in BOUNDS.items()]
    assert all(row in page for row in bounds)


def _short(value: float) -> str:
    return f"{value:g}".removeprefix("0")


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    done(*line(tiny_model, path, "--data", data, "--engine", "transformers", "--engine-dtype", "bfloat16"))
    return path


def test_calibration_is_of_one_engine_version_and_model(written: Path) -> None:
    run = read_calibration(written).engine
    assert check_calibration(written, run).engine == run
    others = [
        replace(run, engine="vllm"),
        replace(run, version="0"),
        replace(run, arguments=("kv_cache_dtype=fp8",)),
        *(
            replace(run, model=replace(run.model, **{name: value}))  # type: ignore[arg-type]
            for name, value in (("weights", "x"), ("config", "x"), ("vocab_size", 5), ("dtype", "float16"))
        ),
        replace(run, model=replace(run.model, attention="vllm")),
    ]
    for other in others:
        with pytest.raises(NotCalibrated, match=r"there, .* here"):
            check_calibration(written, other)


def test_writing_overwrites_nothing_else_and_follows_no_link(written: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    (tmp_path / "c.json.new").write_text("mine")
    (tmp_path / "c.json").symlink_to(tmp_path / "thesis.tex")
    write_calibration(tmp_path / "c.json", read_calibration(written))
    assert read_calibration(tmp_path / "c.json") == read_calibration(written)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    assert (tmp_path / "c.json.new").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.json.new", "thesis.tex"]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another reference": (lambda c: c["reference"]["model"].update(weights="x"), "reference weights"),
    "few positions": (lambda c: c["found"].update(num_positions=10), "positions 10"),
    "above a bound": (lambda c: c["found"].update(max_label_nats=5.0), "max difference of log p"),
    "a field is missing": (lambda c: c["found"].pop("mean_kl_nats"), "expected a finite number at found.mean_kl_nats"),
    "infinite": (lambda c: c["found"].update(mean_kl_nats=float("inf")), "expected a finite number"),
    "no engine": (lambda c: c.update(engine=None), "expected an object at engine"),
    "an unknown field": (
        lambda c: c["engine"]["model"].update(seed=1),
        "no such field at engine.model.seed, found one",
    ),
    "another type": (lambda c: c["engine"]["model"].update(vocab_size="x"), "engine.model.vocab_size"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_calibration_is_refused(written: Path, tmp_path: Path, name: str) -> None:
    change, said = DAMAGE[name]
    run = read_calibration(written).engine
    path = tmp_path / "c.json"
    path.write_bytes(written.read_bytes())
    edit_sealed(path, lambda body: change(body) and None)
    with pytest.raises(NotCalibrated) as caught:
        check_calibration(path, run)
    assert said in str(caught.value)


def test_a_value_that_changed_since_is_refused(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(written.read_bytes().replace(b'"mean_label_nats": ', b'"mean_label_nats": -'))
    with pytest.raises(NotCalibrated, match="expected the checksum"):
        read_calibration(path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NotCalibrated, match=r"reading .*c\.json: .*Run `logitcache calibrate`"):
        read_calibration(path)
