"""A cache that fills itself is filled by its base alone: what is refused, and that nothing is written then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, get_peft_model
from support.cli_harness import snapshot
from support.families import FAMILIES, make_family
from support.filling import SAMPLES, load, make_trainer, moved, plain_trainer, precomputed
from support.plug_ins import lora, make_sft, rows_of
from support.tiny_model import make_tokenizer
from support.tiny_runs import make_samples

from logitcache import CachedLoss, CaptureSettings, Objective, PairingRules
from logitcache.data.batches import pad_samples
from logitcache.errors import InvalidData, InvalidSettings, NotTheBase, TrainingFailed
from logitcache.models.as_configured import unlike_configured
from logitcache.storage import IdentityMismatch, LogitCache
from logitcache.training.supported import divided_by

# TRL's SFTConfig sets gradient_checkpointing, whose name transformers 5.23 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def moved_head(model: Any) -> Any:
    adapted = get_peft_model(model, lora(modules_to_save=["lm_head"]))
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.01)
    return adapted


def trained_whole(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    return model


def other_eps(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.3
    return model


def other_config(model: Any) -> Any:
    model.config.rms_norm_eps = 1e-3
    return model


def nameless(model: Any) -> Any:
    model.config._name_or_path = model.name_or_path = ""
    return model


NOT_THE_BASE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "pissa": (
        lambda f: get_peft_model(load(f), lora(init_lora_weights="pissa")),
        NotTheBase,
        r"found 14 rewritten by the adapter \(of 21 tensors",
    ),
    "olora": (
        lambda f: get_peft_model(load(f), lora(init_lora_weights="olora")),
        NotTheBase,
        "rewritten by the adapter",
    ),
    "an adapter that was trained": (lambda f: moved(load(f)), NotTheBase, "untrained and starts as the identity"),
    "one in bfloat16": (lambda f: moved(load(f, "bfloat16")), NotTheBase, "untrained and starts as the identity"),
    "one merged": (lambda f: moved(load(f)).merge_and_unload(), NotTheBase, "found others in 14 of 21 tensors"),
    "a head that was trained": (lambda f: moved_head(load(f)), NotTheBase, "untrained and starts as the identity"),
    "all weights, trained": (lambda f: trained_whole(load(f)), NotTheBase, "found others in 1 of 21 tensors"),
    "prefix tuning": (
        lambda f: get_peft_model(load(f), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        NotTheBase,
        "untrained and starts as the identity, found one that adds virtual tokens",
    ),
    "rounded to 16 bits and widened": (lambda f: load(f, "bfloat16").float(), NotTheBase, "found others in"),
    "buffers rounded too": (lambda f: load(f).bfloat16(), NotTheBase, r"inv_freq, a buffer that no checkpoint has"),
    "another eps in the modules": (lambda f: other_eps(load(f)), NotTheBase, r"variance_epsilon: 1e-06 by its conf"),
    "another configuration": (lambda f: other_config(load(f)), NotTheBase, "rms_norm_eps"),
    "no checkpoint": (lambda f: nameless(load(f)), TrainingFailed, "expected the checkpoint that the model was loaded"),
    "two dtypes": (
        lambda f: trained_norms(load(f, "bfloat16")),
        TrainingFailed,
        "weights of one dtype.*bfloat16, float32",
    ),
}


def trained_norms(model: Any) -> Any:
    """As `prepare_model_for_kbit_training` leaves some."""
    model.model.norm.float()
    return model


@pytest.mark.parametrize("what", NOT_THE_BASE)
@pytest.mark.parametrize("where", ["trainer", "loop"])
def test_what_is_not_the_base_any_more_fills_nothing(what: str, where: str, tiny_model: Path, tmp_path: Path) -> None:
    make, kind, said = NOT_THE_BASE[what]
    model = make(tiny_model)

    def start() -> None:
        if where == "loop":
            CachedLoss(tmp_path / "c", fill=True).fill(model, [pad_samples(SAMPLES)])
        else:
            plain_trainer(tmp_path, model)

    with pytest.raises(kind, match=said) as told:
        start()
    assert "Nothing was captured." in str(told.value) and not (tmp_path / "c").exists()


def test_a_head_that_no_checkpoint_has_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    load(tiny_model).model.save_pretrained(tmp_path / "body")
    make_tokenizer().save_pretrained(tmp_path / "body")
    torch.manual_seed(0)
    model = load(tmp_path / "body")
    with pytest.raises(NotTheBase, match=r"found 1 that it has not \(the first: lm_head.weight\)"):
        make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), model=model)


def test_what_went_on_from_a_trained_adapter_reads_and_does_not_fill(tiny_model: Path, tmp_path: Path) -> None:
    """All is there: nobody asks what the model is. Something is missing: an error, as without fill."""
    path = precomputed(tiny_model, SAMPLES[:8], tmp_path / "c")
    trained = {"model": moved(load(tiny_model)), "check": False}
    trainer = make_trainer(tmp_path / "o", tiny_model, str(path), SAMPLES[:8], **trained)
    trainer.train()
    assert trainer.filled is None
    before = snapshot(path)
    with pytest.raises(NotTheBase, match="untrained"):
        make_trainer(tmp_path / "o", tiny_model, str(path), **trained)
    assert snapshot(path) == before


@pytest.mark.parametrize("how", ["other weights", "another dtype", "another attention", "another tokenizer"])
def test_a_cache_of_another_base_is_left_as_it_is(
    how: str, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    path = precomputed(other_model if how == "other weights" else tiny_model, SAMPLES[:8], tmp_path / "c")
    before = snapshot(path)
    changes: dict[str, dict[str, Any]] = {
        "other weights": {},
        "another dtype": {"model": load(tiny_model, "bfloat16")},
        "another attention": {"model": load(tiny_model, attn_implementation="eager")},
        "another tokenizer": {"processing_class": make_tokenizer()},
    }
    if how == "another tokenizer":
        changes[how]["processing_class"].add_tokens(["new"])
    said = {"other weights": "model.weights", "another dtype": "model.dtype", "another attention": "model.attention"}
    with pytest.raises(IdentityMismatch, match=said.get(how, "tokenizer.fingerprint")):
        make_trainer(tmp_path / "o", tiny_model, str(path), **changes[how])
    assert snapshot(path) == before


def test_a_cache_that_keeps_something_else_than_asked_is_refused_full_or_not(tiny_model: Path, tmp_path: Path) -> None:
    path = precomputed(tiny_model, SAMPLES, tmp_path / "c", top_k=8)
    with pytest.raises(IdentityMismatch, match=r"top_k: 16 asked for, 8 there"):
        make_trainer(tmp_path / "o", tiny_model, str(path), capture=CaptureSettings(top_k=16))
    more = [*SAMPLES, *make_samples(3, seed=5)]
    trainer = make_trainer(tmp_path / "o", tiny_model, str(path), more)  # without capture: as the cache is
    assert trainer.filled.num_samples == 3 and LogitCache.open(path).manifest.capture.top_k == 8


def test_what_the_objective_cannot_read_is_refused_before_the_base_runs(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="holds the tail as one mass"):
        make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), objective=Objective(tail="groups"))
    assert not (tmp_path / "c").exists()
    capture = CaptureSettings(tail_groups=4)
    objective = Objective(tail="groups")
    make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), objective=objective, capture=capture).train()


def test_samples_longer_than_the_cache_takes_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"rows 0 to 15 of the training data: expected at most 8 tokens"):
        make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), capture=CaptureSettings(max_length=8))


def test_what_nobody_reads_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    path = precomputed(tiny_model, SAMPLES, tmp_path / "c")
    for told, changes in (
        ("^capture: ", {"fill": False, "capture": CaptureSettings()}),
        ("expected the path of a cache, found LogitCache", {"cache": LogitCache.open(path)}),
        ("regularizer none: the loss reads nothing", {"objective": Objective("none")}),
        ("teacher_is_not_base", {"rules": PairingRules(teacher_is_not_base=True)}),
    ):
        with pytest.raises(InvalidSettings, match=told):
            CachedLoss(**{"cache": str(path), "fill": True, **changes})
    with pytest.raises(InvalidSettings, match="regularizer none"):
        make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "none"), objective=Objective("none"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"expected CachedLoss\(..., fill=True\)"):
        CachedLoss(str(path)).fill(load(tiny_model), [])
    model = get_peft_model(load(tiny_model), lora())
    pending = CachedLoss(str(path), fill=True)
    for look in (lambda: pending(model, pad_samples(SAMPLES[:2])), pending.collator, lambda: pending.view(model)):
        with pytest.raises(TrainingFailed, match=r"Call fill\(model, batches\) before the first step"):
            look()
    stream = Dataset.from_list(rows_of(SAMPLES)).to_iterable_dataset()
    with pytest.raises(TrainingFailed, match="training data of a known length"):
        make_sft(tmp_path / "o", stream, str(path), load(tiny_model), fill=True)


def test_a_model_that_will_be_divided_is_refused_in_one_sentence(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.training.trainer.divided_by", lambda _: "FSDP")
    with pytest.raises(TrainingFailed, match=r"under FSDP: expected a model that each process holds whole"):
        make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    path = precomputed(tiny_model, SAMPLES, tmp_path / "d")
    trainer = make_trainer(tmp_path / "o", tiny_model, str(path))
    assert trainer.filled is None  # nothing is missing: nothing is refused
    assert divided_by(trainer) == ""
    trainer.is_fsdp_enabled = True
    assert divided_by(trainer) == "FSDP"
    trainer.is_deepspeed_enabled = True
    assert divided_by(trainer) == "DeepSpeed"


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_as_transformers_loads_them_are_as_configured(family: str, tmp_path: Path) -> None:
    make_family(family).save_pretrained(tmp_path / "m")
    for dtype in ("float32", "bfloat16"):
        model = load(tmp_path / "m", dtype)
        assert unlike_configured(model) == []
        if family != "Phi":
            continue
        assert unlike_configured(get_peft_model(model, lora()).base_model.model) == []
