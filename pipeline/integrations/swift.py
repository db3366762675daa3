"""ms-swift: a plug-in file of yours for `--external_plugins`, which says the block to `register`.

    from logitcache.integrations.swift import register

    register({"cache": "cache/", "fill": True, "weight": 1.0})

ms-swift imports the file before it makes a trainer, and takes the trainer's class from a table by name: that of
`swift sft` and `swift pt` becomes its own with `CachedKL` before it. Owns the options of ms-swift's that are refused,
and what its trainer does to a batch after it was looked up. Must not import ms-swift or torch before `register`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from logitcache.errors import InvalidSettings, TrainingFailed

from .block import OTHER_LOSS, Block, read_block, refusal

WHERE = "register"
"""What messages call the block."""

_SERVED = "causal_lm"

REFUSED: dict[str, str] = {
    "enable_dft_loss": f"{OTHER_LOSS}, and say `ce_weight: dft` to register",
    "loss_type": OTHER_LOSS,
    "router_aux_loss_coef": "the router's loss is not computed here. Leave it at 0",
    "enable_channel_loss": "ms-swift logs it where it makes its own loss, which is not called. Leave it out",
    "use_liger_kernel": "it puts a loss of its own into the model's forward, which would not be used. Leave it out",
}
"""Options of the trainer that would make the loss silently another one, or be without effect; the end of a sentence."""

_REPLACED = "it replaces the forward of the base, and the cache is of the base as transformers runs it. Leave it out"
_VALUES: tuple[tuple[str, str, str], ...] = (
    ("tuner_backend", "unsloth", _REPLACED),
    ("tuner_type", "longlora", _REPLACED),
)
"""Options that are refused at one value."""


def check_options(args: Any, template: Any, ce_weight: str) -> None:
    """Raise `InvalidSettings` for options that are refused. args: of ms-swift's trainer; template: its data's.

    ce_weight: of the objective, which reads the weights of `--loss_scale` where it is "data".
    """
    found = [(name, getattr(args, name, None), why) for name, why in REFUSED.items()]
    found += [(name, value, why) for name, value, why in _VALUES if getattr(args, name, None) == value]
    scaled = ce_weight != "data" and not is_binary(template)
    weights = "it weighs tokens, which the loss would not. Say `ce_weight: data` to register"
    found.append(("loss_scale", getattr(template, "_loss_scale", True) if scaled else None, weights))
    size = getattr(template, "sequence_parallel_size", 1)
    cut = "it cuts sequences across processes, and the targets would not be cut with them. Set it to 1"
    found.append(("sequence_parallel_size", size if size > 1 else None, cut))
    for name, value, why in found:
        if value:
            raise refusal(f"--{name} {value!s:.80}", why)


def is_binary(template: Any) -> bool:
    """Whether `--loss_scale` selects what is learnt, and weighs none of it."""
    told = template.is_binary_loss_scale
    return bool(template.loss_scale.is_binary_loss_scale if told is None else told)


def register(block: Mapping[str, Any]) -> None:
    """Let `swift sft` and `swift pt` train against a cache. block: what docs/how-to/ms-swift.md lists.

    Of other tasks the table is closed: their trainers would read nothing of the cache. Raises `InvalidSettings`.
    """
    said = read_block(block, WHERE)
    if any(name.startswith("swift.megatron.") for name in sys.modules):
        raise InvalidSettings(
            "register of logitcache: expected `swift sft` or `swift pt`, found Megatron's, whose trainer would read "
            "nothing of the cache. Nothing was trained. Leave the plug-in out."
        )
    from swift.trainers import TrainerFactory

    for task in TrainerFactory.TRAINER_MAPPING:
        TrainerFactory.TRAINER_MAPPING[task] = f"{__name__}.{OtherTask.__name__}"
    globals()[_TRAINER] = trainer_class(said)
    TrainerFactory.TRAINER_MAPPING[_SERVED] = f"{__name__}.{_TRAINER}"


_TRAINER = "LogitCacheTrainer"
"""What `register` puts into this module, where ms-swift looks the class up by name."""


class OtherTask:
    """In place of the trainers of tasks that no cache goes into."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # ms-swift's
        raise TrainingFailed(
            f"training with logitcache: expected task_type {_SERVED} (`swift sft`, `swift pt`), found another task, "
            "whose trainer would read nothing of the cache. Nothing was trained. Leave the plug-in out."
        )


def trainer_class(block: Block) -> type[Any]:
    """ms-swift's trainer with `CachedKL` before it, told what the block says."""
    from swift.trainers import Seq2SeqTrainer

    from logitcache.training.trainer import CachedKL

    class LogitCacheTrainer(CachedKL, Seq2SeqTrainer):
        """Its `compute_loss` is the model's own cross-entropy, with what is refused."""

        def __init__(self, *, args: Any, template: Any, **kwargs: Any) -> None:  # ms-swift's
            check_options(args, template, block.objective.ce_weight)
            super().__init__(args=args, template=template, **block.keywords(), replace_loss=True, **kwargs)

        def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
            """Not in training: it cuts labels that were looked up, and logits are made where they count anyway."""
            return False if self.model.training else super().get_use_logits_to_keep(default_value)

    return LogitCacheTrainer
