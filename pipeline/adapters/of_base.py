"""Whether a folder is an adapter, or a trained model, of this base, as whoever loads it is to know before.

Owns the checks that need the base's identity and nothing of its weights; which adapters can be had from their folder at
all is `reloadable`'s. Must not load weights.
"""

from pathlib import Path

from logitcache.errors import InputNotFound, NotTheBase, UnsupportedModel
from logitcache.models.loading import Base
from logitcache.models.same_base import base_differences

from .reloadable import base_of, check_reloadable
from .saved_files import FILES, fault_of


def check_adapter(folder: str, base: Base) -> None:
    """Raise `InputNotFound` where the folder is neither an adapter nor a model, `UnsupportedModel` where it is not what
    was written, `UnsuitableAdapter` where what was trained cannot be had from it, `NotTheBase` where its run.json names
    another model."""
    if not (Path(folder) / "adapter_config.json").is_file() and not is_whole(folder):
        raise InputNotFound(
            f"loading adapter {folder!r}: expected adapter_config.json in it, or a whole model, found neither."
        )
    fault = fault_of(Path(folder)) if (Path(folder) / FILES).exists() else None
    if fault is not None:
        raise UnsupportedModel(
            f"loading adapter {folder!r}: {fault}, and its numbers would not be those of what was trained. Restore it "
            f"from a copy, or train it again; where it was changed on purpose, remove {FILES}."
        )
    check_reloadable(folder)
    trained_on = base_of(folder)
    if trained_on is None:  # an adapter made elsewhere
        return
    name, identity = trained_on
    differs = base_differences(identity, base.identity, "in its run.json", "in the model")
    if differs:
        raise NotTheBase(
            f"loading adapter {folder!r}: it was trained on {name}, not on {base.source.name} ({'; '.join(differs)}). "
            "Give the model it was trained on."
        )


def is_whole(folder: str) -> bool:
    """Whether a folder holds a model and no adapter."""
    path = Path(folder)
    return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
