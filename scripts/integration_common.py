"""What the proofs of the integrations share: a base, rows, the batches of a run, and its losses made again in float64.

    loss of a step = mean CE over its supervised positions + weight * mean masked KL over those that count

Owns the tiny base and its rows, how the batches of another's trainer are kept, the oracle of a step (the formula, from
tests/support/oracles.py, on the logits of base and adapted model in float64, a document at a time), what is asked of a
run, and the rows of docs/benchmarks/integrations.csv. Must not import any framework but transformers and PEFT, nor
`logitcache` beyond its errors: what a framework is told and how it is started is in integration_<framework>.py, which
`scripts/check-integration NAME` runs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "scripts"))

from bench_common import read_csv, write_csv  # noqa: E402
from support.oracles import cross_entropy_oracle, log_softmax, masked_kl_bucket_oracle, record_oracle  # noqa: E402
from support.tiny_model import make_model, make_tokenizer  # noqa: E402

RESULTS = ROOT / "docs" / "benchmarks" / "integrations.csv"
COLUMNS = (
    *("framework", "version", "transformers", "trl", "peft", "torch", "layout", "steps"),
    *("loss", "oracle", "worst_difference", "note"),
)
LARGEST_DIFFERENCE = 1e-5
"""Nats that a logged loss may be from the oracle's."""

TOP_K = 32
"""Alternatives that the caches of the proofs keep, in float32 (precision exact); the base has 260 tokens."""

MIN_BASE_REST = 1e-4
"""Positions where the base leaves less beside the true token have no KL: the default of the objective."""

IGNORED = -100
Batch = dict[str, torch.Tensor]
Document = tuple[np.ndarray, np.ndarray]
"""Token ids [T] and labels [T], unshifted."""


def make_base(folder: Path) -> Path:
    """A random Llama of 260 tokens in float32 and a byte-level tokenizer with a chat template, saved."""
    make_model(seed=0, max_position_embeddings=512).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def chat_rows(count: int) -> list[dict[str, Any]]:
    """`messages` of different lengths: a question and its answer."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} times {i + 1}?"},
                {"role": "assistant", "content": f"{i * (i + 1)}." + " So it is." * (i % 4)},
            ]
        }
        for i in range(count)
    ]


def instruction_rows(count: int) -> list[dict[str, str]]:
    """The same as `instruction`, `input` and `output`."""
    turns = [[turn["content"] for turn in row["messages"]] for row in chat_rows(count)]
    return [{"instruction": asked, "input": "", "output": answered} for asked, answered in turns]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A line for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Recorder:
    """The batches of every optimizer step of a trainer, as they reach its loss.

    attach: once the trainer is made, before it trains. What it keeps are the tensors of the trainer's own collator.
    """

    NAMES = ("input_ids", "labels", "attention_mask", "position_ids")

    def __init__(self) -> None:
        #: By the number of the step, from 1.
        self.batches: dict[int, list[Batch]] = defaultdict(list)
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Keep what this trainer's `compute_loss` is given in training, and let it do its work."""
        self.trainer, inner = trainer, trainer.compute_loss

        def kept(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                batch = {name: inputs[name].clone() for name in self.NAMES if inputs.get(name) is not None}
                self.batches[trainer.state.global_step + 1].append(batch)
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = kept

    @contextmanager
    def watching(self, integration: Any) -> Iterator[None]:
        """Inside, what this module of logitcache.integrations makes in `trainer_class` is attached when it trains."""
        recorder, made = self, integration.trainer_class

        def trainer_class(block: Any) -> type[Any]:
            class Recorded(made(block)):  # type: ignore[misc]
                def train(self, *args: Any, **kwargs: Any) -> Any:
                    recorder.attach(self)
                    return super().train(*args, **kwargs)

            return Recorded

        integration.trainer_class = trainer_class
        try:
            yield
        finally:
            integration.trainer_class = made


@dataclass(frozen=True)
class Step:
    """A step's loss and its two means, nats."""

    loss: float
    ce: float
    kl: float


def documents(batch: Batch) -> list[Document]:
    """The documents of a batch: between the zeros of `position_ids` where these start again, else what the mask
    shows of each row. Padding beside packed documents is a document whose labels count nowhere."""
    found = []
    for i, ids in enumerate(batch["input_ids"]):
        labels, positions, mask = batch["labels"][i], batch.get("position_ids"), batch.get("attention_mask")
        shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[i] > 0
        ids, labels = ids[shown], labels[shown]
        starts = [0] if positions is None else sorted({0, *(positions[i][shown] == 0).nonzero().flatten().tolist()})
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            found.append((ids[start:end].numpy(), labels[start:end].numpy()))
    return [(ids, labels) for ids, labels in found if (labels[1:] != IGNORED).any()]


def oracle_step(base: Path, adapter: Path | None, batches: Sequence[Batch], weight: float) -> Step:
    """A step's loss in float64, by formula: batches of the step, adapter as it was before it (None: untrained)."""
    plain, adapted = _model(base, None), _model(base, adapter)
    ce, kl = [], []
    for ids, labels in (document for batch in batches for document in documents(batch)):
        at = np.flatnonzero(labels[1:] != IGNORED)
        y, b, z = labels[1:][at], _logits(plain, ids)[at], _logits(adapted, ids)[at]
        counts = np.array(
            [1 - np.exp(log_softmax(row)[label]) >= MIN_BASE_REST for row, label in zip(b, y, strict=True)]
        )
        ce += cross_entropy_oracle(z, y)[0].tolist()
        if counts.any():
            record = record_oracle(b[counts], y[counts], TOP_K)
            kl += masked_kl_bucket_oracle(record, z[counts], y[counts])[0].tolist()
    means = float(np.mean(ce)), float(np.mean(kl)) if kl else 0.0
    return Step(means[0] + weight * means[1], *means)


def _model(base: Path, adapter: Path | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.double().eval()


@torch.no_grad()
def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """[T - 1, V] of one document alone: row t predicts token t + 1."""
    logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits
    return np.asarray(logits[0, :-1].numpy())


def logged_steps(log_history: Sequence[Mapping[str, float]]) -> list[Step]:
    """The steps of a run that logs each, from the trainer's `state.log_history`."""
    return [Step(entry["loss"], entry["ce"], entry["kl"]) for entry in log_history if "ce" in entry and "loss" in entry]


def oracle_steps(base: Path, run: Path, recorder: Recorder, weight: float) -> list[Step]:
    """Every step of a run that saved a checkpoint-N after each: step N + 1 is of the adapter in checkpoint-N."""
    return [
        oracle_step(base, run / f"checkpoint-{n - 1}" if n > 1 else None, recorder.batches[n], weight)
        for n in sorted(recorder.batches)
    ]


def worst(ours: Sequence[Step], oracle: Sequence[Step]) -> tuple[Step, Step, float]:
    """The step whose loss, ce or kl is furthest from the oracle's, as both have it, and how far that is."""
    assert ours and len(ours) == len(oracle), (len(ours), len(oracle))
    pairs = [
        (a, b, max(abs(a.loss - b.loss), abs(a.ce - b.ce), abs(a.kl - b.kl))) for a, b in zip(ours, oracle, strict=True)
    ]
    return max(pairs, key=lambda pair: pair[2])


def check_steps(ours: Sequence[Step], oracle: Sequence[Step], steps: int) -> None:
    """Raise AssertionError unless all steps were logged, learn something, and are those of the oracle."""
    assert len(ours) == steps, ours
    assert len({step.loss for step in ours}) == steps and ours[-1].kl > LARGEST_DIFFERENCE, ours
    assert worst(ours, oracle)[2] <= LARGEST_DIFFERENCE, list(zip(ours, oracle, strict=True))


def check_refused(name: str, run: Callable[[], None]) -> None:
    """Raise AssertionError unless a run is refused before it trains, in a sentence that has this option's name."""
    from logitcache import InvalidSettings

    try:
        run()
    except InvalidSettings as error:
        said = str(error)
    else:
        raise AssertionError(f"{name} was not refused")
    assert name in said and "Nothing was trained" in said, said
    print(said)


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache."""
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def row(
    framework: str, package: str, layout: str, ours: Sequence[Step], oracle: Sequence[Step], note: str
) -> dict[str, Any]:
    """A row of the results. package: whose version is the framework's."""
    a, b, difference = worst(ours, oracle)
    return {
        "framework": framework,
        "version": version(package),
        **{name: version(name) for name in ("transformers", "trl", "peft", "torch")},
        "layout": layout,
        "steps": len(ours),
        "loss": f"{a.loss:.8f}",
        "oracle": f"{b.loss:.8f}",
        "worst_difference": f"{difference:.2g}",
        "note": note,
    }


def write_rows(framework: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put a framework's rows in the place of those it had; others' stay."""
    others = [line for line in (read_csv(RESULTS) if RESULTS.is_file() else []) if line["framework"] != framework]
    lines = [{name: line[name] for name in COLUMNS} for line in [*others, *rows]]
    write_csv(sorted(lines, key=lambda line: str(line["framework"])), RESULTS)
