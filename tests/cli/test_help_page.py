"""Help as a page: flags under headings, an example at the end of every verb."""

import shlex

import click
import pytest
from support.cli_harness import done

from logitcache.adapters.settings import AdapterSettings
from logitcache.cli import cli
from logitcache.cli.help_page import LAST, heading, heading_of, verb
from logitcache.cli.options import options_of
from logitcache.losses.objective import Objective
from logitcache.settings import line_settings

VERBS = list(cli.commands)


def headings(text: str) -> list[str]:
    """The lines that end in a colon and have nothing before them."""
    return [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]


def context(command: click.Command) -> click.Context:
    """As the group makes it: click keeps the first help flag that it has made of a command."""
    return click.Context(command, help_option_names=["-h", "--help"])


def examples(command: click.Command) -> list[list[str]]:
    """The commands of an epilog, as a shell divides them."""
    text = (command.epilog or "").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


def test_train_has_its_flags_under_at_least_six_headings() -> None:
    found = headings(done("train", "--help").out)
    assert len(found) - 1 >= 6  # the last is the example
    assert {"Loss", "Adapter", "Training", "Anchors"} <= set(found)
    assert found[-2:] == [LAST, "Example"]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", VERBS)
def test_nothing_but_what_every_verb_has_is_left_over(name: str) -> None:
    command = cli.commands[name]
    left = {p.name for p in command.params if isinstance(p, click.Option) and heading_of(p) == LAST}
    assert left <= {"config", "log_json", "as_json"}


def test_a_setting_stands_under_the_heading_of_its_class_or_its_own() -> None:
    shown = {p.name: heading_of(p) for p in cli.commands["train"].params}
    for owner in (Objective, AdapterSettings):
        assert {shown[s.key] for s in line_settings(owner)} == {owner.heading}
    assert shown["top_k"] == Objective.heading  # a field of the training, about the loss


@pytest.mark.parametrize("name", ["", *VERBS])
def test_the_example_at_the_end_is_a_command_line_that_the_verbs_take(name: str) -> None:
    lines = examples(cli.commands[name] if name else cli)
    assert lines
    for program, used, *arguments in lines:
        assert program == "logitcache"
        command = cli.commands[used]
        values, left, _ = command.make_parser(context(command)).parse_args(arguments)
        assert left == []
        required = {p.name for p in command.params if p.required}
        assert required <= {key for key, value in values.items() if value not in (None, ())}
    assert name == "" or name in [used for _, used, *_ in lines]


@pytest.mark.parametrize("name", VERBS)
def test_the_example_is_shown_as_it_is_written(name: str) -> None:
    shown = done(name, "--help").out.partition("\nExample:\n")[2]
    assert [line.removeprefix("  ") for line in shown.splitlines()] == str(cli.commands[name].epilog).splitlines()


def test_a_plain_flag_has_the_heading_of_the_line_above_it_and_a_setting_its_own() -> None:
    @verb("Do.", example="do")
    @heading("First")
    @click.option("--one")
    @options_of(AdapterSettings)
    @click.option("--two")
    @heading("Second")
    @click.option("--three")
    def do() -> None:
        """Nothing."""

    found = {p.name: heading_of(p) for p in do.params}
    assert (found["one"], found["two"], found["three"], found["rank"]) == ("First", "First", "Second", "Adapter")
