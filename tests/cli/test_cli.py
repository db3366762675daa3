"""The verbs on tiny data: what they print, what they leave, and that their flags stay what they are."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.cli_harness import (
    NUM_POSITIONS,
    ROWS,
    Rows,
    Terminal,
    cache_bytes,
    copy_of,
    done,
    facts,
    logitcache,
    precompute,
    precompute_line,
    refused,
    snapshot,
    unchanged,
)
from support.tiny_model import make_tokenizer, text_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from logitcache.cli import cli
from logitcache.cli.progress import TrainBar
from logitcache.storage import LogitCache
from logitcache.storage.checked_json import unsealed

WriteRows = Callable[..., Path]

TEN_STEPS = ["--max-steps", 10, "--log-every", 1]
OF_DATA = ["--chat-template", "--chat-template-kwargs", "--config-name", "--skip-bad-rows", "--split", "--streaming"]
OF_DATA += ["--supervise"]
RUNTIME = ["--config", "--device", "--dtype"]
FLAGS: dict[str, list[str]] = {
    "calibrate": [
        *("--batch-tokens", "--cache", "--data", "--device-map", "--engine", "--engine-arg", "--engine-attention"),
        *("--engine-dtype", "--max-length", "--model", "--num-positions", "--out", "--tensor-parallel", "--top-k"),
        *OF_DATA,
        *RUNTIME,
    ],
    "precompute": [
        *("--batch-tokens", "--cache", "--calibration", "--cost-per-hour", "--data"),
        *("--device-map", "--engine", "--engine-arg", "--load-in", "--log-json", "--max-length"),
        *("--min-mass", "--model", "--num-shards", "--num-workers", "--plan", "--plan-bytes"),
        *("--precision", "--probe-cache", "--samples-from", "--shard-index", "--shard-positions", "--store"),
        *("--tail-groups", "--tail-samples", "--tensor-parallel", "--tokens-per-second"),
        *("--data-name", "--kl-positions", "--tail-group-step", "--top-k", "--window-rows"),
        *OF_DATA,
        *RUNTIME,
    ],
    "status": ["--config", "--json", "DIR"],
    "inspect": ["--config", "--json", "--max-positions", "--plot", "DIR"],
    "verify": ["--against-model", "--batch-tokens", "--config", "--device", "--json", "--num-positions", "DIR"],
    "repair": ["--config", "--manifest-from", "DIR"],
    "prune": ["--config", "--data", "--dry-run", "--model", "DIR", *OF_DATA],
    "merge": ["--config", "TARGET", "SOURCE..."],
    "convert": ["--config", "--precision", "--store", "SOURCE", "TARGET"],
    "export": ["--config", "--out", "--to", "DIR"],
    "push": [
        *("--base-model", "--config", "--data-license", "--dry-run", "--model-license", "--private", "--revision"),
        *("CACHE", "REPO_ID"),
    ],
    "pull": ["--config", "--revision", "CACHE", "REPO_ID"],
    "train": [
        *("--device-map", "--ignore-padding", "--load-in", "--max-start-kl", "--other-precision"),
        *("--student", "--teacher-is-not-base"),
        "--adapter",
        "--alpha",
        *("--anchor-batch", "--anchor-cache", "--anchor-every", "--anchor-regularizer", "--anchor-weight"),
        *("--batch-size", "--batch-tokens", "--plan"),
        *("--block-size", "--cayley"),
        "--cache",
        *("--ce-weight", "--ce-weight-value", "--label-weight", "--tail-weight", "--recipe"),
        "--data",
        "--dropout",
        "--epochs",
        *("--best-by", "--eval-data", "--eval-prior", "--eval-split", "--eval-steps", "--kl-budget-of", "--patience"),
        *("--stop-at-prior-kl", "--save-steps", "--set", "--log-json", "--start-from"),
        *("--attn-implementation", "--modules-to-save", "--revision"),
        "--grad-accum",
        "--gradient-checkpointing",
        "--kl-budget",
        "--kl-positions",
        "--label-smoothing",
        "--log-every",
        "--lr",
        "--max-length",
        "--max-steps",
        "--min-adapted-rest",
        "--min-base-rest",
        "--model",
        "--nullspace",
        "--out",
        "--rank",
        "--regularizer",
        "--resume",
        "--seed",
        "--tail",
        "--target-modules",
        "--temperature",
        "--top-k",
        "--variant",
        "--weight",
        "--weighting",
        *OF_DATA,
        *RUNTIME,
    ],
    "nullspace": [
        "--batch-tokens",
        "--data",
        "--max-length",
        "--max-samples",
        "--memory-limit",
        "--products",
        "--model",
        "--out",
        "--rank",
        *OF_DATA,
        *RUNTIME,
    ],
    "answers": [
        *("--adapter", "--batch-size", "--device-map", "--load-in", "--max-new-tokens", "--model", "--out"),
        "--prompts",
        *RUNTIME,
    ],
    "evaluate": [
        "--device-map",
        "--adapter",
        "--against",
        "--batch-tokens",
        "--data",
        "--json",
        "--max-length",
        "--model",
        "--new-cache",
        "--prior",
        "--prior-cache",
        "--scales",
        "--tasks",
        "--tasks-path",
        *OF_DATA,
        *RUNTIME,
    ],
    "report": ["--config", "--out", "DIR"],
    "sweep": ["--dry-run", "--jobs", "--out", "--retry-failed", *RUNTIME],
    "demo": ["--config", "--out", "--real"],
}
"""The public surface. A change here is a change for users: it belongs into the changelog."""

OF_ROWS = {"split": "train", "supervise": "assistant"}
OF_MODEL = {"load-in": "as stored", "device-map": "one device"}

DEFAULTS = {
    "calibrate": {
        **OF_ROWS,
        "engine": "vllm",
        "engine-dtype": "that of the reference",
        "engine-attention": "that of the reference",
        "num-positions": "1000",
        "top-k": "64",
        "max-length": "1024",
        "batch-tokens": "8192",
        "out": "calibration.json",
        "device-map": "one device",
        "dtype": "auto",
        "device": "auto",
    },
    "precompute": {
        **OF_MODEL,
        **OF_ROWS,
        "top-k": "64",
        "min-mass": "1.0",
        "tail-groups": "0",
        "tail-group-step": "1.0",
        "tail-samples": "0",
        "kl-positions": "supervised",
        "data-name": "--data as given",
        "precision": "fine",
        "store": "zarr",
        "max-length": "1024",
        "batch-tokens": "8192",
        "shard-positions": "32768",
        "window-rows": "16384",
        "engine": "transformers",
        "num-workers": "one a GPU, or 1",
        "tokens-per-second": "as measured here",
        "plan-bytes": "what these settings take",
        "dtype": "auto",
        "device": "auto",
    },
    "train": {
        **OF_MODEL,
        **OF_ROWS,
        "regularizer": "masked-kl",
        "kl-budget-of": "new",
        "kl-positions": "supervised",
        "kl-budget": "the weight stays",
        "tail": "auto",
        "weight": "1.0",
        "label-smoothing": "0.0",
        "ce-weight": "none",
        "ce-weight-value": "as published",
        "label-weight": "1.0",
        "top-k": "all that the cache has",
        "temperature": "1.0",
        "weighting": "uniform",
        "min-base-rest": "0.0001",
        "min-adapted-rest": "0.0",
        "adapter": "lora",
        "rank": "16",
        "alpha": "2 * rank",
        "dropout": "0.0",
        "target-modules": "all-linear",
        "variant": "v1",
        "block-size": "32",
        "cayley": "neumann",
        "anchor-weight": "4.0",
        "anchor-batch": "4",
        "anchor-every": "1",
        "anchor-regularizer": "full-kl",
        "max-start-kl": ".1 where the formats are 8bit and none, else 1",
        "lr": "0.0002",
        "epochs": "1.0",
        "batch-size": "8",
        "batch-tokens": "2048",
        "grad-accum": "1",
        "seed": "0",
        "max-steps": "-1",
        "revision": "its main branch",
        "attn-implementation": "as transformers chooses",
        "save-steps": "a tenth of the steps",
        "eval-split": "that of --split",
        "eval-steps": "a tenth of the steps",
        "max-length": "that of the cache",
        "log-every": "10",
        "dtype": "auto",
        "device": "auto",
    },
    "nullspace": {
        **OF_ROWS,
        "rank": "16",
        "max-samples": "256",
        "max-length": "1024",
        "batch-tokens": "8192",
        "memory-limit": "4.0",
        "products": "float64",
        "dtype": "auto",
        "device": "auto",
    },
    "evaluate": {
        **OF_ROWS,
        "device-map": "one device",
        "max-length": "1024",
        "batch-tokens": "8192",
        "dtype": "auto",
        "device": "auto",
    },
    "answers": {
        **OF_MODEL,
        "prompts": "100 everyday prompts",
        "max-new-tokens": "128",
        "batch-size": "16",
        "dtype": "auto",
        "device": "auto",
    },
    "report": {"out": "that of the sweep"},
    "sweep": {"jobs": "1", "dtype": "auto", "device": "auto"},
    "demo": {"out": "demo-output"},
    "status": {},
    "inspect": {"max-positions": "200000"},
    "verify": {"num-positions": "4096", "batch-tokens": "8192", "device": "auto"},
    "repair": {},
    "prune": OF_ROWS,
    "merge": {},
    "convert": {"store": "that of the source", "precision": "that of the source"},
    "export": {"to": "parquet"},
    "push": {
        "model-license": "that of the card beside its weights, or there before",
        "data-license": "that of the card there before, or unknown",
        "revision": "main",
    },
    "pull": {"revision": "main"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text rows of growing length."""
    path = tmp_path_factory.mktemp("cli-data") / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(12)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    """A finished cache of `data`, to be read only."""
    path = tmp_path_factory.mktemp("cli-cache") / "cache"
    precompute(tiny_model, data, path, "--shard-positions", 100, "--batch-tokens", 128)
    return path


def train_line(model: Path, cache: Path | None, out: Path, *more: object) -> list[object]:
    """The arguments of a short `train`."""
    source = [] if cache is None else ["--cache", cache]
    return ["train", "--model", model, *source, "--out", out, "--rank", 4, "--lr", 1e-2, "--batch-size", 4, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cache: Path) -> Path:
    """The output folder of an uninterrupted training of 10 steps, to be read only."""
    out = tmp_path_factory.mktemp("cli-train") / "adapter"
    done(*train_line(tiny_model, cache, out, *TEN_STEPS))
    return out


# --- the surface -----------------------------------------------------------------------------------------------------


def test_verbs_and_flags_are_frozen() -> None:
    found = {
        verb: sorted(
            name
            for p in command.params
            for name in (p.opts if isinstance(p, click.Option) else [p.human_readable_name])
        )
        for verb, command in cli.commands.items()
    }
    assert found == {verb: sorted(flags) for verb, flags in FLAGS.items()}


@pytest.mark.parametrize("verb", FLAGS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_flag_and_its_default(verb: str, flag: str) -> None:
    outcome = done(verb, flag)
    assert all(name in outcome.out for name in FLAGS[verb])
    entries = {e.split()[0]: " ".join(e.split()) for e in outcome.out.split("\n  -")[1:]}
    for name, default in DEFAULTS[verb].items():
        assert f"[default: {default}" in entries[f"-{name}"]
    assert outcome.err == ""


@pytest.mark.parametrize("verb", FLAGS)
def test_every_default_that_help_shows_is_tested(verb: str) -> None:
    with_defaults = [
        p.opts[-1].removeprefix("--")
        for p in cli.commands[verb].params
        if isinstance(p, click.Option) and (p.show_default or "[default:" in (p.help or ""))
    ]
    assert sorted(with_defaults) == sorted(DEFAULTS[verb])


def test_help_of_the_group_lists_verbs_and_statuses() -> None:
    out = done("--help").out
    assert all(verb in out for verb in FLAGS)
    assert "3 corrupt data" in out and "130 interrupted" in out
    assert done("--version").out.startswith("logitcache, version ")


def test_runs_as_a_module() -> None:
    outcome = subprocess.run([sys.executable, "-m", "logitcache", "--help"], capture_output=True, text=True, check=True)
    assert outcome.stdout == done("--help").out
    assert outcome.stderr == ""


def test_status_of_the_process_is_that_of_the_verb(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "logitcache", "inspect", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert outcome.returncode == 2
    assert outcome.stdout == "" and outcome.stderr.startswith("logitcache: opening ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["inspect"], ["precompute", "--nonsense"], ["train"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert refused(2, *arguments).startswith("Error: ")


# --- precompute ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_precompute_takes_every_kind_of_row(
    kind: str, store: str, tmp_path: Path, tiny_model: Path, write_rows: WriteRows
) -> None:
    outcome = precompute(tiny_model, write_rows(ROWS[kind]), tmp_path / "c", "--store", store)
    count = NUM_POSITIONS[kind]
    assert outcome.out == f"Cached {count} positions of 2 samples in {tmp_path / 'c'}.\n"
    assert f"2 rows: 2 distinct samples, {facts(tmp_path / 'c')['contents']['num_tokens']} tokens" in outcome.err
    found = facts(tmp_path / "c")
    assert (found["store"], found["contents"]["num_positions"]) == (store, count)
    assert done("verify", tmp_path / "c").out.startswith(f"{tmp_path / 'c'} is intact: 1 shards, 2 samples, {count} ")


@pytest.mark.parametrize("kind", ROWS)
def test_parquet_gives_what_jsonl_gives(kind: str, tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[kind]), tmp_path / "data.parquet")
    precompute(tiny_model, tmp_path / "data.parquet", tmp_path / "a", "--data-name", "rows")
    precompute(tiny_model, write_rows(ROWS[kind]), tmp_path / "b", "--data-name", "rows")
    assert cache_bytes(tmp_path / "a") == cache_bytes(tmp_path / "b")


def test_a_folder_gives_the_rows_of_its_files(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    rows: Rows = [*ROWS["text"], *ROWS["completion"], *ROWS["messages"]]
    write_rows(ROWS["text"], "many/a.jsonl")
    write_rows(ROWS["completion"], "many/c.json")
    pq.write_table(pa.Table.from_pylist(ROWS["messages"]), folder / "b.parquet")
    (folder / "README.md").write_text("not data", encoding="utf-8")
    precompute(tiny_model, folder, tmp_path / "a", "--data-name", "rows")
    precompute(tiny_model, write_rows(rows), tmp_path / "b", "--data-name", "rows")
    assert cache_bytes(tmp_path / "a") == cache_bytes(tmp_path / "b")


@pytest.mark.parametrize(
    ("precision", "label_error", "alternative_error"),
    [("exact", 0, 0), (None, 1 / 2048, 1 / 64), ("fine", 1 / 2048, 1 / 64), ("compact", 1 / 2048, 1 / 32)],
)
def test_the_cache_holds_what_the_base_predicts(
    precision: str | None,
    label_error: float,
    alternative_error: float,
    tmp_path: Path,
    tiny_model: Path,
    write_rows: WriteRows,
) -> None:
    """Within what the precision promises, and 2e-4, since padded batches sum in another order. None: the default."""
    rows = text_rows(12)[5:]
    more = [] if precision is None else ["--precision", precision]
    precompute(tiny_model, write_rows(rows), tmp_path / "c", *more)
    assert facts(tmp_path / "c")["capture"]["max_error"] == alternative_error
    model, opened = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), LogitCache.open(tmp_path / "c")
    for row in rows:
        tokens = np.array(make_tokenizer()(row["text"] + "<|endoftext|>")["input_ids"])
        record = opened.lookup(tokens)
        assert len(record) == len(tokens) - 1 and record.num_alternatives == 8
        with torch.inference_mode():
            logprobs = model(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(1).numpy()
        labels = np.take_along_axis(logprobs, tokens[1:, None], 1).squeeze(1)
        np.testing.assert_allclose(record.label_logprobs, labels, rtol=0, atol=label_error + 2e-4)
        kept = np.take_along_axis(logprobs, record.alternative_ids.astype(np.int64), 1)
        np.testing.assert_allclose(record.alternative_logprobs, kept, rtol=0, atol=alternative_error + 2e-4)
        rest = logprobs.copy()
        np.put_along_axis(rest, tokens[1:, None], -np.inf, 1)
        np.put_along_axis(rest, record.alternative_ids.astype(np.int64), -np.inf, 1)
        assert np.all(rest.max(axis=1) <= kept.min(axis=1) + 2e-4)  # nothing more probable was left out
        tail = np.log(np.exp(rest.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(record.tail_logprobs, tail, rtol=0, atol=label_error + 2e-4)


def test_precompute_again_changes_nothing(tmp_path: Path, tiny_model: Path, data: Path, cache: Path) -> None:
    again = copy_of(cache, tmp_path / "c")
    before = {p: p.stat().st_mtime_ns for p in again.rglob("*") if p.is_file()}
    with unchanged(again):
        outcome = precompute(tiny_model, data, again, "--shard-positions", 100, "--batch-tokens", 128)
    assert outcome.out == f"Cached 0 positions of 0 samples in {again}. 12 samples were there already.\n"
    assert {p: p.stat().st_mtime_ns for p in again.rglob("*") if p.is_file()} == before


def test_a_finished_cache_gains_what_it_lacks(
    tmp_path: Path, tiny_model: Path, cache: Path, write_rows: WriteRows
) -> None:
    grown = copy_of(cache, tmp_path / "c")
    old = {name: b for name, b in cache_bytes(cache).items() if name.startswith(("manifest", "shards"))}
    outcome = precompute(tiny_model, write_rows([*text_rows(12), {"text": "something else"}]), grown)
    assert outcome.out == f"Cached 14 positions of 1 samples in {grown}. 12 samples were there already.\n"
    new = cache_bytes(grown)
    assert {name: new[name] for name in old} == old
    assert len(LogitCache.open(grown)) == 13
    done("verify", grown)


def test_a_plan_writes_nothing(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    with unchanged(tmp_path):
        outcome = precompute(tiny_model, data, tmp_path / "c", "--plan")
    assert outcome.out.startswith("rows    12, 0 of them cut to 1024 tokens\nsamples 12 ")
    assert outcome.out.endswith("Nothing was written.\n")


def test_equal_rows_are_cached_once(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    outcome = precompute(tiny_model, write_rows([{"text": "same"}] * 3), tmp_path / "c")
    assert outcome.out.startswith("Cached 4 positions of 1 samples")
    assert "3 rows: 1 distinct samples" in outcome.err


def test_top_k_is_bounded_by_the_vocabulary(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    rows = write_rows(ROWS["text"])
    for more, said in (
        (["--top-k", 260], "--top-k 260: expected at most 259, all but one of the model's 260 tokens"),
        (["--top-k", 259, "--tail-groups", 4], "no tail is left to split"),
    ):
        assert said in refused(2, *precompute_line(tiny_model, rows, tmp_path / "o", *more))
        assert not (tmp_path / "o").exists()
    precompute(tiny_model, rows, tmp_path / "c", "--top-k", 259)
    assert facts(tmp_path / "c")["capture"]["top_k"] == 259
    assert facts(tmp_path / "c")["contents"]["mean_kept_mass"] == pytest.approx(1.0, abs=1e-5)


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_the_base_alone(tiny_model: Path, data: Path, write_rows: WriteRows) -> None:
    prior = write_rows(ROWS["completion"])
    line = ["evaluate", "--model", tiny_model, "--data", data, "--prior", prior]
    found = json.loads(done(*line, "--json").out)
    assert found["prior"]["before"]["num_positions"] == NUM_POSITIONS["completion"]
    assert found["new"]["after"] is None and found["new"]["kl_nats"] is None
    assert found["new"]["before"]["perplexity"] == pytest.approx(np.exp(found["new"]["before"]["ce_nats"]))
    table = done(*line).out
    assert table.splitlines()[0].split("  ")[-1] == "95 % interval of the change"
    assert f"{found['new']['before']['ce_nats']:.3f}" in table


def test_evaluate_an_adapter(tiny_model: Path, data: Path, trained: Path, write_rows: WriteRows) -> None:
    prior = write_rows(ROWS["completion"])
    line = ["evaluate", "--model", tiny_model, "--adapter", trained, "--data", data, "--prior", prior]
    outcome = done(*line, "--json")
    found = json.loads(outcome.out)
    assert found["new"]["after"]["ce_nats"] < found["new"]["before"]["ce_nats"]  # it was trained on these rows
    assert found["new"]["kl_nats"] > 0 and found["prior"]["kl_nats"] > 0
    assert outcome.err == ""
    base = json.loads(done(*line[:3], *line[5:], "--json").out)
    assert base["new"]["before"] == found["new"]["before"]  # the adapter does not touch "before"
    assert "KL(base || adapted)" in done(*line).out


def test_evaluate_tells_what_it_cut(tiny_model: Path, write_rows: WriteRows) -> None:
    data = write_rows([{"text": "abcdefgh"}, {"text": "ab"}])
    outcome = done("evaluate", "--model", tiny_model, "--data", data, "--prior", data, "--max-length", 4, "--json")
    assert outcome.err == "prior: 1 rows were cut to 4 tokens.\nnew: 1 rows were cut to 4 tokens.\n"
    assert json.loads(outcome.out)["new"]["before"]["num_positions"] == 3 + 2


# --- streams ---------------------------------------------------------------------------------------------------------


def test_results_on_stdout_and_notes_on_stderr(
    tmp_path: Path, tiny_model: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the level of file descriptors, so that a library's own output would show."""
    code = (
        "import sys; from logitcache.cli import run; lines = eval(sys.argv[1]);"
        "sys.exit(max(run(line) for line in lines))"
    )
    out = tmp_path / "out"
    evaluate = ["evaluate", "--model", tiny_model, "--adapter", out, "--data", data, "--prior", data]
    lines = [
        precompute_line(tiny_model, data, tmp_path / "c", "--max-length", 30),
        train_line(tiny_model, tmp_path / "c", out, "--max-steps", 1),
        evaluate,
    ]
    plain = [[str(a) for a in line] for line in lines]
    outcome = subprocess.run([sys.executable, "-c", code, repr(plain)], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    cached, trained, *table = outcome.stdout.splitlines()
    assert cached.startswith("Cached ") and trained.startswith("Trained 1 steps ")
    assert len(table) == 2 + 9 + 9 + 2 and table[-1].startswith("Learnt ")
    rows, cut, names, noise = outcome.stderr.splitlines()  # and nothing else: no bar, no advice of a library
    assert names.startswith("The samples are those of the data sets of ")
    assert rows.startswith("12 rows: ") and " were cut " in cut and noise.startswith("Before step 1 ")
    assert "\r" not in outcome.stderr
    assert capfd.readouterr().err == ""


def test_bars_are_shown_at_a_terminal_and_nowhere_else(
    tmp_path: Path, tiny_model: Path, data: Path, cache: Path
) -> None:
    terminal = Terminal()
    line = precompute_line(tiny_model, data, tmp_path / "a")
    shown = logitcache(*line, stderr=terminal)
    assert "precompute: 100%" in shown.err and "tokens" in shown.err
    silent = logitcache(*precompute_line(tiny_model, data, tmp_path / "b"))
    assert silent.err.count("\n") == 1 and "%" not in silent.err
    assert shown.out.replace("/a", "/b") == silent.out
    bar = logitcache(*train_line(tiny_model, cache, tmp_path / "o", "--max-steps", 3), stderr=Terminal()).err
    assert "train: 100%" in bar and "3/3" in bar and "tokens/s=" in bar and "ce=" in bar


# --- --config --------------------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def plan_with(tmp_path: Path, model: Path, data: Path, config: str, *more: object) -> str:
    """What a dry run says whose other settings come from a file."""
    path = write_config(tmp_path, config)
    line = ["precompute", "--config", path, "--model", model, "--data", data, "--cache", tmp_path / "c", "--plan"]
    return done(*line, *more).out


@pytest.mark.parametrize("text", ["top-k: 5", "top_k: 5", "'top-k': '5'", "# c\ntop-k: 5\nstore: arrow\n"])
def test_config_gives_defaults(text: str, tmp_path: Path, tiny_model: Path, data: Path) -> None:
    assert "keeping 5 of 260" in plan_with(tmp_path, tiny_model, data, text)


def test_a_flag_on_the_line_wins(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    assert "keeping 7 of 260" in plan_with(tmp_path, tiny_model, data, "top-k: 5", "--top-k", 7)


def test_an_empty_config_changes_nothing(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    assert "keeping 64 of 260" in plan_with(tmp_path, tiny_model, data, "")


def test_config_can_hold_a_whole_command(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    text = f"model: {tiny_model}\ndata: {data}\ncache: {tmp_path / 'c'}\ntop-k: 3\nstore: arrow\nmax_length: 20\n"
    done("precompute", "--config", write_config(tmp_path, text))
    found = facts(tmp_path / "c")
    assert (found["capture"]["top_k"], found["capture"]["max_length"], found["store"]) == (3, 20, "arrow")


@pytest.mark.parametrize(("value", "shown"), [("true", True), ("1", True), ("false", False), ("no", False)])
def test_config_sets_switches(value: str, shown: bool, tmp_path: Path, cache: Path) -> None:
    out = done("inspect", "--config", write_config(tmp_path, f"json: {value}"), cache).out
    assert out.startswith("{") is shown


def test_config_of_train(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    text = "lr: 1e-3\nweight: 0.5\nmax-steps: 1\nrank: 2\ntarget_modules: q_proj,v_proj\ntail: renormalize\n"
    out = tmp_path / "o"
    done("train", "--config", write_config(tmp_path, text), "--model", tiny_model, "--cache", cache, "--out", out)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["lr"] == 1e-3 and run["settings"]["max_steps"] == 1
    assert run["objective"]["weight"] == 0.5 and run["objective"]["tail"] == "renormalize"
    assert run["adapter"] == {
        "kind": "lora",
        "rank": 2,
        "alpha": 4.0,
        "dropout": 0.0,
        "target_modules": "q_proj,v_proj",
        "modules_to_save": "",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("topk: 5", "'topk'"),
        ("top-k: 5\nlearning_rate: 1", "'learning-rate'"),
        ("config: x", "'config'"),
        ("help: true", "'help'"),
        ("top-k: [5]", "'top-k'"),
        ("top-k: {a: 5}", "'top-k'"),
        ("top-k:", "'top-k'"),
        ("top-k: eight", "'--top-k'"),
        ("top-k: 8.5", "'--top-k'"),
        ("top-k: true", "'--top-k'"),
        ("top-k: -1", "'--top-k'"),
        ("top-k: 5\ntop_k: 6", "once"),
        ("plan: maybe", "'--plan'"),
        ("store: parquet", "'--store'"),
        ("- top-k", "mapping"),
        ("5", "mapping"),
        ("{", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("a: !!python/name:os.system", "is not YAML"),
    ],
)
def test_a_wrong_config_is_2_and_says_what(text: str, named: str, tmp_path: Path, tiny_model: Path, data: Path) -> None:
    path = write_config(tmp_path, text)
    line = ["precompute", "--model", tiny_model, "--data", data, "--cache", tmp_path / "c", "--config", path]
    with unchanged(tmp_path):
        message = refused(2, *line)
    assert named in message


def test_a_config_that_is_no_text_or_not_there_is_2(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert "does not exist" in refused(2, "demo", "--config", path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in refused(2, "demo", "--config", path)
    assert "is a directory" in refused(2, "demo", "--config", tmp_path)


# --- train -----------------------------------------------------------------------------------------------------------


def read_log(out: Path) -> list[dict[str, Any]]:
    return [unsealed(line) for line in (out / "train_log.jsonl").read_bytes().splitlines()]


def read_run(out: Path) -> dict[str, Any]:
    return unsealed((out / "run.json").read_bytes())


def test_train_writes_what_it_promises(trained: Path, tiny_model: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "files.json", "run.json", "run.lock", "README.md"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {*expected, *tokenizer, "train_log.jsonl", "tensorboard"}
    assert (trained / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["base_model_name_or_path"] == str(tiny_model)


def test_the_model_card_is_filled(trained: Path) -> None:
    """All that is known, and no line to fill in; of a local base the last part of its path."""
    card = (trained / "README.md").read_text(encoding="utf-8")
    _, front, page = card.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["base_model"] == "tiny" and "base_model:adapter:tiny" in told["tags"]
    assert page.startswith("\n# lora adapter of tiny\n") and "cross-entropy + 1 times masked-kl to the base's" in page
    assert "| trained | kind lora, rank 4, alpha 8.0," in page and "| data | 12 samples, " in page
    assert f"ce {read_log(trained)[-1]['ce']:.4g}, kl {read_log(trained)[-1]['kl']:.4g} |" in page
    assert "More Information Needed" not in card and str(trained.parent) not in card


def test_run_json_says_what_was_run(trained: Path, cache: Path, tiny_model: Path) -> None:
    run, found = read_run(trained), facts(cache)
    assert run["model"] == {"name": str(tiny_model), **found["model"]}
    assert run["cache"] == {"path": str(cache), "contents": found["contents"]["checksum"]}
    assert run["data"]["num_positions"] == found["contents"]["num_positions"]
    assert len(run["data"]["fingerprint"]) == 32
    assert run["settings"] == {
        "lr": 1e-2,
        "epochs": 1.0,
        "batch_size": 4,
        "grad_accum": 1,
        "seed": 0,
        "max_steps": 10,
        "log_every": 1,
        "top_k": None,
        "batch_tokens": 2048,
        "gradient_checkpointing": False,
    }
    assert run["objective"]["regularizer"] == "masked-kl" and run["objective"]["tail"] == "bucket"
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["transformers"] == transformers.__version__
    assert {"python", "logitcache", "peft", "accelerate"} <= run["versions"].keys()
    assert run["device"] == "cpu" and run["status"] == "finished"
    result = run["result"]
    assert result["num_steps"] == 10 and result["num_tokens"] > 0 and result["peak_memory_bytes"] > 0
    assert abs(result["step_zero"]["kl_nats"]) < result["step_zero"]["tolerance_nats"] < 3e-4  # 1e-5 + (1/64)^2
    assert result["final"] == {k: v for k, v in read_log(trained)[-1].items() if k not in ("step", "epoch")}


def test_an_exact_cache_leaves_the_noise_of_float32_alone(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    precompute(tiny_model, data, tmp_path / "c", "--precision", "exact")
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--max-steps", 1))
    step_zero = read_run(tmp_path / "o")["result"]["step_zero"]
    assert abs(step_zero["kl_nats"]) < 1e-6 and step_zero["tolerance_nats"] == 1e-5
    assert read_log(tmp_path / "o")[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_train_log_has_every_logged_step(trained: Path) -> None:
    log = read_log(trained)
    assert [entry["step"] for entry in log] == list(range(1, 11))
    for entry in log:
        assert set(entry) == {"step", "epoch", "loss", "ce", "kl", "kl_weight", "grad_norm", "learning_rate"}
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-5)
    assert log[0]["kl"] == pytest.approx(0, abs=2.5e-4) and log[-1]["kl"] > 1e-3
    assert log[-1]["ce"] < log[0]["ce"]


def test_log_entries_are_means_over_their_steps(tmp_path: Path, tiny_model: Path, cache: Path, trained: Path) -> None:
    done(*train_line(tiny_model, cache, tmp_path / "o", "--max-steps", 10, "--log-every", 4))
    each, log = read_log(trained), read_log(tmp_path / "o")
    assert [entry["step"] for entry in log] == [1, 4, 8, 10]  # the first and the last step too
    for entry, steps in zip(log, ([1], [2, 3, 4], [5, 6, 7, 8], [9, 10]), strict=True):
        for name in ("loss", "ce", "kl"):
            assert entry[name] == pytest.approx(np.mean([each[s - 1][name] for s in steps]), rel=1e-5, abs=1e-7)


def test_tensorboard_has_ce_and_kl(trained: Path) -> None:
    (file,) = (trained / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/ce", "train/kl", "train/loss"} <= set(tags)
    logged = [(e.step, e.value) for e in events.Scalars("train/ce")]
    assert logged == [(e["step"], pytest.approx(e["ce"], rel=1e-6)) for e in read_log(trained)]


def test_the_adapter_loads_in_peft_and_changes_the_output(trained: Path, tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, trained).eval()
        assert not torch.allclose(adapted(ids).logits, before, atol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, before)


def test_data_of_the_cache_trains_like_the_cache(
    tmp_path: Path, tiny_model: Path, data: Path, cache: Path, write_rows: WriteRows
) -> None:
    out = tmp_path / "o"
    outcome = done(*train_line(tiny_model, cache, out, "--data", data, "--max-steps", 2))
    assert outcome.out.startswith("Trained 2 steps in ") and outcome.out.endswith(f"nats a position): {out}\n")
    assert read_run(out)["data"]["num_samples"] == 12
    part = write_rows(text_rows(12)[3:6])
    done(*train_line(tiny_model, cache, tmp_path / "p", "--data", part, "--max-steps", 1))
    assert read_run(tmp_path / "p")["data"]["num_samples"] == 3


def test_epochs_count_passes_over_the_samples(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    out = done(*train_line(tiny_model, cache, tmp_path / "o", "--epochs", 2, "--grad-accum", 3)).out
    assert out.startswith("Trained 2 steps in ")  # 12 samples, 4 in a micro-batch, 3 of these in a step
    assert read_log(tmp_path / "o")[-1]["step"] == 2


def test_plain_training_needs_data_only(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    line = train_line(tiny_model, None, tmp_path / "o", "--data", data, "--regularizer", "none", "--max-steps", 2)
    outcome = done(*line)
    assert outcome.err == "" and "Trained 2 steps" in outcome.out
    run = read_run(tmp_path / "o")
    assert run["cache"] is None and run["result"]["step_zero"] is None
    assert all(entry["kl"] == 0 for entry in read_log(tmp_path / "o"))


def test_plain_training_can_take_the_samples_of_a_cache(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    done(*train_line(tiny_model, cache, tmp_path / "o", "--regularizer", "none", "--max-steps", 1))
    assert read_run(tmp_path / "o")["data"]["num_samples"] == 12


@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_every_regularizer_runs(regularizer: str, tail: str, tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    more = ["--regularizer", regularizer, "--tail", tail, "--weight", 2, "--max-steps", 3, "--log-every", 1]
    done(*train_line(tiny_model, cache, tmp_path / "o", *more))
    log = read_log(tmp_path / "o")
    assert log[-1]["kl"] > 1e-5 and log[-1]["kl_weight"] == 2
    assert log[-1]["loss"] == pytest.approx(log[-1]["ce"] + 2 * log[-1]["kl"], rel=1e-5)


@pytest.mark.parametrize("regularizer", ["l2-sp", "ewc"])
def test_penalties_on_the_weights_run_without_a_cache(
    regularizer: str, tmp_path: Path, tiny_model: Path, data: Path, cache: Path
) -> None:
    more = ["--regularizer", regularizer, "--weight", 0.5, "--max-steps", 3, "--log-every", 1]
    outcome = done(*train_line(tiny_model, None, tmp_path / "o", "--data", data, *more))
    assert outcome.err == "" and "Trained 3 steps" in outcome.out
    run, log = read_run(tmp_path / "o"), read_log(tmp_path / "o")
    assert run["objective"]["regularizer"] == "none" and run["cache"] is None and run["result"]["step_zero"] is None
    assert run["penalty"] == {"kind": regularizer, "weight": 0.5, "num_fisher_samples": 64}
    assert log[0]["penalty"] == 0 and log[-1]["penalty"] > 0
    for entry in log:
        assert entry["kl"] == 0
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.5 * entry["penalty"], rel=1e-5)
    done(*train_line(tiny_model, cache, tmp_path / "p", *more))  # the samples of a cache, in their order there
    assert read_run(tmp_path / "p")["data"]["num_samples"] == 12
    assert read_log(tmp_path / "p")[-1]["penalty"] > 0


def test_label_smoothing_is_trained_and_logged(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    line = ["--data", data, "--regularizer", "none", "--max-steps", 1]
    found = {}
    for share in (0, 0.1, 0.2):
        done(*train_line(tiny_model, None, tmp_path / str(share), *line, "--label-smoothing", share))
        assert read_run(tmp_path / str(share))["objective"]["label_smoothing"] == share
        found[share] = read_log(tmp_path / str(share))[0]["ce"]
        assert read_log(tmp_path / str(share))[0]["loss"] == found[share]
    even = found[0] + (found[0.2] - found[0]) / 2  # the same untrained model: the loss is linear in the share
    assert found[0.1] == pytest.approx(even, rel=1e-5) and abs(found[0.2] - found[0]) > 1e-3


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--label-smoothing", 0.1], "--label-smoothing goes with --regularizer none, not with masked-kl"),
        (["--label-smoothing", 0.1, "--regularizer", "ewc"], "--label-smoothing goes with --regularizer none"),
        (["--label-smoothing", 1, "--regularizer", "none"], "'--label-smoothing'"),
        (["--kl-budget", 0.1, "--regularizer", "l2-sp"], "--kl-budget needs a KL regularizer; l2-sp has none"),
    ],
)
def test_baselines_that_do_not_go_together_are_2(
    more: list[object], named: str, tmp_path: Path, tiny_model: Path, cache: Path
) -> None:
    assert named in refused(2, *train_line(tiny_model, cache, tmp_path / "o", *more))
    assert not (tmp_path / "o").exists()


def test_the_seed_decides_the_run(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done(*train_line(tiny_model, cache, tmp_path / name, "--max-steps", 1, "--seed", seed))
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_training_reads_the_cache_only(tmp_path: Path, tiny_model: Path, cache: Path, data: Path) -> None:
    with unchanged(cache, tiny_model, data.parent):
        done(*train_line(tiny_model, cache, tmp_path / "o", "--data", data, "--max-steps", 1))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--lr", "nan"], "'--lr'"),
        (["--lr", "-1"], "'--lr'"),
        (["--weight", "inf"], "'--weight'"),
        (["--weight", "-1"], "'--weight'"),
        (["--alpha", "nan"], "'--alpha'"),
        (["--dropout", "2"], "'--dropout'"),
        (["--epochs", "0"], "'--epochs'"),
        (["--epochs", "nan"], "'--epochs'"),
        (["--max-steps", "0"], "--max-steps 0"),
        (["--max-steps", "-2"], "'--max-steps'"),
        (["--seed", "-1"], "'--seed'"),
        (["--seed", str(2**32)], "'--seed'"),
        (["--rank", "0"], "'--rank'"),
        (["--batch-size", "0"], "'--batch-size'"),
        (["--adapter", "nonsense"], "'--adapter'"),
        (["--target-modules", "nonsense"], "'nonsense'"),
        (["--target-modules", ""], "''"),
        (["--max-length", "7"], "--max-length is for --data"),  # it would be ignored
    ],
)
def test_arguments_out_of_range_are_2(
    more: list[str], named: str, tmp_path: Path, tiny_model: Path, cache: Path
) -> None:
    assert named in refused(2, *train_line(tiny_model, cache, tmp_path / "o", *more))
    assert not (tmp_path / "o" / "run.json").exists()


def test_a_regularizer_without_a_cache_is_2(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    assert "needs --cache" in refused(2, *train_line(tiny_model, None, tmp_path / "o", "--data", data))
    for without in ("none", "l2-sp", "ewc"):
        assert "needs --data" in refused(2, *train_line(tiny_model, None, tmp_path / "o", "--regularizer", without))
    assert not (tmp_path / "o").exists()


# --- train --resume --------------------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next training stop as by ctrl-c at the end of this step, before its checkpoint."""
    original = TrainBar.on_step_end

    def on_step_end(self: TrainBar, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(TrainBar, "on_step_end", on_step_end)


def interrupted(monkeypatch: pytest.MonkeyPatch, model: Path, cache: Path, out: Path, step: int) -> list[object]:
    """Train as `trained` was, stopped at a step. Returns the arguments to resume with."""
    line = train_line(model, cache, out, *TEN_STEPS)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert "--resume" in refused(130, *line)
    assert read_run(out)["status"] == "started"
    assert not (out / "adapter_model.safetensors").exists()
    return [*line, "--resume"]


def assert_equal_runs(out: Path, trained: Path) -> None:
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (trained / name).read_bytes()
    assert read_log(out) == read_log(trained)
    run, expected = read_run(out), read_run(trained)
    times = ("seconds", "peak_memory_bytes")
    for result in (run["result"], expected["result"]):
        for time in times:
            del result[time]
    assert run == expected


def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    out = tmp_path / "o"
    line = ["train", "--model", tiny_model, "--cache", cache, "--out", out, "--max-steps", 10, "--log-every", 10]
    message = refused(1, *line, "--lr", 1e38)
    assert "not finite" in message and "checkpoint is kept" in message
    assert not (out / "adapter_model.safetensors").exists()
    kept = list((out / "checkpoints").glob("checkpoint-*"))
    assert kept
    for checkpoint in kept:
        assert all(t.isfinite().all() for t in load_file(checkpoint / "adapter_model.safetensors").values())


@pytest.mark.parametrize("step", [1, 6, 10])
def test_a_resumed_run_is_bitwise_an_uninterrupted_one(
    step: int, tmp_path: Path, tiny_model: Path, cache: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = interrupted(monkeypatch, tiny_model, cache, tmp_path / "o", step)
    checkpoints = sorted((tmp_path / "o" / "checkpoints").glob("*"))
    kept = [f"checkpoint-{number}" for number in range(max(1, step - 2), step)]
    assert [c.name for c in checkpoints] == kept
    said = done(*resume).err
    assert (f"Going on from {kept[-1]}." if kept else "from the beginning") in said
    assert_equal_runs(tmp_path / "o", trained)


@pytest.mark.parametrize("lost", ["all but weights", "trainer_state.json cut short"])
def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(
    lost: str, tmp_path: Path, tiny_model: Path, cache: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    resume = interrupted(monkeypatch, tiny_model, cache, out, 6)

    def cut_short(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name == "trainer_state.json" and lost.startswith("trainer_state"):
                path.write_bytes(path.read_bytes()[:100])
            elif path.name != "adapter_model.safetensors" and lost.startswith("all"):
                path.unlink()

    copy_of(out / "checkpoints" / "checkpoint-5", out / "checkpoints" / "checkpoint-6", cut_short)
    said = done(*resume).err
    assert "checkpoint-6 was left: " in said and "Going on from checkpoint-5." in said
    assert_equal_runs(out, trained)


def test_a_run_can_be_interrupted_more_than_once(
    tmp_path: Path, tiny_model: Path, cache: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = interrupted(monkeypatch, tiny_model, cache, tmp_path / "o", 3)
    for step in (5, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            refused(130, *resume)
    done(*resume)
    assert_equal_runs(tmp_path / "o", trained)


def test_a_log_entry_after_a_resumption_is_a_mean_over_the_steps_since(
    tmp_path: Path, tiny_model: Path, cache: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = train_line(tiny_model, cache, tmp_path / "o", "--max-steps", 10, "--log-every", 5)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        refused(130, *line)
    done(*line, "--resume")
    each, log = read_log(trained), read_log(tmp_path / "o")
    assert [entry["step"] for entry in log] == [1, 5, 10]
    for name in ("loss", "ce", "kl"):
        assert log[1][name] == pytest.approx((each[3][name] + each[4][name]) / 2, rel=1e-5)  # the checkpoint was at 3


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, tiny_model: Path, cache: Path, trained: Path) -> None:
    out = copy_of(trained, tmp_path / "o")
    with unchanged(out):
        outcome = done(*train_line(tiny_model, cache, out, *TEN_STEPS, "--resume"))
    assert "Trained 10 steps" in outcome.out


def test_resume_without_a_run_starts_one(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    done(*train_line(tiny_model, cache, tmp_path / "o", "--max-steps", 1, "--resume"))
    assert read_run(tmp_path / "o")["status"] == "finished"


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--lr", "1e-3"], "settings"),
        (["--max-steps", "11"], "settings"),
        (["--seed", "1"], "settings"),
        (["--rank", "5"], "adapter"),
        (["--weight", "2"], "objective"),
        (["--regularizer", "full-kl"], "objective"),
    ],
)
def test_resume_with_other_arguments_is_4(
    more: list[str], part: str, tmp_path: Path, tiny_model: Path, cache: Path, trained: Path
) -> None:
    out = copy_of(trained, tmp_path / "o")
    line = train_line(tiny_model, cache, out, *TEN_STEPS)
    with unchanged(out):
        assert f"differs in {part} " in refused(4, *line, *more, "--resume")


def test_resume_with_other_data_or_another_cache_is_4(
    tmp_path: Path, tiny_model: Path, cache: Path, trained: Path, write_rows: WriteRows
) -> None:
    out = copy_of(trained, tmp_path / "o")
    more = [*TEN_STEPS, "--resume"]
    part = write_rows(text_rows(12)[2:])
    precompute(tiny_model, part, tmp_path / "c")
    with unchanged(out):
        assert "differs in data " in refused(4, *train_line(tiny_model, cache, out, *more, "--data", part))
        assert "differs in cache, data " in refused(4, *train_line(tiny_model, tmp_path / "c", out, *more))


@pytest.mark.parametrize("content", ["a run", "other files", "a foreign run.json"])
def test_an_output_folder_in_use_is_left_alone(
    content: str, tmp_path: Path, tiny_model: Path, cache: Path, trained: Path
) -> None:
    out = tmp_path / "o"
    if content == "a run":
        copy_of(trained, out)
    else:
        out.mkdir()
        name, text = ("run.json", "[]") if "run.json" in content else ("notes.txt", "mine")
        (out / name).write_text(text, encoding="utf-8")
    with unchanged(out):
        message = refused(1, *train_line(tiny_model, cache, out, "--max-steps", 1))
        assert message.endswith("another --out.")
        if content != "a run":
            refused(1, *train_line(tiny_model, cache, out, "--max-steps", 1, "--resume"))


def test_snapshots_notice_a_change(tmp_path: Path) -> None:
    """The harness itself: a test of 'unchanged' that cannot fail would prove nothing."""
    (tmp_path / "a").write_text("1", encoding="utf-8")
    before = snapshot(tmp_path)
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert snapshot(tmp_path) != before
    with pytest.raises(AssertionError), unchanged(tmp_path):
        (tmp_path / "b").mkdir()
