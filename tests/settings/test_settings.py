"""One schema of settings: what construction refuses, and that everything else is derived from the fields."""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from logitcache.adapters.settings import AdapterSettings, NullSpaceSettings
from logitcache.capture.settings import CaptureSettings, EngineSettings, JobSpec
from logitcache.cli import cli, run
from logitcache.cli.options import options_of, settings_from
from logitcache.data.settings import DataSettings
from logitcache.errors import InvalidData, InvalidSettings, PipelineError
from logitcache.evaluation.settings import AnswerSettings, ScaleSettings
from logitcache.losses.objective import Objective
from logitcache.models.settings import LoadSettings
from logitcache.pairing.settings import PairingRules
from logitcache.settings import Setting, Settings, line_settings, option, settings_of
from logitcache.sweeps.config import FIELDS, SHARED, CurveSettings, ProbeSettings, make_config
from logitcache.training.settings import AnchorSettings, PenaltySettings, RunSettings, TrainSettings, run_settings
from logitcache.yaml_files import load_yaml

CLASSES: tuple[type[Settings], ...] = (
    *(TrainSettings, PenaltySettings, AdapterSettings, Objective, PairingRules, LoadSettings, CaptureSettings),
    *(AnchorSettings, NullSpaceSettings, ProbeSettings, EngineSettings, JobSpec, RunSettings),
    *(AnswerSettings, ScaleSettings, CurveSettings),
)
GIVEN: dict[type[Settings], dict[str, Any]] = {JobSpec: {"model": "m", "data": "d", "cache": "c"}}
"""What has no default."""

EVERY = [s for owner in CLASSES for s in settings_of(owner)]
NUMBERS = [s for s in EVERY if s.kind in (int, float)]


def name_of(setting: Setting) -> str:
    return f"{setting.owner.__name__}.{setting.name}"


def made(setting: Setting, value: object) -> Settings:
    return setting.owner(**{**GIVEN.get(setting.owner, {}), setting.name: value})


REFUSED: dict[str, tuple[Callable[[], Settings], str]] = {
    "lr": (lambda: TrainSettings(lr=-1), r"TrainSettings\.lr: expected a number of 0 or more, found -1\."),
    "batch_size": (lambda: TrainSettings(batch_size=0), r"batch_size: expected a whole number of 1 or more, found 0"),
    "seed": (lambda: TrainSettings(seed=2**32), r"of 4,294,967,295 or less"),
    "max_steps": (lambda: TrainSettings(max_steps=0), "would train nothing"),
    "top_k": (lambda: CaptureSettings(top_k=-1), r"CaptureSettings\.top_k: expected a whole number of 0 or more"),
    "precision": (lambda: CaptureSettings(precision="nonsense"), "expected one of exact, fine, compact, found 'nonse"),
    "one group": (lambda: CaptureSettings(tail_groups=1), "the whole tail"),
    "draws": (lambda: CaptureSettings(tail_samples=4, min_mass=0.9), "Leave one out"),
    "half a rank": (lambda: AdapterSettings(rank=1.5), "rank: expected a whole number of 1 or more, found 1.5"),
    "yes": (lambda: TrainSettings(epochs=True), "epochs: expected a number above 0, found True"),
    "alpha": (lambda: AdapterSettings(alpha=0), "alpha: expected a number above 0, or None, found 0"),
    "a text": (lambda: Objective(weight="1"), "weight: expected a number of 0 or more, found '1'"),
    "None": (lambda: Objective(weight=None), "weight: expected a number of 0 or more, found None"),
    "weight of none": (lambda: Objective("none", weight=2.0), "--weight 2 with --regularizer none"),
    "budget of none": (lambda: Objective("none", kl_budget=0.1), "--kl-budget needs a KL regularizer"),
    "padding": (
        lambda: RunSettings(pairing=PairingRules(ignore_padding=True)),
        "--ignore-padding is for --teacher-is-not-base",
    ),
    "two places": (lambda: LoadSettings(device_map="auto", device="cpu"), "chooses the devices itself"),
    "calibration": (lambda: JobSpec("m", "d", "c", engine="vllm"), "go together"),
    "packed": (lambda: RunSettings(adapter=AdapterSettings("none"), loading=LoadSettings(load_in="4bit")), "packed|qu"),
    "no teacher": (
        lambda: RunSettings(objective=Objective("none"), pairing=PairingRules(teacher_is_not_base=True)),
        "nothing is learnt from the teacher",
    ),
    "a whole model": (
        lambda: RunSettings(objective=Objective("none"), penalty=PenaltySettings(), adapter=AdapterSettings("none")),
        "--regularizer l2-sp is on what an adapter changes",
    ),
    "a part of another kind": (lambda: RunSettings(adapter=TrainSettings()), "expected a AdapterSettings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_construction_refuses_in_a_sentence(case: str) -> None:
    build, said = REFUSED[case]
    with pytest.raises(InvalidSettings, match=said) as caught:
        build()
    assert isinstance(caught.value, PipelineError) and isinstance(caught.value, ValueError)
    assert caught.value.reason == "invalid-settings" and str(caught.value).endswith(".")


@pytest.mark.parametrize("setting", NUMBERS, ids=name_of)
def test_no_number_takes_what_is_none(setting: Setting) -> None:
    """NaN, infinities, truth, texts; and None where the annotation has none."""
    for wrong in (math.nan, math.inf, -math.inf, True, "3", [3], *([] if setting.optional else [None])):
        with pytest.raises(InvalidSettings, match=f"{name_of(setting)}: expected {setting.expected}"):
            made(setting, wrong)


@pytest.mark.parametrize("setting", [s for s in EVERY if s.choices], ids=name_of)
def test_a_choice_is_one_of_its_own(setting: Setting) -> None:
    for wrong in ("nonsense", "", 3, b"none"):
        with pytest.raises(InvalidSettings, match=f"{name_of(setting)}: expected one of {setting.choices[0]}"):
            made(setting, wrong)


@given(st.data())
def test_bounds_are_those_of_the_field(data: st.DataObject) -> None:
    """`checked` takes a number exactly where the comparisons with the field's own bounds hold."""
    setting = data.draw(st.sampled_from(NUMBERS))
    said = setting.option
    assert said is not None
    edges = [b for b in (said.above, said.at_least, said.below, said.at_most) if b is not None]
    kind = st.integers() if setting.kind is int else st.floats(allow_nan=False, allow_infinity=False)
    value: Any = data.draw(st.one_of(kind, st.sampled_from([setting.kind(e) for e in edges or [1]])))
    inside = all(
        (
            said.above is None or value > said.above,
            said.at_least is None or value >= said.at_least,
            said.below is None or value < said.below,
            said.at_most is None or value <= said.at_most,
        )
    )
    try:
        assert setting.checked(value) == value
    except InvalidSettings:
        assert not inside
    else:
        assert inside


def test_every_field_says_what_it_is_for() -> None:
    for setting in EVERY:
        if setting.option is not None:
            assert setting.option.help.rstrip("]").endswith(".") or "[default:" in setting.option.help, name_of(setting)
            assert setting.default is MISSING or setting.default == setting.checked(setting.default)


# --- one experiment, however it is spelt -----------------------------------------------------------------------------


def test_alpha_is_twice_the_rank_in_the_type() -> None:
    assert AdapterSettings(rank=64) == AdapterSettings(rank=64, alpha=128) == RunSettings.of({"rank": 64}).adapter
    assert AdapterSettings(rank=64).alpha == 128.0
    assert replace(AdapterSettings(rank=64), rank=4).alpha == 8.0
    assert replace(AdapterSettings(rank=64, alpha=3), rank=4).alpha == 3.0
    assert AdapterSettings(rank=64).plain() == {**AdapterSettings(rank=64, alpha=128.0).plain()}


def test_a_whole_number_is_a_number_and_the_same_one() -> None:
    assert type(TrainSettings(lr=1).lr) is float and TrainSettings(lr=1) == TrainSettings(lr=1.0)
    with pytest.raises(InvalidSettings, match="expected a whole number"):
        TrainSettings(batch_size=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("owner", CLASSES, ids=lambda owner: owner.__name__)
def test_plain_values_and_back(owner: type[Settings]) -> None:
    settings = owner(**GIVEN.get(owner, {}))
    assert owner.from_plain(load_yaml(yaml.safe_dump(settings.plain()))) == settings
    assert owner.from_plain(json.loads(json.dumps(settings.plain()))) == settings
    with pytest.raises(InvalidSettings, match="unknown key 'lrr'"):
        owner.from_plain({**settings.plain(), "lrr": 1})


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(InvalidSettings, match="reading JobSpec: expected model, found no such key"):
        JobSpec.from_plain({"data": "d"})


@pytest.mark.parametrize("name", [n for n, s in run_settings().items() if s.kind in (int, float)])
def test_the_command_line_refuses_what_construction_refuses(name: str) -> None:
    """Each bound, from both sides: what Python refuses is status 2 on the line, and what it takes is parsed."""
    setting = run_settings()[name]
    said = setting.option
    assert said is not None
    (flag,) = (p for p in cli.commands["train"].params if p.name == name)
    ctx = click.Context(cli.commands["train"])
    values = [-1, 0, 1, 2, 0.5, 1.5, 2**32, -2, math.nan, math.inf]
    for value in (v for v in values if setting.kind is float or (v == v and abs(v) < math.inf and v == int(v))):
        plain = setting.kind(value)
        try:
            setting.checked(plain)
            takes = True
        except InvalidSettings:
            takes = False
        try:
            flag.type_cast_value(ctx, [str(plain)] if flag.multiple else str(plain))
        except click.UsageError:
            assert not takes, value
        else:
            assert takes, value


# --- adding a setting ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extended(Settings):
    """As if somebody had added settings: this, and its use, is all that they write."""

    warmth: float = option(0.5, "How warm it is.", at_least=0, below=1)
    manner: str = option("slow", "How it goes.", choices=("slow", "fast"))


@click.command()
@options_of(Extended)
def added(**values: Any) -> None:
    """A verb with them."""
    click.echo(repr(settings_from(Extended, values)))


def test_a_field_is_a_flag_with_its_help_default_and_bounds() -> None:
    said = CliRunner().invoke(added, ["--help"]).output
    assert "--warmth NUMBER" in said and "How warm it is.  [default: 0.5; 0<=x<1]" in said
    assert "--manner [slow|fast]" in said and "[default: slow]" in said
    assert CliRunner().invoke(added, ["--warmth", "0.25"]).output == f"{Extended(warmth=0.25)!r}\n"
    for wrong in (["--warmth", "1"], ["--warmth", "nan"], ["--manner", "odd"]):
        assert CliRunner().invoke(added, wrong).exit_code == 2


def test_a_field_of_a_run_is_a_flag_a_key_and_a_field_of_a_sweep() -> None:
    """All flags of train that come from settings, and all that a sweep takes, are the fields and no list besides."""
    settings = {*run_settings(), *(s.key for s in line_settings(DataSettings))}
    flags = {str(p.name) for p in cli.commands["train"].params}
    others = {"config", "model", "cache", "anchor_cache", "eval_data", "eval_prior", "out", "data", "max_length"}
    others |= {"resume", "recipe", "log_json", "revision", "attn_implementation", "start_from"}
    others |= {"modules_to_save", "plan"}
    assert settings == flags - others
    of_one_run = {"dtype", "device", *run_settings("trainer", "evaluation")}
    assert {*FIELDS, *SHARED} - {"probe_top_k", "scales", "scales_of"} == settings - of_one_run
    assert [s.key for s in line_settings(TrainSettings)] == [s.name for s in settings_of(TrainSettings)]


# --- twice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--lr", "1", "--model", "m", "--lr=2", "--out", "o"],
        ["train", "--model", "m", "--student", "m", "--out", "o"],
        ["verify", "c", "--json", "--json"],
        ["precompute", "--plan", "--cache", "a", "--cache", "a"],
    ],
)
def test_a_flag_that_is_given_twice_is_wrong_usage(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    assert "is given twice" in capsys.readouterr().err


def test_yaml_with_a_key_twice_is_refused_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("lr: 1\nlr: 2\n", "a: {b: 1, b: 2}", "a:\n- {b: 1, 'b': 2}", '"lr": 1\nlr: 1\n'):
        with pytest.raises(yaml.YAMLError, match="stands twice"):
            load_yaml(text)
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\n") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    path = tmp_path / "c.yaml"
    path.write_text("lr: 0.1\nlr: 0.2\n", encoding="utf-8")
    assert run(["train", "--config", str(path), "--model", "m", "--out", "o"]) == 2
    assert "the key 'lr' stands twice" in capsys.readouterr().err
    path.write_text("model: m\ncache: c\nnew: n\nprior: p\ngrid:\n  lr: 0.1\n  lr: 0.2\n", encoding="utf-8")
    assert run(["sweep", "--config", str(path), "--out", str(tmp_path / "o")]) == 1
    assert "the key 'lr' stands twice" in capsys.readouterr().err


# --- what is doubted, and clamps that are refusals ------------------------------------------------------------------


def test_what_is_unlikely_to_be_meant_is_said() -> None:
    assert RunSettings().doubts() == [] and JobSpec("m", "d", "c").doubts() == []
    (said,) = RunSettings(training=TrainSettings(lr=1.5)).doubts()
    assert "--lr 1.5 is above 1" in said
    (said,) = JobSpec("m", "d", "c", CaptureSettings(top_k=1025)).doubts()
    assert "--top-k 1,025 is more than 1,024" in said


def test_a_vocabulary_bounds_what_is_kept() -> None:
    CaptureSettings(top_k=9).check_vocabulary(10)
    CaptureSettings(top_k=3, tail_groups=10).check_vocabulary(10)
    for settings, said in (
        (CaptureSettings(top_k=10), "expected at most 9, .* Use --top-k 9"),
        (CaptureSettings(top_k=3, tail_groups=11), "expected at most 10, .* Use --tail-groups 10"),
        (CaptureSettings(top_k=9, tail_groups=2), "no tail is left to split"),
    ):
        with pytest.raises(InvalidSettings, match=said):
            settings.check_vocabulary(10)


# --- sweeps ----------------------------------------------------------------------------------------------------------

PATHS = {"model": "m", "cache": "c", "new": "n.jsonl", "prior": "p.jsonl"}


def test_a_sweep_sets_what_train_sets() -> None:
    found = make_config(
        {
            **PATHS,
            **{"teacher_is_not_base": True, "ignore_padding": True, "load_in": "4bit", "device_map": "balanced"},
            "grid": {"lr": 1, "tail": "auto"},
            "methods": {"a": {"regularizer": "full-kl"}},
        },
        "s.yaml",
    )
    run = found.run_of(found.runs[0])
    assert run.pairing == PairingRules(teacher_is_not_base=True, ignore_padding=True)
    assert run.loading == LoadSettings(load_in="4bit", device_map="balanced") == found.common.loading
    assert run.objective.tail == "bucket" and found.run_of(found.runs[0], has_groups=True).objective.tail == "groups"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"load_in": "2bit"}, "load_in: expected one of 8bit, 4bit, or None"),
        ({"ignore_padding": 1}, "ignore_padding: expected true or false, found 1"),
        ({"ignore_padding": True}, "--ignore-padding is for --teacher-is-not-base"),
        ({"load_in": "4bit", "methods": {"a": {"adapter": "none"}}}, "quantised weights cannot be trained"),
        ({"methods": {"a": {"regularizer": "none", "weight": 0.5}}}, "weight with regularizer none"),
        ({"grid": {"lr": math.nan}}, "lr: expected a number of 0 or more, found nan"),
        ({"grid": {"alpha": 0}}, "alpha: expected a number above 0"),
    ],
)
def test_a_sweep_refuses_what_train_refuses(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        make_config({**PATHS, **keys}, "s.yaml")


def test_one_experiment_in_two_spellings_is_one_run() -> None:
    methods = {"a": {"lr": 1, "rank": 8}, "b": {"lr": 1.0, "rank": 8, "alpha": 16}}
    with pytest.raises(InvalidData, match="'a' and 'b' have a run in common"):
        make_config({**PATHS, "methods": methods}, "s.yaml")


# --- flags that are given with their default's value -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--regularizer", "none", "--weight", "1.0"], "--weight with --regularizer none"),
        (["--regularizer", "none", "--config", "c.yaml"], "--weight with --regularizer none"),
        (["--regularizer", "none", "--adapter", "none", "--rank", "16"], "--rank has no place in --adapter none"),
        (["--regularizer", "none", "--alpha", "0"], "0.0 is not in the range x>0"),
        (["--regularizer", "none", "--alpha", "-1"], "-1.0 is not in the range x>0"),
        (["--regularizer", "none", "--adapter", "vera", "--alpha", "8"], "--alpha has no place in --adapter vera"),
    ],
)
def test_what_has_no_place_is_wrong_usage(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("weight: 1.0\n", encoding="utf-8")
    assert run(["train", "--model", "m", "--data", "d.jsonl", "--out", "o", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
