"""LLaMA-Factory: `python -m logitcache.integrations.llama_factory train.yaml`, in place of `llamafactory-cli train`.

LLaMA-Factory has no place for another's trainer and refuses keys that it does not know. So the `logitcache:` block is
taken out of its YAML here, its own parser reads the rest, and while it runs, its SFT workflow makes its own trainer
with `CachedKL` before it. Owns the options of LLaMA-Factory's that are refused, and its packed batches. Must not import
LLaMA-Factory, nor torch, before `run`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from logitcache.errors import InvalidSettings

from .block import OTHER_LOSS, Block, read_block, refusal

KEY = "logitcache"
"""The block of LLaMA-Factory's YAML."""

_OTHER_FORWARD = "it replaces the base's forward, and the cache is of the base as transformers runs it. Leave it out"
_OTHER_TRAINER = "it trains with another trainer, which would read nothing of the cache. Leave it out"

REFUSED: dict[str, str] = {
    "use_dft_loss": f"{OTHER_LOSS}, and say `ce_weight: dft` in the block",
    "use_eaft_loss": f"{OTHER_LOSS}, and say `ce_weight: eaft` in the block",
    "use_asft_loss": f"{OTHER_LOSS}, and say `ce_weight: dft` and a regularizer in the block",
    "moe_aux_loss_coef": "the router's loss is not computed here. Leave it out",
    **dict.fromkeys(("shift_attn", "mixture_of_depths", "use_unsloth", "use_kt", "fp8"), _OTHER_FORWARD),
    "enable_liger_kernel": "it puts a loss of its own into the model's forward, which would not be used. Leave it out",
    **dict.fromkeys(("use_mca", "use_hyper_parallel", "use_ray"), _OTHER_TRAINER),
}
"""Options that would make the loss silently another one, or leave the cache unread; the end of a sentence."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `InvalidSettings` for options that are refused. options: as written, or as it read them."""
    refused = [(name, REFUSED[name]) for name in REFUSED if options.get(name)]
    if options.get("stage", "sft") != "sft":
        refused.append(("stage", "of LLaMA-Factory's trainers the cache goes into that of `stage: sft`. Say that"))
    if not options.get("do_train"):
        refused.append(("do_train", "nothing is trained without it. Say `do_train: true`, or leave the block out"))
    if options.get("packing") and not options.get("neat_packing"):
        refused.append(("packing", "a document would see those before it. Say `neat_packing: true`"))
    for name, why in refused:
        raise refusal(f"{name}: {options.get(name)!r:.80}", why)


def split_block(config: Any) -> tuple[Block, dict[str, Any]]:
    """The block of a configuration, and the rest, which is LLaMA-Factory's. Raises `InvalidSettings`."""
    if not isinstance(config, Mapping) or config.get(KEY) is None:
        raise InvalidSettings(
            f"reading LLaMA-Factory's configuration: expected a YAML file with a `{KEY}:` block, found none. Nothing "
            "was started. Write one into the YAML, with `cache: PATH`, and give the YAML first."
        )
    return read_block(config[KEY], KEY), {name: value for name, value in config.items() if name != KEY}


@dataclass(frozen=True)
class PackedByPositions:
    """LLaMA-Factory's collator; a packed batch without its mask [B, 1, T, T], which says what position_ids say: they
    start again at 0 with every document."""

    collator: Callable[[Sequence[Any]], Any]

    def __call__(self, features: Sequence[Any]) -> Any:
        batch = self.collator(features)
        mask = batch.get("attention_mask")
        if "position_ids" in batch and mask is not None and mask.dim() == 4:
            del batch["attention_mask"]
        return batch


def trainer_class(block: Block) -> type[Any]:
    """LLaMA-Factory's SFT trainer with `CachedKL` before it, told what the block says."""
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    from logitcache.training.trainer import CachedKL

    class LogitCacheTrainer(CachedKL, CustomSeq2SeqTrainer):
        """Its `compute_loss` differs from transformers' for ASFT alone, which is refused."""

        def __init__(self, *args: Any, data_collator: Any, **kwargs: Any) -> None:  # LLaMA-Factory's
            collator = PackedByPositions(data_collator)
            super().__init__(*args, data_collator=collator, **block.keywords(), replace_loss=True, **kwargs)

    return LogitCacheTrainer


@contextmanager
def _in_place(workflow: Any, trainer: type[Any]) -> Iterator[None]:
    """Inside, LLaMA-Factory's SFT workflow makes this trainer."""
    own = workflow.CustomSeq2SeqTrainer
    workflow.CustomSeq2SeqTrainer = trainer
    try:
        yield
    finally:
        workflow.CustomSeq2SeqTrainer = own


def run(config: Mapping[str, Any]) -> None:
    """Train as `llamafactory-cli train` does. config: its YAML, with the block.

    Raises `InvalidSettings` before anything is loaded, and what `CachedKL` and LLaMA-Factory raise.
    """
    block, given = split_block(config)
    check_options(given)
    from llamafactory.hparams import get_ray_args, get_train_args
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    read = [*get_train_args(given), get_ray_args(given)]
    check_options({name: value for part in read for name, value in vars(part).items()})
    with _in_place(workflow, trainer_class(block)):
        run_exp(given)


def main() -> None:
    """The command line: a YAML and, after it, `name=value` in place of what it says, as LLaMA-Factory reads them."""
    from llamafactory.hparams import read_args

    run(read_args())


if __name__ == "__main__":
    main()
