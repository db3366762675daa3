"""What a picture of a cache says of the alternatives: how many rows keep, or what fewer would keep where all agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.cli_harness import precompute, text_data

from logitcache.reports.plots import _plot_alternatives
from logitcache.storage import LogitCache
from logitcache.storage.statistics import Statistics, describe


def drawn(found: Statistics) -> Any:
    axes: Any = Figure().subplots()
    _plot_alternatives(axes, found)
    return axes


def test_where_every_row_keeps_as_many_it_is_what_fewer_would_keep(tiny_model: Path, tmp_path: Path) -> None:
    """Against p(c) / (1 - p(label)) of every row, in float64."""
    precompute(tiny_model, text_data(tmp_path), tmp_path / "cache", "--precision", "exact")
    cache = LogitCache.open(tmp_path / "cache")
    records = [cache.sample(i).logprobs for i in range(len(cache))]
    p = np.concatenate([np.exp(r.alternative_logprobs.astype(np.float64)) for r in records])
    label = np.concatenate([np.exp(r.label_logprobs.astype(np.float64)) for r in records])
    expected = (p / (1 - label[:, None])).mean(axis=0).cumsum()
    axes = drawn(describe(cache))
    (line,) = axes.lines
    assert line.get_xdata().tolist() == list(range(1, 9))
    assert line.get_ydata() == pytest.approx(expected, rel=1e-4)
    assert line.get_ydata()[-1] == pytest.approx(describe(cache).kept_mass.mean())
    assert axes.get_xlabel() == "first so many of the alternatives (every row keeps 8)"


def test_else_it_is_how_many_rows_keep(tiny_model: Path, tmp_path: Path) -> None:
    precompute(tiny_model, text_data(tmp_path), tmp_path / "some", "--min-mass", 0.2)
    found = describe(LogitCache.open(tmp_path / "some"))
    assert found.num_alternatives.min() < found.num_alternatives.max()
    axes = drawn(found)
    assert not axes.lines and axes.get_xlabel() == "alternatives that a row keeps"
    assert sum(bar.get_height() for bar in axes.patches) == found.num_positions
    precompute(tiny_model, text_data(tmp_path), tmp_path / "none", "--top-k", 0)
    assert drawn(describe(LogitCache.open(tmp_path / "none"))).get_xlabel() == "no row keeps alternatives"
