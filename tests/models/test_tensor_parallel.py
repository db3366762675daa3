"""Tensor parallel: a model divided over two processes gives the records of the whole one, to float noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.breadth import some_of
from support.tensor_parallel_rank import COLUMNS
from support.tiny_model import make_model
from support.tiny_runs import make_samples
from support.two_processes import run_under_torchrun

from logitcache.capture.teacher import capture
from logitcache.capture.vocab_groups import token_groups
from logitcache.errors import InputNotFound, UnsupportedModel
from logitcache.models.loading import find_model, load_base
from logitcache.models.tensor_parallel import agreed, leads

CPU = torch.device("cpu")


PLAIN = pytest.param({}, id="plain")
TIED = pytest.param({"tie_word_embeddings": True, "attention_bias": True}, id="tied")


@pytest.mark.parametrize("config", some_of([PLAIN, TIED], 1))
def test_two_ranks_capture_what_one_process_does(config: dict[str, Any], tmp_path: Path) -> None:
    make_model(**config).save_pretrained(tmp_path / "m")
    run_under_torchrun("tensor_parallel_rank.py", tmp_path / "m", tmp_path)
    model = load_base(find_model(str(tmp_path / "m")), "float32", CPU).model
    groups = token_groups(model, 4)
    records = capture(model, make_samples(12), 16, torch.from_numpy(groups.copy()))
    expected = {name: np.concatenate([getattr(r, name) for r in records]) for name in COLUMNS}
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert found["rows_held"] == 16  # of 32: half of it
            assert np.array_equal(found["groups"], groups)
            assert np.array_equal(found["alternative_ids"], expected["alternative_ids"])
            for name in COLUMNS:
                np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4, err_msg=name)


def test_what_cannot_be_divided_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "m")
    source = find_model(str(tmp_path / "m"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputNotFound, match="expected two or more, found this one"):
        load_base(source, "float32", CPU, tensor_parallel=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UnsupportedModel, match="num_key_value_heads are 2, which 4 does not divide"):
        load_base(source, "float32", CPU, tensor_parallel=True)
    assert not torch.distributed.is_initialized()


def test_alone_a_process_leads_and_agrees_with_itself() -> None:
    assert leads() and agreed("plan") == "plan"
