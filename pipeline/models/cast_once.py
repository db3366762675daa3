"""A head's frozen float32 weight under autocast: cast once a call, and not once a slice.

Autocast keeps what it casts of a trained weight, and casts a frozen one each time it is multiplied, all of [V, D]. Owns
that cast alone: it stands in where autocast would make the same one, in `torch.nn.functional.linear`, so that whatever
else a layer does stays its own. Must not know losses or heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


class CastOnce(TorchFunctionMode):
    """Within, a float32 parameter of which no gradient is wanted is cast for its products once, as autocast would.

    May be entered again and again: what was cast is kept until this goes, so that it must not outlive a call in which
    weights stay as they are. A parameter whose storage is another one by now (gathered, brought back) is cast anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: Any = WeakIdKeyDictionary()  # by identity, and nothing longer than its parameter lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function as it was called, but for the weight of a product."""
        if func is F.linear and len(args) > 1 and _is_cast_each_time(args[1]):
            args = (args[0], self._cast(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _cast(self, weight: Tensor) -> Tensor:
        dtype, where = torch.get_autocast_dtype(weight.device.type), weight.data_ptr()
        kept = self._casts.get(weight)
        if kept is None or kept[0] != where or kept[1].dtype != dtype:
            kept = self._casts[weight] = (where, weight.detach().to(dtype))
        cast: Tensor = kept[1]
        return cast


def _is_cast_each_time(weight: Any) -> bool:
    """Whether autocast would cast it and keep nothing: it is asked here, as a layer may have left autocast."""
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32:
        return False
    if weight.requires_grad and torch.is_grad_enabled():  # autocast keeps these
        return False
    device = weight.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
