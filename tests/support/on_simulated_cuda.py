"""A program that runs cases on the simulated CUDA device. Prints what each found, in JSON.

    python on_simulated_cuda.py 1 simulated_cases '["losses", "steps"]' FOLDER

The first: how many devices there are, 1 or 2. Cases are functions of a module of `support`, each given a folder of its
own. One that raises has {"error": its traceback}. `found_on_device` starts the program. Must not import torch: the
device comes before it.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import simulated_cuda

HERE = Path(__file__).resolve()


def found_on_device(
    cases: Sequence[str], folder: Path, num_devices: int = 1, module: str = "simulated_cases"
) -> dict[str, Any]:
    """What the cases of a module of `support` found, by their names, in a process of their own."""
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE), str(num_devices), module, json.dumps(list(cases)), str(folder)],
        env={**os.environ, **settings, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(num_devices: int, module: str, cases: Sequence[str], folder: Path) -> None:
    """Run them, one after the other."""
    simulated_cuda.switch_on(num_devices)
    import torch

    torch.set_num_threads(1)
    functions = importlib.import_module(f"support.{module}")
    found = {}
    for name in cases:
        place = folder / name
        place.mkdir(parents=True)
        try:
            found[name] = getattr(functions, name)(place)
        except Exception:  # whatever it is: the test fails with it
            found[name] = {"error": traceback.format_exc()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
