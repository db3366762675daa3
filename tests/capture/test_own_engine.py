"""An engine of the user's own: records of its hidden states or logits, and a cache that it fills."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture.test_engine_process import assert_same
from support.cli_harness import done, train_line
from support.tiny_model import make_model
from support.tiny_runs import V, make_samples
from torch import Tensor
from transformers import LlamaForCausalLM

from logitcache import (
    CaptureSettings,
    InvalidSettings,
    LogitCache,
    OwnEngine,
    Sample,
    load_head,
    precompute,
    records_from_hidden,
    records_from_logits,
)
from logitcache.capture.teacher import capture
from logitcache.errors import InvalidBatch, NonFiniteLogits, UnsupportedModel
from logitcache.models.head import hidden_states
from logitcache.models.loading import find_model, load_base
from logitcache.storage import BaseLogprobs

CPU = torch.device("cpu")
SAMPLES = make_samples(7)
GROUPS = (np.arange(V) % 6).astype(np.uint8)


def rows_of(run: Callable[[Tensor], Tensor], batch: Sequence[Sample]) -> Tensor:
    """At the supervised positions, each sample by itself."""
    found = [run(torch.from_numpy(s.token_ids.astype(np.int64))[None])[0][torch.from_numpy(s.positions)] for s in batch]
    return torch.cat(found).detach()


def test_records_are_those_of_a_capture(tiny_model: Path) -> None:
    model = load_base(find_model(str(tiny_model)), "float32", CPU).model
    expected = capture(model, SAMPLES, 8, torch.from_numpy(GROUPS), 3)
    hidden = rows_of(lambda ids: hidden_states(model, input_ids=ids), SAMPLES)
    logits = rows_of(lambda ids: model(input_ids=ids).logits, SAMPLES)
    found = records_from_hidden(hidden, load_head(tiny_model, "float32"), SAMPLES, 8, GROUPS, 3)
    for records in (found, records_from_logits(logits, SAMPLES, 8, GROUPS, 3)):
        for one, other in zip(records, expected, strict=True):
            assert_same(one, other)


def test_rows_of_others_are_refused() -> None:
    num = sum(len(s.positions) for s in SAMPLES)
    for rows in (torch.zeros(num + 1, V), torch.zeros(num, V, 1), torch.zeros(num)):
        with pytest.raises(InvalidBatch, match="a row for each of their supervised positions"):
            records_from_logits(rows, SAMPLES, 8)
    logits = torch.zeros(num, V)
    logits[len(SAMPLES[0].positions) + 1, 5] = torch.nan
    with pytest.raises(NonFiniteLogits, match=f"{SAMPLES[1].origin}, position {SAMPLES[1].positions[1]}"):
        records_from_logits(logits, SAMPLES, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_head_of_a_checkpoint(tied: bool, tmp_path: Path) -> None:
    """Alone, in one file or in several, in its own dtype or another."""
    model = make_model(tie_word_embeddings=tied)
    hidden = torch.randn(5, model.config.hidden_size)
    for size in ("1GB", "20KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        for dtype in ("float32", "bfloat16"):
            expected = model.to(getattr(torch, dtype)).lm_head(hidden.to(model.dtype))
            assert torch.equal(load_head(tmp_path / size, dtype)(hidden.to(model.dtype)), expected)
            model = model.float() if dtype == "float32" else make_model(tie_word_embeddings=tied)
    assert len(list((tmp_path / "20KB").glob("*.safetensors"))) > 1


def test_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "m", state_dict=state)
    with pytest.raises(UnsupportedModel, match="expected one tensor that is an output head in its files, found none"):
        load_head(tmp_path / "m", "float32")
    model.save_pretrained(tmp_path / "n", state_dict={**state, "lm_head.weight": torch.zeros(5, 5)})
    with pytest.raises(UnsupportedModel, match=r"in plain numbers, found float32 of \[5, 5\]"):
        load_head(tmp_path / "n", "float32")


def test_a_class_that_does_more_after_its_head_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits * 2
        return found

    load_head(tiny_model, "bfloat16")
    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(UnsupportedModel, match="something more after its head"):
        load_head(tiny_model, "bfloat16")


def test_a_cache_of_an_own_engine_trains(tiny_model: Path, tmp_path: Path) -> None:
    model = load_base(find_model(str(tiny_model)), "float32", CPU).model
    head = load_head(tiny_model, "float32")

    def run(batch: Sequence[Sample]) -> list[BaseLogprobs]:
        return records_from_hidden(rows_of(lambda i: hidden_states(model, input_ids=i), batch), head, batch, 8)

    engine = OwnEngine("mine", "1.2", run)
    kept = CaptureSettings(top_k=8, max_length=128)
    precompute(tiny_model, make_samples(130), tmp_path / "c", kept, engine=engine)
    manifest = LogitCache.open(tmp_path / "c").manifest
    assert (manifest.model.attention, manifest.created_with["mine"]) == ("mine", "1.2")
    done("calibrate", "--model", tiny_model, "--cache", tmp_path / "c", "--num-positions", 1000)
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "adapter"))


def test_what_it_cannot_be_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("vllm", "sdpa", "Mine", "a b", ""):
        with pytest.raises(InvalidSettings, match="expected a name of its own"):
            OwnEngine(name, "1", lambda _: [])
    kept = CaptureSettings(top_k=8, max_length=128, tail_groups=4)
    with pytest.raises(InvalidSettings, match="Leave tail_groups out"):
        precompute(tiny_model, SAMPLES, tmp_path / "c", kept, engine=OwnEngine("mine", "1", lambda _: []))
    assert not (tmp_path / "c").exists()
