"""The record of a slice of logits against its definition in float64, also where its tail is next to nothing."""

import pytest
import torch
from torch import Tensor

from logitcache.capture.records import LEAST_MASS, slice_record


def from_definition(logits: Tensor, labels: Tensor, k: int) -> dict[str, Tensor]:
    """log p = z - log sum exp(z); the tail is everything but the label and the k largest others."""
    logprobs = logits.double().log_softmax(dim=1)
    others = logprobs.scatter(1, labels[:, None], -torch.inf)
    kept, ids = others.sort(dim=1, descending=True, stable=True)
    return {
        "label_logprobs": logprobs.gather(1, labels[:, None]).squeeze(1),
        "alternative_ids": ids[:, :k],
        "alternative_logprobs": kept[:, :k],
        "tail_logprobs": kept[:, k:].logsumexp(dim=1),
    }


def check(logits: Tensor, labels: Tensor, k: int) -> None:
    expected = from_definition(logits, labels, k)
    for name, found in slice_record(logits.clone(), labels, k).items():
        if name == "alternative_ids":
            assert torch.equal(found, expected[name])
        else:
            torch.testing.assert_close(found.double(), expected[name], atol=2e-6, rtol=2e-7, msg=name)


@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
@pytest.mark.parametrize(("width", "k"), [(300, 8), (4096, 64), (40_000, 64)])
def test_a_record_is_what_its_definition_says(width: int, k: int, size: float) -> None:
    draws = torch.Generator().manual_seed(width)
    check(4 * torch.randn(20, width, generator=draws) + size, torch.randint(width, (20,), generator=draws), k)


@pytest.mark.parametrize("below", [20.0, 57.0, 58.0, 80.0, 90.0, 103.0, 200.0, 5000.0])
def test_a_tail_far_below_the_largest_token_keeps_its_digits(below: float) -> None:
    """Of probabilities down to what no float32 holds: exp(-57.6) is the least mass that is summed as it is."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 1000, generator=draws)
    logits[:, 8:] -= below
    check(logits, torch.arange(12) % 10, 8)  # of some rows the label is in the tail's range
    assert torch.tensor(LEAST_MASS).log() == pytest.approx(-57.6, abs=0.1)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """So that a batch that was halved for want of memory has the same bytes: here one row sums its tail anew."""
    logits, labels = torch.randn(9, 500), torch.arange(9)
    logits[4, 20:] -= 150
    together = slice_record(logits.clone(), labels, 16)
    for row in range(9):
        alone = slice_record(logits[row : row + 1].clone(), labels[row : row + 1], 16)
        assert all(torch.equal(alone[name][0], together[name][row]) for name in together)


def test_without_a_tail_it_is_empty() -> None:
    found = slice_record(torch.randn(5, 9), torch.arange(5), 64)
    assert found["alternative_ids"].shape == (5, 8) and found["tail_logprobs"].eq(-torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_says_so_and_no_other(bad: float) -> None:
    logits = torch.randn(4, 300)
    logits[2, 7] = bad
    assert slice_record(logits, torch.arange(4), 8)["label_logprobs"].isnan().tolist() == [False, False, True, False]
