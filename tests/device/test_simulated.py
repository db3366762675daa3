"""What a GPU would be asked to do, on the simulated CUDA device: the numbers of a CPU, and few waits of the host.

It is no card: what is held here is where tensors lie, what is copied, and how often the host must wait for the device.
Times, memory and a card's own rounding are not.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support import simulated_cuda
from support.on_simulated_cuda import found_on_device

pytestmark = pytest.mark.skipif(bool(simulated_cuda.unavailable()), reason=simulated_cuda.unavailable() or "there")

CASES = [
    *("of_the_device", "losses", "steps", "captured", "waits_of_capture", "compared", "waits_of_a_step"),
    *("waits_of_sft", "sent_columns"),
]

MOST_BEYOND = 3
"""Waits of a training step of ours beyond those of the trainer below, at most."""

OWN_WAITS = {
    "plug-in": 0,
    "plug-in, groups": 1,  # whether a group has lost its digits, once a slice of logits: `losses.compared`
    "plug-in, all positions": 0,
    "plug-in, rho1": 0,
    "plug-in, budget": 1,  # the KL of the step, which decides the weight of the next
    "plug-in, anchor": 0,
    "job": 0,
    "job, micro-batches": 0,
    "job, whole": 0,
    "own loop": 3,  # ids, labels and mask, which the cache is asked for
}
"""Of a step, at lines of the product itself, at most."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cases found; of several workers of pytest one runs them."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    kept = shared / "simulated.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(found_on_device(CASES, tmp_path_factory.mktemp("device"))))
    told: dict[str, Any] = json.loads(kept.read_text())
    return told


def of(found: dict[str, Any], case: str) -> Any:
    assert "error" not in found[case], found[case]["error"]
    return found[case]


def test_the_device_refuses_to_be_mixed_and_shows_when_the_host_waits(found: dict[str, Any]) -> None:
    device = of(found, "of_the_device")
    assert device["device"] == "cuda:0"
    assert len(device["refused"]) == 2
    assert all("Expected all tensors to be on the same device" in said for said in device["refused"])
    waits = device["waits"]
    assert {name for name, count in waits.items() if count == 1} == {
        *("a number", "a comparison", "places", "a choice by a mask", "a copy to the host", "a copy from the host"),
        *("a copy that blocks", "a tensor of a number", "a backward"),
    }
    assert {name for name, count in waits.items() if count == 0} == {
        *("a copy from pinned memory", "an empty copy", "a fill by a mask", "a choice by numbers", "a sum"),
        "a tensor of zeros",
    }


def test_losses_and_gradients_are_those_of_the_cpu(found: dict[str, Any]) -> None:
    losses = of(found, "losses")
    assert len(losses) == 7
    for values in losses.values():
        assert values["cuda"] == pytest.approx(values["cpu"], rel=1e-5)
        assert values["apart"] < 1e-5 * values["size"] and values["size"] > 1


def test_steps_of_the_trainer_are_those_of_the_cpu(found: dict[str, Any]) -> None:
    cpu, cuda = of(found, "steps")["cpu"], of(found, "steps")["cuda"]
    assert cuda["on"] == ["cuda:0"] and cpu["on"] == ["cpu"]
    assert len(cuda["log"]) == len(cpu["log"]) == 3
    for on_cuda, on_cpu in zip(cuda["log"], cpu["log"], strict=True):
        assert on_cuda == pytest.approx(on_cpu, rel=1e-4)
    assert cuda["norm"] == pytest.approx(cpu["norm"], rel=1e-5)


def test_a_cache_made_on_it_is_that_of_the_cpu(found: dict[str, Any]) -> None:
    captured = of(found, "captured")
    ids = {name for name in captured if name.endswith("ids") or name == "positions"}
    assert ids == {"positions", "label_ids", "alternative_ids", "tail_sample_ids"}
    assert all(captured[name] == 0 for name in ids)
    assert len(captured) > len(ids) and all(difference < 1e-4 for difference in captured.values())


@pytest.mark.parametrize("name", ["bucket", "groups and draws"])
def test_a_batch_is_captured_without_waiting_for_the_device(name: str, found: dict[str, Any]) -> None:
    """One event is waited for, when the record is fetched."""
    waits = of(found, "waits_of_capture")[name]
    assert waits["launch"]["own"] == 0, waits["launch"]["lines"]
    assert waits["records"]["count"] == 0, waits["records"]["lines"]


def test_an_evaluation_on_it_is_that_of_the_cpu(found: dict[str, Any]) -> None:
    cpu, cuda = (of(found, "compared")[device] for device in ("cpu", "cuda"))
    assert cuda["samples"] == cpu["samples"] and cuda["num_documents"] == 16
    for name in ("kl_nats", "base_ce_nats", "agreement", "num_first_changed"):
        assert cuda[name] == pytest.approx(cpu[name], rel=1e-5)
    for side in ("before", "after"):
        assert cuda[side] == pytest.approx(cpu[side], rel=1e-5)


@pytest.mark.parametrize("name", OWN_WAITS)
def test_a_step_waits_no_more_than_the_trainer_below_and_three_times(name: str, found: dict[str, Any]) -> None:
    waits = of(found, "waits_of_a_step")
    plain, ours = waits["plain, job" if name.startswith("job") else "plain"], waits[name]
    assert ours["count"] <= plain["count"] + MOST_BEYOND, ours["lines"]
    assert ours["own"] <= OWN_WAITS[name], ours["lines"]
    assert ours["count"] > 0 and plain["own"] == 0  # what the model and the trainer below read is counted


@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_a_step_of_sft_waits_less_than_by_itself(batches: str, found: dict[str, Any]) -> None:
    waits = of(found, "waits_of_sft")
    plain, ours = waits[f"plain, {batches}"], waits[f"cached, {batches}"]
    assert ours["count"] < plain["count"], ours["lines"]
    assert ours["own"] <= 1, ours["lines"]  # whether a label shares the largest logit, for mean_token_accuracy


def test_a_batch_brings_the_columns_that_the_objective_reads(found: dict[str, Any]) -> None:
    columns = {name: set(sent) for name, sent in of(found, "sent_columns").items()}
    groups, draws = {"base_tail_group_logprobs"}, {"base_draw_ids", "base_draw_logprobs"}
    of_tails = {name: sent & (groups | draws) for name, sent in columns.items()}
    assert of_tails == {
        "bucket": set(),
        "groups": groups,
        "sampled": draws,
        "full-kl": set(),
        "reverse": groups,
        "all positions": set(),
        "rho1": set(),
    }
    assert columns["bucket"] >= {"base_alternative_ids", "base_alternative_logprobs", "base_tail_logprobs"}


def test_a_job_on_a_machine_with_two_devices_takes_that_of_its_base(tmp_path: Path) -> None:
    jobs = of(found_on_device(["one_of_two"], tmp_path, num_devices=2), "one_of_two")
    for device in ("cpu", "cuda:0", "cuda:1"):
        assert jobs[device]["steps"] == 3 and jobs[device]["on"] == [device]
        assert jobs[device]["final"] == pytest.approx(jobs["cpu"]["final"], rel=1e-4, abs=1e-6)
    assert jobs["cuda:0, no workers"]["adapter"] == jobs["cuda:0"]["adapter"]  # whoever looks batches up
    assert "2 GPUs in one process (DataParallel)" in jobs["own"]  # a trainer of one's own would divide the batches
