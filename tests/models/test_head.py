"""The captured record against the model's own logits, for model families that do something after their head."""

from typing import Any

import numpy as np
import pytest
import torch
from support.families import FAMILIES, V, make_family
from support.tiny_model import make_model

from logitcache.capture.teacher import capture
from logitcache.data.samples import Sample
from logitcache.errors import NonFiniteLogits, UnsupportedModel
from logitcache.models.head import (
    HEAD_ROWS,
    LOGITS_BYTES,
    OutputHead,
    check_head,
    head_rows,
    hidden_states,
    rows_at_once,
)
from logitcache.storage.records import check_positions, check_rows


def make_batch(vocab_size: int = V, lengths: tuple[int, ...] = (12, 7, 20)) -> list[Sample]:
    """Random samples of different lengths, some positions unsupervised."""
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, vocab_size, n).astype(np.uint32), rng.random(n) < 0.8, f"row {n}") for n in lengths]


def reference(model: Any, sample: Sample) -> np.ndarray:
    """log_softmax(model(...).logits) of one sample alone, float32 [T, V]."""
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logprobs: np.ndarray = model(input_ids=ids).logits.float().log_softmax(-1)[0].numpy()
    return logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_record_equals_the_models_own_logits(family: str) -> None:
    model, batch, k = make_family(family), make_batch(), 16
    check_head(model)
    for sample, record in zip(batch, capture(model, batch, k), strict=True):
        check_positions(record, sample.token_ids, family)
        check_rows(record, V, family)
        own = reference(model, sample)[record.positions]
        rows = np.arange(len(record))[:, None]
        np.testing.assert_allclose(record.label_logprobs, own[rows[:, 0], record.label_ids], atol=1e-5, rtol=0)
        np.testing.assert_allclose(record.alternative_logprobs, own[rows, record.alternative_ids], atol=1e-5, rtol=0)
        rest = own.astype(np.float64)
        rest[rows, record.alternative_ids] = -np.inf
        rest[rows[:, 0], record.label_ids] = -np.inf
        assert (record.alternative_logprobs.min(axis=1) >= rest.max(axis=1) - 1e-5).all()
        np.testing.assert_allclose(record.tail_logprobs, np.log(np.exp(rest).sum(axis=1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere"])
def test_a_head_without_its_post_processing_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unknown family would look like: the split must not pass as right."""
    for table in ("_MULTIPLIERS", "_DIVISORS", "_SOFT_CAPS"):
        monkeypatch.setattr(f"logitcache.models.head.{table}", ())
    with pytest.raises(UnsupportedModel):
        check_head(make_family(family))


def test_the_head_is_called_so_an_adapter_on_it_counts() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    model.eval()
    ids = torch.arange(10)[None]
    own = model(input_ids=ids).logits
    ours = OutputHead(model.get_base_model())(hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids)))
    torch.testing.assert_close(ours, own)
    plain = torch.nn.functional.linear(
        hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids)),
        model.get_base_model().lm_head.base_layer.weight,
    )
    assert (plain - own).abs().max() > 0.01


def test_vocabulary_is_that_of_the_logits() -> None:
    """K = V - 1 of the logits' 260, not of the tokenizer's 257, and nothing is left for the tail."""
    model, batch = make_model(), make_batch(vocab_size=250)
    for record in capture(model, batch, 10_000):
        assert record.num_alternatives == 259
        assert (record.tail_logprobs == -np.inf).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_name_sample_and_position(value: float) -> None:
    model, batch = make_model(), make_batch(vocab_size=250)
    position = int(batch[1].positions[2])

    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        output.last_hidden_state[1, position] = value

    model.model.register_forward_hook(poison)
    with pytest.raises(NonFiniteLogits, match=rf"row 7, position {position}:"):
        capture(model, batch, 8)


def test_no_tensor_of_batch_time_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * 260 * 4)
    model, batch = make_model(), make_batch(vocab_size=250, lengths=(40, 40, 40))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (260,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        capture(model, batch, 8)
    assert largest == 4 * 260


def test_capture_does_not_depend_on_dropout_or_padding() -> None:
    """The record of a sample alone and in a batch agree to float32 noise."""
    model, batch = make_model(), make_batch(vocab_size=250)
    together = capture(model, batch, 8)
    for sample, record in zip(batch, together, strict=True):
        (alone,) = capture(model, [sample], 8)
        np.testing.assert_allclose(alone.label_logprobs, record.label_logprobs, atol=1e-5)
        np.testing.assert_array_equal(alone.alternative_ids, record.alternative_ids)


def test_a_gpu_takes_larger_slices() -> None:
    """A head's weight is read once a slice: at V = 151,936 a GiB is 1,766 rows."""
    with torch.device("meta"):
        model = make_model()
    wide = torch.nn.Linear(32, 151_936, device="meta")
    model.set_output_embeddings(wide)
    assert rows_at_once(model, {"cpu": 2**26, "cuda": 2**30}) == head_rows(model) == 1766  # whatever is no processor


def test_a_processor_takes_rows_that_stay_in_its_cache_where_they_may() -> None:
    model = make_model()
    assert head_rows(model) == HEAD_ROWS < LOGITS_BYTES["cpu"] // (4 * 260)
    model.set_output_embeddings(torch.nn.Linear(32, 200_000))
    assert head_rows(model) == 256 * 2**20 // (4 * 200_000) < HEAD_ROWS
