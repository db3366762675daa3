"""Split a causal language model into its body and its output head: token ids -> hidden states -> logits.

Owns what a model does after its lm_head: soft-capping (Gemma2), scales (Cohere, Granite, Falcon-H1). The output
embedding module is *called*, never multiplied by hand, so that its bias and any LoRA on it count. `check_head` holds
the split against the model itself on a few tokens: what a model does beyond this is refused, not guessed.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from logitcache.errors import UnsupportedModel

from .device_map import head_device, input_device

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")

LOGITS_BYTES = 64 * 2**20
"""Size of one slice of float32 logits that are read and dropped; a few of its size are alive at a time."""


class OutputHead:
    """Hidden states [..., D] -> logits [..., V], as the model's own forward makes them.

    logits = cap * tanh(lm_head(h) * multiplier / divisor / cap), each only where the configuration has it. vocab_size:
    of a wider head, the logits of the first tokens only; what it pads with is as good as not there.
    """

    def __init__(self, causal_lm: PreTrainedModel, vocab_size: int | None = None) -> None:
        self._causal_lm, self._vocab_size = causal_lm, vocab_size
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
        """The output embedding where the logits are what it returns, with nothing done to them after it; else None."""
        is_plain = self.multiplier == 1.0 and self.divisor == 1.0 and self.soft_cap is None
        return self.module if is_plain else None

    @property
    def vocab_size(self) -> int:
        """V."""
        return logits_width(self._causal_lm) if self._vocab_size is None else self._vocab_size

    def parameters(self) -> list[Tensor]:
        """Everything the output embedding computes with, trained or frozen."""
        return list(self.module.parameters())

    def idle_parameters(self) -> list[Tensor]:
        """Those of adapters that are not active, and of an original in place of which a copy is trained."""
        return [p for module in self.module.modules() for part in _idle_parts(module) for p in part]

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] in the model's dtype. Returns logits [..., V] in that dtype."""
        logits: Tensor = self.module(hidden)
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
    """The PEFT model, or the causal language model without one, inside DistributedDataParallel and torch.compile."""
    inner = model
    while wrapped := [m for n, m in inner.named_children() if n in ("module", "_orig_mod")]:
        (inner,) = wrapped
    return inner


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT or distributed wrapper, or the model itself."""
    inner = unwrapped(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


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
    if hidden.shape[:2] != inputs["input_ids"].shape:
        raise UnsupportedModel(
            f"running {type(causal_lm).__name__} on {tuple(inputs['input_ids'].shape)} tokens: found hidden "
            f"states of {tuple(hidden.shape[:2])}. Adapters that add virtual tokens (prompt tuning) are not supported. "
            "Use one that leaves the sequence as it is, such as LoRA."
        )
    return hidden


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


def rows_at_once(model: PreTrainedModel, num_bytes: int) -> int:
    """How many rows of float32 logits fit into num_bytes; 1 at least."""
    return max(1, num_bytes // (4 * logits_width(model)))


def check_head(causal_lm: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` unless head(hidden states) equals the model's own logits on a few tokens."""
    ids, mask = few_tokens(causal_lm)
    with torch.inference_mode(), evaluation_mode(causal_lm):
        own = causal_lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().cpu()
        ours = OutputHead(causal_lm)(hidden_states(causal_lm, input_ids=ids, attention_mask=mask)).float().cpu()
    tolerance = 1e-4 if causal_lm.dtype == torch.float32 else 1e-2
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max().clamp(min=1.0):
        raise UnsupportedModel(
            f"splitting {type(causal_lm).__name__} into body and head: its own logits differ from lm_head(hidden) "
            "with the scales and soft-caps known here. It does something more after its head. The records would be "
            "wrong. Please report the model class."
        )


def few_tokens(causal_lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [1, 8], to hold a model against itself."""
    vocab = causal_lm.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=input_device(causal_lm)) * 7919 % vocab).reshape(1, 8)
    return ids, torch.ones_like(ids)


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


def _idle_parts(module: Any) -> Iterator[list[Tensor]]:
    """Of one of PEFT's wrappers; nothing where the module is none."""
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return
    active = [] if module.disable_adapters else module.active_adapters
    for name in module.adapter_layer_names:
        for adapter, part in attrgetter(name)(module).items():
            if adapter not in active:
                yield list(part.parameters()) if isinstance(part, nn.Module) else [part]
    if isinstance(module, ModulesToSaveWrapper) and active and all(name in module.modules_to_save for name in active):
        yield list(module.original_module.parameters())


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

    shadowed = vars(causal_lm).get("forward")  # an instance's own forward, where a library has patched one in
    causal_lm.forward = forward
    try:
        yield
    finally:
        if shadowed is None:
            del causal_lm.forward
        else:
            causal_lm.forward = shadowed
