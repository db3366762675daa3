"""vLLM as the base -> `BaseLogprobs`: it runs the body, and the record is made here, by the checkpoint's own head.

Owns what vLLM is asked for and on which devices, and that its weights are held as the cache will say. vLLM itself is
imported in its own process only (`vllm_engine`). Must not know caches. Shapes: N positions, D hidden, V vocabulary.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.capture.calibration import Run
from logitcache.capture.pending import PendingRecords
from logitcache.capture.records import Kept, one_hot, record_hidden
from logitcache.capture.settings import EngineSettings
from logitcache.data.batches import label_ids, moved
from logitcache.data.samples import Sample
from logitcache.errors import EngineFailed, InputNotFound, UnsupportedModel, install_line, release_of
from logitcache.models.checkpoint_head import headed_model
from logitcache.models.device_map import head_device
from logitcache.models.head import OutputHead, check_length, logits_width
from logitcache.models.loading import Source, checkpoint_identity
from logitcache.storage import BaseLogprobs, ModelIdentity
from logitcache.storage.identity import weight_files

from .process import Command, EngineProcess
from .vllm_told import arguments_of, engine_device, engine_environment, visible_devices

ATTENTION = "vllm"
"""`model.attention` of what this engine captures: never continued by another one."""

PROCESS = (f"{__package__}.vllm_engine", "main")
"""Module and function of its process."""

NUM_AHEAD = 4
"""Batches that it is given before the records of the first are made, so that it never waits for them."""


@dataclass(frozen=True)
class VllmTeacher:
    """Records by a running vLLM. model: without weights but for the head, which lies where records are made."""

    process: EngineProcess
    model: PreTrainedModel
    kept: Kept
    num_ahead: int = NUM_AHEAD

    def __call__(self, batch: Sequence[Sample]) -> list[BaseLogprobs]:
        """The record of every supervised position of each sample. Raises `EngineFailed` and `NonFiniteLogits`."""
        return self.launch(batch).records()

    def launch(self, batch: Sequence[Sample]) -> "_Launched":
        """What gives the same, while vLLM is at it."""
        launched = _Launched(self, batch, self.process.ask(batch))
        weakref.finalize(launched, self.process.forget, launched.numbers)
        return launched

    def record(self, batch: Sequence[Sample], hidden: Tensor) -> PendingRecords:
        """Of hidden states [N, D] in main memory."""
        device = head_device(self.model)
        rows, wanted = moved(hidden.to(self.model.dtype), device), moved(torch.from_numpy(label_ids(batch)), device)
        return record_hidden(rows, wanted, OutputHead(self.model), logits_width(self.model), batch, self.kept)

    def close(self) -> None:
        """End vLLM."""
        self.process.close()


@dataclass(frozen=True)
class _Launched:
    teacher: VllmTeacher
    batch: Sequence[Sample]
    numbers: list[int]

    def records(self) -> list[BaseLogprobs]:
        """Made here, of what vLLM answers."""
        return self.teacher.record(self.batch, self.teacher.process.fetch(self.numbers)).records()


def vllm_identity(source: Source, dtype: str) -> ModelIdentity:
    """Which distributions vLLM will give: the files' fingerprints and the format that they are quantised in (it is not
    told to quantise), the dtype it is told to use, and no other's attention. dtype: auto is that of the checkpoint
    (vLLM's own would turn float32 into 16 bits)."""
    return checkpoint_identity(source, dtype, ATTENTION)


def vllm_version() -> str:
    """Of the installed vLLM, whatever its distribution is called. Raises `InputNotFound` where there is none."""
    if find_spec("vllm") is not None:
        for name in packages_distributions().get("vllm", []):
            return version(name)
    raise InputNotFound(
        f"running the base with vLLM: it is not installed. Install it by `{install_line('vllm')}`, or use "
        "--engine transformers."
    )


@dataclass(frozen=True)
class VllmBase:
    """A checkpoint as vLLM runs it: all that a calibration compares, and all that its process is told."""

    source: Source
    identity: ModelIdentity
    #: Of vLLM.
    release: str
    settings: EngineSettings
    #: Tokens of the longest sample.
    max_length: int
    #: Tokens of a forward.
    batch_tokens: int
    #: Where records are made: the first of the GPUs that vLLM has, or the CPU.
    device: torch.device

    @property
    def run(self) -> Run:
        """As a calibration and a cache compare it: what it is told that its numbers may depend on comes with it."""
        gpus = f"tensor_parallel_size={self.settings.num_gpus}"
        told = (f"device={self.device.type}", f"max_model_len={self.max_length}", gpus)
        return Run("vllm", self.release, self.identity, (*told, *self.settings.given))

    def head(self) -> PreTrainedModel:
        """The head that goes with it, on the device.

        Raises `UnsupportedModel` where the model's frequencies depend on the longest sample (vLLM chooses them once for
        all), or where the head makes other logits than the identity says.
        """
        model = headed_model(self.source, self.identity.dtype, self.device)
        check_length(model, self.max_length)
        if logits_width(model) != self.identity.vocab_size:
            raise UnsupportedModel(
                f"running {self.source.name!r} with vLLM: expected {self.identity.vocab_size} logits by its "
                f"config.json, found a head of {logits_width(model)}. Nothing was run. Use --engine transformers."
            )
        return model

    def start(self) -> EngineProcess:
        """It, running. Raises `InputNotFound` where so many GPUs are not there, `InvalidSettings` for an argument that
        is set otherwise, `EngineFailed` where it does not start or would run other weights."""
        _check_files(self.source)
        start = {
            "folder": str(self.source.folder),
            "dtype": self.identity.dtype,
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "num_gpus": self.settings.num_gpus,
            "arguments": arguments_of(self.settings.given),
        }
        environment = engine_environment(os.environ, visible_devices(self.settings.num_gpus, self.device))
        process = EngineProcess(Command("vLLM", *PROCESS, start, environment))
        try:
            self._check(process.facts)
        except BaseException:
            process.close()
            raise
        return process

    def _check(self, facts: dict[str, Any]) -> None:
        """Raise `EngineFailed` where what runs is not what the cache will say."""
        _check_held(facts["quantization"], self.source, self.identity)
        if release_of(facts["version"]) != release_of(self.release):
            raise EngineFailed(
                f"starting vLLM: expected version {self.release} as installed, found that {facts['version']} runs. "
                "The cache would not say what made it. Nothing was run. Install one version."
            )


def vllm_base(
    source: Source, dtype: str, device: str, settings: EngineSettings, max_length: int, batch_tokens: int
) -> VllmBase:
    """A checkpoint as vLLM will run it here. dtype: as of `vllm_identity`; device: as of `pick_device`. Raises
    `InputNotFound` where there is no vLLM, and what reading the checkpoint raises."""
    release, where = vllm_version(), engine_device(device, settings.num_gpus)
    return VllmBase(source, vllm_identity(source, dtype), release, settings, max_length, batch_tokens, where)


def vllm_teacher(
    process: EngineProcess,
    model: PreTrainedModel,
    top_k: int,
    token_groups: NDArray[np.uint8] | None = None,
    num_tail_samples: int = 0,
) -> VllmTeacher:
    """A running vLLM as a teacher. model: of `VllmBase.head`; the others: what is kept."""
    device = head_device(model)
    groups = None if token_groups is None else one_hot(torch.from_numpy(token_groups.copy()), device)
    return VllmTeacher(process, model, Kept(top_k, groups, num_tail_samples))


def _check_files(source: Source) -> None:
    """Raise `EngineFailed` where vLLM would load other weights than the ones that are fingerprinted."""
    counted = {file.name for file in weight_files(source.folder)}
    others = sorted(file.name for file in source.folder.glob("*.safetensors") if file.name not in counted)
    if others and len(counted) == 1:  # with an index it reads what that names
        raise EngineFailed(
            f"starting vLLM on {source.name!r}: expected the weights in {', '.join(counted)} alone, found "
            f"{', '.join(others)} beside it, which vLLM would load too. Nothing was run. Move it away, or use --engine "
            "transformers."
        )


def _check_held(found: str, source: Source, identity: ModelIdentity) -> None:
    """Raise `EngineFailed` where vLLM holds quantised weights otherwise than the identity says.

    It names its kernels, gptq_marlin for gptq, so that only whether it holds any is compared.
    """
    if bool(found) != bool(identity.quantization):
        raise EngineFailed(
            f"starting vLLM on {source.name!r}: expected {identity.quantization or 'unquantised'} weights by its "
            f"config.json, found that vLLM holds {found or 'unquantised'} ones. The cache would not say what it is of. "
            "Nothing was run. Use --engine transformers."
        )
