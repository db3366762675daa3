"""What a cache belongs to: content hashes of samples, weights and tokenizers, the config, and the capture settings.

Identity is content, never a path, an ordinal or a time. Owns the hashes, and how a difference is said; must not import
torch.
Trade-off: weights are hashed in full (about 1 GB/s a core), so that a renamed or re-sharded copy is the same model.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .configs import ConfigDifferences, as_spelt
from .plain_text import SHOWN, one_line

_MAX_HEADER_BYTES = 100 * 2**20
_OUTER = r"(?:(?:model|transformer|language_model|text_model|text_decoder|decoder|backbone)\.)*"
_HEAD = re.compile(
    _OUTER + r"(?:lm_head|lm_head\.(?:decoder|out_proj)|embed_out|output_projection|output|head|proj_out)\.weight"
)
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|embed_in|wte|word_embeddings?|tok_embeddings|tokens_embed|embeddings?|shared)\.weight"
)
"""How output heads and input embeddings are named in checkpoints (of transformers 5.24 and before)."""


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
    #: `configs.config_text` of config.json.
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
    #: Whether float32 matrices were multiplied as TF32, where a device can. Equal within a cache, free in training.
    tf32: bool = False


@dataclass(frozen=True)
class TokenizerIdentity:
    """How text became token ids. The chat template counts where a sample was rendered by it: `ShardCommit` has it."""

    fingerprint: str


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


def differing(
    mine: Mapping[str, object],
    theirs: Mapping[str, object],
    here: str = "here",
    there: str = "there",
    configs: ConfigDifferences = as_spelt,
) -> list[str]:
    """Where two identities differ, a phrase each: 'capture.top_k: 64 here, 32 there'. Empty: they are one.

    mine, theirs: fields by name. Of a config (`config`, `model.config`) each field that differs by `configs` is named.
    """
    said = []
    for name in dict.fromkeys([*mine, *theirs]):
        a, b = mine.get(name), theirs.get(name)
        if a == b:
            continue
        parts = {name: (a, b)}
        if name.rpartition(".")[2] == "config" and isinstance(a, str) and isinstance(b, str):
            parts = {f"{name}.{field}".rstrip("."): pair for field, pair in configs(a, b).items()}
        said += [f"{one_line(part, 200)}: {_shown(x)} {here}, {_shown(y)} {there}" for part, (x, y) in parts.items()]
    return said


def _shown(value: object) -> str:
    return one_line("none" if value in ("", None) else str(value), SHOWN)


def weights_fingerprint(folder: Path) -> str:
    """`fingerprint_of` the tensors of the checkpoint in this folder. Raises as `tensor_digests`."""
    return fingerprint_of(tensor_digests(folder))


def tensor_digests(folder: Path) -> dict[str, str]:
    """By name, the digest of dtype, shape and bytes of every tensor of the checkpoint in this folder.

    The files are those transformers loads: model.safetensors, else the ones of model.safetensors.index.json.
    Raises FileNotFoundError where one is missing, ValueError where one is not safetensors.
    """
    jobs = [(file, name, meta, start) for file in weight_files(folder) for name, meta, start in _tensors(file)]
    with ThreadPoolExecutor() as pool:
        return dict(zip([job[1] for job in jobs], pool.map(_tensor_digest, jobs), strict=True))


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """Fingerprint of tensors: names and content, not the sharding. An output head that is the input embedding stored
    again is left out, as where it is tied to it; the config says which it is."""
    again = set(head_names(digests)) - set(own_heads(digests))
    return digest_json(sorted([name, found] for name, found in digests.items() if name not in again))


def own_heads(digests: Mapping[str, str]) -> list[str]:
    """The names of stored output heads with other values than any input embedding beside them."""
    embeddings = {digests[name] for name in embedding_names(digests)}
    return [name for name in head_names(digests) if digests[name] not in embeddings]


def head_names(names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that are an output head."""
    return [name for name in names if _HEAD.fullmatch(name)]


def embedding_names(names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that are an input embedding of tokens."""
    return [name for name in names if _EMBEDDING.fullmatch(name)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name. Raises FileNotFoundError where there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise FileNotFoundError(f"neither model.safetensors nor model.safetensors.index.json is in {folder}")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / name for name in names]


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
