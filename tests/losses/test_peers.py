"""What scripts/bench_loss.py times is what its rows say: values and gradients against their definition in float64.

Projects that this environment does not have are asked all the same; `bench_loss.py --check` asks them in theirs.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOUND = {"seconds": 2.0, "growth": 1.0, "loss_error": 0.0, "gradient_error": 0.0, "largest_gradient": 1.0, "loss": 1.0}
"""What a process answers."""
SCRIPTS = Path(__file__).parents[2] / "scripts"
ALWAYS = {
    *("plain CE", "CE + KL, live full logits", "DistillKit sparse KL + CE", "bare slices of 128"),
    *(f"TRL chunked divergence, beta {beta}" for beta in ("0", "0.5")),
    *(f"TRL generalized_jsd_loss, beta {beta}" for beta in ("0", "0.5")),
    *("TRL fused LM head", "TRL fused LM head, as SFTTrainer"),
}
"""What TRL gives, and what is written here; the others are in environments of their own."""
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    options = ("options=None", "options by default", "128 rows", "128 rows, accurate")
    ALWAYS |= {f"torch linear_cross_entropy, {name}" for name in options}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_loss

    return bench_loss


@pytest.fixture
def peers(bench: ModuleType) -> ModuleType:
    """The list, which needs nothing of ours."""
    assert bench.PEERS
    import bench_loss_peers

    return bench_loss_peers


@pytest.fixture
def inputs(bench: ModuleType) -> Any:
    """Several chunks of most, the last one ragged."""
    return bench.make_inputs(bench.Size(300, 32, 1003, "float32", "cpu"), seed=3)


def test_every_peer_that_runs_computes_its_quantity(bench: ModuleType, inputs: Any) -> None:
    from bench_loss_step import errors, is_another_quantity

    ran = set()
    for peer in bench.PEERS:
        if peer.compiles:
            continue  # a minute each
        try:
            loss = peer.loss_of(inputs)
            found = errors(inputs, loss, peer.expected(inputs))
        except (AttributeError, ImportError, RuntimeError):
            continue  # an older torch, no package, no GPU
        ran.add(peer.name)
        assert not is_another_quantity(found, "float32"), (peer.name, found)
    assert ran >= ALWAYS, ALWAYS - ran


def test_ours_compute_theirs(bench: ModuleType, inputs: Any) -> None:
    from bench_loss_step import errors, is_another_quantity

    for method in bench.OURS:
        found = errors(inputs, bench.loss_of(method, inputs), bench.by_definition(method, inputs))
        assert not is_another_quantity(found, "float32"), (method, found)


def test_the_definition_is_autograd_s_at_once(bench: ModuleType, inputs: Any) -> None:
    """In blocks of rows it gives what one float64 graph over all positions gives."""
    hidden = inputs.hidden.double().requires_grad_()
    value = torch.nn.functional.cross_entropy(hidden @ inputs.weight.double().T, inputs.labels)
    value.backward()
    loss, gradient = bench.by_definition("plain CE", inputs)
    assert loss == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-12, atol=1e-15)


def test_a_loss_under_another_s_name_is_found_out(bench: ModuleType, inputs: Any) -> None:
    """KL + H(p) has KL's gradient, so the value has to tell; of half a gradient, the gradient."""
    from bench_loss_step import errors, is_another_quantity

    peers = {peer.name: peer for peer in bench.PEERS}
    plain, kl = peers["plain CE"], peers["CE + KL, live full logits"]
    for peer, quantity in ((plain, "CE + full KL"), (kl, "CE + full KL + H(p)"), (kl, "CE + JSD"), (kl, "full KL")):
        found = errors(inputs, peer.loss_of(inputs), replace(peer, quantity=quantity).expected(inputs))
        assert is_another_quantity(found, "float32"), quantity
    found = errors(inputs, lambda hidden: plain.loss_of(inputs)((hidden + hidden.detach()) / 2), plain.expected(inputs))
    assert found["loss_error"] < 1e-5 and is_another_quantity(found, "float32")
    assert is_another_quantity(found | {"gradient_error": float("nan")}, "float32")


def test_who_is_not_there_is_a_row_that_says_so(
    peers: ModuleType, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_inputs: Any) -> Any:
        import nobody_has_this

        return nobody_has_this

    home = peers.Home(("nobody-has-this",), ".venv-of-nobody")
    absent = peers.Peer("absent", missing, "CE", 1, home)
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, absent))
    monkeypatch.setattr(peers, "set_up", lambda _threads: None)
    path = tmp_path / "inputs.pt"
    torch.save(asdict(inputs), path)
    job = {"inputs": str(path), "tiny": str(path), "device": "cpu", "threads": 1, "inner": 0, "check": True}
    found = peers.child(job | {"method": "absent"})
    assert found["refused"] == "ModuleNotFoundError: No module named 'nobody_has_this'"
    assert found["by"].startswith("nobody-has-this not installed, torch ")
    assert peers.child(job | {"method": "bare slices of 128"})["by"] == "written here"
    assert home.python.exists()


def test_a_process_that_gives_no_answer_costs_no_other_its_row(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment whose making failed has an interpreter, and nothing to import."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    python.chmod(0o755)
    plain, *_ = bench.PEERS
    half_made = replace(plain, name="half made", home=replace(plain.home, venv=str(tmp_path / "venv")))
    monkeypatch.setitem(bench.BY_NAME, "half made", half_made)
    args = Namespace(methods=["half made", "plain CE"], seed=0, threads=1, inner=1, repeats=2)
    half, whole = bench.measure(bench.Size(64, 16, 300, "float32", "cpu"), args, tmp_path)
    assert half["remark"] == "ended with 1: ModuleNotFoundError: No module named 'torch'"
    assert whole["remark"] == "" and whole["seconds"]


def test_memory_that_was_short_is_asked_for_again(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [{"refused": f"{bench.NO_MEMORY}: about 2 GB, free 1"}, FOUND, FOUND]
    asked = []

    def run_method(_method: str, job: dict[str, Any], _size: Any) -> dict[str, Any]:
        asked.append(job["check"])
        return answers[len(asked) - 1]

    monkeypatch.setattr(bench, "run_method", run_method)
    args = Namespace(methods=["plain CE"], seed=0, threads=1, inner=1, repeats=3)
    (row,) = bench.measure(bench.Size(8, 16, 300, "float32", "cpu"), args, tmp_path)
    assert asked == [True, True, False] and row["remark"] == "" and row["seconds"] == "2"


def test_a_repeat_that_failed_is_said_beside_what_the_first_one_found(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([FOUND | {"by": "somebody 1.0"}, {"refused": "ended with -11: "}])
    monkeypatch.setattr(bench, "run_method", lambda *_: next(answers))
    args = Namespace(methods=["plain CE"], seed=0, threads=1, inner=1, repeats=3)
    (row,) = bench.measure(bench.Size(8, 16, 300, "float32", "cpu"), args, tmp_path)
    assert row["remark"] == "ended with -11: " and row["by"] == "somebody 1.0" and row["seconds"] == "2"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; sys.exit('no such thing')", "ended with 1: no such thing"),
        ("print('no JSON')", "ended without an answer: "),
        ("import time; time.sleep(600)", "no answer in 1 s"),
    ],
)
def test_a_child_without_an_answer_says_why(script: str, said: str, bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "child.py"
    path.write_text(script)
    with pytest.raises(bench.ChildFailed) as caught:
        bench.run_child(str(path), {"method": "m"}, 1, longest=1.0 if "sleep" in script else None)
    assert caught.value.said == said


def test_only_a_child_that_failed_can_have_run_out_of_memory(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "child.py"
    path.write_text("import sys; print('not enough memory for a cache, made it smaller', file=sys.stderr); print('{}')")
    assert bench.run_child(str(path), {"method": "m"}, 1) == {}
    path.write_text('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")')
    assert bench.run_child(str(path), {"method": "m"}, 1) is None


def test_a_run_asks_each_in_a_process_of_its_own(bench: ModuleType, tmp_path: Path) -> None:
    """One of ours, one written here, and Triton's, which says itself that there is no GPU or that it is not there."""
    methods = ["plain CE", "Liger fused linear CE", "logitcache bucket"]
    args = Namespace(methods=methods, seed=0, threads=1, inner=1, repeats=2)
    rows = bench.measure(bench.Size(64, 16, 300, "float32", "cpu"), args, tmp_path)
    plain, liger, ours = rows
    assert [row["method"] for row in rows] == methods
    assert plain["remark"] == ours["remark"] == "" and plain["seconds_ratio"] == "1.000" and ours["seconds_ratio"]
    assert float(ours["gradient_error"]) < 1e-5 * float(ours["largest_gradient"])
    assert set(plain) == set(liger)
    if not torch.cuda.is_available():
        assert liger["remark"] and not liger["seconds"] and "liger-kernel" in liger["by"]
