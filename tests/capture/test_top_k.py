"""Top-k in two stages against sorting the whole row."""

import pytest
import torch
from torch import Tensor

from logitcache.capture.top_k import _chunk, top_k


def sorted_rows(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By sorting all: descending, equal ones by ascending place."""
    found = values.sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@pytest.mark.parametrize("k", [0, 1, 8, 64, 256])
@pytest.mark.parametrize("width", [300, 4096, 4099, 32_000, 50_257, 151_936])
def test_values_and_places_are_those_of_sorting(width: int, k: int) -> None:
    values = torch.randn(5, width, generator=torch.Generator().manual_seed(width + k))
    values[:, torch.randint(width, (3,))] = -torch.inf
    for found, expected in zip(top_k(values, k), sorted_rows(values, k), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("place", [0, 1793, 1794, 50_231, 50_232, 50_256])
def test_the_largest_is_found_wherever_it_stands(place: int) -> None:
    """At the ends of chunks, and behind the last whole one."""
    values = torch.randn(3, 50_257)
    values[:, place] = 9.0
    assert _chunk(50_257, 64) == 28 and top_k(values, 64)[1][:, 0].tolist() == [place] * 3


def test_all_in_few_chunks_and_one_in_every_chunk() -> None:
    """32 values a chunk, 1,024 apart."""
    values = torch.full((2, 32_768), -1.0)
    few = torch.cat([torch.arange(640, 32_768, 1024), torch.arange(641, 32_768, 1024)])
    values[0, few] = torch.arange(64.0)
    values[1, 5:69] = torch.arange(64.0)
    assert _chunk(32_768, 32) == 32
    for k in (32, 64):
        found, places = top_k(values, k)
        assert torch.equal(found, torch.arange(63.0, 63.0 - k, -1.0).expand(2, -1))
        assert places[0].tolist() == few.flip(0)[:k].tolist() and places[1].tolist() == list(range(68, 68 - k, -1))


def test_ties_have_the_values_of_sorting_distinct_places_and_the_argmax_first() -> None:
    values = (torch.randn(50, 151_936, generator=torch.Generator().manual_seed(0)) * 4).bfloat16().float()
    found, places = top_k(values, 64)
    assert torch.equal(found, sorted_rows(values, 64)[0]) and torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == 64 for row in places.tolist())
    assert torch.equal(places[:, 0], values.argmax(dim=1)) and (found[:, 0] == found[:, 1]).any()
    assert torch.equal(top_k(values, 64)[1], places)


@pytest.mark.parametrize("k", [1, 2, 64])
@pytest.mark.parametrize("width", [300, 32_768])
def test_more_of_the_largest_than_are_kept_have_the_argmax_first(width: int, k: int) -> None:
    values = torch.zeros(3, width)
    values[1, 5:] = 1.0
    values[2, [7, 11, 200, 230, 290]] = 1.0
    found, places = top_k(values, k)
    assert torch.equal(places[:, 0], values.argmax(dim=1)) and torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == k for row in places.tolist())
