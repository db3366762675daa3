"""What a sweep's configuration asks for, and what is refused before anything is trained."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from logitcache.errors import InputNotFound, InvalidData
from logitcache.sweeps.config import FIELDS, LEARNING_RATES, METHODS, make_config, read_config
from logitcache.training.settings import AnchorSettings, TrainSettings

PATHS = {"model": "m", "cache": "c", "new": "n.jsonl", "prior": "p.jsonl"}


def config(**keys: Any) -> Any:
    return make_config({**PATHS, **keys}, "sweep.yaml")


def test_the_grid_is_the_product_of_its_axes_for_every_method() -> None:
    found = config(
        grid={"lr": [1e-3, 2e-3], "seed": [0, 1], "rank": 4, "max_steps": 5},
        methods={"plain": {"regularizer": "none"}, "masked": {"weight": [0.5, 1.0], "top_k": [4, 8]}},
    )
    assert found.methods == ["plain", "masked"]
    plain, masked = ([r for r in found.runs if r.method == m] for m in found.methods)
    assert len(plain) == 4 and len(masked) == 16
    chosen = {tuple(r.settings[n] for n in ("lr", "seed", "weight", "top_k")) for r in masked}
    assert chosen == set(itertools.product((1e-3, 2e-3), (0, 1), (0.5, 1.0), (4, 8)))
    for run in found.runs:
        assert run.settings.keys() == set(FIELDS)
        made = found.run_of(run)
        assert made.adapter.rank == 4 and made.adapter.alpha == run.settings["alpha"] == 8.0 and made.penalty is None
        assert made.training == TrainSettings(
            lr=run.settings["lr"], seed=run.settings["seed"], max_steps=5, top_k=run.settings["top_k"]
        )
    assert {found.run_of(r).objective.regularizer for r in plain} == {"none"}
    objectives = [found.run_of(r).objective for r in masked]
    assert {(o.regularizer, o.weight) for o in objectives} == {("masked-kl", 0.5), ("masked-kl", 1.0)}
    assert len({r.name for r in found.runs}) == len(found.runs)


def test_learning_rates_are_swept_where_none_is_named() -> None:
    for methods in (None, {"plain": {"regularizer": "none"}, "masked": None}):
        found = config(methods=methods)
        for method in found.methods:
            assert {r.settings["lr"] for r in found.runs if r.method == method} == set(LEARNING_RATES)
    assert config(methods=None).methods == list(METHODS)


def test_a_method_has_its_own_axes_before_those_of_the_grid() -> None:
    found = config(grid={"lr": [1e-3, 2e-3]}, methods={"low": {"lr": 1e-4}, "both": {"regularizer": "none"}})
    assert [r.settings["lr"] for r in found.runs] == [1e-4, 1e-3, 2e-3]


def test_what_plain_training_does_not_have_is_no_axis_of_it() -> None:
    """The weights, tails and k of the grid are one run without a regulariser."""
    grid = {"lr": 1e-3, "weight": [0.5, 1.0], "tail": ["bucket", "renormalize"], "top_k": [4, 8]}
    found = config(grid=grid, methods={"plain": {"regularizer": "none"}, "masked": {}})
    assert [sum(r.method == m for r in found.runs) for m in found.methods] == [1, 8]


def test_penalties_take_the_weight_and_leave_the_loss_alone() -> None:
    found = config(grid={"lr": 1e-3}, methods={"L2-SP": {"regularizer": "l2-sp", "weight": 0.1}})
    run = found.run_of(found.runs[0])
    assert run.penalty is not None and (run.penalty.kind, run.penalty.weight) == ("l2-sp", 0.1)
    assert run.objective.regularizer == "none"


def test_a_kind_of_adapter_has_its_own_settings_and_no_other() -> None:
    grid = {"lr": 1e-3, "block_size": [8, 16]}
    found = config(grid=grid, methods={"turned": {"adapter": "oft", "cayley": ["neumann", "exact"]}})
    assert len({(r.settings["block_size"], r.settings["cayley"]) for r in found.runs}) == len(found.runs) == 4
    assert all(r.settings[name] is None for r in found.runs for name in ("rank", "alpha", "dropout"))
    adapters = [found.run_of(run).adapter for run in found.runs]
    assert {(a.kind, a.block_size) for a in adapters} == {("oft", 8), ("oft", 16)}
    (lora,) = config(grid={"lr": 1e-3}, methods={"lora": {}}).runs
    assert (lora.settings["rank"], lora.settings["block_size"], lora.settings["cayley"]) == (16, None, None)
    with pytest.raises(InvalidData, match="--rank has no place in --adapter oft"):
        config(grid={"lr": 1e-3, "rank": 8}, methods={"turned": {"adapter": "oft"}})
    both = config(grid={"lr": 1e-3, "rank": [4, 8]}, methods={"turned": {"adapter": "oft"}, "lora": {}})
    assert [run.settings["rank"] for run in both.runs] == [None, 4, 8]  # the grid's rank is of those that have one


def test_a_run_keeps_its_name_when_the_grid_grows() -> None:
    small = config(grid={"lr": 1e-3, "seed": 0}, methods={"masked": {}})
    large = config(grid={"seed": [1, 0], "lr": [2e-3, 1e-3]}, methods={"other": {"weight": 2.0}, "masked": {}})
    assert {r.name for r in small.runs} < {r.name for r in large.runs}
    renamed = config(grid={"lr": 1e-3, "seed": 0}, methods={"Masked!": {}})
    assert renamed.runs[0].name != small.runs[0].name


def test_a_recipe_is_its_settings_and_what_a_method_says_wins() -> None:
    found = config(grid={"lr": 1e-3, "weight": [2.0, 3.0]}, methods={"a": {"recipe": "asft"}, "b": {"recipe": "asft",
        "weight": 0.1}})  # fmt: skip
    objectives = [found.run_of(run).objective for run in found.runs]
    assert [(o.regularizer, o.ce_weight, o.weight) for o in objectives] == [
        ("full-kl", "dft", 0.05),
        ("full-kl", "dft", 0.1),
    ]


def test_weights_are_axes_of_plain_methods_too() -> None:
    methods = {"a": {"regularizer": "none", "ce_weight": ["none", "dft", "my.py:f"]}}
    methods["b"] = {"regularizer": "l2-sp", "ce_weight": "rho1", "ce_weight_value": [0.5, 0.6]}
    found = config(grid={"lr": 1e-3}, methods=methods)
    assert [run.settings["ce_weight"] for run in found.runs] == ["none", "dft", "my.py:f", "rho1", "rho1"]
    assert [run.settings["ce_weight_value"] for run in found.runs] == [None, None, None, 0.5, 0.6]
    read = {"a": {"regularizer": "none", "ce_weight": ["my.py:f", "stm"], "lr": 1e-3, "top_k": [4, 8]}}
    read_by = [(run.settings["ce_weight"], run.settings["top_k"]) for run in config(methods=read).runs]
    assert read_by == [("my.py:f", 4), ("my.py:f", 8), ("stm", None)]  # a formula is given the alternatives
    spelt = {"a": {"ce_weight": "stm"}, "b": {"ce_weight": "stm", "ce_weight_value": 2.5}}
    with pytest.raises(InvalidData, match="'a' and 'b' have a run in common"):
        config(grid={"lr": 1e-3}, methods=spelt)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no recipe": ({"methods": {"a": {"recipe": "soup"}}}, "method 'a': recipe: expected one of asft, found 'soup'"),
    "recipes": ({"methods": {"a": {"recipe": ["asft"]}}}, "recipe: expected one of asft"),
    "a recipe for all": ({"grid": {"recipe": "asft"}}, "unknown key 'recipe'"),
    "no weight": ({"methods": {"a": {"ce_weight": "dtf"}}}, "ce_weight: expected one of none, dft"),
    "no number": ({"methods": {"a": {"ce_weight": "dft", "ce_weight_value": 2}}}, "whose formula has no number"),
    "unknown key": ({"modle": "m"}, "unknown key 'modle'"),
    "unknown field": ({"grid": {"learning_rate": 1e-3}}, "unknown key 'learning_rate'"),
    "unknown field of a method": ({"methods": {"a": {"lrr": 1}}}, "method 'a': unknown key 'lrr'"),
    "no value": ({"grid": {"lr": []}}, "lr has no values"),
    "no method": ({"methods": {}}, "at least one method"),
    "a value twice": ({"grid": {"seed": [0, 1, 0]}}, "seed has 0 twice"),
    "unknown regulariser": ({"methods": {"a": {"regularizer": "kl"}}}, "regularizer: expected one of"),
    "unknown adapter": ({"grid": {"adapter": "lorra"}}, "adapter: expected one of"),
    "refused adapter": ({"grid": {"adapter": "loftq"}}, "LoftQ replaces the weights"),
    "odd rank": ({"grid": {"adapter": "orthogonal", "rank": 3}}, "even rank"),
    "a rank of rotations": (
        {"grid": {"lr": 1e-3}, "methods": {"a": {"adapter": ["lora", "oft"], "rank": 16}}},
        "method 'a': --rank has no place in --adapter oft",
    ),
    "a scale twice": ({"scales": [0.5, "0.50"]}, "--scales 0.5,0.5: expected different numbers"),
    "no null space": ({"grid": {"adapter": "lora-null"}}, "null space"),
    "a text for a number": (
        {"grid": {"lr": "1e-3x"}},
        "lr: expected a number of 0 or more, found '1e-3x'",
    ),
    "half a seed": ({"grid": {"seed": 0.5}}, "seed: expected a whole number of 0 or more"),
    "yes for a number": ({"grid": {"rank": True}}, "rank: expected a whole number of 1 or more, found True"),
    "a number for a text": ({"grid": {"tail": 3}}, "tail: expected one of auto, bucket"),
    "a negative weight": ({"grid": {"weight": -1.0}}, "weight: expected a number of 0 or more, found '-1.0'"),
    "temperature with a bucket": ({"grid": {"temperature": 2.0}}, "Use tail renormalize"),
    "nothing to train": ({"grid": {"max_steps": 0}}, "would train nothing"),
    "fewer than none": ({"grid": {"top_k": -1}}, "top_k: expected a whole number of 0 or more"),
    "a budget for weights": ({"methods": {"a": {"regularizer": "ewc", "kl_budget": 0.1}}}, "--kl-budget needs a KL"),
    "a path that is none": ({"cache": [3]}, "expected cache, a path"),
    "a probe of nothing": ({"probe_top_k": 0}, "probe_top_k"),
    "a list for the grid": ({"grid": [1]}, "grid: expected fields and their values"),
    "one run in two methods": ({"methods": {"a": {"lr": 1e-3}, "b": {"lr": 1e-3}}}, "'a' and 'b' have a run in common"),
    "too many": ({"grid": {"seed": list(range(101)), "rank": list(range(1, 101))}}, "more than 10,000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_one_sentence(case: str, tmp_path: Path) -> None:
    keys, said = WRONG[case]
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**PATHS, **keys}), encoding="utf-8")
    with pytest.raises(InvalidData) as caught:
        read_config(path)
    message = str(caught.value)
    assert said in message and str(path) in message and message.endswith(".") and "\n" not in message


def test_a_file_that_is_none() -> None:
    with pytest.raises(InputNotFound, match=r"reading nowhere\.yaml: No such file"):
        read_config(Path("nowhere.yaml"))


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [", ""])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidData, match="reading"):
        read_config(path)


# --- anchors ---------------------------------------------------------------------------------------------------------


def test_caches_of_anchors_are_of_all_runs_that_weigh_them() -> None:
    """A weight of 0 is one run without anchors, whatever the other axes say of them."""
    grid = {"lr": 1e-3, "anchor_weight": [0, 1, 4], "anchor_batch": [2, 8], "anchor_regularizer": "masked-kl"}
    methods = {"plain": {"regularizer": "none"}, "masked": {"anchor_weight": 0}}
    found = config(anchor_cache=["a", "b"], grid=grid, methods=methods)
    assert found.anchor_cache == ("a", "b") and config(anchor_cache="a").anchor_cache == ("a",)
    plain, masked = ([r for r in found.runs if r.method == m] for m in found.methods)
    anchors = [found.run_of(r).anchor for r in plain]
    assert [(a.weight, a.batch) for a in anchors] == [(0, 4), (1, 2), (1, 8), (4, 2), (4, 8)]
    assert [a.regularizer for a in anchors] == ["full-kl", *["masked-kl"] * 4]
    assert [found.run_of(r).anchor for r in masked] == [AnchorSettings(0.0)]


def test_without_caches_there_are_no_anchors() -> None:
    runs = config(grid={"lr": 1e-3}).runs
    assert {run.settings["anchor_weight"] for run in runs} == {0.0}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grid": {"anchor_weight": 1}}, "anchor_weight is of an anchor cache, found none"),
        ({"methods": {"m": {"anchor_every": [1, 2]}}}, "method 'm': anchor_every is of an anchor cache, found none"),
        ({"anchor_cache": []}, "expected anchor_cache, a path or a list of them"),
        ({"anchor_cache": ["a", 1]}, "expected anchor_cache, a path or a list of them"),
        ({"anchor_cache": {"a": 1}}, "expected anchor_cache, a path or a list of them"),
        ({"anchor_cache": "a", "grid": {"anchor_weight": -1}}, "anchor_weight: expected a number of 0 or more"),
        ({"anchor_cache": "a", "grid": {"anchor_regularizer": "none"}}, "anchor_regularizer: expected one of full-kl"),
    ],
)
def test_anchors_that_are_wrong_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        config(**keys)
