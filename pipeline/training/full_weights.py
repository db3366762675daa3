"""Training every weight of a model, without an adapter: made ready, and saved as an ordinary transformers folder.

Owns the precision: the weights are float32 whatever they were loaded in, since an update of bfloat16 weights is lost
below 1/256 of each; a model that was loaded in bfloat16 computes in it, by autocast. Trade-off: 16 bytes a weight with
gradient and AdamW's state. What is trained is saved, float32. Must not know the trainer or the cache.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from logitcache.errors import UnsuitableAdapter
from logitcache.models.loading import Source, load_tokenizer
from logitcache.models.quantization import held_in


def check_unpacked(model: PreTrainedModel) -> None:
    """Raise `UnsuitableAdapter` where the weights of a model are quantised."""
    if held_in(model) is not None:
        raise UnsuitableAdapter(
            f"training every weight of {type(model).__name__}: its weights are quantised, and whole numbers have no "
            "gradient. Use an adapter (--adapter lora), or the model as it was before."
        )


def unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, all of its weights float32 and trained. Raises as `check_unpacked`."""
    check_unpacked(model)
    model.float()
    model.requires_grad_(True)
    return model


def computes_in_bfloat16(model: PreTrainedModel) -> bool:
    """Whether a model as it was loaded is to be trained under autocast. Ask before `unfreeze`."""
    found: torch.dtype = model.dtype
    return found == torch.bfloat16


def save_whole(model: PreTrainedModel, source: Source, out: Path) -> None:
    """The model, and the tokenizer of where it came from, as `from_pretrained` reads them."""
    model.save_pretrained(out)
    tokenizer = load_tokenizer(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
