"""What the installed PEFT lacks is refused by name, and the refusal says which version has it."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from support.adapter_cases import SAMPLES
from support.tiny_model import make_model

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.errors import UnsuitableAdapter
from logitcache.evaluation.compare import load_adapter


def with_peft(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attaching believes that this PEFT is installed."""
    monkeypatch.setattr(import_module("logitcache.adapters.attach"), "version", lambda _: number)


@pytest.mark.parametrize(("kind", "installed", "first"), [("mica", "0.19.1", "0.20"), ("lora-ga", "0.18.1", "0.19")])
def test_a_kind_that_the_installed_peft_lacks_is_refused(
    kind: Any, installed: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_peft(installed, monkeypatch)
    with pytest.raises(UnsuitableAdapter, match=f"{kind}: expected PEFT {first} or later.*found PEFT {installed}"):
        attach(model, AdapterSettings(kind, rank=4), "tiny", SAMPLES)
    assert model.state_dict().keys() == before.keys()
    with_peft(f"{first}.0", monkeypatch)
    attach(model, AdapterSettings(kind, rank=4), "tiny", SAMPLES)


def test_a_factor_that_would_not_stay_frozen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_peft("0.19.1", monkeypatch)
    settings = AdapterSettings("lora-null", rank=4, nullspace="never read", variant="v2")
    with pytest.raises(UnsuitableAdapter, match=r"lora-null: expected PEFT 0\.20 or later"):
        attach(make_model(), settings, "tiny", SAMPLES)


# --- adapters made elsewhere ------------------------------------------------------------------------------------------


def saved(folder: Path, **changes: Any) -> str:
    """A plain LoRA's folder with these settings in its configuration."""
    attach(make_model(), AdapterSettings(rank=4), "tiny").save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
    return str(folder)


def test_a_setting_that_the_installed_peft_does_not_know_is_refused(tmp_path: Path) -> None:
    """PEFT leaves it out with a warning: what is loaded would be a plain LoRA."""
    folder = saved(tmp_path, comet_config={"tail": 2}, peft_version="0.99.0")
    with pytest.raises(UnsuitableAdapter, match=r"comet_config.*PEFT 0\.99\.0, which saved it") as caught:
        load_adapter(make_model(), folder)
    assert caught.value.reason == "unsuitable-adapter" and folder in str(caught.value)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")  # PEFT's, of what it leaves out
def test_a_later_setting_that_was_not_used_is_no_obstacle(tmp_path: Path) -> None:
    folder = saved(tmp_path, comet_config=None, use_comet=False, comet_pattern={})
    assert load_adapter(make_model(), folder) is not None


def test_a_type_that_the_installed_peft_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {name: config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(name.value) != "HRA"}
    monkeypatch.setattr("logitcache.adapters.reloadable.PEFT_TYPE_TO_CONFIG_MAPPING", older)
    folder = saved(tmp_path, peft_type="HRA", peft_version="0.12.0")
    with pytest.raises(UnsuitableAdapter, match=r"found type HRA.*PEFT 0\.12\.0, which saved it"):
        load_adapter(make_model(), folder)
    folder = saved(tmp_path / "unsaid", peft_type="HRA", peft_version=None)
    with pytest.raises(UnsuitableAdapter, match=r"found type HRA.*Install the latest PEFT"):
        load_adapter(make_model(), folder)
