"""What the Trainer is told beside a run's own settings: fields of transformers' TrainingArguments, by their names.

Owns which of them may be set, and why the others may not: a flag sets them, or a promise of `train` would not hold.
Must not import torch or transformers: the values are held against the installed version in `trainer_arguments`.
"""

from dataclasses import dataclass
from typing import ClassVar

from logitcache.errors import InvalidSettings
from logitcache.settings import Settings, option

NEFTUNE = "neftune_noise_alpha"

_FLAGS = {
    "output_dir": "--out",
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "max_steps": "--max-steps",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--grad-accum",
    "seed": "--seed",
    "data_seed": "--seed",
    "logging_steps": "--log-every",
    "save_steps": "--save-steps",
    "eval_steps": "--eval-steps",
    "use_cpu": "--device",
    "resume_from_checkpoint": "--resume",
    "label_smoothing_factor": "--label-smoothing",
}

_FORMAT = "the number format follows the model's, in which the cache was made. Use --dtype"
_RESUME = "a run that goes on would end otherwise, or could not. Leave it out"
_EVALUATION = "held-out text is measured by --eval-data and --eval-prior, not by the Trainer. Use those"
_LOGS = "train_log.jsonl and the check that the loss is finite need it as it is. Leave it out"
_DIVIDED = "weights or batches would be divided, and a run saves whole ones. Use torchrun alone"
_HUB = "a run sends nothing anywhere, and run.json would keep a token. Push the folder when it is finished"
_LOSS = "the loss is made in the model's own forward from the cache, which this replaces. Leave it out"
_MEMORY = "it has a flag of its own, --gradient-checkpointing. Use that"

_REASONS = {
    _FORMAT: ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval"),
    _RESUME: (
        *("save_strategy", "save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "auto_find_batch_size"),
    ),
    _EVALUATION: (
        *("eval_strategy", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "prediction_loss_only"),
        *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
        *("batch_eval_metrics", "do_train", "do_eval", "do_predict"),
    ),
    _LOGS: (
        *("logging_strategy", "logging_first_step", "logging_nan_inf_filter", "include_num_input_tokens_seen"),
        *("disable_tqdm", "skip_memory_metrics", "debug", "log_level", "log_level_replica", "log_on_each_node"),
    ),
    _DIVIDED: ("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config", "local_rank"),
    _HUB: (
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        *("hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    _LOSS: (
        *("use_liger_kernel", "liger_kernel_config", "average_tokens_across_devices", "remove_unused_columns"),
        *("label_names", "use_cache"),
    ),
    _MEMORY: (
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
        "activation_checkpointing_kwargs",
    ),
}

REFUSED: dict[str, str] = {
    **{name: f"the flag {flag} sets it. Use that" for name, flag in _FLAGS.items()},
    **{name: why for why, names in _REASONS.items() for name in names},
}
"""Fields that may not be set, and why; the end of a sentence."""

PLATEAU = ("reduce_lr_on_plateau", "greedy")
"""Schedules that wait for an evaluation of the Trainer's, of which a run has none."""


@dataclass(frozen=True)
class TrainerSettings(Settings):
    """Of the Trainer, beside what the other flags say of it."""

    heading: ClassVar[str] = "Training"

    save_steps: int | None = option(
        None, "Optimizer steps from one checkpoint to the next.  [default: a tenth of the steps]", at_least=1
    )
    set: tuple[str, ...] | None = option(
        None,
        "Any other field of transformers' TrainingArguments, such as weight_decay=.01 or lr_scheduler_type=linear "
        "(docs/how-to/train.md). In YAML a mapping. Again for more.",
        metavar="NAME=VALUE",
    )

    @property
    def fields(self) -> dict[str, str]:
        """The texts of the fields that are set, by their names."""
        return dict(text.split("=", 1) for text in self.set or ())

    def check_together(self) -> None:
        """Raise `InvalidSettings` for a field that may not be set, or is set twice."""
        seen: list[str] = []
        for text in self.set or ():
            name, equals, value = text.partition("=")
            if not (name.isidentifier() and equals):
                raise InvalidSettings(f"--set {text!r:.200}: expected NAME=VALUE. Give it as weight_decay=.01.")
            if name in REFUSED:
                raise InvalidSettings(f"--set {name}: {REFUSED[name]}.")
            if name == "lr_scheduler_type" and value in PLATEAU:
                raise InvalidSettings(f"--set {name}={value}: {_EVALUATION}.")
            if name in seen:
                raise InvalidSettings(f"--set {name} is given twice. Leave one of them out.")
            seen.append(name)

    def check_budget(self, kl_budget: float | None) -> None:
        """Raise `InvalidSettings` where a budget would be of a noisy KL."""
        if NEFTUNE in self.fields and kl_budget is not None:
            raise InvalidSettings(
                f"--set {NEFTUNE} with --kl-budget: the noise on the student's embeddings is in the KL that the budget "
                "is of, and the weight would follow the noise. Leave one of them out."
            )

    def doubts(self) -> list[str]:
        """NEFTune, whose noise is in the regulariser."""
        if NEFTUNE not in self.fields:
            return []
        return [
            f"--set {NEFTUNE}: the noise on the student's embeddings is in its KL to the base too, which is logged and "
            "trained as larger than the model's own. --eval-prior measures without noise."
        ]
