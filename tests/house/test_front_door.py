"""`import logitcache`: what is public, what importing it loads, and that users of it need nothing deeper."""

import ast
import pydoc
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import logitcache

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = (
    *(
        "AdapterSettings",
        "AnswerSettings",
        "CacheError",
        "CacheWriter",
        "CaptureSettings",
        "DataSettings",
        "InvalidSettings",
        "LogitCache",
        "Objective",
    ),
    *("PairingRules", "TrainSettings", "sample_id"),
)


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_loads_no_framework_and_a_name_only_what_it_needs() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "click"}
    assert not loaded_by("import logitcache; logitcache.__version__; dir(logitcache)") & heavy
    assert not loaded_by(f"from logitcache import {', '.join(WITHOUT_TORCH)}") & heavy


@pytest.mark.parametrize("name", logitcache.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(logitcache, name)
    if name == "__version__":
        assert found == version("logitcache")
        return
    assert found.__doc__ and name in dir(logitcache)
    assert found.__module__.startswith("logitcache.")


LATER_PEFT = {"peft": ["LoraGAConfig"], "peft.tuners.lora.variants": ["MiCALinearVariant"]}
"""What PEFT 0.18 does not have yet, by module."""


def test_plug_ins_import_nothing_that_peft_0_18_lacks() -> None:
    """A trainer's user has the PEFT that the trainer allows."""
    older = [f"del importlib.import_module({module!r}).{name}" for module in LATER_PEFT for name in LATER_PEFT[module]]
    plug_ins = "from logitcache import CacheView, CachedKL, CachedKLTrainer, CachedLoss, CachedReference"
    loaded = loaded_by("\n".join(["import importlib", *older, plug_ins, "import logitcache.adapters.registry"]))
    assert {"logitcache.training.trainer", "logitcache.training.custom_loop", "peft"} <= loaded


def test_another_name_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'logitcache' has no attribute 'trian'"):
        logitcache.trian  # noqa: B018


def test_help_shows_the_public_names() -> None:
    told = pydoc.plain(pydoc.render_doc(logitcache))
    assert "logitcache.precompute" in told and "CachedKL" in told


def test_checkers_see_what_is_there_at_run_time() -> None:
    """The names under TYPE_CHECKING and those of the table are one list."""
    tree = ast.parse((ROOT / "pipeline" / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        (alias.name, (node.module or ""))
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == set(logitcache._HOMES.items())


def test_docs_and_examples_import_from_the_front_door() -> None:
    """README, docs and examples import from logitcache, its storage or an integration, nothing deeper; scripts nothing
    private."""
    examples = (ROOT / "scripts" / "examples").glob("*.py")
    pages = [ROOT / "README.md", *(ROOT / "docs" / "how-to").glob("*.md"), *examples]
    for page in pages:
        deeper = re.findall(r"^\s*(?:from|import) (logitcache\.\S+)", page.read_text(encoding="utf-8"), re.M)
        deeper = [name for name in deeper if not name.startswith("logitcache.integrations.")]
        assert set(deeper) <= {"logitcache.storage"}, page
    for script in (ROOT / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("logitcache"):
                assert not any(alias.name.startswith("_") for alias in node.names), script
