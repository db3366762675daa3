"""A base, data and training with any tail, the demo's or given ones: what study_tails.py and study_frontier.py share.

Owns where these are kept between runs, and the first two of the tails that are compared. Measures nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers.utils import logging

from logitcache.adapters.attach import AdapterSettings
from logitcache.capture.cache_spec import cache_spec
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, distinct, make_samples
from logitcache.demo.run import DemoSettings, write_data
from logitcache.evaluation.compare import load_adapter
from logitcache.losses.formulas import Objective, Regularizer, Tail
from logitcache.models.loading import Base, Source, load_base, load_tokenizer
from logitcache.storage import LogitCache
from logitcache.storage.encoding import columns_of
from logitcache.storage.statistics import describe
from logitcache.training.run import TrainSettings, train

WORK = Path(tempfile.gettempdir()) / "logitcache-study-tails"
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Arm:
    """A tail that is trained with, and the cache it needs; top_k 0: every other token."""

    name: str
    top_k: int = 64
    tail: Tail = "bucket"
    tail_groups: int = 0
    tail_samples: int = 0
    regularizer: Regularizer = "masked-kl"
    precision: str = "fine"


PLAIN = Arm("plain CE", regularizer="none")
REFERENCE = Arm("bucket k=64")


class Material:
    """A base, what is new to it, and training on it. settings: steps, batches, lengths; work: where all is kept."""

    lr = LEARNING_RATE

    def __init__(self, source: Source, work: Path, settings: DemoSettings) -> None:
        self.source, self.work, self.settings = source, work, settings
        self.tokenizer = load_tokenizer(self.source)
        self.untouched = self.load()
        self.partitions: dict[tuple[int, str], NDArray[np.uint8]] = {}
        self.train_set: list[Sample] = []
        self.new: list[Sample] = []

    def fill(
        self, path: Path, samples: Sequence[Sample], job: CaptureSettings, groups: NDArray[np.uint8] | None = None
    ) -> LogitCache:
        """A cache as `logitcache precompute` makes it. groups: uint8 [V], a partition that is not the base's own."""
        if groups is not None:  # the cache that is begun with it keeps it
            cache_spec(self.source.name, self.untouched.identity, self.tokenizer, job, groups).writer(path).close()
        precompute(self.untouched, samples, path, job)
        return LogitCache.open(path)

    def cache(self, arm: Arm) -> LogitCache | None:
        """What the arm is trained with, made once."""
        if arm.regularizer == "none":
            return None
        k = arm.top_k or self.untouched.identity.vocab_size - 1
        rows = 32_768 if arm.top_k else 2_048  # a shard is made in memory
        job = CaptureSettings(k, self.settings.max_length, shard_positions=rows, precision=arm.precision)
        job = replace(job, tail_groups=arm.tail_groups, tail_samples=arm.tail_samples)
        name = f"cache-{self.settings.max_steps}-k{k}-g{arm.tail_groups}-m{arm.tail_samples}-{arm.precision}"
        return self.fill(self.work / name, self.train_set, job)

    def train(
        self, arm: Arm, cache: LogitCache | None, weight: float, seed: int, folder: Path
    ) -> tuple[PeftModel, float]:
        """The adapted model and the seconds its training took; a finished run is only loaded."""
        rank, steps = self.settings.rank, self.settings.max_steps
        adapter = AdapterSettings(rank=rank)
        objective = Objective(
            regularizer=arm.regularizer, tail=arm.tail, weight=1.0 if arm.regularizer == "none" else weight
        )
        settings = TrainSettings(lr=self.lr, batch_size=self.settings.batch_size, max_steps=steps, seed=seed)
        report = train(self.load(), self.train_set, cache, folder, adapter, objective, settings, resume=True)
        return load_adapter(self.load().model, str(folder)), report.seconds

    def load(self) -> Base:
        """Loaded anew: an adapter changes the model it is attached to."""
        return load_base(self.source, "float32", torch.device("cpu"))

    def samples(self, path: Path) -> list[Sample]:
        """Of the rows of a file."""
        vocab_size = self.untouched.identity.vocab_size
        return make_samples(read_rows(str(path)), self.tokenizer, self.settings.max_length, vocab_size).samples


class Demo(Material):
    """The demo's base and data; max_steps decides how much there is to train on."""

    def __init__(self, folder: Path, work: Path, settings: DemoSettings) -> None:
        super().__init__(Source("demo base", folder), work, settings)
        data = work / f"data-{settings.max_steps}-{settings.num_held_out}"
        if not data.exists():
            write_data(data.with_suffix(".new"), self.settings)
            data.with_suffix(".new").rename(data)
        self.train_set, self.new, self.prior = (
            self.samples(data / f"{name}.jsonl") for name in ("new_train", "new_heldout", "prior_heldout")
        )


class Given(Material):
    """Another base and rows of the user's: the last fifth of them is held out, the first are trained on."""

    lr = LEARNING_RATE / 2

    def __init__(self, source: Source, rows: Path, work: Path, settings: DemoSettings) -> None:
        super().__init__(source, work / source.name, settings)
        samples = list(distinct(self.samples(rows)))
        wanted, last = settings.max_steps * settings.batch_size, len(samples) * 4 // 5
        self.train_set, self.new = samples[: min(wanted, last)], samples[last:]


def bytes_a_position(cache: LogitCache) -> float:
    """Of the record's columns as they lie on disk, without the sample table."""
    sizes = describe(cache, max_positions=1).bytes_by_column
    return sum(sizes[column.name] for column in columns_of(cache.manifest.capture)) / cache.num_positions


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What both studies take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of training")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for data, models and caches of training")
    parser.add_argument("--out", type=Path, help="the CSV, by default in docs/benchmarks")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--table", action="store_true", help="only print what is in the CSV")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the arguments, and let the libraries be quiet."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    args.work.mkdir(parents=True, exist_ok=True)
    return args
