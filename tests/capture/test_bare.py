"""`bare` of scripts/bench_precompute.py, which the batch job is measured against, is no slower than it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_model import make_model

from logitcache.data.samples import Sample

SCRIPTS = Path(__file__).parents[2] / "scripts"


def sample_of(ids: np.ndarray, first: int) -> Sample:
    """Supervised from the first label on."""
    return Sample(ids.astype(np.uint32), np.arange(len(ids)) >= first, "here")


def test_bare_makes_every_logit_once_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_precompute

    model = make_model()
    rng = np.random.default_rng(0)
    batches = [[sample_of(rng.integers(10, 90, n), 4) for n in lengths] for lengths in ((20, 12), (9,))]
    seen: list[Any] = []
    body, head = model.base_model, model.get_output_embeddings()
    body.register_forward_pre_hook(lambda _m, _a, given: seen.append(given.get("attention_mask")), with_kwargs=True)
    rows: list[int] = []
    head.register_forward_hook(lambda _m, given, _out: rows.append(len(given[0])))
    bench_precompute.bare(model, batches, False, 10)
    assert rows == [10, 10, 4, 5] and seen == [None, None]
    assert sum(rows) == sum(len(sample.positions) for batch in batches for sample in batch)
    bench_precompute.bare(model, batches[:1], True, 10)
    assert torch.equal(seen[2].sum(dim=1), torch.tensor([20, 12]))


def test_its_slices_are_one_of_those_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_precompute

    model = make_model()
    batch = [sample_of(np.arange(10, 40), 1)]
    width = model.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(bench_precompute, "SLICE_BYTES", (0, 4 * width * 7, 2**30))
    monkeypatch.setattr(bench_precompute, "timed", lambda run, _device: rows_of(run))

    def rows_of(run: Any) -> float:
        taken: list[int] = []
        hook = model.get_output_embeddings().register_forward_hook(lambda _m, given, _out: taken.append(len(given[0])))
        run()
        hook.remove()
        assert sum(taken) == 29
        return abs(max(taken) - 7)  # as if slices of 7 were the fastest

    assert bench_precompute.fastest_rows(model, batch, False) == 7
