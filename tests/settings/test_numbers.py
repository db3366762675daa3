"""One syntax of numbers: what the line takes, YAML takes, a sweep takes, and all of them mean the same by it."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from logitcache.cli.common import config_option
from logitcache.cli.options import options_of, settings_from
from logitcache.errors import InvalidData, InvalidSettings
from logitcache.evaluation.settings import ScaleSettings
from logitcache.settings import settings_of
from logitcache.sweeps.config import read_config
from logitcache.training.settings import TrainSettings
from logitcache.yaml_files import load_yaml, read_as, read_number, read_numbers, read_whole

NUMBERS = {"1e-4": 1e-4, ".5": 0.5, "2.": 2.0, "+3": 3.0, "1_000.5": 1000.5, "010": 10.0, "1E3": 1000.0, "0": 0.0}
WHOLE = {"8": 8, "1e3": 1000, "8.0": 8, "1_000": 1000, "010": 10, "+4": 4, "1.5e1": 15, "9007199254740993": 2**53 + 1}
NONE = ["1,000", "0x10", "0b1", "1:30", "nan", "inf", ".inf", "1__0", "_1", "1_", "", " ", "1e", ".", "e3", "½", "1 0"]
NO_WHOLE = [*NONE, "1.5", "1e-1", "1e400", "18446744073709551616", "2e19"]


@click.command()
@config_option
@options_of(TrainSettings)
@options_of(ScaleSettings)
def verb(**values: Any) -> None:
    """A verb with them."""
    scales = ScaleSettings() if values["scales"] is None else settings_from(ScaleSettings, values)
    click.echo(repr((settings_from(TrainSettings, values), scales)))


def on_the_line(flag: str, text: str) -> Any:
    """Whether a flag takes a text, and what the settings are then."""
    found = CliRunner().invoke(verb, [f"--{flag}={text}"])
    assert found.exit_code in (0, 2), found.output
    return found.output if found.exit_code == 0 else None


def in_a_file(folder: Path, flag: str, text: str) -> Any:
    path = folder / "flags.yaml"
    path.write_text(f"{flag}: {text}\n", encoding="utf-8")
    found = CliRunner().invoke(verb, ["--config", str(path)])
    assert found.exit_code in (0, 2), found.output
    return found.output if found.exit_code == 0 else None


def in_a_sweep(folder: Path, field: str, text: str) -> Any:
    path = folder / "sweep.yaml"
    fields = f"{{lr: 1e-3, {field}: {text}}}" if field != "lr" else f"{{lr: {text}}}"
    path.write_text(f"model: m\ncache: c\nnew: n\nprior: p\ngrid: {fields}\nmethods: {{a: {{}}}}\n", encoding="utf-8")
    try:
        (run,) = read_config(path).runs
    except (InvalidData, yaml.YAMLError):
        return None
    return run.settings[field]


@pytest.mark.parametrize("text", [*NUMBERS, *NONE])
def test_a_number_is_the_same_wherever_it_stands(text: str, tmp_path: Path) -> None:
    expected = NUMBERS.get(text)
    said = None if expected is None else f"{(TrainSettings(lr=expected), ScaleSettings())!r}\n"
    assert on_the_line("lr", text) == said
    for written in (text, f"'{text}'"):
        if written.strip() or expected is not None:
            assert in_a_file(tmp_path, "lr", written) == said, written
            assert in_a_sweep(tmp_path, "lr", written) == expected, written


@pytest.mark.parametrize("text", [*WHOLE, *NO_WHOLE])
def test_a_whole_number_is_the_same_wherever_it_stands(text: str, tmp_path: Path) -> None:
    expected = WHOLE.get(text)
    found = on_the_line("log-every", text)
    assert found == (None if expected is None else f"{(TrainSettings(log_every=expected), ScaleSettings())!r}\n")
    for written in (text, f'"{text}"'):
        if written.strip():
            assert in_a_file(tmp_path, "log_every", written) == found, written
            assert in_a_sweep(tmp_path, "log_every", written) == expected, written


def test_a_text_of_digits_stays_the_text_that_it_is(tmp_path: Path) -> None:
    """target_modules 010 is no ten: only a field that is a number reads one."""
    for text in ("010", "1e3", "1_000", "1:30"):
        assert in_a_sweep(tmp_path, "target_modules", text) == text


@pytest.mark.parametrize("text", ["0, .25,5e-1 ,1", "0,0.25,0.5,1.0"])
def test_several_numbers_are_a_list_or_stand_between_commas(text: str, tmp_path: Path) -> None:
    expected = (0.0, 0.25, 0.5, 1.0)
    assert read_numbers(text) == expected
    said = f"{(TrainSettings(), ScaleSettings(expected))!r}\n"
    assert on_the_line("scales", text) == said and in_a_file(tmp_path, "scales", f"'{text}'") == said
    (setting,) = settings_of(ScaleSettings)
    for same in (text, text.split(","), list(expected)):
        assert setting.checked(read_as(setting.kind, same)) == expected
    for wrong in ("0,,1", "0;1", "0,x", "", [], ["x"], [True], "2.5", "-1", "nan", None, 3):
        with pytest.raises(ValueError, match=r"expected a number|scales: expected numbers in a list"):
            setting.checked(read_as(setting.kind, wrong))
    with pytest.raises(InvalidSettings, match="expected different numbers"):
        ScaleSettings((1, 1))


def test_a_refusal_says_what_a_number_is(tmp_path: Path) -> None:
    found = CliRunner().invoke(verb, ["--lr=1,5"])
    assert "expected a number, such as 8, .5, 1e-4 or 1_000, found '1,5'." in found.output
    path = tmp_path / "s.yaml"
    path.write_text("model: m\ncache: c\nnew: n\nprior: p\ngrid: {lr: '1,5'}\n", encoding="utf-8")
    with pytest.raises(InvalidData, match=re.escape("lr: expected a number of 0 or more, found '1,5'.")):
        read_config(path)


def test_a_sweep_knows_two_spellings_of_a_number_as_one(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("model: m\ncache: c\nnew: n\nprior: p\ngrid: {lr: [1e-3, .001]}\n", encoding="utf-8")
    with pytest.raises(InvalidData, match=r"lr has 0\.001 twice"):
        read_config(path)


def test_yaml_without_fields_has_the_same_numbers() -> None:
    expected = {"1e-4": 1e-4, "010": 10, "1:30": "1:30", "0x10": "0x10", ".5": 0.5, "8": 8, "1_000": 1000, "+5": 5}
    found = load_yaml("".join(f"'{text}': {text}\n" for text in expected))
    assert found == expected and type(found["8"]) is int and type(found[".5"]) is float
    for wrong in ("a: !!int 0x10", "a: !!float .inf", "a: !!int 1.5"):
        with pytest.raises(yaml.YAMLError, match="a value is not what its tag says"):
            load_yaml(wrong)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_what_python_writes_is_read_again(number: float) -> None:
    assert read_number(repr(number)) == number
    assert load_yaml(yaml.safe_dump(number)) == number


@given(st.integers(-(2**64) + 2048, 2**64 - 2048))
def test_whole_numbers_are_exact(number: int) -> None:
    assert read_whole(str(number)) == number and read_whole(f"{number:_}") == number


@given(st.text(alphabet="0123456789_.eE+-, ", max_size=12))
def test_no_text_of_such_signs_is_another_failure(text: str) -> None:
    for reader in (read_number, read_whole, read_numbers):
        with suppress(ValueError):
            assert reader(text) is not None
