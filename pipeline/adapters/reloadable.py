"""Which adapter folders, loaded on the base, compute what was trained, and which base that was.

Owns the closed tables. PEFT runs an adapter's initialisation again when it loads it, before it reads the file. One that
rewrites the base's weights by a random draw, or by samples that are not there any more, rewrites them otherwise than
they were in training, or not at all; nothing in the file says so. Trade-off: what is not known to be made again is
refused, though a version of PEFT to come may do it. Must not load weights.
"""

import json
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from logitcache.errors import UnsuitableAdapter, UnsupportedModel, release_of
from logitcache.json_files import read_checked
from logitcache.storage.plain_text import one_line

from .registry import KINDS, AdapterSettings, rewrites_base

CONFIG, RUN, CHECKPOINTS = "adapter_config.json", "run.json", "checkpoints"

TYPES = frozenset(
    {
        *("ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "CARTRIDGE", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA"),
        *("GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF"),
        *("PEANUT", "PREFIX_TUNING", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA"),
        *("TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
    }
)
"""Of PEFT 0.21's types, those that compute the same after loading, and through body and head apart: tests assert it for
each. What they draw is in the file, or drawn again from a seed in the configuration. Left out: types that lengthen the
sequence (PROMPT_TUNING, P_TUNING, CPT, ...) or need more than tokens (POLY, XLORA, ...)."""

INITIALISATIONS = frozenset({"gaussian", "orthogonal", "eva", "mica", "pissa", "olora"})
"""Values of `init_lora_weights` beside true and false: the file replaces all that they set, or (pissa, olora) W loses
the same part again: to the last bit on the same machine, within 1e-8 nats of KL with another number of threads
(docs/log.md)."""

OTHER_SUM = "0.18"
"""The first PEFT that sums OFT's Cayley-Neumann terms as later ones do, and the first that writes its version down."""

WHY = {
    "pissa_niter": "PEFT decomposes the weights at random, and takes another part out of them each time it is loaded",
    "corda": "what was taken out of the weights came from samples, and PEFT cannot take it out without them",
    "lora_ga": "what was taken out of the weights came from gradients, and PEFT leaves the weights whole without them",
    "loftq": "the weights that it was trained on were quantised and differ from the base's in full rank",
}
"""By how `init_lora_weights` begins."""

DRAWN_AGAIN = "0.21"
"""The first PEFT that does not miss a TinyLoRA's projections in a file that leaves them to their seed."""


def check_reloadable(folder: str) -> None:
    """Raise `UnsuitableAdapter` where the folder holds an adapter that is not known to compute, on the base, what was
    trained; `UnsupportedModel` where its configuration cannot be read. A folder without an adapter passes."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        return
    _check_checkpoint(path)
    config = _json(path / CONFIG, folder)
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if not isinstance(kind, str):
        raise _damaged(folder, f"{CONFIG} does not say of which type it is")
    if kind not in TYPES:
        raise UnsuitableAdapter(
            f"loading adapter {folder!r}: expected a type that is known to compute after loading what was trained "
            f"(docs/adapters.md), found {kind}. Its numbers might be another model's. Merge it into the base where it "
            "was trained (merge_and_unload, save_pretrained), and give that folder."
        )
    _check_installed(folder, kind, config)
    if kind == "LORA" and isinstance(start, str) and start.lower() not in INITIALISATIONS:
        why = next((said for name, said in WHY.items() if start.lower().startswith(name)), "it is not known here")
        raise UnsuitableAdapter(
            f"loading adapter {folder!r}: expected a LoRA of the untouched base, found init_lora_weights {start!r}: "
            f"{why}. It would be another model than was trained. Where it was trained, save it as a plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)), or train it by "
            "`logitcache train`, which saves one."
        )
    if kind == "OFT" and config.get("use_cayley_neumann") and _before_other_sum(config.get("peft_version")):
        raise UnsuitableAdapter(
            f"loading adapter {folder!r}: expected an OFT of PEFT {OTHER_SUM} or later, found use_cayley_neumann of an "
            "earlier one, which made rotations by another sum of the same parameters. It would be another model than "
            "was trained. Merge it into the base with the PEFT that trained it (merge_and_unload, save_pretrained), "
            "and give that folder."
        )
    drawn = kind == "TINYLORA" and config.get("save_projection") is False
    if drawn and release_of(version("peft")) < release_of(DRAWN_AGAIN):
        raise UnsuitableAdapter(
            f"loading adapter {folder!r}: expected PEFT {DRAWN_AGAIN} or later, which draws the projections of a "
            f"TinyLoRA again, found PEFT {version('peft')}, which takes them for missing. Upgrade it (pip install -U "
            "peft)."
        )
    if config.get("sample_at_inference"):
        raise UnsuitableAdapter(
            f"loading adapter {folder!r}: expected one distribution a position, found sample_at_inference: {kind} then "
            "draws at random in every forward. Set it to false in adapter_config.json to evaluate the mean."
        )


def _before_other_sum(saved_by: object) -> bool:
    """Whether a version is earlier than `OTHER_SUM`; it is where none is given."""
    found = re.match(r"\d+\.\d+", saved_by) if isinstance(saved_by, str) else None
    return found is None or release_of(found[0]) < release_of(OTHER_SUM)


def _check_installed(folder: str, kind: str, config: dict[str, Any]) -> None:
    """Raise `UnsuitableAdapter` for what the installed PEFT does not know: it would leave settings out, with a warning,
    and load another adapter than was trained."""
    known = next((c for name, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(name.value) == kind), None)
    names = {"peft_version"} | ({field.name for field in fields(known)} if known is not None else set())
    strange = sorted(name for name, value in config.items() if value and name not in names)
    if known is not None and not strange:
        return
    what, then = f"type {kind}", "It cannot be loaded"
    if known is not None:
        what = f"{one_line(', '.join(strange), 200)} in {CONFIG}"
        then = "PEFT would leave that out, and load another adapter than was trained"
    saved = config.get("peft_version")
    by = f"PEFT {one_line(saved, 40)}, which saved it" if isinstance(saved, str) and saved else "the latest PEFT"
    raise UnsuitableAdapter(
        f"loading adapter {folder!r}: expected what the installed PEFT {version('peft')} can load, found {what}. "
        f"{then}. Install {by}."
    )


def base_of(folder: str) -> tuple[str, dict[str, str]] | None:
    """Which model an adapter was trained on, as its run.json has it: the name, and `weights` and `config` of its
    identity; None without a run.json. Raises `UnsupportedModel` where that does not say it."""
    run = Path(folder) / RUN
    if not run.is_file():
        return None
    try:
        said = read_checked(run)["model"]
        return one_line(str(said["name"]), 200), {key: str(said[key]) for key in ("weights", "config")}
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"loading adapter {folder!r}: its run.json does not say which model it was trained on. "
            "Restore it from a copy; for an adapter made elsewhere, remove it."
        ) from error


def _check_checkpoint(path: Path) -> None:
    """Raise `UnsuitableAdapter` for what a run keeps for --resume, where it belongs to rewritten weights."""
    place = path.resolve().parent
    run = place.parent / RUN
    if place.name != CHECKPOINTS or not run.is_file():
        return
    try:
        described = read_checked(run).get("adapter")
    except (OSError, ValueError) as error:
        raise _damaged(str(path), f"{run}: {error}") from error
    if not isinstance(described, dict) or described.get("kind") not in KINDS:
        raise _damaged(str(path), f"{run} does not say of which kind it is")
    settings = AdapterSettings(described["kind"], variant=described.get("variant", AdapterSettings.variant))
    if rewrites_base(settings):
        raise UnsuitableAdapter(
            f"loading adapter {str(path)!r}: it is a checkpoint of a run with {settings.kind}, whose adapter belongs "
            "to the weights that training rewrote. On the base it is another model. It is for --resume alone: finish "
            f"the run, and give {str(place.parent)!r}."
        )


def _json(path: Path, folder: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(folder, f"{path.name} is no JSON object")
    return found


def _damaged(folder: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"loading adapter {folder!r}: it is damaged ({why}). Restore it from a copy, or train it again."
    )
