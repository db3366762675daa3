"""The processes that torchrun started for one job: what they agree on, and one model divided over them.

Owns the group of processes and what its members agree on. All ranks run the same forwards together, or all wait for
ever; so what is to be run is decided by the rank that leads, which alone writes. Must not load anything.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from logitcache.errors import InputNotFound, UnsupportedModel

T = TypeVar("T")
Question = TypeVar("Question")
Answer = TypeVar("Answer")


def dividing(config: Any, name: str) -> dict[str, Any]:
    """What `from_pretrained` is told to divide a model of this text config. Starts the group where there is none.

    Raises `InputNotFound` without torchrun, `UnsupportedModel` where the heads do not divide. A model without a plan
    is refused by transformers itself.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        raise InputNotFound(
            f"loading model {name!r} over processes: expected two or more, found this one. Start them with "
            "torchrun --nproc-per-node N -m logitcache precompute --tensor-parallel N ..."
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, heads, None)
        if isinstance(count, int) and count % size:
            raise UnsupportedModel(
                f"loading model {name!r} over {size} processes: its {heads} are {count}, which {size} does not divide. "
                "Start as many processes as divide it, or spread it with --device-map."
            )
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return {"distributed_config": DistributedConfig(tp_size=size)}


def is_divided() -> bool:
    """Whether the processes hold one model together."""
    return dist.is_initialized()


def leads() -> bool:
    """Whether this process decides and writes for its group; without a group it does."""
    return not dist.is_initialized() or dist.get_rank() == 0


@dataclass(frozen=True)
class Leading(Generic[Question, Answer]):
    """A function that all processes of the group must call together, as the leader calls it: see `follow`."""

    function: Callable[[Question], Answer]

    def __call__(self, question: Question) -> Answer:
        """The function's answer here, while the others compute theirs."""
        agreed((question,))
        return self.function(question)

    def release(self) -> None:
        """Let the others go."""
        agreed(None)


def follow(function: Callable[[Question], object]) -> None:
    """Call the function with whatever the leader calls it with, until it lets go."""
    question: tuple[Question] | None = None
    while (asked := agreed(question)) is not None:
        function(asked[0])


def agreed(value: T) -> T:
    """What the leading process says, on every one. All must call it; value: anything that pickles."""
    if not dist.is_initialized():
        return value
    box = [value if leads() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    said: Any = box[0]
    return said  # type: ignore[no-any-return]


def decided(function: Callable[[], T]) -> T:
    """What the leading process finds, or its refusal, on every one; the others do not call the function."""
    found: tuple[Any, Exception | None] = (None, None)
    if leads():
        try:
            found = (function(), None)
        except Exception as error:
            found = (None, error)
    if dist.is_initialized():
        box = [found]
        dist.broadcast_object_list(box, src=0)  # on the device that the group has a backend for
        found = box[0] if not leads() else found
    value, refusal = found
    if refusal is not None:
        raise refusal
    return value  # type: ignore[no-any-return]
