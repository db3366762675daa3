"""A program that runs cases on the simulated CUDA device. Prints what each found, in JSON.

    python on_simulated_cuda.py 1 '["losses", "steps"]' FOLDER

The first: how many devices there are, 1 or 2. Cases are functions of `simulated_cases`, each given a folder of its own.
One that raises has {"error": its traceback}. `found_on_device` starts the program. Must not import torch: the device
comes before it.
"""

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


def found_on_device(cases: Sequence[str], folder: Path, num_devices: int = 1) -> dict[str, Any]:
    """What the cases found, by their names, in a process of their own."""
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE), str(num_devices), json.dumps(list(cases)), str(folder)],
        env={**os.environ, **settings, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(num_devices: int, cases: Sequence[str], folder: Path) -> None:
    """Run them, one after the other."""
    simulated_cuda.switch_on(num_devices)
    import torch
    from support import simulated_cases

    torch.set_num_threads(1)
    found = {}
    for name in cases:
        place = folder / name
        place.mkdir(parents=True)
        try:
            found[name] = getattr(simulated_cases, name)(place)
        except Exception:  # whatever it is: the test fails with it
            found[name] = {"error": traceback.format_exc()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
