"""A cache that fills itself: the bytes of `precompute`, the numbers of the run; refused where the base is not in hand.

The oracle of values computes in float64 from the checkpoint's weights, and knows nothing of the code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from support.cli_harness import cache_bytes, snapshot
from support.filling import SAMPLES, SMALL, load, make_trainer, padded, plain_trainer, precomputed
from support.plug_ins import CachedSFTTrainer, logs_of, lora, rows_of
from support.tiny_model import make_tokenizer
from support.tiny_runs import V, make_samples
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl import SFTConfig

from logitcache import CachedLoss, CaptureSettings, Objective
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed
from logitcache.models.loading import find_model, load_base
from logitcache.storage import LogitCache, SampleNotCached, sample_id
from logitcache.training.fill import FILLED

# TRL's SFTConfig sets gradient_checkpointing, whose name transformers 5.23 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "examples" / "trl_sft.py"
CHAT = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
CPU = torch.device("cpu")


def chats(count: int = 6) -> list[dict[str, Any]]:
    turns = ("user", "hello {}"), ("assistant", "good day {}"), ("user", "and {}?"), ("assistant", "{} it is")
    return [{"messages": [{"role": r, "content": c.format(i * 37)} for r, c in turns]} for i in range(count)]


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base whose template marks what the assistant says."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    load(tiny_model).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


# The script of a user


def stock_script(folder: Path, cache: Path, out: Path, assistant_only: bool) -> Any:
    """TRL's defaults, and three lines more."""
    trainer = CachedSFTTrainer(
        cache=str(cache),
        fill=True,
        model=load(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        train_dataset=Dataset.from_list(chats()),
        args=SFTConfig(str(out), assistant_only_loss=assistant_only, use_cpu=True, report_to=[], logging_steps=1),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("assistant_only", [False, True], ids=["whole chats", "assistant only"])
def test_a_stock_trl_script_fills_its_cache_and_the_second_run_reads_it(
    assistant_only: bool, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stock_script(chat_model, tmp_path / "c", tmp_path / "a", assistant_only)
    assert first.step_zero.num_positions > 0 and first.step_zero.kl_nats <= 5e-5
    assert first.filled.num_samples == len(chats())
    before = snapshot(tmp_path / "c")

    def nobody(*_: Any, **__: Any) -> None:
        raise AssertionError("the base ran again")

    monkeypatch.setattr("logitcache.training.fill.base_below", nobody)
    monkeypatch.setattr("logitcache.pairing.base_below.adapters_off", nobody)
    second = stock_script(chat_model, tmp_path / "c", tmp_path / "b", assistant_only)
    assert second.filled is None and snapshot(tmp_path / "c") == before
    numbers = [[{n: e[n] for n in ("loss", "ce", "kl")} for e in logs_of(t)] for t in (first, second)]
    assert numbers[0] == numbers[1] and numbers[0][-1]["kl"] > 0
    assert second.step_zero == first.step_zero


@pytest.mark.parametrize("more", [[], ["--assistant-only"]], ids=["whole chats", "assistant only"])
def test_the_example_script_exits_0_twice(more: list[str], chat_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chats()), encoding="utf-8")
    adapters = []
    for out in ("a", "b"):
        flags = ["--model", chat_model, "--cache", tmp_path / "c", "--data", data, "--out", tmp_path / out, *more]
        line = [sys.executable, str(EXAMPLE), *map(str, flags)]
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr[-2000:]
        adapters.append((tmp_path / out / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


# The same bytes, the same numbers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 8, "tail_groups": 4, "precision": "compact", "store": "arrow", **SMALL},
        {"top_k": 8, "tail_samples": 4, "precision": "exact", "kl_positions": "all", **SMALL},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_the_bytes_are_those_of_precompute(
    settings: dict[str, Any], layout: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    expected = precomputed(tiny_model, SAMPLES, tmp_path / "expected", **settings)
    capture = CaptureSettings(**settings) if settings else None
    trainer = make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), capture=capture, **layout)
    assert trainer.filled.num_samples == len(SAMPLES) and trainer.filled.is_final
    assert cache_bytes(tmp_path / "c") == cache_bytes(expected)
    trainer.train()
    assert trainer.step_zero.kl_nats <= 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_manifest_says_how_the_model_in_memory_is_held(
    dtype: str, attention: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = load_base(find_model(str(tiny_model)), dtype, CPU, attention=attention)
    precompute(base, SAMPLES, tmp_path / "expected", data_name=FILLED)
    model = load(tiny_model, dtype, attn_implementation=attention)
    make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), model=model).train()
    found = LogitCache.open(tmp_path / "c").manifest.model
    assert (found.dtype, found.attention) == (dtype, attention)
    assert cache_bytes(tmp_path / "c") == cache_bytes(tmp_path / "expected")


def test_records_are_the_log_softmax_of_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    capture = CaptureSettings(top_k=16, precision="exact", tail_groups=4)
    make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), capture=capture)
    cache, oracle = LogitCache.open(tmp_path / "c"), load(tiny_model).double().eval()
    groups = cache.token_groups()
    assert groups is not None
    for sample in SAMPLES:
        record = cache.lookup(sample.token_ids)
        assert record.positions.tolist() == sample.positions.tolist()
        with torch.no_grad():
            ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
            logprobs = oracle(input_ids=ids).logits[0].log_softmax(-1).numpy()
        for row, at in enumerate(sample.positions.tolist()):
            said, label = logprobs[at], int(sample.token_ids[at + 1])
            others = np.delete(np.arange(V), label)
            kept = others[np.argsort(-said[others])][:16]
            tail = np.setdiff1d(others, kept)
            assert record.label_ids[row] == label
            assert set(record.alternative_ids[row].tolist()) == set(kept.tolist())
            near = {"rtol": 0, "atol": 2e-5}
            np.testing.assert_allclose(record.label_logprobs[row], said[label], **near)
            np.testing.assert_allclose(record.alternative_logprobs[row], said[record.alternative_ids[row]], **near)
            np.testing.assert_allclose(record.tail_logprobs[row], np.logaddexp.reduce(said[tail]), **near)
            assert record.tail_group_logprobs is not None
            for group in range(4):
                inside = tail[groups[tail] == group]
                mass = np.exp(said[inside]).sum()
                np.testing.assert_allclose(np.exp(record.tail_group_logprobs[row, group]), mass, rtol=1e-4, atol=1e-8)


def test_a_run_that_fills_has_the_numbers_of_one_that_need_not(tiny_model: Path, tmp_path: Path) -> None:
    """Dropout, shuffling and all: not a number is drawn, and nothing of the model is left changed."""
    expected = precomputed(tiny_model, SAMPLES, tmp_path / "expected")
    runs = []
    for path, fill in ((expected, False), (tmp_path / "c", True)):
        torch.manual_seed(7)
        settings = {"max_steps": 6, "per_device_train_batch_size": 4, "peft_config": lora(lora_dropout=0.2)}
        trainer = make_trainer(tmp_path / "o", tiny_model, str(path), fill=fill, **settings)
        trainer.model.train()
        grads = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        runs.append((grads, [{n: e[n] for n in ("loss", "ce", "kl", "grad_norm")} for e in logs_of(trainer)], weights))
    assert runs[0][:2] == runs[1][:2] and runs[0][1][-1]["kl"] > 1e-4
    assert all(torch.equal(tensor, runs[1][2][name]) for name, tensor in runs[0][2].items())


def test_filling_leaves_modes_gradients_and_generators_alone(tiny_model: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny_model), lora(modules_to_save=["lm_head"]))
    model.train()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    model.base_model.model.model.norm.eval()
    state = [(m.training, m) for m in model.modules()], [(p.requires_grad, p) for p in model.parameters()]
    loader = DataLoader(rows_of(SAMPLES), batch_size=2, shuffle=True, collate_fn=padded)
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    anchored = CachedLoss(str(tmp_path / "c"), fill=True)
    anchored.fill(model, loader)
    assert anchored.filled is not None and anchored.filled.num_samples == len(SAMPLES)
    assert all(m.training == mode for mode, m in state[0])
    assert all(p.requires_grad == wanted and p.grad is None for wanted, p in state[1])
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_what_is_there_is_not_captured_again(tiny_model: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "c", tmp_path / "expected"):
        precomputed(tiny_model, SAMPLES[:7], path, **SMALL)
    before = snapshot(tmp_path / "c")
    precomputed(tiny_model, SAMPLES, tmp_path / "expected", **SMALL)
    trainer = make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), capture=CaptureSettings(**SMALL))
    assert trainer.filled.num_samples == len(SAMPLES) - 7 and trainer.filled.num_samples_found == 7
    assert cache_bytes(tmp_path / "c") == cache_bytes(tmp_path / "expected")
    kept = {name: data for name, data in before.items() if name.startswith("shards/")}
    assert kept and kept.items() <= snapshot(tmp_path / "c").items()


def test_a_cache_that_holds_more_and_longer_is_not_written_to(tiny_model: Path, tmp_path: Path) -> None:
    """Beginnings of what is cached are found, as without fill."""
    path = precomputed(tiny_model, SAMPLES, tmp_path / "c")
    before = snapshot(path)
    cut = [Sample(s.token_ids[:-1], s.supervised[:-1], s.origin) for s in SAMPLES[3:9] if s.supervised[1:-1].any()]
    assert len(cut) > 3
    trainer = make_trainer(tmp_path / "o", tiny_model, str(path), cut)
    trainer.train()
    assert trainer.filled is None and snapshot(path) == before


def test_all_weights_may_be_those_that_will_be_trained(tiny_model: Path, tmp_path: Path) -> None:
    expected = precomputed(tiny_model, SAMPLES, tmp_path / "expected")
    trainer = plain_trainer(tmp_path, load(tiny_model))
    assert cache_bytes(tmp_path / "c") == cache_bytes(expected)
    trainer.train()
    assert trainer.step_zero is not None and trainer.step_zero.kl_nats <= 5e-5


IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KEEPING: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA with the head": lambda: lora(use_rslora=True, modules_to_save=["lm_head"]),
    "LoRA of the embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "trained tokens": lambda: lora(trainable_token_indices=[3, 5]),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM", **IA3),
    "OFT": lambda: OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=8),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KEEPING)
def test_adapters_that_leave_the_base_as_it_is(kind: str, dtype: str, tiny_model: Path, tmp_path: Path) -> None:
    precompute(load_base(find_model(str(tiny_model)), dtype, CPU), SAMPLES, tmp_path / "expected", data_name=FILLED)
    adapted = get_peft_model(load(tiny_model, dtype), KEEPING[kind]())
    make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), model=adapted)
    assert cache_bytes(tmp_path / "c") == cache_bytes(tmp_path / "expected")


def test_every_position_is_captured_where_the_objective_asks_for_it(tiny_model: Path, tmp_path: Path) -> None:
    objective = Objective(kl_positions="all")
    trainer = make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), objective=objective)
    trainer.train()
    assert trainer.filled.num_positions == sum(len(s.token_ids) - 1 for s in SAMPLES)


# A loop of one's own


def test_a_loop_fills_before_its_first_step(tiny_model: Path, tmp_path: Path) -> None:
    expected = precomputed(tiny_model, SAMPLES, tmp_path / "expected")
    generator, losses = torch.Generator(), []
    for path, fill in ((expected, False), (tmp_path / "c", True)):
        torch.manual_seed(11)
        generator.manual_seed(5)
        model = get_peft_model(load(tiny_model), lora())
        loader = DataLoader(rows_of(SAMPLES), 4, shuffle=True, generator=generator, collate_fn=padded)
        anchored = CachedLoss(str(path), Objective(weight=2.0), fill=fill)
        if fill:
            anchored.fill(model, loader)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        run = []
        for batch in loader:
            found = anchored(model, batch)
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append((float(found.loss.detach()), float(found.kl)))
        losses.append(run)
    assert losses[0] == losses[1] and losses[0][-1][1] > 1e-4
    assert cache_bytes(tmp_path / "c") == cache_bytes(expected)
    stranger = pad_samples(make_samples(1, seed=9))
    with pytest.raises(SampleNotCached):  # what came later, with an adapter that has moved, is an error
        anchored(model, stranger)


def test_a_loop_keeps_what_can_be_gone_through_once(tiny_model: Path, tmp_path: Path) -> None:
    batches = (padded(rows_of(SAMPLES[i : i + 4])) for i in (0, 4))
    with pytest.raises(TrainingFailed, match=r"expected batches that can be gone through again, found generator"):
        CachedLoss(str(tmp_path / "c"), fill=True).fill(load(tiny_model), batches)
    assert len(list(batches)) == 2 and not (tmp_path / "c").exists()


def test_rows_without_labels_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    nothing = Sample(np.arange(7, dtype=np.uint32), np.zeros(7, dtype=np.bool_), "nothing to learn")
    trainer = make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), [nothing, *SAMPLES[:3], nothing])
    assert trainer.filled.num_samples == 3
    assert {sample_id(s.token_ids) for s in SAMPLES[:3]} == {
        LogitCache.open(tmp_path / "c").sample_id(i) for i in range(3)
    }
