"""Whether a model keeps apart what stands in one row is asked before its first such batch, whatever came before.

The oracle is the model's own forward over each document alone; nothing here looks into the probe.
"""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from support.plug_ins import arguments, lora, make_exact_cache, make_sft, on_the_left, packed_by_hand, rows_of, trl
from support.tiny_model import make_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.storage import LogitCache
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.trainer import CachedKLTrainer

V = 211
SIZES: dict[str, Any] = {
    **{"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 128},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

LEAKY: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GptOss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager"},
    "Jamba": {
        **{"num_key_value_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "Lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "Qwen3Next": {
        **{**GROUPED, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "shared_expert_intermediate_size": 16},
    },
    "RecurrentGemma": {
        **{"lru_width": 32, "attention_window_size": 16, "head_dim": 8, "num_hidden_layers": 3},
        "block_types": ("recurrent", "recurrent", "attention"),
    },
}
"""Families that do not read position_ids in some layer, in transformers 5.24 on a CPU."""

APART: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, eager": {"attn_implementation": "eager"},
    "Qwen3": GROUPED,
    "Gemma2": GROUPED,
    "GPT2": GPT2,
    "Qwen3Moe": {**GROUPED, **EXPERTS},
    "GPTNeoX": {},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # PEFT 0.21, prefix tuning
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL 1.16's default
]


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model, its weights large enough for what it sees to matter."""
    name, settings = family.split(",")[0], {**SIZES, **{**LEAKY, **APART, "XGLM": XGLM}[family]}
    kwargs = {k: settings.pop(k) for k in ("attn_implementation",) if k in settings}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings), **kwargs)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(2.0)
    return model.to(dtype).eval()


XGLM = {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64}


def make_documents(count: int = 6, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 14, count)
    return [Sample(rng.integers(3, V, n).astype(np.uint32), np.ones(n, np.bool_), f"row {n}") for n in lengths]


def flat(documents: Sequence[Sample]) -> dict[str, Any]:
    """One row, as transformers flattens a batch."""
    return dict(DataCollatorWithFlattening(return_tensors="pt")(rows_of(documents)))


def own_kl(model: Any, batch: dict[str, Any], base: Any, documents: Sequence[Sample]) -> float:
    """Mean KL(base, each document alone || model, this flat batch), from dense logits."""
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        q = model(**inputs).logits[0].float().log_softmax(-1)
        ids = [torch.from_numpy(d.token_ids.astype(np.int64))[None] for d in documents]
        p = torch.cat([base(input_ids=i).logits[0].float().log_softmax(-1) for i in ids])
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, list[Sample], LogitCache]:
    model, documents = make(request.param), make_documents()
    return model, documents, make_exact_cache(tmp_path / "c", model, documents)


# --- packed rows


@pytest.mark.parametrize("first", ["packed layout", "padded"])
@pytest.mark.parametrize("pair", LEAKY, indirect=True)
def test_a_packed_batch_after_others_is_refused(first: str, pair: Any) -> None:
    """The first batch holds one document a row, in which nothing can leak."""
    model, documents, cache = pair
    assert own_kl(model, flat(documents), model, documents) > 1e-5  # else there were no fault to find
    anchored = CachedLoss(cache)
    start = flat(documents[:1]) if first == "packed layout" else pad_samples(documents[:3])
    assert abs(float(anchored(model, start).kl)) < 1e-5
    for _ in range(2):  # and again
        with pytest.raises(TrainingFailed, match=r"packed rows.*row 0.*column \d+.*[Oo]ne document"):
            anchored(model, flat(documents))
    assert abs(float(anchored(model, flat(documents[1:2])).kl)) < 1e-5  # alone it trains on


@pytest.mark.parametrize("pair", APART, indirect=True)
def test_a_model_that_keeps_documents_apart_trains_on_packed_rows(pair: Any) -> None:
    model, documents, cache = pair
    anchored = CachedLoss(cache)
    for batch in (flat(documents[:1]), flat(documents), packed_by_hand(rows_of(documents))):
        assert abs(float(anchored(model, batch).kl)) < 1e-5


@pytest.mark.parametrize("pair", ["Mamba", "Lfm2"], indirect=True)
def test_packed_rows_are_refused_where_the_base_is_not_checked(pair: Any) -> None:
    """An adapter that is trained already, or the student of another teacher: nothing is compared with the cache."""
    model, documents, cache = pair
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    anchored = CachedLoss(cache, check=False)
    anchored(adapted, flat(documents[:1]))
    with pytest.raises(TrainingFailed, match="packed rows"):
        anchored(adapted, flat(documents))


@pytest.mark.parametrize("family", ["Bloom", "Jamba", "Lfm2", "RecurrentGemma", "Qwen3Next", "Llama", "Qwen3Moe"])
def test_in_bfloat16_too(family: str, tmp_path: Path) -> None:
    """Where a KL between the two would be lost in the noise."""
    model, documents = make(family, torch.bfloat16), make_documents()
    anchored = CachedLoss(make_exact_cache(tmp_path / "c", model, documents), check=False)
    if family in LEAKY:
        with pytest.raises(TrainingFailed, match="packed rows"):
            anchored(model, flat(documents))
    else:
        anchored(model, flat(documents))


@pytest.mark.parametrize("pair", ["Llama"], indirect=True)
def test_several_packed_rows_are_another_question_than_one(pair: Any) -> None:
    """With flash attention in transformers position_ids tell documents apart in a batch of one row only."""
    model, documents, cache = pair
    forward = model.model.forward

    def one_row_only(**kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 1:
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        return forward(**kwargs)

    model.model.forward = one_row_only
    anchored = CachedLoss(cache)
    assert abs(float(anchored(model, flat(documents)).kl)) < 1e-5
    with pytest.raises(TrainingFailed, match="packed rows"):
        anchored(model, packed_by_hand(rows_of(documents)))


@pytest.mark.parametrize("pair", ["Llama"], indirect=True)
def test_what_the_collator_gives_beside_position_ids_is_given_to_the_probe(pair: Any) -> None:
    """A model may need it. Without it, it is another layout."""
    model, documents, cache = pair
    seen: list[dict[str, Any]] = []
    forward = model.model.forward

    def watched(**kwargs: Any) -> Any:
        if "attention_mask" in kwargs:  # how the cache was made
            return forward(**kwargs)
        seen.append(kwargs)
        if "seq_idx" not in kwargs:
            kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
        return forward(**kwargs)

    model.model.forward = watched
    anchored = CachedLoss(cache)
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator(rows_of(documents))
    assert abs(float(anchored(model, batch).kl)) < 1e-5
    for inputs in seen:
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        ids = np.split(inputs["input_ids"][0].numpy(), starts[1:])
        again = collator([{"input_ids": i.tolist(), "labels": i.tolist()} for i in ids])
        for name in ("input_ids", "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
            assert torch.equal(inputs[name], again[name]) and inputs[name].dtype == again[name].dtype, name
        assert inputs["max_length_q"] == inputs["max_length_k"] == again["max_length_q"]
    assert [len(inputs["cu_seq_lens_q"]) - 1 for inputs in seen] == [
        2,
        2,
        2,
        2,
        6,
        6,
    ]
    with pytest.raises(TrainingFailed, match="packed rows"):
        anchored(model, flat(documents))


@pytest.mark.parametrize("pair", ["Llama"], indirect=True)
def test_each_model_is_asked_by_itself(pair: Any) -> None:
    model, documents, cache = pair
    anchored = CachedLoss(cache, check=False)
    anchored(model, flat(documents))
    with pytest.raises(TrainingFailed, match="packed rows"):
        anchored(get_peft_model(make("Llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
                 flat(documents))  # fmt: skip
    with pytest.raises(TrainingFailed, match="packed rows"):
        anchored(make("OPT"), flat(documents))


@pytest.mark.parametrize("pair", ["Llama"], indirect=True)
def test_checks_go_around_wrappers_that_talk_to_other_processes_and_happen_once(pair: Any) -> None:
    """Only one process may have padding on the left, or something to learn; DistributedDataParallel would wait."""
    model, documents, cache = pair
    calls: list[str] = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: Any) -> Any:
            calls.append("wrapper")
            return self.module(**kwargs)

    model.model.register_forward_hook(lambda *_: calls.append("body"))
    anchored, wrapper = CachedLoss(cache), Wrapper(model)
    for batch in (on_the_left(rows_of(documents)), flat(documents)):
        anchored(wrapper, batch)
        assert calls.count("wrapper") == 1 < calls.count("body")
        calls.clear()
        for again in (anchored, copy.deepcopy(anchored), pickle.loads(pickle.dumps(anchored))):
            again(wrapper, batch)
            if again is anchored:
                assert sorted(calls) == ["body", "wrapper"]
            calls.clear()


def test_a_model_without_numbers_is_not_said_to_keep_documents_apart(tmp_path: Path) -> None:
    model, documents = make("Llama"), make_documents()
    anchored = CachedLoss(make_exact_cache(tmp_path / "c", model, documents), check=False)
    model.model.norm.weight.data[:] = torch.nan
    with pytest.raises(TrainingFailed, match="packed rows"):
        anchored(model, flat(documents))


# --- padding on the left


@pytest.mark.parametrize("pair", ["GPT2", "XGLM", "RecurrentGemma"], indirect=True)
def test_padding_on_the_left_after_batches_without_is_refused_where_it_moves_positions(pair: Any) -> None:
    model, documents, cache = pair
    anchored = CachedLoss(cache)
    assert abs(float(anchored(model, on_the_left(rows_of(documents[:1]))).kl)) < 1e-5
    with pytest.raises(TrainingFailed, match=r"padding on the left.*row \d.*column \d+.*position_ids"):
        anchored(model, on_the_left(rows_of(documents)))
    assert abs(float(anchored(model, on_the_left(rows_of(documents), counted=True)).kl)) < 1e-5
    assert abs(float(anchored(model, trl(rows_of(documents))).kl)) < 1e-5


@pytest.mark.parametrize("pair", ["Llama", "OPT", "Bloom", "Mamba", "Qwen3Next"], indirect=True)
def test_padding_is_no_reason_to_refuse_where_it_moves_nothing(pair: Any) -> None:
    """Nor is a model that could not be packed, for those who never pack."""
    model, documents, cache = pair
    anchored = CachedLoss(cache)
    for batch in (pad_samples(documents), on_the_left(rows_of(documents)), flat(documents[:1])):
        assert abs(float(anchored(model, batch).kl)) < 1e-5


# --- in a trainer


def packs(entries: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """A row of what each entry of the data holds, which is some documents."""
    return flat([document for entry in entries for document in entry])


@pytest.mark.parametrize("family", ["Mamba", "Llama"])
@pytest.mark.parametrize("check", [True, False])
def test_a_trainer_is_refused_at_its_first_packed_batch(family: str, check: bool, tmp_path: Path) -> None:
    model, documents = make(family), make_documents()
    cache = make_exact_cache(tmp_path / "c", model, documents)
    steps: list[int] = []

    class Watched(CachedKLTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            steps.append(self.state.global_step)
            return loss

    trainer = Watched(
        model=get_peft_model(model, lora(target_modules=["in_proj" if family == "Mamba" else "q_proj"])),
        args=arguments(
            tmp_path, remove_unused_columns=False, per_device_train_batch_size=1, max_steps=3, learning_rate=0.0
        ),
        train_dataset=[documents[:1], documents[1:2], documents[2:]],
        data_collator=packs,
        cache=cache,
        objective=Objective(weight=1.0),
        check=check,
    )
    trainer._get_train_sampler = lambda *_: None  # in the order of the data
    if family == "Llama":
        trainer.train()
        assert len(steps) == 3 and max(abs(entry["kl"]) for entry in trainer.state.log_history if "kl" in entry) < 1e-5
        return
    with pytest.raises(TrainingFailed, match=r"training MambaForCausalLM on packed rows"):
        trainer.train()
    assert len(steps) == 2


def test_sft_that_packs_is_refused_before_its_first_step(tmp_path: Path) -> None:
    model, documents = make("Bloom"), make_documents()
    cache = make_exact_cache(tmp_path / "c", model, documents)
    trainer = make_sft(tmp_path / "o", documents, cache, model, packing=True, peft_config=lora())
    with pytest.raises(TrainingFailed, match=r"training BloomForCausalLM on packed rows.*packing=False"):
        trainer.train()
    assert not [entry for entry in trainer.state.log_history if "kl" in entry]


# --- other properties of all batches that the first one does not tell


def test_a_first_step_with_nothing_to_learn_does_not_end_the_check_of_the_base(tmp_path: Path) -> None:
    documents = make_documents()
    cache = make_exact_cache(tmp_path / "c", make("Llama"), documents)
    unsupervised = Sample(documents[0].token_ids, np.zeros(len(documents[0].token_ids), np.bool_), "nothing")
    wrong = make("Llama")
    for parameter in wrong.parameters():
        parameter.data.mul_(1.5)
    trainer = CachedKLTrainer(
        model=get_peft_model(wrong, lora()),
        args=arguments(tmp_path, remove_unused_columns=False, per_device_train_batch_size=1, max_steps=2),
        train_dataset=[unsupervised, documents[1]],
        data_collator=pad_samples,
        cache=cache,
    )
    trainer._get_train_sampler = lambda *_: None
    with pytest.raises(NotTheBase):
        trainer.train()


def test_a_second_model_of_another_width_is_refused(tmp_path: Path) -> None:
    documents = make_documents()
    anchored = CachedLoss(make_exact_cache(tmp_path / "c", make("Llama"), documents), check=False)
    anchored(make("Llama"), pad_samples(documents))
    with pytest.raises(NotTheBase, match=f"over {V} tokens, found 260"):
        anchored(make_model(), pad_samples(documents))
