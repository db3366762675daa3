"""TrainingArguments of a run with the fields that --set names, each as its type reads the text; and of one device.

Owns how a text is read for a field of the installed transformers, and which GPU a run of one process is on. Which
fields may be set is `trainer_settings`'.
"""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from logitcache.errors import InvalidSettings
from logitcache.models.loading import first_line

from .trainer_settings import TrainerSettings


def with_fields(arguments: TrainingArguments, settings: TrainerSettings) -> TrainingArguments:
    """The arguments, with what the settings say beside them. Raises `InvalidSettings` for a field that the installed
    transformers lacks, and for a value that it does not take."""
    kinds = {field.name: str(field.type) for field in fields(TrainingArguments) if field.init}
    unknown = sorted(settings.fields.keys() - kinds.keys())
    if unknown:
        raise InvalidSettings(
            f"--set {unknown[0]}: expected a field of the installed transformers' TrainingArguments, found no such "
            "one. Check its spelling."
        )
    found = {name: _read(name, text, kinds[name]) for name, text in settings.fields.items()}
    if settings.save_steps is not None:
        found["save_steps"] = settings.save_steps
    if not found:
        return arguments
    try:
        made = replace(arguments, **found)
        _try(made)
    except (TypeError, ValueError, KeyError, ImportError) as error:  # what its own checks raise
        raise InvalidSettings(f"--set: transformers refuses it ({first_line(error)}). Give other values.") from error
    return made


def _try(arguments: TrainingArguments) -> None:
    """Raise what transformers would of schedule, optimizer and loader, once the run had begun."""
    parameter = nn.Parameter(torch.zeros(1))
    if not str(arguments.optim).startswith(("galore", "apollo")):  # which are made of a model
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD([parameter], lr=arguments.learning_rate),
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
    )
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise ValueError("dataloader_persistent_workers needs dataloader_num_workers above 0")


def _finite(text: str) -> float:
    """Raises ValueError as float does, and for what is no number."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def on_device(arguments: TrainingArguments, device: torch.device) -> TrainingArguments:
    """The arguments, for one process that trains on this GPU alone, however many the machine has.

    transformers would take them all, by DataParallel, which splits a batch without its targets, and move the model to
    the first. Under a launcher each process has its own already; a model that is spread over several stays so.
    """
    if device.type == "cuda" and arguments.n_gpu > 1:
        torch.cuda.set_device(device)
        arguments._n_gpu = 1
        vars(arguments)["_setup_devices"] = device  # what its property `device` has found, and keeps
    return arguments


def _read(name: str, text: str, kind: str) -> Any:
    """A text for a field of this type, as TrainingArguments annotates it. Raises `InvalidSettings`."""
    word = text.strip().lower()
    if word in ("true", "false") and "bool" in kind:
        return word == "true"
    if word == "null" and "None" in kind:
        return None
    if "bool" in kind and not any(other in kind for other in ("str", "int", "float")):
        raise InvalidSettings(f"--set {name}: expected true or false, found {text!r:.200}. Give one of them.")
    readers: list[Callable[[str], Any]] = [int] if "'int'" in kind or "int |" in kind else []
    readers += [_finite] if "float" in kind else []
    for reader in readers:
        try:
            return reader(text)
        except ValueError:
            continue
    if readers and "str" not in kind:
        raise InvalidSettings(f"--set {name}: expected a number, found {text!r:.200}. Give one.")
    if text.startswith(("{", "[")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise InvalidSettings(f"--set {name}: expected JSON, found {text!r:.200} ({error}). Mend it.") from error
    return text
