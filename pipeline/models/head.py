"""Split a causal language model into its body and its output head: token ids -> hidden states -> logits.

Owns what a model does after its lm_head: soft-capping (Gemma2), scales (Cohere, Granite, Falcon-H1). The output
embedding module is *called*, never multiplied by hand, so that its bias and any LoRA on it count. `check_head` holds
the split against the model itself on a few tokens: what a model does beyond this is refused, not guessed.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from logitcache.errors import UnsupportedModel

from .device_map import head_device, input_device
from .head_layer import PASSING_ON, HeadLayer, is_untouched, shadowed

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")

LOGITS_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Size of one slice of float32 logits that are read and dropped, by the kind of device; a few are alive at a time. The
head's whole weight is read from memory for every slice."""

HEAD_ROWS = 512
"""Rows of such a slice on a processor at most: of more the product is no faster, and their logits leave its cache."""


class OutputHead:
    """Hidden states [..., D] -> logits [..., V], as the model's own forward makes them.

    logits = cap * tanh(lm_head(h) * multiplier / divisor / cap), each only where the configuration has it. vocab_size:
    of a wider head, the logits of the first tokens only; what it pads with is as good as not there. layer: the head's
    own, within its forward (`inside_forward`), which is then called in place of the whole module.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, vocab_size: int | None = None, layer: HeadLayer | None = None
    ) -> None:
        self._causal_lm, self._vocab_size, self._layer = causal_lm, vocab_size, layer
        config = causal_lm.config.get_text_config()
        self.multiplier = math.prod(_number(config, name, 1.0) for name in _MULTIPLIERS)
        self.divisor = math.prod(_number(config, name, 1.0) for name in _DIVISORS)
        caps = [getattr(config, name) for name in _SOFT_CAPS if getattr(config, name, None)]
        self.soft_cap: float | None = float(caps[0]) if caps else None

    @property
    def module(self) -> nn.Module:
        """The output embedding as it is now, with whatever an adapter has put around it."""
        module: nn.Module = self._causal_lm.get_output_embeddings()
        return module

    @property
    def plain_layer(self) -> nn.Module | None:
        """What is called, where the logits are what the forward of its class returns, and nothing is done to them after
        it; else None."""
        if self.multiplier != 1.0 or self.divisor != 1.0 or self.soft_cap is not None:
            return None
        if self._layer is not None:
            return self._layer.layer if self._layer.untouched else None
        return self.module if is_untouched(self.module) else None

    @property
    def vocab_size(self) -> int:
        """V."""
        return logits_width(self._causal_lm) if self._vocab_size is None else self._vocab_size

    def parameters(self) -> list[Tensor]:
        """Everything the output embedding computes with, trained or frozen."""
        return list(self.module.parameters())

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] in the model's dtype. Returns logits [..., V] in that dtype."""
        logits: Tensor = self.module(hidden) if self._layer is None else self._layer.logits_of(hidden)
        if self._vocab_size is not None and logits.shape[-1] > self._vocab_size:
            logits = logits[..., : self._vocab_size]
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.divisor != 1.0:
            logits = logits / self.divisor  # not times 1 / divisor: the model's own rounding, in half precision too
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


def unwrapped(model: nn.Module) -> Any:
    """The PEFT model, or the causal language model without one, inside distributed and compiling wrappers."""
    inner = model
    while wrapped := [m for n, m in inner.named_children() if n in PASSING_ON]:
        (inner,) = wrapped
    return inner


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT or distributed wrapper, or the model itself."""
    inner = unwrapped(model)
    while isinstance(inner, (PeftModel, PeftMixedModel)):
        inner = unwrapped(inner.get_base_model() if isinstance(inner, PeftModel) else inner.base_model.model)
    return inner


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states [B, T, D], what the output head is given. No logits are made.

    inputs: those of the model's own forward (input_ids, attention_mask, position_ids, ...), but no labels. The call
    goes through `model` itself (a PEFT or DistributedDataParallel wrapper), so that its hooks run; only the causal
    language model inside skips its head. Of a model on several devices, inputs may lie on any, and what is returned
    lies where the head is.
    """
    causal_lm = causal_lm_of(model)
    where = input_device(causal_lm)
    placed = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with _head_skipped(causal_lm):
        output = model(**{**placed, "use_cache": False})
    hidden: Tensor = output.last_hidden_state.to(head_device(causal_lm))
    no_virtual_tokens(causal_lm, inputs["input_ids"], hidden)
    return hidden


def no_virtual_tokens(causal_lm: PreTrainedModel, input_ids: Tensor | None, hidden: Tensor) -> None:
    """Raise `UnsupportedModel` unless there is one hidden state a token."""
    if input_ids is None or hidden.shape[:2] != input_ids.shape:
        given = "no" if input_ids is None else tuple(input_ids.shape)
        raise UnsupportedModel(
            f"running {type(causal_lm).__name__} on {given} tokens: found hidden states of {tuple(hidden.shape[:2])}. "
            "Adapters that add virtual tokens (prompt tuning) and hooks that cut sequences (context or sequence "
            "parallelism) are not supported. Use one that leaves the sequence as it is, such as LoRA."
        )


def logits_width(model: PreTrainedModel) -> int:
    """V: the width of the logits, which a padded head makes larger than the tokenizer's vocabulary."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if head is None or weight is None:
        raise UnsupportedModel(f"splitting {type(model).__name__}: it has no output embedding (lm_head) to work with.")
    if weight.is_floating_point() and weight.dim() == 2:
        return int(weight.shape[0])
    width = getattr(head, "out_features", None)  # a quantised weight may be packed
    if not isinstance(width, int):
        raise UnsupportedModel(
            f"splitting {type(model).__name__}: its output embedding ({type(head).__name__}) is quantised in a way "
            "that hides how many logits it makes. Leave the lm_head out of the quantisation."
        )
    return width


def rows_at_once(model: PreTrainedModel, num_bytes: Mapping[str, int]) -> int:
    """How many rows of float32 logits fit into num_bytes, by the kind of device that the head is on; 1 at least."""
    return rows_of(num_bytes, logits_width(model), head_device(model))


def head_rows(model: PreTrainedModel) -> int:
    """Rows of one slice of logits that are read and dropped."""
    return slice_rows(logits_width(model), head_device(model))


def rows_of(num_bytes: Mapping[str, int], vocab_size: int, device: torch.device) -> int:
    """`rows_at_once` of logits that are so wide, on a device."""
    return max(1, num_bytes.get(device.type, num_bytes["cuda"]) // (4 * vocab_size))


def slice_rows(vocab_size: int, device: torch.device) -> int:
    """`head_rows` of logits that are so wide, on a device."""
    num_rows = rows_of(LOGITS_BYTES, vocab_size, device)
    return min(num_rows, HEAD_ROWS) if device.type == "cpu" else num_rows


def check_head(causal_lm: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` unless head(hidden states) equals the model's own logits on a few tokens."""
    ids, mask = few_tokens(causal_lm)
    with torch.inference_mode(), evaluation_mode(causal_lm):
        own = causal_lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        ours = OutputHead(causal_lm)(hidden_states(causal_lm, input_ids=ids, attention_mask=mask))
    check_same_logits(causal_lm, own, ours)


def check_same_logits(causal_lm: PreTrainedModel, own: Tensor, ours: Tensor) -> None:
    """Raise `UnsupportedModel` unless a model's own logits are head(hidden states), but for noise."""
    tolerance = 1e-4 if causal_lm.dtype == ours.dtype == torch.float32 else 1e-2
    own, ours = own.float().cpu(), ours.float().cpu()
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max().clamp(min=1.0):
        raise UnsupportedModel(
            f"splitting {type(causal_lm).__name__} into body and head: its own logits differ from lm_head(hidden) "
            "with the scales and soft-caps known here. It does something more after its head. The records would be "
            "wrong. Please report the model class."
        )


def few_tokens(causal_lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [1, 8], to hold a model against itself."""
    ids = (torch.arange(8, device=input_device(causal_lm)) * 7919 % num_tokens(causal_lm)).reshape(1, 8)
    return ids, torch.ones_like(ids)


def num_tokens(causal_lm: PreTrainedModel) -> int:
    """How many tokens the input embedding knows."""
    weight = causal_lm.get_input_embeddings().weight
    in_pieces = weight.dim() != 2 or not len(weight)  # FSDP and ZeRO-3 show what lies here
    return int(causal_lm.config.get_text_config().vocab_size if in_pieces else weight.shape[0])


def body_of(causal_lm: PreTrainedModel) -> nn.Module:
    """What makes the hidden states: the causal language model without its head."""
    body = getattr(causal_lm, causal_lm.base_model_prefix, None)
    if body is None or body is causal_lm:
        raise UnsupportedModel(f"splitting {type(causal_lm).__name__}: it has no body apart from its head.")
    found: nn.Module = body
    return found


def check_length(causal_lm: PreTrainedModel, longest: int) -> None:
    """Raise `UnsupportedModel` where a sample is longer than the model's table of learned positions, if it has one, or
    where its rotary frequencies depend on the length of the batch, so that a record would depend on its neighbours."""
    config = causal_lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    for rope in (rotary, *(part for part in rotary.values() if isinstance(part, dict))):  # one for all layers, or each
        kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings") or limit
        if kind in ("dynamic", "longrope") and original is not None and longest > original:
            raise UnsupportedModel(
                f"running {type(causal_lm).__name__} on a sample of {longest} tokens: beyond {original} its rotary "
                f"frequencies ({kind}) depend on the longest sample of a batch, so one position has no one "
                f"distribution. Use --max-length {original}."
            )
    if limit is None or getattr(config, "rope_parameters", None) is not None or longest <= limit:
        return
    raise UnsupportedModel(
        f"running {type(causal_lm).__name__} on a sample of {longest} tokens: it learned {limit} positions and none "
        f"beyond them. Use --max-length {limit}."
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout within; after it every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    if value is None:
        return default
    if not isinstance(value, (int, float)):
        raise UnsupportedModel(f"reading {name} of the model's config: expected a number, found {value!r}.")
    return float(value)


@contextmanager
def _head_skipped(causal_lm: PreTrainedModel) -> Iterator[None]:
    body = body_of(causal_lm)

    def forward(**kwargs: Any) -> BaseModelOutput:
        for name in ("labels", "return_dict"):  # PEFT passes them on
            kwargs.pop(name, None)
        output: BaseModelOutput = body(**{k: v for k, v in kwargs.items() if v is not None}, return_dict=True)
        return output

    with shadowed(causal_lm, forward):
        yield
