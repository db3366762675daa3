"""The layer that makes logits: found inside what wraps it, and described as it is within its own forward.

A wrapper that shards a model puts the head's weights together while the head's own layer runs, and only then. So what
the layer computes with is asked there, and what is trained of it is noted by name before the call: FSDP puts views of
a flat tensor, or other parameters, in the place of those that a module shows outside. Must not know what is made of
logits.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel

from logitcache.errors import UnsupportedModel

from .cast_once import CastOnce

PASSING_ON = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which DistributedDataParallel, DeepSpeed, torch.compile, FSDP and activation checkpointing hold what they
wrap."""

_SHARDING = ("torch", "deepspeed")
"""Packages whose forward hooks gather and free weights, or wait for a gradient, and take any output. Those of others
are meant for logits, and so are those of the next."""

_DIVIDING = "torch.distributed.tensor"
"""Whose hooks divide what a layer is given, and put together the logits that come of it (parallelize_module)."""


@dataclass(frozen=True)
class HeadLayer:
    """The layer that makes logits, within its own forward.

    Names are those of its parameters before the call: trained ones that must have a part in the logits, and frozen
    ones, since FSDP1's flat parameter has a gradient for both.
    """

    layer: nn.Module
    logits_of: Callable[[Tensor], Tensor]
    """[n, D] -> [n, V]: the layer's own forward, its frozen weight cast once a call, and the hooks around it that are
    meant for logits."""
    trained: frozenset[str]
    frozen: frozenset[str]
    untouched: bool
    """Whether `logits_of` is the forward of the layer's class and nothing else."""

    def tensors(self) -> dict[str, Tensor]:
        """What the layer holds right now, by name: parameters, or what a wrapper has put in their place."""
        found: dict[str, Tensor] = {}
        for prefix, module in self.layer.named_modules():
            held = {**vars(module), **module._parameters}
            found |= {f"{prefix}.{n}".lstrip("."): t for n, t in held.items() if isinstance(t, Tensor)}
        return found

    @property
    def has_parts(self) -> bool:
        """Whether parts of the layer are gathered by hooks of their own, each time they run.

        Slices would gather as often, and their gradients would run such hooks in the middle of a forward.
        """
        inside = [module for module in self.layer.modules() if module is not self.layer]
        if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in inside):
            return True
        in_zero = any(hasattr(p, "ds_id") for module in inside for p in module.parameters(recurse=False))
        return in_zero and not getattr(self.layer, "_z3_leaf", False)

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the layer, which then computes without what is trained of it."""
        return bool(getattr(self.layer, "merged", False))


def layer_of(head: nn.Module) -> nn.Module:
    """What computes logits, inside wrappers that only pass on what it returns."""
    return _chain(head)[-1]


def idle_parts(module: Any) -> Iterator[list[Tensor]]:
    """Of one of PEFT's wrappers what no active adapter computes with; nothing where the module is none."""
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return
    active = [] if module.disable_adapters else module.active_adapters
    for name in module.adapter_layer_names:
        for adapter, part in attrgetter(name)(module).items():
            if adapter not in active:
                yield list(part.parameters()) if isinstance(part, nn.Module) else [part]


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    is_patched = "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None
    return not is_patched and not module._forward_hooks and not nn.modules.module._global_forward_hooks


@contextmanager
def shadowed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, an instance's forward is this one; after it what was there, the class's or one that was patched in."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def replaced_forward(head: nn.Module, work: Callable[[Tensor, HeadLayer], Tensor]) -> Iterator[None]:
    """Within, calling the head runs work(what its layer is given, the layer) in place of making logits."""
    chain = _chain(head)
    layer = chain[-1]
    with ExitStack() as stack:
        around = [stack.enter_context(_without_hooks(module)) for module in chain]
        before = [hook for hooks, _ in around for hook in hooks]
        after = [hook for _, hooks in reversed(around) for hook in hooks]
        former, casts = layer.forward, CastOnce()

        def logits_of(hidden: Tensor) -> Tensor:
            given: Any = hidden
            for hook in before:
                given = hook(given)
            with casts:
                logits: Tensor = former(given)
            for hook in after:
                seen = hook((given,), logits)
                logits = logits if seen is None else seen
            return logits

        idle = {id(p) for module in layer.modules() for part in idle_parts(module) for p in part}
        named = [(name, p) for name, p in layer.named_parameters() if not isinstance(p, FlatParameter)]
        described = HeadLayer(
            layer,
            logits_of,
            frozenset(name for name, p in named if p.requires_grad and id(p) not in idle),
            frozenset(name for name, p in named if not p.requires_grad),
            not (before or after) and "forward" not in vars(layer),
        )

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def worked(hidden: Tensor) -> Tensor:
            return work(hidden, described)

        stack.enter_context(shadowed(layer, worked))
        yield


def _chain(head: nn.Module) -> list[nn.Module]:
    """A head, and what it passes its input on to, down to the layer that computes."""
    chain = [head]
    while True:
        module: Any = chain[-1]
        wrapped = [m for name, m in module.named_children() if name in PASSING_ON]
        if isinstance(module, ModulesToSaveWrapper):
            active = [] if module.disable_adapters else module.active_adapters
            copies = [module.modules_to_save[name] for name in active if name in module.modules_to_save]
            chain.append(copies[0] if copies else module.original_module)
        elif wrapped:
            chain.append(wrapped[0])
        else:
            return chain


_Before = list[Callable[[Any], Any]]
_After = list[Callable[[tuple[Any, ...], Tensor], Any]]


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[tuple[_Before, _After]]:
    """Within, the hooks around a forward that are meant for logits are off; gives those before it, of what it is given,
    and those after it, of inputs and output.

    A hook that is called whatever happens ends what another one began (saved tensors that are kept elsewhere), so it
    stays, once a call.
    """
    first, last, always = module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called
    with_kwargs = (set(module._forward_pre_hooks_with_kwargs), set(module._forward_hooks_with_kwargs))
    former = (dict(first), dict(last))
    before = {key: hook for key, hook in first.items() if _divides(hook) and key not in with_kwargs[0]}
    meant = {key: hook for key, hook in last.items() if _divides(hook) or not _is_of_sharding(hook)}
    after = {key: hook for key, hook in meant.items() if key not in always}
    for key in before:
        del first[key]
    for key in after:
        del last[key]
    last.update({key: _ending(hook) for key, hook in meant.items() if key in always})
    try:
        yield (
            [_hook_before(module, hook) for hook in before.values()],
            [_hook_after(module, hook, key in with_kwargs[1]) for key, hook in after.items()],
        )
    finally:
        for hooks, kept in zip((first, last), former, strict=True):
            added = {key: hook for key, hook in hooks.items() if key not in kept}
            hooks.clear()
            hooks.update({**kept, **added})


def _hook_before(module: nn.Module, hook: Callable[..., Any]) -> Callable[[Any], Any]:
    """What it makes of what the forward is given."""

    def changed(given: Any) -> Any:
        seen = hook(module, (given,))
        if seen is None:
            return given
        return seen[0] if isinstance(seen, tuple) else seen

    return changed


def _hook_after(module: nn.Module, hook: Callable[..., Any], with_kwargs: bool) -> Callable[..., Any]:
    """The hook, of inputs and output."""

    def seen(inputs: tuple[Any, ...], output: Tensor) -> Any:
        return hook(module, inputs, {}, output) if with_kwargs else hook(module, inputs, output)

    return seen


def _ending(hook: Callable[..., Any]) -> Callable[..., None]:
    """The hook, which may return nothing, since what it is given is no logits."""

    def ends(*given: Any) -> None:
        if hook(*given) is not None:
            raise UnsupportedModel(
                "making the loss in the output head: expected a forward hook of it that is called whatever happens "
                "(always_call=True) to return nothing, found one that changes the output. It would change the loss and "
                "no logits. Register it without always_call."
            )

    return ends


def _is_of_sharding(hook: Any) -> bool:
    return _made_in(hook).split(".")[0] in _SHARDING


def _divides(hook: Any) -> bool:
    return _made_in(hook).startswith(_DIVIDING)


def _made_in(hook: Any) -> str:
    """The module that a function is written in."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))
