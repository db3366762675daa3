"""ms-swift's plug-in without ms-swift: `scripts/check-integration swift` runs it with."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from logitcache import InvalidSettings, TrainingFailed
from logitcache.integrations import swift
from logitcache.integrations.swift import REFUSED, OtherTask, check_options, is_binary, register

BLOCK = {"cache": "cache/", "fill": True}


def args(**options: Any) -> Any:
    """Of ms-swift's trainer, as it sets them itself, but for these."""
    defaults = {"enable_dft_loss": False, "loss_type": None, "router_aux_loss_coef": 0.0, "tuner_backend": "peft"}
    return SimpleNamespace(**{**defaults, "tuner_type": "lora", "use_liger_kernel": False, **options})


def template(scale: str = "default", binary: bool = True, told: bool | None = None, parts: int = 1) -> Any:
    """Of ms-swift's data."""
    of_scale = SimpleNamespace(is_binary_loss_scale=binary)
    return SimpleNamespace(
        loss_scale=of_scale, _loss_scale=scale, is_binary_loss_scale=told, sequence_parallel_size=parts
    )


def test_it_is_imported_without_ms_swift_and_without_torch() -> None:
    code = "import sys, logitcache.integrations.swift as a; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"swift", "torch", "transformers", "peft"}


def test_ms_swifts_own_defaults_are_no_reason_to_refuse() -> None:
    check_options(args(), template(), "none")
    check_options(args(), template("react", binary=False), "data")
    check_options(args(), template("react", binary=False, told=True), "none")


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_make_the_loss_another_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        InvalidSettings, match=rf"training with logitcache: --{name} 2 is refused: .*Nothing was trained"
    ):
        check_options(args(**{name: 2}), template(), "none")


OTHERS: list[tuple[dict[str, Any], Any, str]] = [
    ({"tuner_backend": "unsloth"}, template(), "--tuner_backend unsloth is refused"),
    ({"tuner_type": "longlora"}, template(), "--tuner_type longlora is refused"),
    ({}, template("react", binary=False), "--loss_scale react is refused.*ce_weight: data"),
    ({}, template("default", told=False), "--loss_scale default is refused"),
    ({}, template(parts=2), "--sequence_parallel_size 2 is refused.*Set it to 1"),
]


@pytest.mark.parametrize(("options", "of_data", "said"), OTHERS)
def test_values_of_options_are_refused(options: dict[str, Any], of_data: Any, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        check_options(args(**options), of_data, "none")


def test_what_the_template_is_told_counts_before_what_its_scale_says() -> None:
    assert is_binary(template(binary=True)) and not is_binary(template(binary=False))
    assert is_binary(template(binary=False, told=True)) and not is_binary(template(binary=True, told=False))


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ms-swift's table of trainers, in an ms-swift that has nothing else."""
    found = SimpleNamespace(TRAINER_MAPPING={"causal_lm": "swift.trainers.Seq2SeqTrainer", "dpo": "swift.DPOTrainer"})
    trainers: Any = ModuleType("swift.trainers")
    trainers.TrainerFactory, trainers.Seq2SeqTrainer = found, object
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.trainers", trainers)
    return found


def test_the_table_names_a_trainer_that_is_there_and_closes_the_other_tasks(factory: Any) -> None:
    register(BLOCK)
    assert set(factory.TRAINER_MAPPING) == {"causal_lm", "dpo"}
    for task, path in factory.TRAINER_MAPPING.items():
        module, name = path.rsplit(".", 1)
        assert module == swift.__name__ and isinstance(getattr(swift, name), type)
        assert (getattr(swift, name) is OtherTask) == (task != "causal_lm")
    with pytest.raises(TrainingFailed, match=r"expected task_type causal_lm .*Nothing was trained"):
        OtherTask(model=None)


def test_what_is_no_block_changes_nothing(factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(factory.TRAINER_MAPPING)
    with pytest.raises(InvalidSettings, match="register: unknown key 'wieght'"):
        register({**BLOCK, "wieght": 2})
    monkeypatch.setitem(sys.modules, "swift.megatron.arguments", ModuleType("swift.megatron.arguments"))
    with pytest.raises(InvalidSettings, match="found Megatron's"):
        register(BLOCK)
    assert before == factory.TRAINER_MAPPING


def test_the_page_names_every_option_that_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "ms-swift.md").read_text(encoding="utf-8")
    names = [*REFUSED, "loss_scale", "sequence_parallel_size", "tuner_backend unsloth", "tuner_type longlora"]
    assert not [name for name in names if f"`--{name}" not in page]
