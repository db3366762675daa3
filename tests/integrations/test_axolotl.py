"""axolotl's plug-in without axolotl: `scripts/check-integration axolotl` runs it with."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitcache import InvalidSettings, TrainingFailed
from logitcache.integrations.axolotl import REFUSED, LogitCachePlugin, count_tokens, perplexity

NAMED = {"plugins": ["logitcache.integrations.axolotl.LogitCachePlugin"]}
USED = {**NAMED, "logitcache": {"cache": "cache/", "fill": True}}


def test_the_plug_in_is_imported_without_axolotl_and_without_torch() -> None:
    """axolotl swallows an ImportError and trains without the plug-in, so there must be nothing to fail."""
    code = "import sys, logitcache.integrations.axolotl as a; print(a.LogitCachePlugin, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"axolotl", "torch", "transformers", "peft", "pydantic"}


def test_a_configuration_that_says_only_what_is_known_is_taken() -> None:
    plugin = LogitCachePlugin()
    plugin.register({**USED, "adapter": "lora", "sample_packing": True, "context_parallel_size": 1, "rl": None})
    plugin.register({"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"], "rl": "dpo"})  # of another run


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_make_the_loss_another_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        InvalidSettings, match=rf"training with logitcache: {name}: 2 is refused: .*Nothing was trained"
    ):
        LogitCachePlugin().register({**USED, name: 2})
    with pytest.raises(InvalidSettings, match=f"{name}: 2 is refused"):
        LogitCachePlugin().pre_model_load({**USED, name: 2})


def test_noise_on_the_embeddings_is_refused_with_a_budget_alone() -> None:
    LogitCachePlugin().register({**USED, "neftune_noise_alpha": 5})
    budget = {**NAMED, "logitcache": {"cache": "cache/", "kl_budget": 0.1}, "neftune_noise_alpha": 5}
    with pytest.raises(InvalidSettings, match="neftune_noise_alpha: 5 with kl_budget is refused"):
        LogitCachePlugin().register(budget)


@pytest.mark.parametrize(
    ("cfg", "said"), [(NAMED, "expected a `logitcache:` block"), ({**NAMED, "logitcache": {}}, "expected cache")]
)
def test_a_plug_in_without_its_block_is_refused(cfg: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        LogitCachePlugin().register(cfg)


class Other:
    """A plug-in with a trainer of its own."""

    def get_trainer_cls(self, cfg: Any) -> type[Any]:
        return Other

    def get_collator_cls_and_kwargs(self, cfg: Any) -> None:
        return None


def test_another_plug_in_with_a_trainer_is_refused_whichever_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl takes the trainer of the first that has one, and says nothing of the others."""
    plugin, other = LogitCachePlugin(), Other()
    manager = SimpleNamespace(get_instance=lambda: SimpleNamespace(plugins={"ours": plugin, "other": other}))
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(PluginManager=manager))
    with pytest.raises(TrainingFailed, match=r"found Other.*Leave that plug-in out"):
        plugin.get_trainer_cls(USED)
    with pytest.raises(TrainingFailed, match=r"found Other.*Leave that plug-in out"):
        plugin.post_trainer_create(USED, other)
    assert plugin.get_trainer_cls({"plugins": []}) is None  # of a run without it in the same process
    plugin.post_trainer_create({"plugins": []}, other)


def test_the_collator_is_of_packed_training_alone() -> None:
    plugin = LogitCachePlugin()
    assert plugin.get_collator_cls_and_kwargs(USED) is None
    assert plugin.get_collator_cls_and_kwargs({**USED, "sample_packing": True}, is_eval=True) is None
    assert plugin.get_collator_cls_and_kwargs({"plugins": [], "sample_packing": True}) is None


def test_the_schema_is_where_axolotl_looks_for_it() -> None:
    pytest.importorskip("pydantic")
    module, name = LogitCachePlugin().get_input_args().rsplit(".", 1)
    space: dict[str, Any] = {}
    exec(f"from {module} import {name}", space)  # as axolotl does
    assert space[name](logitcache={"cache": "c/"}).logitcache == {"cache": "c/"}
    with pytest.raises(ImportError):
        exec(f"from {module} import LogitCacheArguments", {})


def test_tokens_are_counted_as_axolotl_counts_them() -> None:
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(), accelerator=SimpleNamespace(reduce=lambda counts, reduction: counts)
    )
    for labels in ([[-100, 3, 4]], [[-100, -100], [5, -100]]):
        count_tokens(trainer, torch.tensor(labels))
    assert (trainer.state.tokens["trainable"].item(), trainer.state.tokens["total"].item()) == (3, 7)


def test_the_perplexity_is_of_the_cross_entropy() -> None:
    assert perplexity(math.log(7.0)) == 7.0 and perplexity(1e4) == math.inf


def test_the_page_names_every_option_that_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "axolotl.md").read_text(encoding="utf-8")
    assert not [name for name in REFUSED if f"`{name}`" not in page]
