"""How a model is held: number format, devices, quantisation, without torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from logitcache.errors import InvalidSettings
from logitcache.settings import Settings, option

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LoadIn = Literal["8bit", "4bit"]
Spread = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""accelerate's ways of spreading layers over all GPUs, then main memory, then the disk."""


@dataclass(frozen=True)
class LoadSettings(Settings):
    """How a model is loaded; `loading.load` does it."""

    heading: ClassVar[str] = "How the model is held"

    load_in: LoadIn | None = option(
        None,
        "Quantise the linear layers of the model, by bitsandbytes (docs/how-to/distil.md).  [default: as stored]",
    )
    device_map: Spread | None = option(
        None,
        "Spread the layers of a model that is larger than a GPU over all there are (docs/how-to/distil.md).  "
        "[default: one device]",
    )
    tensor_parallel: bool = option(
        False, "torchrun's processes hold one model together, and are one worker.", on_line=False
    )
    dtype: Dtype = option("auto", "Number format of the weights; auto: that of the checkpoint.")
    device: Device = option("auto", "Where to run; auto: CUDA where there is one.")

    def check_together(self) -> None:
        """Raise `InvalidSettings` where the model is to lie in two places."""
        if self.device_map is not None and self.device != "auto":
            raise InvalidSettings(
                f"--device-map {self.device_map} chooses the devices itself. Leave --device {self.device} out."
            )
        if self.tensor_parallel and self.device_map is not None:
            raise InvalidSettings("--tensor-parallel goes with torchrun alone, without --device-map.")
