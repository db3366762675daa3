"""What a cache belongs to: content hashes of samples, weights and tokenizers, and the capture settings.

Identity is content, never a path, an ordinal or a time. Owns the hashes; must not import torch.
Trade-off: weights are hashed in full (about 1 GB/s a core), so that a renamed or re-sharded copy is the same model.
"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COSMETIC_CONFIG_KEYS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"})
_MAX_HEADER_BYTES = 100 * 2**20


def sample_id(token_ids: NDArray[np.uint32]) -> bytes:
    """128-bit BLAKE2b of the token ids as little-endian uint32: the address of a sample."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids, dtype="<u4").tobytes(), digest_size=16).digest()


def digest(data: bytes) -> str:
    """128-bit BLAKE2b as 32 hexadecimal digits: the checksum of files and the fingerprint of meanings."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_json(value: object) -> str:
    """`digest` of the canonical JSON of a value (sorted keys, no spaces)."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


@dataclass(frozen=True)
class ModelIdentity:
    """Which distributions the cache holds."""

    #: Fingerprint of the tensors.
    weights: str
    #: Fingerprint of config.json.
    config: str
    #: Width of the logits (V), which may differ from the tokenizer's.
    vocab_size: int
    #: How the base was run: equal within a cache, free in training.
    dtype: str
    #: How the base was run: equal within a cache, free in training.
    attention: str
    #: In which format its linear layers were held, 8bit, 4bit or the method that a checkpoint names ("": as its dtype
    #: says). Equal within a cache, and in training unless another is asked for.
    quantization: str = ""


@dataclass(frozen=True)
class TokenizerIdentity:
    """How text became token ids: the tokenizer itself and its chat template."""

    fingerprint: str
    chat_template: str


@dataclass(frozen=True)
class CaptureIdentity:
    """What was kept of each distribution."""

    #: K, alternatives at most (0: label and tail alone).
    top_k: int
    #: Samples are cut at this many tokens.
    max_length: int
    #: A row keeps the fewest alternatives that hold this share of the non-target mass (1: always K).
    min_mass: float = 1.0
    #: exact, fine or compact.
    precision: str = "exact"
    #: Of an alternative's log-probability against what the base said, in nats.
    max_error: float = 0.0
    #: G, parts the tail is split into (0: not split).
    num_tail_groups: int = 0
    #: `digest` of the group of each token, "" without groups.
    tail_partition: str = ""
    #: What the groups' shares of the tail are rounded to a nat, at any precision but exact (0: no groups).
    group_steps_per_nat: int = 0
    #: M, draws from the tail that a row keeps (0: none).
    num_tail_samples: int = 0
    #: The tail is 1 minus the rest of the row, from an engine that returns nothing else of it, and not a sum of its
    #: own.
    tail_from_remainder: bool = False


def weights_fingerprint(folder: Path) -> str:
    """Fingerprint of every tensor of the checkpoint in this folder: name, dtype, shape, bytes; not of the sharding.

    The files are those transformers loads: model.safetensors, else the ones of model.safetensors.index.json.
    Raises FileNotFoundError where one is missing, ValueError where one is not safetensors.
    """
    jobs = [(file, name, meta, start) for file in weight_files(folder) for name, meta, start in _tensors(file)]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_tensor_digest, jobs)
        entries = sorted(zip([job[1] for job in jobs], digests, strict=True))
    return digest_json(entries)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name. Raises FileNotFoundError where there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise FileNotFoundError(f"neither model.safetensors nor model.safetensors.index.json is in {folder}")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / name for name in names]


def config_fingerprint(folder: Path) -> str:
    """Fingerprint of config.json without the keys that do not change what the model computes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return digest_json({k: v for k, v in config.items() if k not in _COSMETIC_CONFIG_KEYS})


def _tensors(file: Path) -> list[tuple[str, dict[str, Any], int]]:
    with file.open("rb") as f:
        prefix = f.read(8)
        (size,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 2 <= size <= min(_MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise ValueError(f"{file} is not a safetensors file, or is cut short")
        header = json.loads(f.read(size))
    end = max((meta["data_offsets"][1] for name, meta in header.items() if name != "__metadata__"), default=0)
    if file.stat().st_size != 8 + size + end:
        raise ValueError(f"{file} is cut short: expected {8 + size + end} bytes, found {file.stat().st_size}")
    return [(name, meta, 8 + size) for name, meta in header.items() if name != "__metadata__"]


def _tensor_digest(job: tuple[Path, str, dict[str, Any], int]) -> str:
    file, _, meta, start = job
    begin, end = meta["data_offsets"]
    state = hashlib.blake2b(f"{meta['dtype']}{meta['shape']}".encode(), digest_size=16)
    with file.open("rb") as f:
        f.seek(start + begin)
        remaining = end - begin
        while remaining:
            block = f.read(min(remaining, 1 << 24))
            if not block:
                raise ValueError(f"{file} is cut short")
            state.update(block)
            remaining -= len(block)
    return state.hexdigest()
