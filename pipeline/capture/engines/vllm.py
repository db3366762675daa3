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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.capture.calibration import Run
from logitcache.capture.pending import PendingRecords
from logitcache.capture.records import Kept, one_hot, record_hidden
from logitcache.capture.settings import EngineSettings
from logitcache.data.batches import moved
from logitcache.data.samples import Sample
from logitcache.errors import EngineFailed, InputNotFound, UnsupportedModel, install_line, release_of
from logitcache.models.checkpoint_head import headed_model
from logitcache.models.device_map import head_device
from logitcache.models.head import OutputHead, check_length, logits_width
from logitcache.models.loading import Source, checkpoint_identity
from logitcache.storage import BaseLogprobs, ModelIdentity
from logitcache.storage.identity import weight_files

from .process import Command, EngineProcess
from .vllm_told import arguments_of, engine_environment, visible_devices

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
        labels = np.concatenate([s.token_ids[s.positions + 1] for s in batch]).astype(np.int64)
        rows, wanted = moved(hidden.to(self.model.dtype), device), moved(torch.from_numpy(labels), device)
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


def start_vllm(
    source: Source,
    identity: ModelIdentity,
    settings: EngineSettings,
    max_length: int,
    batch_tokens: int,
    device: torch.device,
) -> EngineProcess:
    """vLLM with this model, which takes samples of at most max_length tokens.

    device: of `engine_device`. Raises `InputNotFound` where vLLM or so many GPUs are not there, `InvalidSettings` for
    an argument that is set otherwise, `EngineFailed` where it does not start or would run other weights.
    """
    release = vllm_version()
    _check_files(source)
    start = {
        "folder": str(source.folder),
        "dtype": identity.dtype,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "num_gpus": settings.num_gpus,
        "arguments": arguments_of(settings.given),
    }
    environment = engine_environment(os.environ, visible_devices(settings.num_gpus, device))
    process = EngineProcess(Command("vLLM", *PROCESS, start, environment))
    try:
        _check_held(process.facts["quantization"], source, identity)
        if release_of(process.facts["version"]) != release_of(release):
            raise EngineFailed(
                f"starting vLLM: expected version {release} as installed, found that {process.facts['version']} runs. "
                "The cache would not say what made it. Nothing was run. Install one version."
            )
    except BaseException:
        process.close()
        raise
    return process


def vllm_teacher(
    process: EngineProcess,
    model: PreTrainedModel,
    top_k: int,
    token_groups: NDArray[np.uint8] | None = None,
    num_tail_samples: int = 0,
) -> VllmTeacher:
    """A running vLLM as a teacher. model: of `headed_model`; the others: what is kept."""
    device = head_device(model)
    groups = None if token_groups is None else one_hot(torch.from_numpy(token_groups.copy()), device)
    return VllmTeacher(process, model, Kept(top_k, groups, num_tail_samples))


def headed(source: Source, identity: ModelIdentity, device: torch.device, max_length: int) -> PreTrainedModel:
    """The head that goes with a vLLM of this identity, which runs samples of at most max_length tokens.

    Raises `UnsupportedModel` where its frequencies depend on that length (vLLM chooses them once for all samples), or
    where the head makes other logits than the identity says.
    """
    model = headed_model(source, identity.dtype, device)
    check_length(model, max_length)
    if logits_width(model) != identity.vocab_size:
        raise UnsupportedModel(
            f"running {source.name!r} with vLLM: expected {identity.vocab_size} logits by its config.json, found a "
            f"head of {logits_width(model)}. Nothing was run. Use --engine transformers."
        )
    return model


def run_of(
    release: str, identity: ModelIdentity, settings: EngineSettings, max_length: int, device: torch.device
) -> Run:
    """vLLM as a calibration and a cache compare it: what it is told that its numbers may depend on comes with it."""
    told = (f"device={device.type}", f"max_model_len={max_length}", f"tensor_parallel_size={settings.num_gpus}")
    return Run("vllm", release, identity, (*told, *settings.given))


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
