"""TRL's preference trainers with their reference from a cache: TRL's own losses, and no forward of the base.

The oracle of losses is TRL with the reference that it runs itself; that of the sums computes in float64 from the
checkpoint's weights.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.oracles_reference import sum_of_logprobs
from support.preferences import (
    CachedDPO,
    CachedKTO,
    Forwards,
    PlainDPO,
    PlainKTO,
    Recorded,
    adapter,
    chat_pairs,
    load,
    make,
    text_pairs,
)
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl.experimental.bema_for_ref_model import DPOTrainer as MovingReferenceDPO
from trl.trainer.dpo_trainer import DataCollatorForPreference

from logitcache import CachedReference, CaptureSettings, PairingRules
from logitcache.cli import run
from logitcache.errors import InvalidBatch, InvalidSettings, NotTheBase, TrainingFailed
from logitcache.pairing.step_zero import NUM_PROBED
from logitcache.storage import IdentityMismatch, LogitCache, SampleNotCached
from logitcache.training.fill import FILLED
from logitcache.training.reference import columns_of

# TRL's configs set gradient_checkpointing, whose name transformers 5.23 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "preferences.md"
PAIRS, CHATS = text_pairs(), chat_pairs()
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DPO": (CachedDPO, PlainDPO, {}),
    "IPO": (CachedDPO, PlainDPO, {"loss_type": ["ipo"]}),
    "KTO": (CachedKTO, PlainKTO, {}),
}


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by trainers of rank 4: the sequences of both data sets, and KTO's of the texts in batches of 4."""
    folder = tmp_path_factory.mktemp("reference")
    for kind, data in ((CachedDPO, PAIRS), (CachedDPO, CHATS), (CachedKTO, PAIRS)):
        trainer = make(kind, tiny_model, folder / "o", data, folder / "c", fill=True, peft_config=adapter(4))
        assert trainer.filled["train"].num_samples > 0
    return folder / "c"


def losses(trainer: Any) -> list[float]:
    trainer.train()
    found: list[float] = trainer.losses
    return found


def assert_close(found: list[float], expected: list[float], nats: float = 1e-5) -> None:
    assert len(found) == len(expected) > 0
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= nats


# The same losses, without the base


@pytest.mark.parametrize(
    ("name", "data", "rank"), [("DPO", PAIRS, 8), ("DPO", CHATS, 16), ("IPO", PAIRS, 16), ("KTO", PAIRS, 8)]
)
def test_losses_are_those_with_trls_own_reference_and_the_base_does_not_run(
    name: str, data: Dataset, rank: int, cache: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, plain, settings = KINDS[name]
    settings = {**settings, "peft_config": adapter(rank), "seed": rank}
    ran = Forwards(monkeypatch)
    trainer = make(cached, tiny_model, tmp_path, data, cache, **settings)
    at_start = ran.num
    found = losses(trainer)
    of_policy = 2 if name == "KTO" else 1  # KTO's estimate of the KL is a forward of its own
    assert (ran.num_of_base, ran.num - at_start) == (0, 4 * of_policy) and at_start <= NUM_PROBED
    assert trainer.ref_model is None and trainer.filled == {} and trainer.step_zero.kl_nats <= 1e-5
    expected = losses(make(plain, tiny_model, tmp_path, data, **settings))
    assert ran.num_of_base == 4 * of_policy
    assert_close(found, expected)
    assert max(abs(loss - found[0]) for loss in found) > 1e-3  # it trains


@pytest.mark.parametrize(
    "settings",
    [
        {"ld_alpha": 0.5, "loss_type": ["sigmoid_norm", "bco_pair"], "loss_weights": [1.0, 0.3]},
        {"max_length": 20, "use_weighting": True, "pad_to_multiple_of": 16},
        {"f_divergence_type": "js_divergence", "gradient_accumulation_steps": 2, "precompute_ref_batch_size": 3},
        {"peft_config": None, "learning_rate": 1e-3},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_a_setting_does_to_the_reference_it_does_to_that_of_the_cache(
    settings: dict[str, Any], cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Without a peft_config all weights are trained, and TRL's own reference is a second model."""
    settings = {"max_steps": 2, **settings}
    trainer = make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, **settings)
    assert trainer.ref_model is None
    found = losses(trainer)
    assert_close(found, losses(make(PlainDPO, tiny_model, tmp_path, PAIRS, **settings)))
    assert len(set(found)) > 1


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
def test_ends_that_a_trainer_keeps_are_samples_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "max_length": 12, "truncation_mode": "keep_end"}
    trainer = make(CachedDPO, tiny_model, tmp_path, PAIRS, tmp_path / "c", fill=True, **settings)
    found = LogitCache.open(tmp_path / "c")
    assert max(len(found.sample(i).token_ids) for i in range(len(found))) == 12
    assert_close(losses(trainer), losses(make(PlainDPO, tiny_model, tmp_path, PAIRS, **settings)))


def test_sums_are_those_of_the_base_whatever_the_adapter(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    """PiSSA takes a part out of the weights: with its adapter off, what is left is not the base."""
    pissa = adapter(4, init_lora_weights="pissa")
    rows = make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, peft_config=pissa).train_dataset
    for row in (rows[0], rows[5]):
        for kind in ("chosen", "rejected"):
            expected = sum_of_logprobs(tiny_model, row["prompt_ids"], row[f"{kind}_ids"])
            assert row[f"ref_{kind}_logps"] == pytest.approx(expected, rel=1e-6)
    row = make(CachedKTO, tiny_model, tmp_path, PAIRS, cache, peft_config=pissa).train_dataset[5]
    for column, completion in (("ref_logps", "completion_ids"), ("ref_KL_logps", "KL_completion_ids")):
        assert row[column] == pytest.approx(sum_of_logprobs(tiny_model, row["prompt_ids"], row[completion]), rel=1e-6)
    assert row["completion_ids"] != row["KL_completion_ids"]


def test_another_model_may_be_the_reference(cache: Path, tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    rules = PairingRules(teacher_is_not_base=True)
    trainer = make(CachedDPO, other_model, tmp_path, PAIRS, cache, rules=rules, max_steps=1)
    row = trainer.train_dataset[3]
    expected = sum_of_logprobs(tiny_model, row["prompt_ids"], row["chosen_ids"])
    assert row["ref_chosen_logps"] == pytest.approx(expected, rel=1e-6) and trainer.step_zero is None
    plain = make(PlainDPO, other_model, tmp_path, PAIRS, ref_model=load(tiny_model), max_steps=1)
    assert_close(losses(trainer), losses(plain))


def test_kto_without_a_kl_needs_no_mismatched_pairs(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 3, "max_steps": 2}
    trainer = make(CachedKTO, tiny_model, tmp_path, PAIRS, cache, **settings)
    assert "ref_KL_logps" not in trainer.train_dataset.column_names
    assert_close(losses(trainer), losses(make(PlainKTO, tiny_model, tmp_path, PAIRS, **settings)))


def test_evaluation_reads_the_cache_too(tiny_model: Path, tmp_path: Path) -> None:
    held_out = {"a": PAIRS.select([0, 3]), "b": PAIRS.select([5])}
    settings = {"eval_dataset": held_out, "max_steps": 1}
    trainer = make(CachedDPO, tiny_model, tmp_path, PAIRS.select([1, 2]), tmp_path / "c", fill=True, **settings)
    assert [trainer.filled[name].num_samples for name in ("train", "a", "b")] == [4, 4, 2]
    assert {d.name for d in LogitCache.open(tmp_path / "c").data_sets} == {FILLED, f"{FILLED} (a)", f"{FILLED} (b)"}
    plain = make(PlainDPO, tiny_model, tmp_path, PAIRS.select([1, 2]), **settings)
    found, expected = ([losses(t), t.evaluate(), t.evaluate(PAIRS.select([0]))] for t in (trainer, plain))
    assert_close(found[0], expected[0])
    for which, name in ((1, "eval_a_loss"), (1, "eval_b_loss"), (2, "eval_loss")):
        assert found[which][name] == pytest.approx(expected[which][name], abs=1e-5)
    with pytest.raises(NotTheBase, match="untrained"):
        trainer.evaluate(PAIRS.select([7]))


def test_a_rounded_cache_says_how_far_its_sums_may_be_off(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = CaptureSettings(top_k=0)
    trainer = make(CachedDPO, tiny_model, tmp_path, PAIRS, tmp_path / "c", fill=True, capture=kept)
    assert "rounded to 1/1024 nat" in caplog.text and "--precision exact" in caplog.text
    off = []
    for row in trainer.train_dataset:
        for kind in ("chosen", "rejected"):
            error = row[f"ref_{kind}_logps"] - sum_of_logprobs(tiny_model, row["prompt_ids"], row[f"{kind}_ids"])
            off.append(abs(error) / (len(row[f"{kind}_ids"]) / 2048))
    assert 1e-3 < max(off) <= 1


@pytest.mark.parametrize(
    ("captured", "trained", "bf16", "said"),
    [
        (torch.float32, torch.float32, False, ""),
        (torch.float32, torch.float32, True, "in float32, and what is trained computes in float32 under bfloat16"),
        (torch.bfloat16, torch.float32, False, "in bfloat16, and what is trained computes in float32, "),
        (torch.bfloat16, torch.bfloat16, True, ""),
    ],
)
def test_a_base_in_another_dtype_than_what_is_trained_is_said(
    captured: torch.dtype,
    trained: torch.dtype,
    bf16: bool,
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(CachedDPO, tiny_model, tmp_path, PAIRS, tmp_path / "c", model=load(tiny_model, captured), fill=True)
    caplog.clear()
    make(CachedDPO, tiny_model, tmp_path, PAIRS, tmp_path / "c", model=load(tiny_model, trained), bf16=bf16)
    assert said in caplog.text
    assert ("what is trained computes in" in caplog.text) == bool(said)


# Refused


class OwnLoss(DPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("kind", "found"),
    [(SFTTrainer, "SFTTrainer"), (MovingReferenceDPO, "bema_for_ref_model"), (OwnLoss, "OwnLoss._compute_loss")],
)
def test_a_trainer_that_is_not_known_is_refused(kind: Any, found: str) -> None:
    class Mixed(CachedReference, kind):  # type: ignore[misc]
        """Below the mixin, where its loss may read another reference."""

    with pytest.raises(TrainingFailed, match=rf"expected DPOTrainer or KTOTrainer.*found .*{found}"):
        Mixed(cache="nowhere")


def test_what_a_user_adds_above_the_mixin_is_called() -> None:
    assert issubclass(CachedDPO, Recorded) and columns_of(CachedDPO) == ("ref_chosen_logps", "ref_rejected_logps")
    assert columns_of(CachedKTO) == ("ref_logps", "ref_KL_logps")


class Positions(DataCollatorForPreference):
    def torch_call(self, examples: Any) -> Any:
        batch = super().torch_call(examples)
        return {**batch, "position_ids": batch["attention_mask"].cumsum(1) + 7}


class Renamed(DataCollatorForPreference):
    def torch_call(self, examples: Any) -> Any:
        return {"tokens": super().torch_call(examples)["input_ids"]}


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "without effect": (CachedDPO, {"precompute_ref_log_probs": False}, TrainingFailed, "precompute_ref_log_probs=True"),
    "capture": (CachedDPO, {"capture": CaptureSettings()}, InvalidSettings, "fill=True"),
    "another teacher": (
        CachedDPO,
        {"fill": True, "rules": PairingRules(teacher_is_not_base=True)},
        InvalidSettings,
        "teacher_is_not_base",
    ),
    "a cut vocabulary": (CachedDPO, {"rules": PairingRules(ignore_padding=True)}, InvalidSettings, "ignore_padding"),
    "other pairs": (CachedKTO, {"per_device_train_batch_size": 5}, SampleNotCached, "row 0 of the train.*order of the"),
    "inputs": (CachedDPO, {"data_collator": Positions(0)}, InvalidBatch, "found position_ids"),
    "no inputs": (CachedDPO, {"data_collator": Renamed(0)}, InvalidBatch, "completion_mask.*found tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name: str, cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    kind, settings, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make(kind, tiny_model, tmp_path, PAIRS, cache, **settings)


def test_a_reference_model_and_data_that_bring_sums_are_refused(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="found a ref_model"):
        make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, ref_model=load(tiny_model))
    with pytest.raises(TrainingFailed, match="found train data that bring ref_chosen_logps"):
        make(CachedDPO, tiny_model, tmp_path, PAIRS.add_column("ref_chosen_logps", [0.0] * len(PAIRS)), cache)
    with pytest.raises(TrainingFailed, match="a stream"):
        make(CachedDPO, tiny_model, tmp_path, PAIRS.to_iterable_dataset(), cache)


def test_a_row_that_is_missing_is_named(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    more = Dataset.from_list([*PAIRS, {"prompt": "new ", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(SampleNotCached, match=r"row 8 of the train data.*fill=True"):
        make(CachedDPO, tiny_model, tmp_path, more, cache)


def test_another_base_and_a_trained_adapter_are_refused(
    cache: Path, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """TRL's own reference of an adapter that came with the model is that adapter, not the base."""
    for peft_config in (adapter(), None):
        with pytest.raises((NotTheBase, IdentityMismatch)):
            make(CachedDPO, other_model, tmp_path, PAIRS, cache, peft_config=peft_config)
    trained = get_peft_model(load(tiny_model), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    untrained = make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, model=trained, peft_config=None)
    assert untrained.step_zero.kl_nats <= 1e-5
    trained = get_peft_model(load(tiny_model), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with pytest.raises(NotTheBase, match=r"TRL's own reference would be the adapter.*merge it into the base"):
        make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, model=trained, peft_config=None)


def test_a_new_adapter_that_starts_elsewhere_is_refused_unless_it_is_meant_to(
    cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Its reference is the base below, as it is without a cache."""
    elsewhere = adapter(4, init_lora_weights=False)
    with pytest.raises(NotTheBase, match="does not start as the identity"):
        make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, peft_config=elsewhere)
    settings = {"peft_config": elsewhere, "max_steps": 1}
    trainer = make(CachedDPO, tiny_model, tmp_path, PAIRS, cache, check=False, **settings)
    found = losses(trainer)
    assert_close(found, losses(make(PlainDPO, tiny_model, tmp_path, PAIRS, **settings)))
    assert abs(found[0] - np.log(2)) > 1e-3


# The page


def test_the_page_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script, the rows of a trainer without a cache, and their `precompute`, which the script then reads."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", ""]
    (tmp_path / "base").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {
        "Dataset": Dataset,
        "DPOConfig": DPOConfig,
        "DPOTrainer": DPOTrainer,
        "model": load(tiny_model),
        "pairs": PAIRS,
        "peft_config": adapter(),
        "settings": {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1, "disable_tqdm": True},
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model),
    }
    exec(blocks[0][1], scope)
    assert scope["trainer"].filled["train"].num_samples == 2 * len(PAIRS)
    scope["model"] = load(tiny_model)
    exec(blocks[1][1], scope)
    assert run(shlex.split(blocks[2][1])[1:]) == 0
    made, filled = LogitCache.open("beforehand"), LogitCache.open("cache")
    assert (len(made), made.num_positions) == (len(filled), filled.num_positions)
    for sample in filled.samples():
        found = made.lookup(sample.token_ids, sample.logprobs.positions).label_logprobs
        assert np.abs(found - sample.logprobs.label_logprobs).max() <= 1e-6
