"""torch.cuda without a GPU: builds simulated_cuda.cpp once, and puts it under torch before that is imported.

    from support import simulated_cuda
    simulated_cuda.switch_on(num_devices=1)   # before torch is imported, so in a process of its own
    import torch                              # whose cuda:0 lies in main memory

What runs on it: kernels of the CPU, so numbers are the CPU's; devices that are mixed raise as on a card, and memory is
pinned or not. What it cannot show: time, memory of a card, its rounding, its kernels. Owns the build, and what Python
asks of `torch.cuda`. Must not import torch before it is switched on.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")

TORCH = "2.13"
"""Whose headers the source is written to: they are no interface that torch keeps."""

BYTES = 80 << 30
"""Of the memory that a device says it has."""


def unavailable() -> str:
    """Why there can be no simulated device here; "" where there can."""
    if shutil.which("g++") is None:
        return "no C++ compiler (g++)"
    found = version("torch")
    if not found.startswith(f"{TORCH}."):
        return f"torch {found}, and the simulated device is written to the headers of {TORCH}"
    return "" if found.endswith("+cpu") else f"torch {found}, which has a CUDA of its own"


def library() -> Path:
    """The shared library, built where it is not there yet, in a folder of this source and this torch."""
    key = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"logitcache-simulated-cuda-{os.getuid()}-{key}"
    built = folder / "libsimulated_cuda.so"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"building the simulated device: {folder} is another user's. Remove it, or set TMPDIR.")
    if not built.exists():
        made = folder / f"{os.getpid()}.so"
        _compile(made)
        made.replace(built)  # two processes may build at once
    return built


def _compile(to: Path) -> None:
    torch = _torch_folder()
    includes = [f"-I{torch / 'include' / below}" for below in ("", "torch/csrc/api/include")]
    linked = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    line = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", *includes, str(SOURCE), "-o", str(to), *linked]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the simulated device: {done.stderr[-2000:]}")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def switch_on(num_devices: int = 1) -> None:
    """Have torch, which is imported here for the first time, see so many devices (1 or 2)."""
    assert "torch" not in sys.modules, "the simulated device comes before torch"
    folder = _torch_folder() / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    import peft as peft  # and bitsandbytes with it, which would load its CUDA kernels if it saw a device

    _replace_torch_cuda(num_devices)


def _replace_torch_cuda(num_devices: int) -> None:
    """What a CPU build of torch.cuda lacks or raises at."""
    import torch

    properties = _Properties()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: num_devices,
        "current_device": _current,
        "set_device": _make_current,
        "device": _Within,
        "current_stream": lambda of=None: _Stream(),
        "Event": _Event,
        "synchronize": lambda of=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda of=None: properties.name,
        "get_device_capability": lambda of=None: (properties.major, properties.minor),
        "get_device_properties": lambda of=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda of=None: (BYTES, BYTES),
        "memory_allocated": lambda of=None: 0,
        "max_memory_allocated": lambda of=None: 0,
        "reset_peak_memory_stats": lambda of=None: None,
        # the generator is the CPU's, whose state is kept and set by itself
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda of=None: torch.random.get_rng_state(),
        "get_rng_state_all": lambda: [torch.random.get_rng_state()],
        "set_rng_state": lambda state, of=None: None,
        "set_rng_state_all": lambda states: None,
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, replaced[name])
    torch._C._cuda_getDevice = _current


class _Within:
    """As `torch.cuda.device`, a context. Which device is current is kept below, for each thread."""

    def __init__(self, of: Any) -> None:
        self._index, self._before = _index_of(of), 0

    def __enter__(self) -> None:
        self._before = _current()
        _make_current(self._index)

    def __exit__(self, *raised: object) -> None:
        _make_current(self._before)


def _current() -> int:
    import torch

    return int(torch._C._accelerator_getDeviceIndex())


def _make_current(of: Any) -> None:
    import torch

    torch._C._accelerator_setDeviceIndex(_index_of(of))


def _index_of(of: Any) -> int:
    import torch

    if isinstance(of, int):
        return of
    index = None if of is None else torch.device(of).index
    return _current() if index is None else index


class _Stream:
    """Has always finished."""

    cuda_stream = 0

    def synchronize(self) -> None:
        """Nothing is left."""

    def wait_stream(self, other: Any) -> None:
        """Nothing is left there either."""


class _Event:
    """As `torch.cuda.Event`, at the host's clock: how long the host took, which says nothing of a card."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Now: everything before it has finished."""
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is left."""

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds."""
        return (end._at - self._at) * 1000


class _Properties:
    name = "Simulated"
    major, minor = 9, 0
    total_memory = BYTES
    multi_processor_count = 132
