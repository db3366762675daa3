"""The model card of a run: README.md beside what was trained, filled with what is known of it.

Owns its words, all of them from the run's description and report; what nobody told (a licence, a language, what it is
for) is not in it. Of a base that was a local folder the last part of its path is said. Must not know the trainer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.adapters.registry import NO_ADAPTER
from logitcache.storage.plain_text import one_line

_LOAD = {
    True: """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}{revision})
model = PeftModel.from_pretrained(base, "THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```""",
    False: """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```""",
}


def card_of(description: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The whole page. description: as `description.describe` makes it; result: of a `TrainReport`."""
    adapter, name = description["adapter"], description["model"]["name"]
    base = one_line(Path(name).name if Path(name).is_dir() else name, 200)
    is_adapter, asked = adapter["kind"] != NO_ADAPTER, description["model"].get("revision")
    revision = "" if asked is None else f", revision={json.dumps(asked)}"
    relation = "adapter" if is_adapter else "finetune"
    tags = [f"base_model:{relation}:{base}", "transformers", "logitcache", *([adapter["kind"]] if is_adapter else [])]
    front = {
        "base_model": base,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    title = f"{adapter['kind']} adapter of {base}" if is_adapter else f"{base}, fine-tuned"
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
            "---",
            f"\n# {title}\n",
            f"Trained by `logitcache train`: {_loss_of(description)}. What the program cannot know (licence, "
            "languages, purpose) is not said here; run.json beside this page has every setting, and the digests of "
            "model, data and cache.\n",
            "| | |",
            "|---|---|",
            *(f"| {what} | {said} |" for what, said in _rows(description, result)),
            "\n## How to load it\n",
            _LOAD[is_adapter].format(base=json.dumps(base), revision=revision) if is_adapter else _LOAD[False],
            "",
        ]
    )


def _loss_of(description: Mapping[str, Any]) -> str:
    objective, penalty = description["objective"], description["penalty"]
    weighted = "" if objective["ce_weight"] == "none" else f" weighted by {objective['ce_weight']}"
    words = [f"cross-entropy{weighted}"]
    if objective["regularizer"] != "none":
        weight = objective["weight"]
        of_prior = (description["evaluation"] or {}).get("kl_budget_of") == "prior"
        budget = f"a weight that meets {objective['kl_budget']:g} nats" if objective["kl_budget"] else ""
        how = f"{budget}{' on prior text' * of_prior}" if budget else f"{weight:g}"
        whose = "the teacher's" if description["pairing"]["teacher_is_not_base"] else "the base's"
        words.append(f"{how} times {objective['regularizer']} to {whose} cached predictions")
    if penalty is not None:
        words.append(f"{penalty['weight']:g} times {penalty['kind']}")
    words += [f"{anchor['weight']:g} times {anchor['regularizer']} on anchors" for anchor in description["anchors"]]
    return one_line(" + ".join(words), 400)


def _rows(description: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, data, adapter = description["settings"], description["data"], description["adapter"]
    name, revision = description["model"]["name"], description["model"].get("revision")
    own = ", ".join(f"{key} {value}" for key, value in adapter.items() if _is_said(key, value))
    rows = [
        ("trained", own or "every weight"),
        *([] if revision is None else [("base", f"{name}, revision {revision}")]),
        (
            "data",
            f"{data['num_samples']:,} samples, {data['num_tokens']:,} tokens, {data['num_positions']:,} supervised "
            f"positions (fingerprint {data['fingerprint']})",
        ),
        (
            "steps",
            f"{result['num_steps']:,} of {settings['batch_size']} x {settings['grad_accum']} samples x "
            f"{description['processes']} processes, peak learning rate {settings['lr']:g}, seed {settings['seed']}",
        ),
        ("last logged", _numbers({name: result["final"].get(name) for name in ("ce", "kl", "anchor_kl")})),
    ]
    if result["evaluated"]:
        step = result["num_steps"] if result["best_step"] is None else result["best_step"]
        rows.append((f"held-out text, step {step:,}", _numbers(result["evaluated"])))
    if result["stopped"]:
        rows.append(("stopped early", result["stopped"]))
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in description["versions"].items())))
    return [(what, one_line(said, 600).replace("|", "\\|")) for what, said in rows]


def _is_said(key: str, value: object) -> bool:
    return value not in (None, "") and key not in ("nullspace", "path") and value != NO_ADAPTER


def _numbers(found: Mapping[str, float | None]) -> str:
    """By their names, nats a position but for counts."""
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if value is not None)
