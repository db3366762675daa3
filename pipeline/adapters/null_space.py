"""What the inputs of a model's layers never use: the directions with the least energy.

The eigenvectors with the smallest eigenvalues of C = sum of x x^T over calibration text (`covariances`) are the null
space that LoRA-Null (arXiv 2503.02659) writes into. Owns the folder it is kept in and what is worth telling about it;
what an adapter makes of it is in `registry`, and peft is unknown here. Trade-off: sequences are not scaled by max|x|,
as in the paper's code: that is against overflow of float16, of which there is none in float64, and would weigh texts.
Shapes: N positions, D width of a layer's input, r rank.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from logitcache.data.samples import Sample
from logitcache.errors import InputNotFound, NotTheBase, TrainingFailed, UnsuitableAdapter
from logitcache.events import Progress
from logitcache.json_files import read_checked, write_checked
from logitcache.models.loading import Base
from logitcache.models.same_base import base_differences
from logitcache.storage import CorruptCache, sample_id
from logitcache.storage.checked_json import checksum_of
from logitcache.storage.files import is_unfinished, replace_file
from logitcache.storage.identity import digest, digest_json
from logitcache.storage.plain_text import one_line, shown

from .covariances import InputGroup, input_covariances, input_groups, spread
from .settings import NullSpaceSettings as NullSpaceSettings

MANIFEST, TENSORS, FORMAT_VERSION = "nullspace.json", "nullspace.safetensors", 2
_PRODUCTS = {"float64": torch.float64, "float32": torch.float32}
TIE = 1e-6
"""Relative gap of two eigenvalues at the cut below which the choice between their directions says nothing."""


@dataclass(frozen=True)
class InputSpace:
    """The least used directions of a group's input."""

    group: InputGroup
    #: float32 [r, D], orthonormal rows, least energy first.
    directions: Tensor
    #: float64 [D], of C / N, ascending.
    eigenvalues: Tensor
    #: In which inputs were multiplied.
    products: torch.dtype = torch.float64

    @property
    def rank(self) -> int:
        """r."""
        return len(self.directions)

    @property
    def energy_share(self) -> float:
        """What the kept directions carry of tr C: r / D for random ones."""
        return float(self.eigenvalues[: self.rank].clamp(min=0).sum() / self.eigenvalues.sum())

    def noise_floor(self, dtype: torch.dtype) -> float:
        """An eigenvalue that rounding alone makes.

        eps^2 * tr C / D, of inputs that are rounded to `dtype`; D * eps * the largest, of the decomposition in float64;
        eps * the largest, of products in float32, whose error is measured as half of that (docs/adapters.md).
        """
        rounding = torch.finfo(dtype).eps ** 2 * float(self.eigenvalues.mean())
        decomposed = self.group.width * torch.finfo(torch.float64).eps
        multiplied = torch.finfo(torch.float32).eps if self.products == torch.float32 else 0.0
        return rounding + (decomposed + multiplied) * float(self.eigenvalues[-1])

    def null_dimension(self, dtype: torch.dtype) -> int:
        """Directions at the noise floor: the dimension of the null space."""
        return int((self.eigenvalues <= self.noise_floor(dtype)).sum())

    def is_tied(self, dtype: torch.dtype) -> bool:
        """Whether the first direction that was left out has as little energy as the last that was kept."""
        if self.rank == self.group.width:
            return False
        kept, left = float(self.eigenvalues[self.rank - 1]), float(self.eigenvalues[self.rank])
        return left - kept <= TIE * abs(left) or left <= self.noise_floor(dtype)


@dataclass(frozen=True)
class NullSpace:
    """The null spaces of a model's linear layers, and what they were computed from."""

    spaces: tuple[InputSpace, ...]
    rank: int
    model_name: str
    #: Fingerprint of the model's tensors.
    weights: str
    #: `storage.configs.config_text` of the model's config.json.
    config: str
    #: Of its activations.
    dtype: str
    #: Fingerprint of the calibration samples.
    data: str
    num_samples: int
    num_tokens: int
    settings: dict[str, int | str]

    @property
    def directions(self) -> dict[str, Tensor]:
        """float32 [r, D] by the name of the layer."""
        return {name: space.directions for space in self.spaces for name in space.group.layers}

    @property
    def checksum(self) -> str:
        """What identifies it: the checksum of its manifest."""
        return checksum_of(self._body(self._tensors()))

    def findings(self) -> list[str]:
        """What is worth knowing before an adapter is made of it, a sentence each; empty where all is well."""
        dtype = getattr(torch, self.dtype)
        few = [s for s in self.spaces if self.num_tokens < s.group.width]
        wide = [s for s in self.spaces if s.null_dimension(dtype) < s.rank]
        tied = [s for s in self.spaces if s.is_tied(dtype)]
        total = len(self.spaces)
        said = []
        if few:
            said.append(
                f"{_of(few, total)}: {self.num_tokens:,} calibration tokens are fewer than the width (largest "
                f"{max(s.group.width for s in few):,}), so directions count as unused that were only not seen. "
                "Give more text, or a larger --max-samples."
            )
        if wide:
            worst = max(wide, key=lambda s: s.energy_share)
            said.append(
                f"{_of(wide, total)}: rank {self.rank} is larger than the null space ({_range(wide, dtype)} directions "
                f"at the noise floor of {self.dtype}). The kept directions carry up to {worst.energy_share:.1e} of the "
                f"inputs' energy ({worst.group.layers[0]}; random ones: {self.rank / worst.group.width:.1e})."
            )
        if tied:
            said.append(
                f"{_of(tied, total)}: directions are tied at the cut (the next one has as little energy), so which "
                "are kept is chance. Another rank, or more calibration text, may separate them."
            )
        return said

    def save(self, folder: Path) -> None:
        """Write the tensors, then the manifest that names their checksum: without it the folder is no null space."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors()
        body = self._body(tensors)
        replace_file(folder / TENSORS, tensors)
        write_checked(folder / MANIFEST, body)

    @classmethod
    def open(cls, folder: Path) -> "NullSpace":
        """What `save` wrote. Raises `InputNotFound` where there is none, `CorruptCache` where it is damaged."""
        if not (folder / MANIFEST).is_file():
            raise InputNotFound(
                f"opening null space {str(folder)!r}: expected {MANIFEST} in it, found none. "
                "Make one with `logitcache nullspace`."
            )
        try:
            body = read_checked(folder / MANIFEST)
            if body["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {body['format_version']}, this program reads {FORMAT_VERSION}")
            data = (folder / TENSORS).read_bytes()
            if digest(data) != body["tensors"]:
                raise ValueError(f"{TENSORS} is not what the manifest says")
            tensors = load(data)
            products = _PRODUCTS[body["settings"]["products"]]
            spaces = tuple(
                InputSpace(
                    InputGroup(tuple(g["layers"]), g["width"]),
                    tensors[f"directions.{i}"],
                    tensors[f"eigenvalues.{i}"],
                    products,
                )
                for i, g in enumerate(body["inputs"])
            )
            rest = {k: v for k, v in body.items() if k not in ("format_version", "tensors", "inputs", "created_with")}
            _check_types(rest)
            return cls(spaces=spaces, **rest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CorruptCache(
                f"opening null space {str(folder)!r}: {one_line(str(error), 300)}. It cannot be trusted. Make it again."
            ) from error

    def _tensors(self) -> bytes:
        parts = {f"directions.{i}": s.directions.contiguous() for i, s in enumerate(self.spaces)}
        parts |= {f"eigenvalues.{i}": s.eigenvalues.contiguous() for i, s in enumerate(self.spaces)}
        found: bytes = save(parts)
        return found

    def _body(self, tensors: bytes) -> dict[str, Any]:
        simple = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "spaces"}
        return {
            "format_version": FORMAT_VERSION,
            **simple,
            "inputs": [asdict(s.group) | {"layers": list(s.group.layers)} for s in self.spaces],
            "tensors": digest(tensors),
            "created_with": {name: version(name) for name in ("logitcache", "torch", "transformers")},
        }


def _check_types(fields: dict[str, Any]) -> None:
    """Raise ValueError where a manifest has something else in a field than a null space, whoever wrote it."""
    kinds = {"rank": int, "num_samples": int, "num_tokens": int, "settings": dict}
    for name, value in fields.items():
        if type(value) is not kinds.get(name, str):
            raise ValueError(f"{name}: expected another kind of value, found {shown(value)}")
    if not isinstance(getattr(torch, fields["dtype"], None), torch.dtype):
        raise ValueError(f"dtype: expected one of torch's, found {shown(fields['dtype'])}")


def compute_null_space(
    base: Base, samples: Sequence[Sample], settings: NullSpaceSettings, progress: Progress = lambda _: None
) -> NullSpace:
    """The null spaces of every linear layer's input but the output head's, over calibration samples.

    samples: max_samples of them, spread over the data, are run. progress: tokens of a pass. Raises `UnsuitableAdapter`
    where the rank is larger than an input is wide, `UnsupportedModel`, `NonFiniteLogits`.
    """
    used = spread(samples, settings.max_samples)
    spaces, num_tokens = [], sum(len(s.token_ids) for s in used)
    narrow = [g for g in input_groups(base.model, used[0]) if g.width < settings.rank]
    if narrow:
        raise UnsuitableAdapter(
            f"computing null spaces of rank {settings.rank}: the input of {narrow[0].layers[0]} has {narrow[0].width} "
            "dimensions. Use a lower --rank."
        )
    products = _PRODUCTS[settings.products]
    found = input_covariances(base.model, used, settings.batch_tokens, settings.memory_bytes, progress, products)
    for group, covariance in found:
        values, vectors = torch.linalg.eigh(covariance / num_tokens)  # ascending
        directions = vectors[:, : settings.rank].T.float().cpu().contiguous()
        spaces.append(InputSpace(group, directions, values.cpu(), products))
    return NullSpace(
        spaces=tuple(spaces),
        rank=settings.rank,
        model_name=base.source.name,
        weights=base.identity.weights,
        config=base.identity.config,
        dtype=base.identity.dtype,
        data=digest_json([sample_id(s.token_ids).hex() for s in used]),
        num_samples=len(used),
        num_tokens=num_tokens,
        settings={name: getattr(settings, name) for name in ("max_samples", "max_length", "products")},
    )


def check_null_space(space: NullSpace, base: Base, rank: int, where: str) -> None:
    """Raise `NotTheBase` for another model's null space, `InputNotFound` for another rank's."""
    stated = {"weights": space.weights, "config": space.config}
    differs = base_differences(stated, base.identity, "in the null space", "in the model")
    if differs:
        raise NotTheBase(
            f"pairing null space {where} with {base.source.name}: it was computed from {space.model_name}, not from "
            f"this model ({'; '.join(differs)}). Its directions mean nothing here. Run `logitcache nullspace` with "
            "this model."
        )
    if space.rank != rank:
        raise InputNotFound(
            f"pairing null space {where} with --rank {rank}: it holds {space.rank} directions an input. "
            f"Use --rank {space.rank}, or run `logitcache nullspace` with --rank {rank}."
        )


def claim_folder(folder: Path) -> None:
    """Raise `TrainingFailed` unless the folder is empty or absent, or holds what a killed process left unfinished."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if not all(is_unfinished(name, MANIFEST) or is_unfinished(name, TENSORS) for name in names):
        raise TrainingFailed(f"writing to {folder}: expected an empty folder, found files. Choose another --out.")


def _of(spaces: Sequence[InputSpace], total: int) -> str:
    return f"{len(spaces)} of {total} inputs"


def _range(spaces: Sequence[InputSpace], dtype: torch.dtype) -> str:
    counts = [s.null_dimension(dtype) for s in spaces]
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
