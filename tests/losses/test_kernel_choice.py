"""Where the kernels of the loss are chosen, on a machine without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logitcache.losses.kernels import choice
from logitcache.losses.objective import Objective

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _asked_anew() -> Any:
    choice.are_usable.cache_clear()
    yield
    choice.are_usable.cache_clear()


@pytest.mark.parametrize(
    ("label_smoothing", "tail", "num_groups", "served"),
    [(0.0, "bucket", 0, True), (0.1, "bucket", 0, False), (0.0, "groups", 256, True), (0.0, "groups", 257, False)],
)
def test_what_they_serve(label_smoothing: float, tail: Any, num_groups: int, served: bool) -> None:
    regularizer = "none" if label_smoothing else "masked-kl"
    chosen = Objective(regularizer=regularizer, tail=tail, label_smoothing=label_smoothing)
    assert choice.serve(chosen, num_groups) == served


def test_groups_that_are_not_compared_do_not_matter() -> None:
    assert choice.serve(Objective(tail="bucket"), 1000)


def test_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton; a card of compute capability 8 of CUDA's, not ROCm's; or the interpreter, that is asked for."""
    found: dict[str, Any] = {"triton": object(), "cuda": "12.8", "capability": (8, 0)}
    monkeypatch.setattr(choice, "find_spec", lambda name: found[name])
    monkeypatch.setattr(torch.version, "cuda", found["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choice.are_there(CARD) and not choice.are_there(CPU) and not choice.are_there(torch.device("meta"))
    found["capability"] = (7, 5)
    assert not choice.are_there(CARD)
    found["capability"] = (9, 0)
    assert choice.are_there(CARD)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not choice.are_there(CARD)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choice.are_there(CPU)
    found["triton"] = None
    assert not choice.are_there(CPU) and not choice.are_there(CARD)


def test_a_fault_is_told_once_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fault(device: torch.device, dtype: torch.dtype) -> str:
        asked.append((device, dtype))
        if dtype == torch.float16:
            raise OSError("no linker")
        return "other sums of a slice of [40, 1003] logits"

    monkeypatch.setattr(choice, "are_there", lambda device: True)
    monkeypatch.setattr(choice, "_fault", fault)
    with pytest.warns(
        UserWarning, match=r"on cuda:0 of logits in torch.bfloat16: .*found other sums.* PyTorch's slices"
    ):
        assert not choice.are_usable(CARD, torch.bfloat16)
    with pytest.warns(UserWarning, match="found OSError: no linker"):
        assert not choice.are_usable(CARD, torch.float16)
    assert not choice.are_usable(CARD, torch.bfloat16)  # and no warning, which would be an error
    assert not choice.are_usable(CARD, torch.float64) and len(asked) == 2


def test_rows_of_a_slice() -> None:
    half_gib = 512 * 2**20
    for vocab, dtype, rows in (
        (151_936, torch.bfloat16, 1664),
        (151_936, torch.float32, 1024),
        (32_000, torch.bfloat16, 4096),
        (100_000, torch.bfloat16, 2560),
        (262_144, torch.bfloat16, 1024),
    ):
        assert choice.num_rows(half_gib, vocab, dtype) == rows
