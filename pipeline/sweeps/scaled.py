"""The curve between the base and a finished run, kept in its folder as scales.json.

    W(s) = W_base + s (W_adapted - W_base)      `evaluation.scales`: nothing is trained for it

Owns that each point is measured once, whatever happens to the process, on the texts and against the probes of the
sweep; a run that has no curve (an adapter that does not merge, packed weights) says why. Must not train.
"""

from pathlib import Path

from logitcache.errors import UnsupportedModel
from logitcache.evaluation.compare import compare_cached, load_adapter
from logitcache.evaluation.scales import models_between
from logitcache.json_files import CheckedJson, write_checked

from .config import RunSpec
from .folder import SCALES
from .prepare import Prepared


def measure_scales(prepared: Prepared, spec: RunSpec, folder: Path) -> list[str]:
    """Measure what is asked for of a finished run and not there yet. Sentences: why there is no curve.

    Raises `UnreadableSweep` where the points that are there are damaged.
    """
    path = folder / SCALES
    found = CheckedJson.of(path).values if path.is_file() else {"points": [], "error": None}
    points, known = list(found["points"]), {point["scale"] for point in found["points"]}
    left = [scale for scale in prepared.config.scales_of(spec) if scale not in known]
    if not left or found["error"] is not None:
        return []
    about = {"name": spec.name, "method": spec.method, "settings": spec.settings}
    base = prepared.untouched().model
    adapted = load_adapter(prepared.fresh().model, str(folder), prepared.config.common.loading.device_map)
    try:
        for scale, model in models_between(base, adapted, left):
            measured = {n: compare_cached(model, c, prepared.texts[n]).as_dict() for n, c in prepared.probes.items()}
            points.append({"scale": scale, **measured})
            write_checked(path, {**about, "points": points, "error": None})
    except UnsupportedModel as error:
        write_checked(path, {**about, "points": points, "error": str(error)})
        return [f"No curve between base and adapter: {error}"]
    return []
