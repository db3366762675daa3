"""docs/reference.md: every setting and every flag, from the fields and options themselves.

python scripts/make_reference.py          writes the page; tests/house/test_reference.py holds it current
"""

from dataclasses import MISSING
from pathlib import Path

import click

from logitcache.adapters.settings import AdapterSettings, NullSpaceSettings
from logitcache.capture.settings import AgainstSettings, CaptureSettings, EngineSettings, JobSpec
from logitcache.cli import cli
from logitcache.cli.help_page import heading_of
from logitcache.data.settings import DataSettings
from logitcache.evaluation.settings import AnswerSettings, ScaleSettings
from logitcache.integrations.block import CacheSettings
from logitcache.losses.objective import Objective
from logitcache.models.settings import LoadSettings
from logitcache.pairing.settings import PairingRules
from logitcache.settings import Setting, Settings, settings_of
from logitcache.sweeps.config import FIELDS, SHARED, CurveSettings, ProbeSettings
from logitcache.training.settings import (
    RECIPES,
    AnchorSettings,
    EvalSettings,
    PenaltySettings,
    RunSettings,
    TrainSettings,
)
from logitcache.training.trainer_settings import TrainerSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
CLASSES: tuple[type[Settings], ...] = (
    *(Objective, PenaltySettings, AnchorSettings, AdapterSettings, TrainSettings, TrainerSettings, EvalSettings),
    *(PairingRules, LoadSettings, RunSettings, DataSettings),
    *(CaptureSettings, JobSpec, EngineSettings, AgainstSettings, NullSpaceSettings, AnswerSettings, ScaleSettings),
    *(ProbeSettings, CurveSettings, CacheSettings),
)

HEAD = """# Reference

Made by `python scripts/make_reference.py` from the settings and the verbs themselves; edit those.

A setting is a field of a frozen dataclass. Its default, bounds and choices hold for Python, for flags, for keys of
`--config` and for a sweep alike: what one refuses, all refuse (`InvalidSettings`, exit status 2).
"""


def settings_table(owner: type[Settings]) -> str:
    """A class: what it is, and a row a field."""
    rows = "".join(f"{_row(setting)}\n" for setting in settings_of(owner))
    purpose = (owner.__doc__ or "").strip().split("\n\n")[0]
    return (
        f"### {owner.__module__}.{owner.__name__}\n\n{' '.join(purpose.split())}\n\n"
        f"| field | flag | expected | default | meaning |\n|---|---|---|---|---|\n{rows}"
    )


def _row(setting: Setting) -> str:
    on_line = setting.option is not None and setting.option.on_line
    default = "must be given" if setting.default is MISSING else f"`{setting.default!r}`"
    meaning = setting.option.help if setting.option is not None else "settings of their own, above or below"
    if setting.option is None:
        default = "theirs" if setting.default is MISSING else default
    cells = [f"`{setting.name}`", f"`{setting.flag}`" if on_line else "", setting.expected, default, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def verb_table(name: str, command: click.Command) -> str:
    """A verb with its arguments: what it does, and a row a flag."""
    ctx = click.Context(command, info_name=name, max_content_width=100_000, terminal_width=100_000)
    arguments = [f" {argument.metavar}" for argument in command.params if isinstance(argument, click.Argument)]
    records = ((o, o.get_help_record(ctx)) for o in command.params if isinstance(o, click.Option))
    cells = [[*map(_cell, record), heading_of(option)] for option, record in records if record]
    rows = "".join("| " + " | ".join(row) + " |\n" for row in cells)
    table = f"\n| flag | meaning | heading of --help |\n|---|---|---|\n{rows}" if rows else ""
    return f"### logitcache {name}{''.join(arguments)}\n\n{command.get_short_help_str(200)}\n{table}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def reference() -> str:
    """The whole page."""
    swept = ", ".join(f"`{name}`" for name in FIELDS)
    shared = ", ".join(f"`{name}`" for name in SHARED)
    recipes = ", ".join(f"`{name}`" for name in RECIPES)
    return "\n".join(
        [
            HEAD,
            "## Settings\n",
            *map(settings_table, CLASSES),
            "## Fields of a sweep\n",
            f"In `grid` and `methods`: {swept}. In `methods` also `recipe`: {recipes}.\n",
            f"For all runs, beside `model`: {shared}.\n",
            "## Verbs\n",
            *(verb_table(name, command) for name, command in cli.commands.items()),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
