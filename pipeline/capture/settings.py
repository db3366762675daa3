"""What is kept of the base's predictions, and what a job is that keeps them, in plain values without torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from logitcache.data.settings import DataSettings
from logitcache.errors import InvalidSettings
from logitcache.models.settings import LoadSettings
from logitcache.settings import Settings, option, required
from logitcache.storage.data_sets import name_of

Store = Literal["zarr", "arrow"]
Precision = Literal["exact", "fine", "compact"]
Engine = Literal["transformers", "vllm"]

GROUP_STEPS = (1.0, 0.25)
"""Nats that the tail groups of a cache may be rounded to."""

ROWS, CUT, WORKERS = DataSettings.heading, "How the work is cut", "Engine and workers"
"""Headings of the help."""

MANY_ALTERNATIVES = 1024
"""More of them than this and a cache is mostly of tokens that the base rules out."""


@dataclass(frozen=True)
class CaptureSettings(Settings):
    """What a cache keeps of each position, and how the work is cut."""

    heading: ClassVar[str] = "What the cache keeps"

    top_k: int = option(
        64, "Alternatives to keep a position; 0: the true token's log-probability alone, with the tail.", at_least=0
    )
    max_length: int = option(
        1024,
        "Tokens a sample; longer ones are cut at the end, counted and reported.",
        at_least=2,
        heading=ROWS,
    )
    batch_tokens: int = option(
        8192,
        "Tokens in one forward of the base, padding included. Lower it if memory runs out.",
        at_least=1,
        heading=CUT,
    )
    shard_positions: int = option(
        32_768, "Positions a shard: what an interruption can lose at most.", at_least=1, heading=CUT
    )
    store: Store = option("zarr", "File layout of the shards.")
    precision: Precision = option("fine", "Maximum error of a stored log-probability: 0 (float32), 1/64 or 1/32 nat.")
    min_mass: float = option(
        1.0,
        "Keep the fewest alternatives that hold this share of the non-target mass, --top-k at most.",
        above=0,
        at_most=1,
    )
    tail_groups: int = option(
        0,
        "Groups of the vocabulary to split the mass beyond the alternatives over; 0: keep it as one.",
        at_least=0,
        at_most=256,
    )
    tail_group_step: float = option(
        1.0, "Nats that the groups' shares of the tail are rounded to, 1 or 0.25, unless --precision is exact.", above=0
    )
    tail_samples: int = option(
        0,
        "Draw this many tokens from beyond the alternatives (train --tail sampled).",
        at_least=0,
        at_most=4096,
    )

    kl_positions: Literal["supervised", "all"] = option(
        "supervised",
        "Capture the supervised positions, or all of each sample that has some, for train --kl-positions all.",
    )

    def check_together(self) -> None:
        """Raise `InvalidSettings` for a tail that cannot be kept so."""
        if self.tail_groups == 1:
            raise InvalidSettings("--tail-groups 1 is the whole tail, which is always kept: give 2 or more, or 0.")
        if self.tail_group_step not in GROUP_STEPS:
            raise InvalidSettings(f"--tail-group-step {self.tail_group_step:g}: a cache has steps of 1 or 0.25 nat.")
        if self.tail_group_step != 1 and not self.tail_groups:
            raise InvalidSettings("--tail-group-step without --tail-groups: there is nothing to round. Leave it out.")
        if not self.top_k and self.min_mass < 1:
            raise InvalidSettings("--min-mass with --top-k 0: there are no alternatives to keep of. Leave it out.")
        if self.tail_samples and self.min_mass < 1:
            raise InvalidSettings(
                "--tail-samples with --min-mass: the draws are from beyond all --top-k. Leave one out."
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidSettings` for more alternatives or groups than there are tokens beside the label."""
        most = vocab_size - 1
        if self.top_k > most:
            raise InvalidSettings(
                f"capturing --top-k {self.top_k:,}: expected at most {most:,}, all but one of the model's "
                f"{vocab_size:,} tokens. Nothing was captured. Use --top-k {most}, or less."
            )
        if self.tail_groups and self.top_k == most:
            raise InvalidSettings(
                f"capturing --tail-groups {self.tail_groups} with --top-k {self.top_k:,}: these are all alternatives, "
                "and no tail is left to split. Nothing was captured. Leave --tail-groups out."
            )
        if self.tail_groups > vocab_size:
            raise InvalidSettings(
                f"capturing --tail-groups {self.tail_groups}: expected at most {vocab_size}, one a token of the model. "
                f"Nothing was captured. Use --tail-groups {vocab_size}, or less."
            )

    def doubts(self) -> list[str]:
        """A cache that is larger than what it says is worth."""
        if self.top_k <= MANY_ALTERNATIVES:
            return []
        return [
            f"--top-k {self.top_k:,} is more than {MANY_ALTERNATIVES:,}: the cache grows with it, and what lies beyond "
            "is kept as the tail anyway."
        ]


@dataclass(frozen=True)
class EngineSettings(Settings):
    """How vLLM runs the base."""

    heading: ClassVar[str] = WORKERS

    arguments: tuple[str, ...] | None = option(
        None,
        "An argument of vLLM's own, as gpu_memory_utilization=0.7; again for more.",
        flag="engine_arg",
        metavar="NAME=VALUE",
    )
    num_gpus: int = option(1, "GPUs that hold one copy of the model.", at_least=1, on_line=False)

    @property
    def given(self) -> tuple[str, ...]:
        """The arguments, in an order that says nothing."""
        return tuple(sorted(self.arguments or ()))


@dataclass(frozen=True)
class JobSpec(Settings):
    """What a precompute job is, in plain values that any process can be told."""

    heading: ClassVar[str] = "Model, data and cache"

    model: str = required("Base model: a local folder or a hub id.", metavar="M")
    data: tuple[str, ...] = required(
        "JSONL or Parquet file, a folder or a URL of them, or a hub data set id; again for more.", metavar="D"
    )
    cache: str = required("Cache to fill: a folder, or a URL such as s3://b/c.", metavar="DIR")
    #: What is kept of each position, and how the work is cut.
    settings: CaptureSettings = field(default_factory=CaptureSettings)
    #: How the base is held.
    loading: LoadSettings = field(default_factory=LoadSettings)
    #: How the rows are found, read and rendered.
    how: DataSettings = field(default_factory=DataSettings)
    #: How vLLM runs it, where that is the engine.
    running: EngineSettings = field(default_factory=EngineSettings)
    window_rows: int = option(
        16_384, "Rows that are held, sorted by length and cut into shards together.", at_least=1, heading=CUT
    )
    engine: Engine = option(
        "transformers",
        "What runs the base: transformers; vLLM (with --calibration); or either, the same way, in Ray's workers.",
        heading=WORKERS,
    )
    calibration: str = option("", "What `logitcache calibrate` wrote of vLLM.", metavar="FILE", heading=WORKERS)
    data_name: str = option(
        "",
        "Name of the data set in the cache; the same name again replaces what was there.  [default: --data as given]",
        metavar="NAME",
    )
    samples_from: str = option("", "Another cache of the same base: copy what it has already.", metavar="DIR")

    @property
    def name(self) -> str:
        """What the data set is called in the cache; another split of the same data is another data set."""
        part = ", ".join(filter(None, (self.how.config_name, self.how.split)))
        return name_of(self.data_name or " + ".join(self.data) + (f" ({part})" if part else ""))

    def check_together(self) -> None:
        """Raise `InvalidSettings` for what the engine does not have."""
        if (self.engine == "vllm") != bool(self.calibration):
            raise InvalidSettings("vLLM and --calibration go together: run `logitcache calibrate` first.")
        held = self.loading
        if self.engine == "vllm" and (held.load_in or held.device_map or held.tensor_parallel):
            raise InvalidSettings("--load-in and --device-map are of transformers, not of vLLM.")
        if self.engine != "vllm" and self.running != EngineSettings():
            raise InvalidSettings("--engine-arg is for vLLM. Leave it out.")


@dataclass(frozen=True)
class AgainstSettings(Settings):
    """How much of a cache is captured again to hold it against its model."""

    heading: ClassVar[str] = "Against the model"

    num_positions: int = option(
        4096, "With --against-model: positions to capture again, or a few more; all, where there are fewer.", at_least=1
    )
    batch_tokens: int = option(
        8192, "With --against-model: tokens in one forward, padding included. Lower it if memory runs out.", at_least=1
    )
