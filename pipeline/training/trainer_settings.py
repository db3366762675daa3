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

_UNREAD = "nothing of a run reads it: what is trained on are samples, not columns. Leave it out"

_REASONS = {
    _UNREAD: ("length_column_name",),
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

ADAMW = "adamw_torch"
"""The optimizer of a run that names none."""

PLATEAU = ("reduce_lr_on_plateau", "greedy")
"""Schedules that wait for an evaluation of the Trainer's, of which a run has none."""


_IN_BACKWARD = "it steps in every backward, of which a step has as many as --batch-tokens makes"
_NOT_KEPT = "the weights that it trains with are not those that it is to be used with, and a run saves the former"
_OPTIMIZERS = {
    **dict.fromkeys(("lomo", "adalomo", "apollo_adamw_layerwise"), _IN_BACKWARD),
    **dict.fromkeys((f"galore_{name}_layerwise" for name in ("adamw", "adamw_8bit", "adafactor")), _IN_BACKWARD),
    **dict.fromkeys((f"schedule_free_{name}" for name in ("adamw", "radam", "sgd")), _NOT_KEPT),
}
"""Optimizers with which a run would be another than it says, and why."""

_READ_ARGS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
}
"""What transformers reads of optim_args for an optimizer; the rest it leaves out in silence."""

_PASS_ARGS = ("galore", "apollo", "grokadamw", "stable_adamw", "adamw_anyprecision", "rmsprop_bnb")
"""How optimizers begin that are given optim_args as they are."""

_PROJECTED = ("galore", "apollo")
"""How optimizers begin that read optim_target_modules."""

_DRAWN_ORDER = ("group_by_length", "batch_rebalance")
"""Orders that are drawn anew where a run goes on."""


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
            if name == "train_sampling_strategy" and value in _DRAWN_ORDER:
                raise InvalidSettings(f"--set {name}={value}: {_RESUME}.")
            if name in seen:
                raise InvalidSettings(f"--set {name} is given twice. Leave one of them out.")
            seen.append(name)
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """Raise `InvalidSettings` for an optimizer with which a run is another, and for what it does not read."""
        chosen = self.fields.get("optim", ADAMW)
        if chosen in _OPTIMIZERS:
            raise InvalidSettings(f"--set optim={chosen}: {_OPTIMIZERS[chosen]}. Use another optimizer.")
        if "optim_target_modules" in self.fields and not chosen.startswith(_PROJECTED):
            raise InvalidSettings(f"--set optim_target_modules: {chosen} does not read it. Leave it out.")
        if "optim_args" not in self.fields or chosen.startswith(_PASS_ARGS):
            return
        read = _READ_ARGS.get(chosen.removeprefix("paged_").removesuffix("_8bit").removesuffix("_32bit"), ())
        names = [part.partition("=")[0].strip() for part in self.fields["optim_args"].split(",")]
        unread = [name for name in names if name not in read]
        if unread:
            known = f"it reads {', '.join(read)}" if read else "it reads none"
            raise InvalidSettings(f"--set optim_args: {chosen} does not read {unread[0]!r:.80}; {known}. Leave it out.")

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
