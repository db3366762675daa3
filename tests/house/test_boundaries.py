"""The rooms of the architecture: which package may import which, what importing one loads, and who may print."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "peft", "datasets", "click", "accelerate"}

STORAGE_ROOMS = {
    "errors": set(),
    "records": {"errors"},
    "configs": set(),
    "identity": {"configs", "plain_text"},
    "layout": set(),
    "plain_text": set(),
    "links": {"errors", "layout"},
    "lesser_systems": {"layout"},
    "local_files": {"layout", "lesser_systems", "links"},
    "object_files": {"errors", "plain_text"},
    "files": {"errors", "layout", "local_files", "object_files", "plain_text"},
    "encoding": {"errors", "identity", "records"},
    "checked_json": {"errors", "identity", "plain_text"},
    "manifest": {"checked_json", "configs", "encoding", "errors", "files", "identity", "layout", "plain_text"},
    "backend": {"encoding", "errors", "files", "identity", "manifest"},
    "arrow_sizes": set(),
    "zarr_backend": {"backend", "encoding", "identity", "manifest"},
    "arrow_backend": {"arrow_sizes", "backend", "encoding", "identity", "manifest"},
    "shard": {
        *("arrow_backend", "backend", "encoding", "errors", "files", "identity", "manifest", "records", "zarr_backend"),
    },
    "index": {"backend", "encoding", "files", "identity", "layout", "manifest"},
    "data_sets": {"backend", "files", "identity", "index", "layout", "manifest", "plain_text"},
    "data_samples": {"cache", "data_sets", "errors", "identity", "manifest", "shard"},
    "prefixes": set(),
    "heads": {"backend", "errors", "files", "identity", "index", "layout", "manifest"},
    "cache": {
        *(
            "backend",
            "data_sets",
            "errors",
            "files",
            "heads",
            "identity",
            "index",
            "layout",
            "manifest",
            "prefixes",
            "records",
        ),
        "shard",
    },
    "captured_index": {"encoding", "identity"},
    "leftovers": {"data_sets", "errors", "files", "layout", "manifest"},
    "job_status": {
        *("heads", "data_sets", "errors", "files", "identity", "layout", "leftovers", "manifest", "plain_text"),
    },
    "packing": {"backend", "encoding", "errors", "identity", "manifest", "records", "shard"},
    "child_process": set(),
    "packing_process": {"child_process", "encoding", "errors", "manifest", "packing", "records"},
    "writer": {
        *("backend", "heads", "captured_index", "configs", "data_sets", "encoding", "errors", "files", "identity"),
        *("index", "layout", "manifest", "packing", "records", "shard"),
    },
    "shard_check": {"backend", "encoding", "errors", "files", "identity", "layout", "manifest", "shard"},
    "verify": {
        *("heads", "data_sets", "encoding", "errors", "files", "identity", "index", "job_status", "layout"),
        *("leftovers", "manifest", "shard_check"),
    },
    "model_check": {"cache", "errors", "files", "identity", "layout", "manifest"},
    "repack": {"backend", "encoding", "identity", "shard"},
    "transfer": {
        "cache",
        "configs",
        "data_sets",
        "encoding",
        "errors",
        "files",
        "identity",
        "layout",
        "manifest",
        "records",
        "repack",
        "shard",
        "writer",
    },
    "prune": {
        "heads",
        "data_sets",
        "encoding",
        "errors",
        "files",
        "identity",
        "layout",
        "leftovers",
        "manifest",
        "packing",
        "repack",
        "shard",
        "job_status",
        "writer",
    },
    "statistics": {"cache", "records"},
    "inventory": {"heads", "data_sets", "files", "identity", "index", "layout", "manifest"},
}
"""The files of storage/, and the others of it that each may import."""

PACKAGES = {
    "errors": set(),
    "events": set(),
    "json_files": {"errors", "storage"},
    "settings": {"errors"},
    "yaml_files": {"storage"},
    "losses": {"errors", "settings"},
    "data": {"errors", "settings", "storage"},
    "models": {"errors", "settings", "storage"},
    "pairing": {"data", "errors", "losses", "models", "settings", "storage"},
    "capture": {"data", "errors", "events", "json_files", "models", "settings", "storage"},
    "adapters": {"data", "errors", "events", "json_files", "models", "settings", "storage"},
    "evaluation": {
        *("adapters", "data", "errors", "events", "losses", "models", "pairing", "settings", "storage"),
    },
    "training": {
        *("adapters", "capture", "data", "errors", "events", "json_files", "losses", "models", "pairing", "settings"),
        "storage",
    },
    "sweeps": {
        *(
            "capture",
            "data",
            "errors",
            "evaluation",
            "events",
            "json_files",
            "models",
            "pairing",
            "settings",
            "storage",
        ),
        "training",
        "yaml_files",
    },
    "reports": {"errors", "evaluation", "json_files", "storage", "sweeps"},
    "hub": {"errors", "models", "storage", "yaml_files"},
    "demo": {"capture", "errors", "evaluation", "models", "reports", "storage", "sweeps"},
    "integrations": {"capture", "errors", "settings", "training", "yaml_files"},
}
"""The packages and ground-floor files of pipeline/, and which others each may import; cli imports all, nobody cli."""


def imports_of(path: Path, package: str) -> tuple[set[str], set[str], set[str]]:
    """Siblings (relative), rooms of this project (absolute, without the package itself), and foreign packages."""
    siblings, rooms, foreign = set(), set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}: relative imports stay within their package"
            module = node.module or ""
            siblings |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if parts[0] != "logitcache":
                foreign.add(parts[0])
            elif len(parts) > 1:
                rooms.add(parts[1])
            else:
                rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, rooms - {package}, foreign


def files_of(package: str) -> list[Path]:
    """The files of a package of pipeline/, or the one file on its ground floor."""
    folder = ROOT / "pipeline" / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def rooms_of(package: str) -> set[str]:
    """The other packages that a package imports."""
    return set().union(*(imports_of(path, package)[1] for path in files_of(package)))


@pytest.mark.parametrize("room", STORAGE_ROOMS)
def test_storage_imports_only_what_it_may(room: str) -> None:
    siblings, rooms, foreign = imports_of(ROOT / "storage" / f"{room}.py", "storage")
    assert siblings <= STORAGE_ROOMS[room] and not rooms
    assert not foreign & {*HEAVY, "logitcache"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_it_may(package: str) -> None:
    assert rooms_of(package) <= PACKAGES[package]
    for path in files_of(package):
        assert not imports_of(path, package)[2] & {"click", "logitcache"}, path


def test_training_captures_in_one_file() -> None:
    """A cache that fills itself; everything else of training reads."""
    importing = {path.stem for path in files_of("training") if "capture" in imports_of(path, "training")[1]}
    assert importing == {"fill"}


def test_an_integration_knows_no_other() -> None:
    """One thin file a framework; what they share is `block`, which knows none."""
    folder = ROOT / "pipeline" / "integrations"
    shared = {path.stem: imports_of(path, "integrations")[0] for path in folder.glob("*.py")}
    assert shared.pop("block") == set() and shared and all(siblings <= {"block"} for siblings in shared.values())


def test_losses_import_torch_and_the_ground_floor() -> None:
    for path in (ROOT / "pipeline" / "losses").rglob("*.py"):
        _, rooms, foreign = imports_of(path, "losses")
        assert rooms <= PACKAGES["losses"] and not foreign & (HEAVY - {"torch"}), path


def test_triton_is_imported_in_one_file() -> None:
    """Which another imports where it is chosen: a machine without Triton has never heard of it."""
    kernels = ROOT / "pipeline" / "losses" / "kernels"
    importing = {path for path in (ROOT / "pipeline").rglob("*.py") if "triton" in imports_of(path, "losses")[2]}
    assert importing == {kernels / "programs.py"}
    assert not loaded_by("import logitcache.losses.fused") & {
        "triton",
        "logitcache.losses.kernels.tail",
        "logitcache.losses.kernels.programs",
    }


def test_names_of_a_cache_are_spelt_in_its_layout_alone() -> None:
    """A name that stands in two places is changed in one of them."""
    spelt = re.compile(r"^(manifest|contents)\.json$|^token_groups\.npy$|^writer\.lock$|^/?shards/|^index-|^worker-$")
    found = {}
    for path in [
        *(ROOT / "storage").glob("*.py"),
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
    ]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found[path.relative_to(ROOT).as_posix()] = {text for text in strings if spelt.search(text)}
    assert len(found.pop("storage/layout.py")) >= 7
    assert not {path: names for path, names in found.items() if names}


def test_every_module_has_a_room() -> None:
    """A new package is a decision about the architecture: enter it above."""
    assert {p.stem for p in (ROOT / "storage").glob("*.py")} == {*STORAGE_ROOMS, "__init__"}
    found = {p.stem for p in (ROOT / "pipeline").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found == {*PACKAGES, "cli", "__init__", "__main__"}


def test_the_house_stays_small() -> None:
    """Packages stand on floors, each above what it imports, without a circle; so few that one can be kept in mind."""
    arrows = {"storage": set(), **{name: rooms_of(name) for name in PACKAGES}}
    floors, rest = 0, dict(arrows)
    placed: set[str] = set()
    while rest:
        ready = {name for name, needs in rest.items() if needs <= placed}
        assert ready, f"a circle among {sorted(rest)}"
        placed, floors = placed | ready, floors + 1
        rest = {name: needs for name, needs in rest.items() if name not in ready}
    of_cli = rooms_of("cli")
    assert len(arrows) + 1 <= 22 and floors + 1 <= 9
    assert sum(map(len, arrows.values())) + len(of_cli) <= 101  # docs/adr/0007-house.md says why not 90


def test_functions_fit_a_screen() -> None:
    """None is longer than 60 lines but in the command line, whose options are its arguments."""
    long, num = [], 0
    for path in [*(ROOT / "storage").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        if "cli" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, num = (node.end_lineno or 0) - node.lineno + 1, num + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert num > 500 and not long


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
    loaded = loaded_by("import logitcache.storage")
    assert not loaded & HEAVY
    assert not any(name.startswith("logitcache.") and not name.startswith("logitcache.storage") for name in loaded)


def test_losses_know_nothing_of_storage() -> None:
    loaded = loaded_by("import logitcache.losses.formulas, logitcache.losses.fused")
    assert not any(name.startswith("logitcache.storage") for name in loaded)
    assert not loaded & {"transformers", "peft", "zarr", "pyarrow"}


def test_help_loads_no_framework() -> None:
    """`logitcache --help` answers at once."""
    assert not loaded_by("import logitcache.cli") & {"torch", "transformers", "peft", "datasets"}


def test_settings_load_no_framework() -> None:
    """The command line and a sweep read their fields from them."""
    packages = ("losses.objective", "adapters.settings", "capture.settings", "training.settings", "sweeps.config")
    for name in packages:
        assert not loaded_by(f"import logitcache.{name}") & HEAVY, name


def test_reports_load_no_framework() -> None:
    """Reports are made of files: a laptop without torch can read a sweep."""
    assert not loaded_by("import logitcache.reports.build") & {"torch", "transformers", "peft", "datasets"}
