"""The output head of a checkpoint alone: a model without weights but for the layer that makes logits.

Owns which tensors of the files those are: the head's own, or the input embedding where the config ties them. So hidden
states of another engine become logits without a second copy of the model. Must not run a body.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.errors import UnsupportedModel
from logitcache.storage.identity import embedding_names, head_names, weight_files

from .head import OutputHead, body_of, check_same_logits, evaluation_mode
from .head_layer import shadowed
from .loading import Source, config_of, find_model, first_line
from .without_weights import from_config


def load_head(model: str | Path, dtype: str, device: torch.device | str = "cpu") -> OutputHead:
    """Last hidden states [..., D] -> logits [..., V], of a folder or a hub id.

    dtype: of the weights, as float32 or bfloat16. Raises `InputNotFound` and `UnsupportedModel`.
    """
    return OutputHead(headed_model(find_model(str(model)), dtype, torch.device(device)))


def headed_model(source: Source, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model, whose output embedding has its weights on the device, and nothing else has any.

    Raises `UnsupportedModel` where the files have no such layer in plain numbers of its shape, or several.
    """
    try:
        model = from_config(config_of(source), getattr(torch, dtype))
        files = _files_of(source.folder)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"loading the output head of {source.name!r}: {first_line(error)}.") from error
    layer = model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModel(
            f"loading the output head of {source.name!r}: {type(model).__name__} has none that is a layer of its own. "
            "Use --engine transformers."
        )
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    weight_name = _weight_name(files, tied, source)
    for name, empty in list(layer.named_parameters(recurse=False)):
        stored = weight_name if name == "weight" else weight_name.removesuffix("weight") + name
        setattr(layer, name, nn.Parameter(_read(files, stored, empty, source).to(device), requires_grad=False))
    if any(p.is_meta for p in layer.parameters()):
        raise UnsupportedModel(
            f"loading the output head of {source.name!r}: {type(layer).__name__} is made of several layers, which no "
            "engine's hidden states were tried with. Use --engine transformers."
        )
    _check_forward(model)
    return model


class _BodyOutput:
    """Of a body that has run: its last hidden states, and nothing of what else it may return."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@torch.inference_mode()
def _check_forward(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` where the model's own forward makes other logits of some hidden states than the head
    with what is known to come after it."""
    weight = next(model.get_output_embeddings().parameters())
    size = (1, 8, int(weight.shape[1]))
    hidden = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    ids = torch.zeros(size[:2], dtype=torch.int64, device=weight.device)
    with shadowed(body_of(model), lambda *_, **__: _BodyOutput(hidden)), evaluation_mode(model):
        own = model(input_ids=ids, use_cache=False).logits
    check_same_logits(model, own, OutputHead(model)(hidden))


def _files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint."""
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _weight_name(files: Mapping[str, Path], tied: bool, source: Source) -> str:
    """A head that is stored counts, as for transformers; that it has the embedding's values where the config ties them
    was seen when the checkpoint was identified."""
    found = head_names(files) or (embedding_names(files) if tied else [])
    if len(found) == 1:
        return found[0]
    what = "an output head, or the embedding it is tied to," if tied else "an output head"
    raise UnsupportedModel(
        f"loading the output head of {source.name!r}: expected one tensor that is {what} in its files, found "
        f"{', '.join(found) or 'none'}. Use --engine transformers."
    )


def _read(files: Mapping[str, Path], name: str, empty: Tensor, source: Source) -> Tensor:
    file = files.get(name)
    found: Tensor | None = None
    if file is not None:
        with safe_open(file, framework="pt") as tensors:
            found = tensors.get_tensor(name)
    if found is None or found.shape != empty.shape or not found.is_floating_point() or found.element_size() < 2:
        said = "none" if found is None else f"{str(found.dtype).removeprefix('torch.')} of {list(found.shape)}"
        raise UnsupportedModel(
            f"loading the output head of {source.name!r}: expected {name} of {list(empty.shape)} in plain numbers, "
            f"found {said}. A head that is packed is not unpacked here. Use --engine transformers."
        )
    return found.to(empty.dtype)
