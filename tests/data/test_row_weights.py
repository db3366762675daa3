"""Weights a token that rows bring: which are read, how they follow the tokens, and what is none."""

from typing import Any

import numpy as np
import pytest
from support.tiny_model import make_tokenizer

from logitcache.data.batches import pad_samples, pad_weighted
from logitcache.data.samples import make_samples
from logitcache.errors import InvalidData


def sample_of(row: dict[str, Any], max_length: int = 64) -> Any:
    (sample,) = make_samples([("row 1", row)], make_tokenizer(), max_length, 260).samples
    return sample


def test_a_list_beside_token_ids_is_aligned_with_them() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}
    for name in ("loss_scale", "weights"):
        sample = sample_of({**row, name: [0, 1, 0.5, 2]})
        assert sample.weights.dtype == np.float32 and sample.weights.tolist() == [0, 1, 0.5, 2]
        assert sample_of({**row, name: [0, 1, 0.5, 2]}, max_length=3).weights.tolist() == [0, 1, 0.5]
    assert sample_of(row).weights is None and sample_of({**row, "weights": None}).weights is None


@pytest.mark.parametrize(
    "row",
    [{"text": "abc"}, {"prompt": "ab", "completion": "c"}, {"input_ids": [1, 2, 3, 4]}],
    ids=lambda row: next(iter(row)),
)
def test_a_number_counts_for_every_token(row: dict[str, Any]) -> None:
    sample = sample_of({**row, "loss_scale": 0.25})
    assert sample.weights.tolist() == [0.25] * len(sample.token_ids)


def test_a_list_beside_text_is_of_something_else() -> None:
    """Whose tokens it would count is not known."""
    assert sample_of({"text": "abc", "weights": [1, 2]}).weights is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"loss_scale": [1, 2]}, "each of its 4 tokens in 'loss_scale'"),
    "negative": ({"weights": [1, -1, 1, 1]}, "a number of 0 or more for each of its 4 tokens in 'weights'"),
    "not a number": ({"weights": [1, "1", 1, 1]}, "in 'weights'"),
    "truth": ({"weights": [True, False, True, True]}, "in 'weights'"),
    "infinite": ({"weights": float("inf")}, "in 'weights'"),
    "a text": ({"weights": "heavy"}, "found 'heavy'"),
    "both": ({"weights": 1.0, "loss_scale": 1.0}, "both loss_scale and weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_weights_are_refused_by_the_row(case: str) -> None:
    brought, said = WRONG[case]
    with pytest.raises(InvalidData, match=f"reading row 1: .*{said}"):
        sample_of({"input_ids": [1, 2, 3, 4], **brought})


def test_a_batch_has_them_where_it_is_asked_for_them() -> None:
    samples = [
        sample_of({"input_ids": [1, 2, 3], "weights": [1, 2, 3]}),
        sample_of({"input_ids": [4, 5], "weights": 7}),
    ]
    assert pad_weighted(samples)["loss_scale"].tolist() == [[1, 2, 3], [7, 7, 0]]
    assert "loss_scale" not in pad_samples(samples)
