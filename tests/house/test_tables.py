"""The scripts that write a committed table of docs/benchmarks do not write a part of it, or another one, over it."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PARTS = {
    "bench_captured": ["--sizes", "10"],
    "bench_gpu": ["--sections", "top-k"],
    "bench_loss": ["--methods", "plain CE"],
    "bench_monitor": ["--steps", "1"],
    "bench_precompute": ["--methods", "bare"],
    "bench_size_peers": ["--rows", "8"],
    "bench_step": ["--only", "demo"],
    "study_budget": ["--of", "new"],
    "study_tails": ["--samples", "2"],
    "table_nullspace": ["--rank", "1"],
    "table_scaling": ["--rows", "8"],
}
"""An option of each with which its table would be another one."""


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_common

    return bench_common


@pytest.mark.parametrize("script", PARTS)
def test_a_part_wants_a_place_of_its_own(
    script: str,
    common: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("sys.argv", [f"{script}.py", *PARTS[script]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "write_csv", lambda *_: pytest.fail("written"))
    with pytest.raises(SystemExit):
        import_module(script).main()
    said = capsys.readouterr().err
    assert f"expected --out beside {PARTS[script][0]}" in said and ".csv" in said


def test_every_script_with_a_table_of_one_run_is_asked() -> None:
    """Who calls `out_of` has a part above."""
    asking = {path.stem for path in SCRIPTS.glob("*.py") if "out_of(parser" in path.read_text(encoding="utf-8")}
    assert asking == set(PARTS)


def test_where_a_table_goes(common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, other = tmp_path / "table.csv", tmp_path / "other.csv"
    parser = ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--work")
    parser.add_argument("--sizes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--out", type=Path)

    def goes(*arguments: str, taste: bool = False) -> Path | None:
        found: Path | None = common.out_of(parser, parser.parse_args(arguments), table, ["work"], taste)
        return found

    assert goes() == goes("--batch-size", "2", "--work", "w", "--sizes", "1", "2") == table
    assert goes("--batch-size", "3", "--out", str(other)) == other
    assert goes("--batch-size", "3", taste=True) is None
    with pytest.raises(SystemExit):
        goes("--out", str(other), taste=True)
    assert f"expected no --out for a taste, which writes nothing, found {other}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        goes("--batch-size", "3", "--work", "w")
    said = capsys.readouterr().err
    assert f"expected --out beside --batch-size: {table} is of the defaults" in said


def test_a_table_of_several_models_is_not_written_without_one(
    common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, table = ArgumentParser(), tmp_path / "table.csv"
    common.check_models(parser, table, ["demo base"])  # there is none
    common.write_csv([{"model": "demo base"}, {"model": "SmolLM2"}], table)
    common.check_models(parser, table, ["SmolLM2", "demo base", "another"])
    with pytest.raises(SystemExit):
        common.check_models(parser, table, ["demo base"])
    assert f"expected --model for SmolLM2 or another --out: {table}" in capsys.readouterr().err
