"""axolotl's plug-in: `plugins: [logitcache.integrations.axolotl.LogitCachePlugin]` and a `logitcache:` block.

Owns what axolotl asks of a plug-in, the options of axolotl's that are refused (`REFUSED`), and what its trainer does in
the loss beside the loss: it counts tokens, and calls exp(loss) the perplexity. The trainer's own class is kept, so
everything else of it stays. Must not import axolotl, pydantic or torch before axolotl is there: this module is imported
by others too, and axolotl goes on without a plug-in whose import fails.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from logitcache.errors import InvalidSettings, TrainingFailed

from .block import OTHER_LOSS, Block, read_block, refusal

KEY = "logitcache"
"""The block of axolotl's YAML."""

_OWN_CE = (
    "it computes the cross-entropy, which is computed here, in slices of the head that are never [T, V] either; it "
    "would be without effect. Leave it out"
)
_IN_PARTS = "it cuts a sequence across processes, and the targets would not be cut with it. Set it to 1"
_STREAMED = (
    "documents are cut and joined while they are read, and cannot be found or captured before step 1. Use `datasets` "
    "with `type: completion`, and sample_packing to pack them"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(("rl", "reward_model", "process_reward_model", "orpo_alpha", "kd_trainer"), OTHER_LOSS),
    "use_eaft": f"{OTHER_LOSS}, or say `ce_weight: eaft` in the block",
    "trainer_cls": "a class of your own would not be used, as a plug-in's comes first. Leave it out",
    **dict.fromkeys(("cut_cross_entropy", "chunked_cross_entropy", "flash_attn_cross_entropy"), _OWN_CE),
    **dict.fromkeys(("liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_use_token_scaling"), _OWN_CE),
    **dict.fromkeys(("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"), _IN_PARTS),
    **dict.fromkeys(("pretraining_dataset", "streaming"), _STREAMED),
    "use_pose": "positions that leap are not those that the base was run at. Leave it out",
    "processor_type": "the cache knows samples by their tokens alone, not by their images. Leave it out",
}
"""Options that would make the loss silently another one, or be silently without effect; the end of a sentence."""

_IN_ONE = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
"""Of these 1 is what axolotl does anyway."""


def check_options(cfg: Mapping[str, Any], block: Block) -> None:
    """Raise `InvalidSettings` for an option of axolotl's that is refused. cfg: as written, or completed."""
    for name, why in REFUSED.items():
        value = cfg.get(name)
        if value and not (name in _IN_ONE and value == 1):
            raise refusal(f"{name}: {value!r:.80}", why)
    noise = cfg.get("neftune_noise_alpha")
    if noise and block.objective.kl_budget is not None:
        raise refusal(
            f"neftune_noise_alpha: {noise!r:.80} with kl_budget",
            "the noise on the embeddings is in the KL that the budget is of, and the weight would follow the noise. "
            "Leave one of them out",
        )


def block_of(cfg: Mapping[str, Any]) -> Block:
    """What the block of a configuration says. Raises `InvalidSettings`, also where there is none."""
    if cfg.get(KEY) is None:
        raise InvalidSettings(
            f"reading axolotl's configuration: expected a `{KEY}:` block beside `plugins`, found none. Nothing was "
            f"started. Write one, with `cache: PATH`."
        )
    return read_block(cfg[KEY], KEY)


def count_tokens(trainer: Any, labels: Any) -> None:
    """Move axolotl's own counters on by a batch of all processes: what is learnt, and places. labels: [B, T]."""
    import torch

    counts = torch.stack([(labels != -100).sum(), torch.full_like(labels, 1).sum()])
    learnt, places = trainer.accelerator.reduce(counts, reduction="sum").cpu().unsqueeze(1)
    before = getattr(trainer.state, "tokens", {"trainable": torch.zeros(1), "total": torch.zeros(1)})
    trainer.state.tokens = {"trainable": before["trainable"] + learnt, "total": before["total"] + places}


def perplexity(nats: float) -> float:
    """exp(nats), as axolotl rounds it."""
    return round(math.exp(nats), 5) if nats < 700 else math.inf


_Plugin: Any = object
if find_spec("axolotl") is not None:
    from axolotl.integrations.base import BasePlugin

    _Plugin = BasePlugin


class LogitCachePlugin(_Plugin):
    """What axolotl calls, in its order; without effect for a configuration that does not name it, since axolotl keeps
    the plug-ins of earlier runs of a process."""

    def register(self, cfg: Any) -> None:
        """The file as the user wrote it: refused before anything is loaded."""
        if _asked(cfg):
            check_options(cfg, block_of(cfg))

    def get_input_args(self) -> str:
        """Where axolotl finds the schema of the block."""
        return f"{__name__}.LogitCacheArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """The same of what axolotl and other plug-ins made of the file."""
        self.register(cfg)

    def get_trainer_cls(self, cfg: Any) -> type[Any] | None:
        """axolotl's trainer with `CachedKL` before it."""
        if not _asked(cfg):
            return None
        _check_alone(self, cfg)
        return trainer_class(block_of(cfg))

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> tuple[type[Any], dict[str, Any]] | None:
        """For training on packed rows axolotl's collator without the mask; else axolotl's own choice."""
        packed = _asked(cfg) and cfg.get("sample_packing") and not is_eval
        return (_packed_collator(), {}) if packed else None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raise `TrainingFailed` where another plug-in's trainer came first."""
        from logitcache.training.trainer import CachedKL

        if _asked(cfg) and not isinstance(trainer, CachedKL):
            raise _not_alone(type(trainer).__name__)


def trainer_class(block: Block) -> type[Any]:
    """axolotl's trainer with `CachedKL` before it, told what the block says."""
    from axolotl.core.trainers import AxolotlTrainer
    from transformers import Trainer

    from logitcache.training.trainer import CachedKL

    class Perplexity(Trainer):
        """Below axolotl's trainer, which logs exp(loss) as `ppl`: of the cross-entropy alone."""

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "ppl" in logs and "ce" in logs:
                logs["ppl"] = perplexity(logs["ce"])
            super().log(logs, start_time)

    class LogitCacheTrainer(CachedKL, AxolotlTrainer, Perplexity):
        """What axolotl's `compute_loss` does beside the loss is done here."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:  # axolotl's
            super().__init__(*args, **block.keywords(), replace_loss=True, **kwargs)

        def _set_signature_columns_if_needed(self) -> None:
            if self._signature_columns is None:  # axolotl's own fails when it is called again on packed rows
                super()._set_signature_columns_if_needed()

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.args.include_tkps and model.training:
                count_tokens(self, inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    return LogitCacheTrainer


def _packed_collator() -> type[Any]:
    from axolotl.utils.collators import BatchSamplerDataCollatorForSeq2Seq

    class PackedCollator(BatchSamplerDataCollatorForSeq2Seq):
        """Packed rows, told apart by their position_ids alone: axolotl's mask numbers documents, which only its own
        attention reads, and beside a mask transformers does not look at the position_ids."""

        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            batch = super().__call__(features, return_tensors=return_tensors)
            batch.pop("attention_mask", None)
            return batch

    return PackedCollator


def _asked(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration names this plug-in."""
    return any(str(name).rsplit(".", 1)[-1] == LogitCachePlugin.__name__ for name in cfg.get("plugins") or ())


def _check_alone(plugin: Any, cfg: Any) -> None:
    """Raise `TrainingFailed` where another plug-in brings a trainer or a collator: axolotl takes the first's."""
    from axolotl.integrations.base import PluginManager

    for other in PluginManager.get_instance().plugins.values():
        if other is not plugin and (other.get_trainer_cls(cfg) or other.get_collator_cls_and_kwargs(cfg)):
            raise _not_alone(type(other).__name__)


def _not_alone(name: str) -> TrainingFailed:
    return TrainingFailed(
        f"training with {KEY}: expected no other plug-in with a trainer or a collator of its own, found {name}. Only "
        "one of them would be used, and the loss would be the other's or have no KL. Leave that plug-in out."
    )


def __getattr__(name: str) -> Any:
    """`LogitCacheArgs`, the schema that axolotl asks for by its name, made where pydantic is there."""
    if name != "LogitCacheArgs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pydantic import BaseModel

    class LogitCacheArgs(BaseModel):
        """The block is one key to axolotl; what is in it is `block`'s to check."""

        logitcache: dict[str, Any] | None = None

    globals()[name] = LogitCacheArgs
    return LogitCacheArgs
