"""The rooms of the architecture: what each module may import, and what importing it loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "peft", "datasets", "click", "accelerate"}

STORAGE_ROOMS = {
    "errors": set(),
    "records": {"errors"},
    "identity": set(),
    "links": {"errors"},
    "local_files": {"errors", "links"},
    "files": {"errors", "local_files"},
    "encoding": {"errors", "identity", "records"},
    "manifest": {"encoding", "errors", "files", "identity"},
    "backend": {"encoding", "errors", "files", "identity", "manifest"},
    "arrow_sizes": set(),
    "zarr_backend": {"backend", "encoding", "identity", "manifest"},
    "arrow_backend": {"arrow_sizes", "backend", "encoding", "identity", "manifest"},
    "shard": {"arrow_backend", "backend", "encoding", "errors", "files", "manifest", "records", "zarr_backend"},
    "index": {"backend", "encoding", "files", "identity", "manifest"},
    "cache": {"backend", "errors", "files", "identity", "index", "manifest", "records", "shard"},
    "captured": {"encoding", "identity"},
    "workers": {"cache", "errors", "files", "manifest", "shard"},
    "writer": {
        "backend",
        "cache",
        "captured",
        "encoding",
        "errors",
        "files",
        "identity",
        "index",
        "manifest",
        "records",
        "shard",
    },
    "verify": {"cache", "encoding", "errors", "files", "identity", "index", "manifest", "shard", "workers"},
    "repack": {"backend", "encoding", "identity", "shard"},
    "transfer": {
        "cache",
        "encoding",
        "errors",
        "files",
        "identity",
        "manifest",
        "records",
        "repack",
        "shard",
        "writer",
    },
    "prune": {"cache", "encoding", "errors", "files", "identity", "manifest", "repack", "shard", "workers", "writer"},
    "statistics": {"cache", "records"},
    "inventory": {"cache", "files", "identity", "index", "manifest", "shard"},
}
PIPELINE_ROOMS = {
    "errors": set(),
    "placement": {"errors"},
    "ranks": {"errors"},
    "head": {"errors", "placement"},
    "models": {"errors", "head", "placement", "quantized", "ranks", "storage"},
    "samples": {"errors"},
    "rows": {"errors", "samples"},
    "teacher": {"errors", "head", "placement", "samples", "storage"},
    "vllm_teacher": {"errors", "models", "samples", "storage"},
    "calibrate": {"checked_json", "errors", "gate", "models", "samples", "storage", "teacher"},
    "partition": {"errors", "head", "placement"},
    "filler": {"errors", "samples", "storage", "teacher"},
    "precompute": {"errors", "filler", "head", "models", "partition", "samples", "storage", "teacher"},
    "job": {
        *("calibrate", "errors", "filler", "head", "models", "precompute", "ranks", "rows", "samples", "storage"),
        *("teacher", "vllm_teacher"),
    },
    "estimate": {"filler", "job", "precompute", "samples", "storage"},
    "ray_engine": {"errors", "filler", "job", "models", "precompute", "samples", "storage"},
    "prune": {"models", "rows", "samples", "storage"},
    "losses": set(),
    "padding": {"errors"},
    "quantized": {"errors"},
    "leaves": {"errors"},
    "fused": {"leaves", "losses"},
    "targets": {"errors", "losses", "padding", "samples", "storage"},
    "inputs": {"errors", "head", "targets"},
    "replaced": {"errors", "targets"},
    "step": {"fused", "head", "inputs", "losses", "targets"},
    "budget": set(),
    "covariances": {"errors", "filler", "head", "precompute", "samples"},
    "nullspace": {"covariances", "errors", "filler", "models", "samples", "storage"},
    "factors": {"covariances", "errors", "head", "samples"},
    "kinds": {"errors", "factors", "nullspace", "quantized", "samples"},
    "adalora": set(),
    "adapters": {"adalora", "covariances", "errors", "kinds", "quantized", "samples"},
    "reloadable": {"errors", "kinds"},
    "own_loss": {"adalora", "errors", "head"},
    "full": {"errors", "models", "quantized"},
    "gate": {
        *("errors", "head", "inputs", "losses", "models", "placement", "quantized", "samples", "storage", "targets"),
    },
    "layout": {"errors", "gate", "head", "inputs", "quantized", "storage", "targets"},
    "loop": {"adalora", "fused", "gate", "head", "layout", "losses", "own_loss", "step", "storage", "targets"},
    "penalties": {"covariances", "errors", "fused", "head", "losses", "samples"},
    "normalisation": {"errors"},
    "trainer": {
        *("adalora", "budget", "errors", "gate", "head", "layout", "losses", "normalisation", "own_loss", "penalties"),
        *("replaced", "step", "storage", "targets"),
    },
    "file_list": {"storage"},
    "run_folder": {"errors", "file_list", "storage"},
    "training": {
        *("adapters", "errors", "full", "gate", "head", "kinds", "losses", "models", "nullspace", "own_loss"),
        *("penalties", "placement", "quantized", "ranks", "run_folder", "samples", "storage", "targets", "trainer"),
    },
    "grid": {"errors", "kinds", "losses", "penalties", "storage", "training"},
    "sweep": {
        *("errors", "evaluate", "gate", "grid", "head", "models", "precompute", "rows", "run_folder", "samples"),
        *("storage", "targets", "teacher", "training"),
    },
    "jobs": {"errors", "grid", "models", "sweep"},
    "metrics": set(),
    "evaluate": {
        *("errors", "file_list", "gate", "head", "inputs", "losses", "metrics", "models", "precompute", "samples"),
        *("placement", "reloadable", "storage", "targets", "teacher"),
    },
    "tasks": {"errors", "metrics", "models"},
    "report": {"metrics", "tasks"},
    "card": {"storage"},
    "pulling": {"storage"},
    "hub": {"card", "errors", "pulling", "storage"},
    "checked_json": {"errors"},
    "results": {"checked_json", "errors", "storage"},
    "frontier": {"results"},
    "pictures": {"frontier", "results", "storage"},
    "page": {"report"},
    "sweep_tables": {"frontier", "results"},
    "sweep_report": {"frontier", "page", "pictures", "results", "storage", "sweep_tables"},
}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Rooms a module imports (relative, or across as 'storage'/'pipeline'), and foreign top-level packages."""
    rooms, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = node.module or ""
            rooms |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if parts[0] == "logitcache":
                rooms.add(parts[1])
            else:
                foreign.add(parts[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return rooms, foreign


@pytest.mark.parametrize("room", STORAGE_ROOMS)
def test_storage_room_imports_only_what_it_may(room: str) -> None:
    rooms, foreign = imports_of(ROOT / "storage" / f"{room}.py")
    assert rooms <= STORAGE_ROOMS[room]
    assert not foreign & (HEAVY | {"storage", "pipeline"})


@pytest.mark.parametrize("room", PIPELINE_ROOMS)
def test_pipeline_room_imports_only_what_it_may(room: str) -> None:
    rooms, foreign = imports_of(ROOT / "pipeline" / f"{room}.py")
    assert rooms <= PIPELINE_ROOMS[room]
    assert not foreign & {"click", "storage", "pipeline"}


def test_every_module_has_a_room() -> None:
    """A new file is a decision about the architecture: enter it above."""
    assert {p.stem for p in (ROOT / "storage").glob("*.py")} == {*STORAGE_ROOMS, "__init__"}
    assert {p.stem for p in (ROOT / "pipeline").glob("*.py")} == {*PIPELINE_ROOMS, "__init__", "__main__"}


def test_only_the_command_line_prints_or_exits() -> None:
    for path in [*(ROOT / "storage").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        if "cli" in path.relative_to(ROOT).parts:
            continue
        names = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert not names & {"print", "exit", "quit", "breakpoint"}, path
        assert "sys.exit" not in path.read_text(encoding="utf-8"), path


def loaded_by(statement: str) -> set[str]:
    """Top-level and logitcache modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.split())


def test_importing_storage_loads_no_framework() -> None:
    assert not loaded_by("import logitcache.storage") & {*HEAVY, "logitcache.pipeline"}


def test_a_run_s_folder_is_looked_at_without_a_framework() -> None:
    assert not loaded_by("import logitcache.pipeline.run_folder") & HEAVY


def test_losses_know_nothing_of_storage() -> None:
    loaded = loaded_by("import logitcache.pipeline.losses, logitcache.pipeline.fused")
    assert not any(name.startswith("logitcache.storage") for name in loaded)
    assert not loaded & {"transformers", "peft", "zarr", "pyarrow"}


def test_help_loads_no_framework() -> None:
    """`logitcache --help` answers at once."""
    assert not loaded_by("import logitcache.pipeline.cli") & {"torch", "transformers", "peft", "datasets"}
