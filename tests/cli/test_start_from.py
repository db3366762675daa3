"""train --start-from, --attn-implementation and --revision: what a run starts at, and what may be no start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.cli_harness import done, precompute, refused, text_data
from transformers import AutoModelForCausalLM

from logitcache.adapters.attach import AdapterSettings
from logitcache.cli.progress import TrainBar
from logitcache.errors import NotTheBase
from logitcache.losses.formulas import Objective
from logitcache.models import loading
from logitcache.training.run import train

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path]:
    """A cache, and a LoRA of rank 2 that was trained against it."""
    folder = tmp_path_factory.mktemp("start")
    precompute(tiny_model, text_data(folder, 0, 8), folder / "cache")
    done(*line_of(tiny_model, folder / "cache", folder / "first", "--max-steps", 3, "--lr", 0.05))
    return folder / "cache", folder / "first"


def line_of(model: Path, cache: Path, out: Path, *more: object) -> list[object]:
    short = ["--rank", 2, "--lr", 1e-2, "--max-steps", 2, "--batch-size", 4, "--log-every", 1]
    return ["train", "--model", model, "--cache", cache, "--out", out, *short, *more]


def test_a_run_starts_at_the_weights_of_an_adapter(
    tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]
) -> None:
    """At a learning rate of 0 it ends there; the KL of step 1 is its own, that of the check before it the base's."""
    cache, first = folders
    outcome = done(*line_of(tiny_model, cache, tmp_path / "o", "--start-from", first, "--lr", 0))
    assert "Before step 1 the KL to the base was" in outcome.err
    began, ended = load_file(first / ADAPTER), load_file(tmp_path / "o" / ADAPTER)
    assert began.keys() == ended.keys() and all(torch.equal(began[name], ended[name]) for name in began)
    log = json.loads((tmp_path / "o" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert log["kl"] > 1e-2


def test_another_start_is_another_run(tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]) -> None:
    cache, first = folders
    done(*line_of(tiny_model, cache, tmp_path / "o", "--start-from", first))
    line = [*line_of(tiny_model, cache, tmp_path / "o"), "--resume"]
    assert "differs in start_from " in refused(4, *line)
    assert "differs in start_from " in refused(4, *line, "--start-from", tmp_path / "o")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank", 4], "found --rank: 2 there, 4 here; --alpha: 4.0 there, 8.0 here"),
        (["--alpha", 7], "found --alpha: 4.0 there, 7.0 here"),
        (["--adapter", "dora"], "found --adapter dora: False there, True here"),
        (["--target-modules", "q_proj"], "found --target-modules: "),
        (["--adapter", "pissa"], "found pissa, whose first weights are its own"),
    ],
)
def test_an_adapter_of_another_shape_is_no_start(
    more: list[object], said: str, tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]
) -> None:
    cache, first = folders
    assert said in refused(2, *line_of(tiny_model, cache, tmp_path / "o", "--start-from", first, *more))


def test_an_adapter_of_another_base_is_no_start(
    tmp_path: Path, tiny_model: Path, other_model: Path, folders: tuple[Path, Path]
) -> None:
    cache, _ = folders
    plain = ["--regularizer", "none", "--data", text_data(tmp_path, 0, 8), "--max-steps", 1]
    done(*[word for word in line_of(other_model, cache, tmp_path / "other", *plain) if word not in ("--cache", cache)])
    said = refused(4, *line_of(tiny_model, cache, tmp_path / "o", "--start-from", tmp_path / "other"))
    assert "it was trained on" in said and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("made_with", "said"),
    [
        ({"alpha_pattern": {"q_proj": 40}}, "found alpha_pattern: {'q_proj': 40} there, {} here"),
        (
            {"init_lora_weights": "pissa"},
            "found init_lora_weights 'pissa', which took a part out of the base's weights",
        ),
        ({"init_lora_weights": "olora"}, "found init_lora_weights 'olora'"),
        ({"modules_to_save": ["lm_head"]}, "found --modules-to-save: base_model.model.lm_head.weight is in one"),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj.lora_A.weight: [4, 32] there, [2, 32] here"),
    ],
)
def test_a_lora_that_computes_otherwise_is_no_start(
    made_with: dict[str, Any], said: str, tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]
) -> None:
    """A scale of one layer, or a base that was rewritten, is told by the configuration alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **made_with}
    get_peft_model(base, LoraConfig(**config)).save_pretrained(tmp_path / "foreign")
    line = line_of(tiny_model, folders[0], tmp_path / "o", "--start-from", tmp_path / "foreign")
    assert said in refused(2, *line)


def test_an_adapter_of_another_base_is_no_start_from_python(
    tmp_path: Path, other_model: Path, folders: tuple[Path, Path]
) -> None:
    _, first = folders
    rows, rank = str(text_data(tmp_path, 0, 8)), AdapterSettings(rank=2)
    with pytest.raises(NotTheBase, match="it was trained on"):
        train(str(other_model), rows, None, tmp_path / "o", rank, Objective("none"), start=first)


def test_attention_is_computed_as_is_said(tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]) -> None:
    cache, _ = folders
    done(*line_of(tiny_model, cache, tmp_path / "o", "--attn-implementation", "eager", "--max-steps", 1))
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["model"]["attention"] == "eager"


def test_a_folder_has_no_revision(tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]) -> None:
    said = refused(2, *line_of(tiny_model, folders[0], tmp_path / "o", "--revision", "v1"))
    assert "--revision v1:" in said and "is a local folder" in said


def test_a_module_is_trained_whole_and_saved(
    tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head: what PEFT loads computes what was measured at the last step, and a run that goes on ends the same."""
    cache, _ = folders
    line = line_of(tiny_model, cache, tmp_path / "o", "--max-steps", 4, "--lr", 3e-3, "--modules-to-save", "lm_head")
    done(*line, "--eval-prior", cache)
    saved = load_file(tmp_path / "o" / ADAPTER)
    before = load_file(tiny_model / "model.safetensors")["lm_head.weight"]
    assert (saved["base_model.model.lm_head.weight"] - before).abs().max() > 1e-3
    found = json.loads(
        done("evaluate", "--model", tiny_model, "--adapter", tmp_path / "o", "--prior-cache", cache, "--json").out
    )
    last = json.loads((tmp_path / "o" / "eval_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["prior_kl"] == pytest.approx(found["prior"]["kl_nats"], rel=1e-4) and last["prior_kl"] > 1e-3

    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    again = line_of(tiny_model, cache, tmp_path / "p", *line[-6:], "--eval-prior", cache, "--save-steps", 3)
    with monkeypatch.context() as patch:
        patch.setattr(TrainBar, "on_save", stops)
        refused(130, *again)
    assert "Going on from checkpoint-3." in done(*again, "--resume").err
    assert (tmp_path / "p" / ADAPTER).read_bytes() == (tmp_path / "o" / ADAPTER).read_bytes()


def test_a_revision_is_told_to_who_loads_the_adapter(
    tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the base's main branch it would be an adapter of other weights; a run that goes on may find them elsewhere."""
    asked: list[Any] = []

    def snapshot(name: str, revision: str | None = None, **_: Any) -> str:
        asked.append((name, revision))
        return str(tiny_model)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    out = tmp_path / "o"
    done(*line_of(Path("owner/name"), folders[0], out, "--revision", "v2"))
    assert set(asked) == {("owner/name", "v2")}
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v2")
    assert 'AutoModelForCausalLM.from_pretrained("owner/name", revision="v2")' in (out / "README.md").read_text("utf-8")
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["model"]["revision"] == "v2"
    done(*line_of(tiny_model, folders[0], out, "--resume"))


def test_what_is_named_is_trained_whole_and_nothing_else(
    tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]
) -> None:
    done(*line_of(tiny_model, folders[0], tmp_path / "o", "--modules-to-save", "model.norm,input_layernorm"))
    whole = {name for name in load_file(tmp_path / "o" / ADAPTER) if "lora_" not in name}
    layers = {f"base_model.model.model.layers.{i}.input_layernorm.weight" for i in range(2)}
    assert whole == {"base_model.model.model.norm.weight", *layers}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--modules-to-save", "head"], "training 'head' whole beside lora: no module is called so"),
        (["--modules-to-save", "q_proj"], "training 'q_proj' whole beside lora: the adapter is on it"),
        (["--modules-to-save", "norm"], "PEFT would train model.layers.0.input_layernorm too, whose name ends so"),
        (["--modules-to-save", "layers", "--target-modules", "lm_head"], "training 'layers' whole beside lora: it is"),
        (["--modules-to-save", "lm_head,"], "--modules-to-save 'lm_head,': expected names separated by commas"),
        (["--modules-to-save", "lm_head", "--adapter", "pissa"], "pissa is saved as the change of weights"),
    ],
)
def test_a_module_that_cannot_be_trained_whole_is_2(
    more: list[object], said: str, tmp_path: Path, tiny_model: Path, folders: tuple[Path, Path]
) -> None:
    assert said in refused(2, *line_of(tiny_model, folders[0], tmp_path / "o", *more))
    assert not (tmp_path / "o").exists()
