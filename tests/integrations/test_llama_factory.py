"""What stands before LLaMA-Factory, without it: `scripts/check-integration llama_factory` runs it with."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitcache import InvalidSettings
from logitcache.integrations.llama_factory import (
    REFUSED,
    PackedByPositions,
    _in_place,
    check_options,
    run,
    split_block,
)

USED = {"stage": "sft", "do_train": True, "neat_packing": True, "logitcache": {"cache": "cache/", "fill": True}}


def test_it_is_imported_without_llama_factory_and_without_torch() -> None:
    code = "import sys, logitcache.integrations.llama_factory as a; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"llamafactory", "torch", "transformers", "peft"}


def test_the_block_is_taken_out_of_what_llama_factory_reads() -> None:
    block, given = split_block(USED)
    assert block.of_cache.cache == "cache/" and block.of_cache.fill
    assert given == {"stage": "sft", "do_train": True, "neat_packing": True}
    check_options(given)


@pytest.mark.parametrize("config", [{"stage": "sft"}, ["--stage", "sft"], {"logitcache": None}])
def test_a_run_without_a_block_is_refused(config: Any) -> None:
    with pytest.raises(InvalidSettings, match="expected a YAML file with a `logitcache:` block"):
        split_block(config)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_make_the_loss_another_one_is_refused_by_name(name: str) -> None:
    """Before LLaMA-Factory is imported, too."""
    said = rf"training with logitcache: {name}: 2 is refused: .*Nothing was trained"
    with pytest.raises(InvalidSettings, match=said):
        run({**USED, name: 2})
    check_options({"do_train": True, name: False})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": "dpo"}, "stage: 'dpo' is refused.*Say that"),
        ({"do_train": False}, "do_train: False is refused.*Say `do_train: true`"),
        ({"packing": True, "neat_packing": False}, "packing: True is refused.*Say `neat_packing: true`"),
    ],
)
def test_a_run_that_would_read_nothing_or_mix_documents_is_refused(options: dict[str, Any], said: str) -> None:
    check_options({"do_train": True, "packing": True, "neat_packing": True})
    with pytest.raises(InvalidSettings, match=said):
        check_options({"do_train": True, **options})


def collated(batch: dict[str, Any]) -> dict[str, Any]:
    """What the wrapped collator makes of a batch that another has made."""

    def own(_: Sequence[Any]) -> dict[str, Any]:
        return dict(batch)

    made: dict[str, Any] = PackedByPositions(own)([])
    return made


def test_only_a_mask_that_position_ids_repeat_is_left_out() -> None:
    flat, square = torch.ones(1, 4), torch.zeros(1, 1, 4, 4)
    places = torch.tensor([[0, 1, 0, 1]])
    assert set(collated({"attention_mask": square, "position_ids": places})) == {"position_ids"}
    for kept in ({"attention_mask": flat, "position_ids": places}, {"attention_mask": square}):
        assert set(collated(kept)) == set(kept)
    assert collated({"attention_mask": None, "position_ids": places})["attention_mask"] is None


def test_the_workflow_has_its_own_trainer_back_whatever_happens() -> None:
    workflow: Any = SimpleNamespace(CustomSeq2SeqTrainer=int)
    made = []

    def train() -> None:
        with _in_place(workflow, str):
            made.append(workflow.CustomSeq2SeqTrainer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert made == [str] and workflow.CustomSeq2SeqTrainer is int


def test_the_page_names_every_option_that_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "llama-factory.md").read_text(encoding="utf-8")
    assert not [name for name in [*REFUSED, "stage", "do_train", "packing"] if f"`{name}`" not in page]
