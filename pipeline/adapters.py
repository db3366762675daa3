"""PEFT configurations by name, and whether the adapter is the identity at its start.

Owns nothing of the adapters themselves: PEFT does. A closed table, one row an adapter.
"""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

IDENTITY_AT_START = {"lora": True}
"""Whether base + untrained adapter computes what the base does, so that KL(base || adapted) is 0 before step 1."""


@dataclass(frozen=True)
class AdapterSettings:
    """rank r; alpha (scale = alpha / rank); dropout on the adapter's input; target_modules as PEFT understands it:
    'all-linear' (every linear layer but the output head) or names separated by commas."""

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"


def attach(model: PreTrainedModel, settings: AdapterSettings, base_name: str) -> PeftModel:
    """The model with an untrained adapter; its base weights are frozen. base_name: where PEFT finds the base again.

    The factors are drawn from torch's generator: seed it before. Raises ValueError where a name fits no layer.
    """
    names = settings.target_modules
    wanted = [] if names == "all-linear" else [name.strip() for name in names.split(",")]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=wanted or names,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    found = adapted.targeted_module_names
    for name in wanted:  # PEFT is content with one of them
        if not any(module == name or module.endswith(f".{name}") for module in found):
            raise ValueError(f"no layer is called {name!r}")
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted
