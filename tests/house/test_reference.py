"""docs/reference.md says what the settings and verbs say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_page_is_current() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["reference"](), "run python scripts/make_reference.py"


def test_every_settings_class_is_on_the_page() -> None:
    """Whatever is derived from Settings in the package, wherever it stands."""
    import logitcache.settings

    made = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))
    written = {c for c in logitcache.settings.Settings.__subclasses__() if c.__module__.startswith("logitcache.")}
    assert written == set(made["CLASSES"])
