"""The README does what it says: its commands and its Python run, its links lead somewhere."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from support.tiny_model import make_model, make_tokenizer, text_rows

from logitcache.cli import run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


OF_A_PROTOCOL = {
    *("write", "open", "table", "token_ids", "rows", "samples", "column_bytes"),
    *("read", "read_spans", "exists", "names", "sizes", "times", "create", "replace", "publish", "remove", "join"),
    "convert",
}
"""Methods whose docstring stands where they are declared."""


def blocks(language: str, page: str = README) -> list[str]:
    """Fenced code blocks of a language ('' for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


def test_readme_commands_and_python_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model)
    for name in ("train", "new", "prior"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(6)))
    config = {"model": "base/", "cache": "cache/", "new": "new.jsonl", "prior": "prior.jsonl"}
    config |= {"grid": {"lr": 1e-3, "max_steps": 1, "rank": 2}, "methods": {"plain": {"regularizer": "none"}, "KL": {}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(config))  # which YAML includes
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("logitcache ")]
    verbs = [shlex.split(line)[1] for line in lines]
    made = ["precompute", "inspect", "train", "evaluate", "sweep", "report"]
    assert verbs == [*made, "convert", "merge", "export", "inspect"]
    for verb, line in zip(verbs, lines, strict=True):
        if verb == "merge":
            shutil.copytree("cache", "more")
        assert run(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    (code,) = blocks("python")
    scope: dict[str, object] = {}
    exec(code, scope)
    assert len(scope["record"]) > 0  # type: ignore[arg-type]


def test_commands_of_the_distillation_page_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util
    import json

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model)
    make_model(seed=7, hidden_size=48).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    for name in ("train", "new", "prior"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(6)))
    page = (ROOT / "docs" / "how-to" / "distil.md").read_text(encoding="utf-8")
    lines = [line for block in blocks("", page) for line in block.splitlines()]
    verbs = [shlex.split(line)[1] for line in lines]
    assert verbs == ["precompute", "train", "train", "evaluate", "evaluate", "precompute", "train"]
    for line in lines:
        if "--load-in" not in line or importlib.util.find_spec("bitsandbytes") is not None:
            assert run(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page}: {target}"


def test_every_install_line_is_of_the_one_place() -> None:
    """Extras are installed from where `errors.install_line` says: the clone, until the first release."""
    from logitcache.errors import install_line

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    right = {install_line(extra) for extra in extras}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "pipeline").rglob("*.py")]
    found = []
    for path in (p for p in pages if p.name != "log.md"):
        text = " ".join(path.read_text(encoding="utf-8").split())
        found += [(path.name, line) for line in re.findall(r"pip install '[^']+\[[^']+'", text)]
    assert found and not [(name, line) for name, line in found if line not in right and "{" not in line]
    assert not [p.name for p in pages if p.name != "log.md" and "logitcache[" in p.read_text(encoding="utf-8")]


def test_the_tables_of_the_house_name_every_package_and_file() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split("## What is where")[1]
    pipeline, storage = page.split("| package | owns |")[1].split("| `storage/` | owns |")
    for table, folder in ((pipeline, ROOT / "pipeline"), (storage, ROOT / "storage")):
        cells = re.findall(r"^\| (`[^|]+`) \|", table, flags=re.MULTILINE)
        named = [name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
        there = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
        assert sorted(named) == sorted(there - {"__main__", *({"__init__"} if folder.name == "storage" else ())})


def test_readme_names_the_exit_statuses_of_the_program() -> None:
    from logitcache.cli import STATUSES

    for status in {0, 1, 130, *STATUSES.values()}:
        assert re.search(rf"\b{status} [a-z]", README)


def test_every_public_name_is_documented() -> None:
    """Every module, class and function that is not private has a docstring."""
    import ast

    missing = []
    for path in [*(ROOT / "storage").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
        for node in [tree, *tree.body, *(member for c in classes for member in c.body)]:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and not ast.get_docstring(node):
                name = getattr(node, "name", "module")
                if not name.startswith(("_", "on_")) and name not in OF_A_PROTOCOL:
                    missing.append(f"{path.name}: {name}")
    assert not missing
