"""scripts/bench_gpu.py --tiny on the simulated device: every section runs, what is wrong is seen. No time counts."""

import math
from typing import Any

import pytest
from support import simulated_cuda
from support.on_simulated_cuda import found_on_device

pytestmark = pytest.mark.skipif(bool(simulated_cuda.unavailable()), reason=simulated_cuda.unavailable() or "there")

CASES = ["whole", "wrong_loss", "wrong_capture", "failing_kernels", "failing_peer", "an_error", "without_time"]

SECTIONS = {
    "correctness": {"loss", "gradient", "CE only", "bucket", "renormalize", "groups", "sampled"},
    "correctness of capture": {"capture: label", "capture: alternatives", "capture: ids", "capture: tail"},
    "loss": {"plain cross-entropy", "the two products alone", "logitcache bucket", "logitcache groups"},
    "slices": {"bucket, PyTorch's slices, rows by default", "groups, PyTorch's slices, 48 rows"},
    "top-k": {"torch.topk", "two stages", "the record"},
    "noise": {"demo's base, its own text: bfloat16", "random, tiny: float32, TF32 products"},
    "steps, smaller": {"plain", "cached, bucket", "cached, groups", "adapter disabled", "second model"},
    "steps, larger": {"plain", "cached, bucket", "cached, groups", "adapter disabled", "second model"},
    "loader": {"looked up alone", "batches that are ready", "in the process", "by 2 workers"},
    "capture": {"bare forward", "capture, nothing written", "precompute, the whole job"},
}
"""Their order, and what must be among their lines with a number."""

NEED_A_CARD = ("torch linear_cross_entropy", "TRL chunked divergence")
"""Peers that multiply as only CUDA can."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_on_device(CASES, tmp_path_factory.mktemp("bench"), module="bench_gpu_cases")


def of(found: dict[str, Any], case: str) -> Any:
    assert "error" not in found[case], found[case]["error"]
    return found[case]


def test_every_section_gives_finite_numbers(found: dict[str, Any]) -> None:
    lines = of(found, "whole")["lines"]
    assert list(dict.fromkeys(line["section"] for line in lines)) == list(SECTIONS)
    assert {line["device"] for line in lines} == {"simulated"}
    for section, wanted in SECTIONS.items():
        numbers = {}
        for line in (line for line in lines if line["section"] == section):
            if line["seconds"] or line["value"]:
                numbers[line["what"]] = [float(line[name]) for name in ("seconds", "value", "ratio") if line[name]]
        assert all(math.isfinite(number) and number >= 0 for found in numbers.values() for number in found)
        assert all(any(part in what for what in numbers) for part in wanted), (section, wanted, sorted(numbers))


def test_what_cannot_be_measured_says_so_in_a_line(found: dict[str, Any]) -> None:
    lines = of(found, "whole")["lines"]
    failed = [line["what"] for line in lines if line["verdict"] == "failed"]
    assert all(what.startswith(NEED_A_CARD) for what in failed), failed
    absent = {line["what"]: line["remark"] for line in lines if line["verdict"] == "not installed"}
    assert "Triton's kernels" in absent and all(absent.values())
    assert not any(line["verdict"] == "skipped" for line in lines)


def test_the_numbers_that_mean_something_here_are_right(found: dict[str, Any]) -> None:
    whole = of(found, "whole")
    checked = [line for line in whole["lines"] if line["verdict"] == "right"]
    assert whole["status"] == 0 and len(checked) == 2 * 5 * 2 + 2 * 4 + 1
    values = {line["what"]: float(line["value"]) for line in whole["lines"] if line["what"].endswith("value")}
    ours = values["logitcache CE only, PyTorch's slices: value"]
    assert ours == pytest.approx(values["plain cross-entropy: value"], rel=1e-3)
    noise = {line["what"]: float(line["value"]) for line in whole["lines"] if "bfloat16" in line["what"]}
    assert len(noise) == 2 and all(0 < value < 0.1 for value in noise.values()), noise


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("wrong_loss", {"logitcache bucket: loss, PyTorch's slices", "logitcache groups: gradient, PyTorch's slices"}),
        ("wrong_capture", {"capture: ids that are not among the best k, or twice there", "capture: tail"}),
        ("failing_kernels", {"Triton's kernels"}),
    ],
)
def test_what_is_wrong_is_a_line_and_status_1(case: str, what: set[str], found: dict[str, Any]) -> None:
    wrong = {line["what"] for line in of(found, case)["lines"] if line["verdict"] == "wrong"}
    assert of(found, case)["status"] == 1 and what <= wrong


def test_a_section_that_fails_is_a_line_and_the_next_goes_on(found: dict[str, Any]) -> None:
    lines = of(found, "an_error")["lines"]
    (failed,) = [line for line in lines if line["verdict"] == "failed"]
    assert failed["section"] == "slices" and failed["remark"] == "RuntimeError: no inputs at all"
    assert sum(line["section"] == "noise" for line in lines) > 3 and of(found, "an_error")["status"] == 0


def test_another_project_s_error_costs_no_line_of_ours(found: dict[str, Any]) -> None:
    lines = of(found, "failing_peer")["lines"]
    assert "RuntimeError: no driver" in {line["remark"] for line in lines if line["verdict"] == "failed"}
    ours = [line for line in lines if line["what"].startswith("logitcache") and line["seconds"]]
    assert len(ours) == 5 and all(line["ratio_to"] == "plain cross-entropy" for line in ours)


def test_without_time_every_section_is_skipped_with_what_it_needs(found: dict[str, Any]) -> None:
    lines = of(found, "without_time")["lines"]
    assert [line["section"] for line in lines] == list(SECTIONS)
    assert all(line["verdict"] == "skipped" and "found 0 s" in line["remark"] for line in lines)
