"""What a hostile reading found: inputs for which a run was silently other than it said."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import make_base, make_cache, make_samples, run
from transformers import LlamaConfig, LlamaForCausalLM

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.data.samples import make_samples as samples_of_rows
from logitcache.errors import InvalidData, TrainingFailed, UnsupportedModel
from logitcache.evaluation.compare import load_adapter
from logitcache.json_files import line_of
from logitcache.losses.formulas import Objective
from logitcache.models.head import check_length
from logitcache.models.loading import find_model, load_base
from logitcache.storage import IdentityMismatch
from logitcache.storage.identity import weights_fingerprint
from logitcache.training import logs
from logitcache.training import run as training


def test_a_run_of_one_step_trains(tmp_path: Path) -> None:
    """Its warm-up would be that step, at a learning rate of 0."""
    samples = make_samples(8)
    report = run(make_base(), samples, make_cache(tmp_path / "c", samples), tmp_path / "o", lr=1e-2)
    factors = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert report.num_steps == 1
    assert max(float(v.abs().max()) for k, v in factors.items() if "lora_B" in k) > 1e-3


def test_every_named_layer_is_adapted_or_the_name_refused() -> None:
    for names in ("q_proj,v_proj", "q_proj, v_proj"):
        adapted = attach(make_model(), AdapterSettings(rank=2, target_modules=names), "tiny")
        assert {n.split(".")[-1] for n in adapted.targeted_module_names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="v_prj"):
        attach(make_model(), AdapterSettings(rank=2, target_modules="q_proj,v_prj"), "tiny")


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"epochs": 0.5}, {"epochs": 2.0}])
def test_resuming_after_the_last_step_adds_none(
    tmp_path: Path, length: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(24)
    cache, out = make_cache(tmp_path / "c", samples), tmp_path / "o"
    first = run(make_base(), samples, cache, tmp_path / "whole", lr=1e-2, batch_size=4, **length)
    names = ("adapter_model.safetensors", "train_log.jsonl")
    ends = [(tmp_path / "whole" / name).read_bytes() for name in names]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("logitcache.training.run.save", killed)  # between its last checkpoint and its adapter
    with pytest.raises(KeyboardInterrupt):
        run(make_base(), samples, cache, out, lr=1e-2, batch_size=4, **length)
    monkeypatch.undo()
    with (out / "train_log.jsonl").open("a") as f:
        f.write('{"step": 1, "lo')  # and while it wrote a line
    monkeypatch.setattr("support.tiny_runs.train", lambda *args: _train_on(*args))
    second = run(make_base(), samples, cache, out, lr=1e-2, batch_size=4, **length)
    assert (second.num_steps, second.num_tokens, second.final) == (first.num_steps, first.num_tokens, first.final)
    assert [(out / name).read_bytes() for name in names] == ends


def _train_on(*args: Any) -> Any:
    from logitcache.training.run import train

    return train(*args, resume=True)


def test_a_damaged_log_is_not_gone_on_with(tmp_path: Path) -> None:
    """Only what comes after the checkpoint may be anything: it is written again."""
    log = tmp_path / "train_log.jsonl"
    lines = [line_of({"step": step, "ce": 1.0}) for step in (1, 2, 3)]
    log.write_bytes(b"".join(lines).replace(b'"step": 1', b'"step": 5'))
    with pytest.raises(TrainingFailed, match=r"going on with .*train_log\.jsonl: expected JSON in line 1"):
        logs.logged(log, 2)
    log.write_bytes(b"".join([*lines, b"\0\0\0\n"]))
    assert [entry["step"] for entry in logs.logged(log, 2)] == [1, 2]


def test_another_number_of_processes_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples(8)
    cache, out = make_cache(tmp_path / "c", samples), tmp_path / "o"
    describe = training.describe
    with monkeypatch.context() as patch:
        patch.setattr(training, "describe", lambda *told: {**describe(*told), "processes": 2})
        run(make_base(), samples, cache, out)
    monkeypatch.setattr("support.tiny_runs.train", lambda *args: _train_on(*args))
    with pytest.raises(IdentityMismatch, match="processes"):
        run(make_base(), samples, cache, out)


def test_training_in_float16_is_refused(tmp_path: Path) -> None:
    """Unscaled, the gradient of the KL lost 98 % of its norm over 4,000 positions of 32,000 tokens."""
    samples = make_samples(4)
    base = make_base()
    with pytest.raises(TrainingFailed, match="float16"):
        run(replace(base, model=base.model.half()), samples, make_cache(tmp_path / "c", samples), tmp_path / "o")


def test_one_alternative_renormalised_is_refused(tmp_path: Path) -> None:
    """Its KL is 0 whatever the student does."""
    samples = make_samples(4)
    cache = make_cache(tmp_path / "c", samples, top_k=1)
    with pytest.raises(TrainingFailed, match="one alternative"):
        run(make_base(), samples, cache, tmp_path / "o", objective=Objective("masked-kl", "renormalize"))


def test_the_fingerprint_is_of_the_weights_that_are_loaded(tmp_path: Path) -> None:
    """A folder with both: transformers loads the single file."""
    single, both = tmp_path / "single", tmp_path / "both"
    make_model(seed=0).save_pretrained(single)
    make_model(seed=1).save_pretrained(both, max_shard_size="20KB")
    shutil.copy(single / "model.safetensors", both)
    loaded = load_base(find_model(str(both)), "float32", torch.device("cpu"))
    assert torch.equal(loaded.model.model.embed_tokens.weight, make_model(seed=0).model.embed_tokens.weight)
    assert weights_fingerprint(both) == weights_fingerprint(single)


def test_a_base_with_an_adapter_in_its_folder_is_refused(tmp_path: Path) -> None:
    make_model(seed=0).save_pretrained(tmp_path / "a")
    make_model(seed=1).save_pretrained(tmp_path / "b")
    attach(make_model(seed=0), AdapterSettings(rank=2), str(tmp_path / "a")).save_pretrained(tmp_path / "b")
    with pytest.raises(UnsupportedModel, match=r"adapter_config\.json"):
        find_model(str(tmp_path / "b"))


def test_an_adapter_of_more_layers_is_refused(tmp_path: Path) -> None:
    larger = attach(make_model(num_hidden_layers=4), AdapterSettings(rank=2), "tiny")
    larger.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UnsupportedModel, match="no place"):
        load_adapter(make_model(), str(tmp_path))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_batch_are_refused(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 32}
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    limit = 32 if kind == "dynamic" else 128
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=limit, rope_parameters=rope)
    )
    check_length(model, 32)
    with pytest.raises(UnsupportedModel, match=f"{kind}.*--max-length 32"):
        check_length(model, 33)


def test_masks_of_tokenized_rows_count() -> None:
    for name in ("completion_mask", "assistant_masks"):
        (sample,) = samples_of_rows([("r", {"input_ids": [5, 6, 7, 8], name: [0, 0, 1, 1]})], None, 9, 99).samples
        assert sample.supervised.tolist() == [False, False, True, True]
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [False, True, True, True], "labels": [-100, -100, -100, 8]}
    (sample,) = samples_of_rows([("r", row)], None, 9, 99).samples
    assert sample.supervised.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "extra", [{"attention_mask": [1, 1, 0]}, {"completion_mask": [0, 1]}, {"assistant_masks": [0, 1, 2]}]
)
def test_padding_and_broken_masks_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidData, match="mask"):
        samples_of_rows([("r", {"input_ids": [5, 6, 7], **extra})], None, 9, 99)


def test_tools_are_not_dropped_in_silence() -> None:
    """Said where the template does not show them; refused where a call is not rendered either."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    found = samples_of_rows([("r", row), ("s", {"messages": messages})], make_tokenizer(), 99, 260)
    assert [sample.token_ids.tolist() for sample in found.samples[1:]] == [found.samples[0].token_ids.tolist()]
    (said,) = found.notes
    assert "tools, which the chat template does not show" in said
    messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]  # type: ignore[assignment]
    messages[1]["content"] = "f"  # as if the template had shown the call
    with pytest.raises(InvalidData, match="drops a call of 'f' in turn 1"):
        samples_of_rows([("r", row)], make_tokenizer(), 99, 260)
