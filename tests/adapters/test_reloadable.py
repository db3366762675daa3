"""Adapter folders that others made: evaluated as they were trained, or refused."""

import inspect
import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, MontecloraConfig, VeloraConfig
from support.cli_harness import done, precompute, refused, text_data, train_line
from support.tiny_model import make_model

from logitcache.adapters.start import calibrate_corda, calibrate_loraga
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import UnsuitableAdapter, release_of
from logitcache.evaluation.compare import compare, load_adapter
from logitcache.models.head import OutputHead, causal_lm_of, hidden_states
from logitcache.training import run_folder

TARGETS = ["q_proj", "v_proj", "down_proj"]
SAMPLES = [
    Sample(np.arange(3, 43, dtype=np.uint32) * (5 + i) % 250, np.ones(40, dtype=np.bool_), f"row {i}") for i in range(6)
]
IDS = torch.arange(24).reshape(2, 12) * 7 % 250


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)


def trained(config: LoraConfig, first: Path | None = None) -> PeftModel:
    """By PEFT and torch alone, for some steps. first: where the untrained adapter is kept, as PEFT advises."""
    model = make_model()
    torch.manual_seed(1)
    if config.init_lora_weights == "corda":
        calibrate_corda(model, config, SAMPLES)
    if config.init_lora_weights == "lora_ga":
        calibrate_loraga(model, config, SAMPLES)
    adapted = get_peft_model(model, config)
    if first is not None:
        how, adapted.peft_config["default"].init_lora_weights = config.init_lora_weights, True
        adapted.save_pretrained(str(first), save_embedding_layers=False)
        adapted.peft_config["default"].init_lora_weights = how
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    batch = {k: v for k, v in pad_samples(SAMPLES).items() if k in ("input_ids", "attention_mask")}
    for _ in range(10):
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def cross_entropy(model: Any) -> float:
    """On the samples, nats a token, by the model's own forward."""
    batch = {k: v for k, v in pad_samples(SAMPLES).items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return float(model(**batch, labels=batch["input_ids"]).loss)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def evaluated(folder: Path, seed: int) -> float:
    """Cross-entropy after, as `evaluate` finds it, with torch's generator at some place."""
    untouched, base = make_model(), make_model()
    torch.manual_seed(seed)
    after = compare(untouched, load_adapter(base, str(folder)), SAMPLES).after
    assert after is not None
    return after.ce_nats


def forged(folder: Path, **changes: Any) -> Path:
    """The adapter folder with another configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
    return folder


# --- initialisations of LoRA ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:CorDA changes the base weights")  # PEFT, of the two adapters of its conversion
@pytest.mark.filterwarnings("ignore:.*_config` specified but will be ignored")  # PEFT keeps it in what it converts
@pytest.mark.parametrize("how", ["pissa_niter_4", "corda", "lora_ga"])
def test_what_loading_does_not_make_again_is_refused_and_the_way_out_is_right(how: str, tmp_path: Path) -> None:
    """PEFT draws pissa_niter's decomposition anew, leaves out lora_ga's, and asks for corda's samples."""
    more = {"corda": {"corda_config": CordaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}.get(how, {})
    adapted = trained(lora(init_lora_weights=how, **more), tmp_path / "first")
    right = cross_entropy(adapted)
    adapted.save_pretrained(str(tmp_path / "unconverted"), save_embedding_layers=False)
    with pytest.raises(UnsuitableAdapter) as caught:
        load_adapter(make_model(), str(tmp_path / "unconverted"))
    assert caught.value.reason == "unsuitable-adapter"
    told = str(caught.value)
    assert how in told and "path_initial_model_for_weight_conversion" in told and "logitcache train" in told

    first = str(tmp_path / "first")
    adapted.save_pretrained(
        str(tmp_path / "converted"), save_embedding_layers=False, path_initial_model_for_weight_conversion=first
    )
    assert (
        evaluated(tmp_path / "converted", 1) == evaluated(tmp_path / "converted", 2) == pytest.approx(right, abs=1e-4)
    )


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora"])
def test_what_loading_makes_again_is_evaluated_as_it_was_trained(how: bool | str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eva")  # that it has no samples here: A is as torch makes it
        adapted = trained(lora(init_lora_weights=how))
    right, expected = cross_entropy(adapted), logits(adapted)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert evaluated(tmp_path, 1) == evaluated(tmp_path, 2) == pytest.approx(right, abs=1e-5)
    assert torch.equal(logits(load_adapter(make_model(), str(tmp_path))), expected)
    assert abs(right - cross_entropy(make_model())) > 0.1


@pytest.mark.parametrize("how", ["pissa_niter_0", "corda", "lora_ga", "loftq", "another"])
def test_every_other_initialisation_is_refused_before_anything_is_loaded(how: str, tmp_path: Path) -> None:
    trained(lora()).save_pretrained(str(tmp_path), save_embedding_layers=False)
    forged(tmp_path, init_lora_weights=how)
    base = make_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(UnsuitableAdapter, match=how):
        load_adapter(base, str(tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_evaluate_says_so_on_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    data = text_data(tmp_path)
    trained(lora(init_lora_weights="pissa_niter_4")).save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    line = ["--model", tiny_model, "--adapter", tmp_path / "a", "--data", data, "--prior", data]
    told = refused(2, "evaluate", *line)
    assert "pissa_niter_4" in told and "path_initial_model_for_weight_conversion" in told


# --- checkpoints of our own runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "is_whole"), [("lora", True), ("milora", False), ("pissa", False)])
def test_a_checkpoint_belongs_to_the_weights_it_was_trained_on(
    kind: str, is_whole: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where these are not the base's, it is for --resume alone: evaluated on the base, it is another model."""
    data = text_data(tmp_path)
    precompute(tiny_model, data, tmp_path / "c")
    settle, kept = run_folder.settle, tmp_path / "kept"
    monkeypatch.setattr(run_folder, "settle", lambda out: (shutil.copytree(out / "checkpoints", kept), settle(out)))
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--adapter", kind, "--rank", 4, "--lr", "1e-2"))
    kept.rename(tmp_path / "o" / "checkpoints")  # as a run has them that is not finished
    checkpoint = max((tmp_path / "o" / "checkpoints").glob("checkpoint-*"), key=lambda c: int(c.name.split("-")[1]))
    line = ["--model", tiny_model, "--data", data, "--prior", data, "--json"]
    at_the_end = json.loads(done("evaluate", *line, "--adapter", tmp_path / "o").out)
    if is_whole:
        assert json.loads(done("evaluate", *line, "--adapter", checkpoint).out) == at_the_end
        return
    told = refused(2, "evaluate", *line, "--adapter", checkpoint)
    assert kind in told and "--resume" in told and str(tmp_path / "o") in told
    assert "--resume" in refused(2, "evaluate", *line, "--adapter", tmp_path / "o" / "checkpoints" / "start")


# --- every type of PEFT's, and LoRA's variants ------------------------------------------------------------------------

CHANGED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4, "psoft_svd": "lowrank"},
    "P_TUNING": {"num_virtual_tokens": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [7, 14]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 50},
}
"""Of PEFT's own settings, so that they fit the tiny model."""

WITHOUT_PROJECTIONS = ["VERA", "RANDLORA", "PVERA", "FROD", "TINYLORA"]
"""Types that may leave their random bases out of the file, and draw them from a seed in the configuration."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "all biases": {"bias": "all"},
    "velora": {"velora_config": VeloraConfig()},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "bdlora": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2, match_strict=False
        )
    },
    "alora": {"alora_invocation_tokens": [7]},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "layers twice": {"layer_replication": [(0, 2), (0, 2)]},
    "trained tokens": {"trainable_token_indices": [7, 14]},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"]},
}
if hasattr(lora_configs, "KasaConfig"):  # since PEFT 0.21
    VARIANTS["kasa"] = {"kasa_config": lora_configs.KasaConfig()}


def config_of(name: str, **changes: Any) -> Any:
    kind = {str(k.value): c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[name]
    targets = {"target_modules": TARGETS} if "target_modules" in inspect.signature(kind).parameters else {}
    return kind(task_type="CAUSAL_LM", **{**targets, **CHANGED.get(name, {}), **changes})


def moved(config: Any) -> PeftModel:
    """Every value that would be trained is drawn from another place than where it starts."""
    model = make_model()
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    torch.manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return adapted.eval()


def assert_the_same_after_loading(adapted: PeftModel, folder: Path) -> None:
    """By PEFT's own forward and as `evaluate` runs it, whatever torch's generator is at."""
    expected = logits(adapted)
    assert (expected - logits(make_model())).abs().max() > 1e-3
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    for seed in (3, 4):
        base = make_model()
        torch.manual_seed(seed)
        again = load_adapter(base, str(folder))
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
        hidden = hidden_states(again, input_ids=IDS, attention_mask=torch.ones_like(IDS))
        torch.testing.assert_close(OutputHead(causal_lm_of(again))(hidden), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(str(k.value) for k in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_type_is_evaluated_as_it_was_trained_or_refused(name: str, tmp_path: Path) -> None:
    from logitcache.adapters.reloadable import TYPES

    if name in TYPES:
        assert_the_same_after_loading(moved(config_of(name)), tmp_path)
        return
    lora().save_pretrained(str(tmp_path))
    with pytest.raises(UnsuitableAdapter, match=f"found {name}"):
        load_adapter(make_model(), str(forged(tmp_path, peft_type=name)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", WITHOUT_PROJECTIONS)
def test_bases_drawn_from_a_seed_that_is_kept_are_drawn_again(name: str, tmp_path: Path) -> None:
    adapted = moved(config_of(name, save_projection=False))
    if name == "TINYLORA" and release_of(version("peft")) < (0, 21):
        adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
        with pytest.raises(UnsuitableAdapter, match=r"expected PEFT 0\.21 or later, which draws the projections"):
            load_adapter(make_model(), str(tmp_path))
        return
    assert_the_same_after_loading(adapted, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora_are_evaluated_as_they_were_trained(name: str, tmp_path: Path) -> None:
    assert_the_same_after_loading(moved(lora(**VARIANTS[name])), tmp_path)


def test_an_adapter_that_draws_at_random_in_every_forward_is_refused(tmp_path: Path) -> None:
    adapted = moved(config_of("PVERA", sample_at_inference=True))
    assert not torch.equal(logits(adapted), logits(adapted))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UnsuitableAdapter, match="draws at random in every"):
        load_adapter(make_model(), str(tmp_path))
