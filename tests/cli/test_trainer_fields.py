"""train --set and --save-steps: what the Trainer is told, what may not be, and that a run says what it was."""

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_harness import done, precompute, refused, text_data
from transformers import TrainingArguments

from logitcache.cli.progress import TrainBar
from logitcache.errors import release_of
from logitcache.training.trainer_settings import REFUSED

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    precompute(tiny_model, text_data(folder, 0, 8), folder / "cache")
    return folder / "cache"


def line_of(model: Path, cache: Path, out: Path, *more: object) -> list[object]:
    short = ["--rank", 2, "--lr", 1e-2, "--max-steps", 6, "--batch-size", 4, "--log-every", 1]
    return ["train", "--model", model, "--cache", cache, "--out", out, *short, *more]


def rates(out: Path) -> list[float]:
    lines = (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


def test_a_field_is_the_same_on_the_line_and_in_yaml_and_is_what_the_run_is(
    tmp_path: Path, tiny_model: Path, cache: Path
) -> None:
    asked = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.5, "dataloader_drop_last": True}
    words = [word for name, value in asked.items() for word in ("--set", f"{name}={str(value).lower()}")]
    done(*line_of(tiny_model, cache, tmp_path / "line", *words))
    assert rates(tmp_path / "line") == pytest.approx([0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"set": asked}), encoding="utf-8")
    done(*line_of(tiny_model, cache, tmp_path / "yaml", "--config", tmp_path / "c.yaml"))
    assert (tmp_path / "yaml" / ADAPTER).read_bytes() == (tmp_path / "line" / ADAPTER).read_bytes()
    run = json.loads((tmp_path / "line" / "run.json").read_text(encoding="utf-8"))
    assert run["trainer"] == {name: str(value).lower() for name, value in asked.items()}
    said = refused(4, *line_of(tiny_model, cache, tmp_path / "line", *words[:-4], "--resume"))
    assert "differs in trainer (max_grad_norm: 0.5 there, None here; dataloader_drop_last: true there" in said


def test_save_steps_are_those_of_the_checkpoints(
    tmp_path: Path, tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often is no part of what the run is: it goes on with another one."""

    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainBar, "on_train_end", stops)
        refused(130, *line_of(tiny_model, cache, tmp_path / "o", "--save-steps", 4))
    assert {p.name for p in (tmp_path / "o" / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert "checkpoint-6" in done(*line_of(tiny_model, cache, tmp_path / "o", "--save-steps", 3, "--resume")).err


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("learning_rate=1", "--set learning_rate: the flag --lr sets it"),
        ("save_total_limit=1", "--set save_total_limit: a run that goes on would end otherwise"),
        ("fp16=true", "--set fp16: the number format follows the model's"),
        ("push_to_hub=true", "--set push_to_hub: a run sends nothing anywhere"),
        ("use_liger_kernel=true", "--set use_liger_kernel: the loss is made in the model's own forward"),
        ("lr_scheduler_type=reduce_lr_on_plateau", "--set lr_scheduler_type=reduce_lr_on_plateau: held-out text"),
        ("weight_decay", "--set 'weight_decay': expected NAME=VALUE"),
        ("weigth_decay=1", "--set weigth_decay: expected a field of the installed transformers"),
        ("weight_decay=much", "--set weight_decay: expected a number, found 'much'"),
        ("dataloader_drop_last=3", "--set dataloader_drop_last: expected true or false, found '3'"),
        ("weight_decay=nan", "--set weight_decay: expected a number, found 'nan'"),
        ("length_column_name=n", "--set length_column_name: nothing of a run reads it"),
        ("train_sampling_strategy=group_by_length", "a run that goes on would end otherwise, or could not"),
        ("optim=schedule_free_adamw", "the weights that it trains with are not those that it is to be used with"),
        ("optim=lomo", "--set optim=lomo: it steps in every backward"),
        ("optim=galore_adamw_layerwise", "it steps in every backward"),
        ("optim_args=eps=1", "--set optim_args: adamw_torch does not read 'eps'; it reads none"),
        ("optim_target_modules=q_proj", "--set optim_target_modules: adamw_torch does not read it"),
        ('lr_scheduler_kwargs={"foo": 1}', "--set: transformers refuses it (get_cosine_schedule_with_warmup() got an"),
        ("lr_scheduler_type=cosine_with_min_lr", "--set: transformers refuses it (One of min_lr or min_lr_rate"),
        ("dataloader_persistent_workers=true", "needs dataloader_num_workers above 0"),
        ("optim=best", "--set: transformers refuses it (best is not a valid OptimizerNames"),
    ],
)
def test_what_may_not_be_set_is_refused_by_name(
    field: str, said: str, tmp_path: Path, tiny_model: Path, cache: Path
) -> None:
    assert said in refused(2, *line_of(tiny_model, cache, tmp_path / "o", "--set", field))
    assert not (tmp_path / "o").exists()


def test_a_field_is_not_set_twice(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    twice = ["--set", "weight_decay=.1", "--set", "weight_decay=.2"]
    assert "--set weight_decay is given twice" in refused(2, *line_of(tiny_model, cache, tmp_path / "o", *twice))


def test_what_an_optimizer_does_not_read_is_refused(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    line = line_of(tiny_model, cache, tmp_path / "o", "--set", "optim=sgd")
    said = refused(2, *line, "--set", "optim_args=momentum=.9,nesterof=true")
    assert "sgd does not read 'nesterof'; it reads momentum, dampening" in said


def test_numbers_within_a_field_of_yaml_are_numbers(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    """min_lr as a text would be divided by the rate."""
    asked = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 4e-3}, "warmup_steps": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"set": asked}), encoding="utf-8")
    done(*line_of(tiny_model, cache, tmp_path / "o", "--config", tmp_path / "c.yaml"))
    assert rates(tmp_path / "o")[0] == pytest.approx(1e-2) and 4e-3 < min(rates(tmp_path / "o")) < 5e-3
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert json.loads(run["trainer"]["lr_scheduler_kwargs"]) == {"min_lr": 4e-3}


def test_a_run_without_a_step_is_none(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    """Of 8 samples a batch of 100 is none, and an adapter that learnt nothing would be saved as trained."""
    line = line_of(tiny_model, cache, tmp_path / "o", "--batch-size", 100, "--set", "dataloader_drop_last=true")
    assert "8 samples make no batch of 100" in refused(1, *line)
    assert not (tmp_path / "o" / ADAPTER).exists()


@pytest.mark.skipif(release_of(version("transformers")) < (5, 24), reason="some of the fields are of later versions")
def test_every_refused_field_is_one_of_the_trainers() -> None:
    assert {*REFUSED} <= {field.name for field in fields(TrainingArguments)}


def test_neftune_is_told_and_has_no_budget(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    """Its noise is in the student's KL from the first step on, where the model is the base."""
    noisy = ["--set", "neftune_noise_alpha=5"]
    told = done(*line_of(tiny_model, cache, tmp_path / "o", *noisy, "--max-steps", 1)).err
    assert "--set neftune_noise_alpha: the noise on the student's embeddings is in its KL to the base too" in told
    log = json.loads((tmp_path / "o" / "train_log.jsonl").read_text(encoding="utf-8"))
    assert log["kl"] > 1e-3
    said = refused(2, *line_of(tiny_model, cache, tmp_path / "p", *noisy, "--kl-budget", 0.1))
    assert "--set neftune_noise_alpha with --kl-budget" in said
