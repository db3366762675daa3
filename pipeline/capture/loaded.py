"""What a worker of a precompute job loads once: the base as a teacher, whatever runs it, and what its cache is to hold.

Owns which engine that is, and that one which runs by itself is ended. Must not know the work.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from logitcache.capture.engines.vllm import VllmTeacher, vllm_base, vllm_teacher
from logitcache.data.samples import Sample
from logitcache.errors import InvalidSettings
from logitcache.models.device_map import head_device
from logitcache.models.head import check_head
from logitcache.models.loading import (
    Base,
    Source,
    checkpoint_identity,
    find_model,
    load_as,
    load_tokenizer,
)
from logitcache.models.tensor_parallel import Leading, agreed, follow, is_divided, leads
from logitcache.storage import BaseLogprobs

from .cache_spec import CacheSpec, cache_spec
from .calibration import check_calibration
from .settings import Engine, JobSpec
from .teacher import Teacher, teacher_of
from .vocab_groups import groups_for
from .windows import SampleRows

TRANSFORMERS: Engine = "transformers"
VLLM: Engine = "vllm"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")


@dataclass(frozen=True)
class OwnEngine:
    """An engine of one's own, which runs the base: what fills a cache, where neither transformers nor vLLM does.

    The cache says name and version, so that no other engine goes on with it. Nobody has compared it with transformers
    before: `logitcache calibrate --cache` does it after, and training does it before step 1.
    """

    #: Of lower-case letters and digits, as sglang.
    name: str
    version: str
    #: A batch to the records of its samples, in their order: of `records_from_hidden` or `records_from_logits`, with
    #: the top_k of the capture's settings.
    records: Callable[[Sequence[Sample]], list[BaseLogprobs]]

    def __post_init__(self) -> None:
        """Raise `InvalidSettings` for a name that is another engine's, or that no manifest takes."""
        if not _NAME.fullmatch(self.name) or self.name in (TRANSFORMERS, VLLM, "eager", "sdpa"):
            raise InvalidSettings(
                f"engine {self.name!r}: expected a name of its own, of up to 32 lower-case letters, digits, dots and "
                "dashes. Nothing was run. Give another name."
            )


@dataclass(frozen=True)
class Loaded:
    """What a worker loads once, for any number of shares."""

    tokenizer: PreTrainedTokenizerBase | None
    cache_spec: CacheSpec
    teacher: Teacher
    base: Base | None
    #: The data, where they are in memory; None: the job names them.
    samples: SampleRows | None = None

    @property
    def is_on_gpu(self) -> bool:
        """Whether the records are made there."""
        teacher = self.teacher
        model = teacher.model if isinstance(teacher, VllmTeacher) else self.base.model if self.base else None
        return model is not None and head_device(model).type == "cuda"


def load(
    spec: JobSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: Base | None = None,
    own: OwnEngine | None = None,
) -> Loaded:
    """The base and all that goes with it. tokenizer, base: None are the ones that the job names; own: in place of the
    job's engine.

    Raises what loading raises, and `NotCalibrated`.
    """
    source = find_model(spec.model) if base is None else base.source
    tokenizer = tokenizer or load_tokenizer(source)
    if own is not None:
        return _load_own(spec, source, tokenizer, own)
    if spec.engine == VLLM:
        return _load_vllm(spec, source, tokenizer)
    base = load_as(source, spec.loading) if base is None else base
    check_head(base.model)
    groups = agreed(groups_for(base, spec.settings, spec.cache))
    kept = cache_spec(source.name, base.identity, tokenizer, spec.settings, groups)
    return Loaded(tokenizer, kept, teacher_of(base, kept), base)


@contextmanager
def one_worker(loaded: Loaded) -> Iterator[Loaded | None]:
    """With a model that is divided over processes: what the leader works with, and None, after all of the work, on the
    others, which follow its forwards. Otherwise what was loaded; an engine that runs by itself is ended after it."""
    if not is_divided():
        try:
            yield loaded
        finally:
            if isinstance(loaded.teacher, VllmTeacher):
                loaded.teacher.close()
    elif not leads():
        follow(loaded.teacher)
        yield None
    else:
        leading = Leading(loaded.teacher)
        try:
            yield replace(loaded, teacher=leading)
        finally:
            leading.release()


def _load_vllm(spec: JobSpec, source: Source, tokenizer: PreTrainedTokenizerBase | None) -> Loaded:
    settings, held = spec.settings, spec.loading
    vllm = vllm_base(source, held.dtype, held.device, spec.running, settings.max_length, settings.batch_tokens)
    check_calibration(Path(spec.calibration), vllm.run)
    head = vllm.head()
    groups = groups_for(Base(source, head, vllm.identity), settings, spec.cache)
    kept = cache_spec(source.name, vllm.identity, tokenizer, settings, groups, engine=(VLLM, vllm.release))
    process = vllm.start()
    try:
        teacher = vllm_teacher(process, head, settings.top_k, groups, settings.tail_samples)
    except BaseException:
        process.close()
        raise
    return Loaded(tokenizer, kept, teacher, None)


def _load_own(spec: JobSpec, source: Source, tokenizer: PreTrainedTokenizerBase | None, own: OwnEngine) -> Loaded:
    settings = spec.settings
    if settings.tail_groups:
        raise InvalidSettings(
            f"capturing --tail-groups {settings.tail_groups} by {own.name}: whether its records have the groups of the "
            "cache cannot be seen. Nothing was run. Leave tail_groups out."
        )
    identity = checkpoint_identity(source, spec.loading.dtype, own.name)
    kept = cache_spec(source.name, identity, tokenizer, settings, engine=(own.name, own.version))
    return Loaded(tokenizer, kept, own.records, None)
