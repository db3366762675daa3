"""Benchmark tasks of lm-evaluation-harness, on base and adapted model alike.

Owns the way to the harness, an optional dependency (the extra `tasks`), imported when it is used. Both
models go through the same wrapper, so that they see the same prompts. Must not compute a metric itself: values and what
they mean are the harness's; only the interval of the change is ours, by the resampling of `metrics`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from logitcache.errors import InputNotFound, TasksFailed, install_line
from logitcache.models.loading import first_line

from .metrics import TaskScore, intervals_of, resampled_totals


def check_harness() -> None:
    """Raise `InputNotFound` where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise InputNotFound(
            f"running tasks: lm-evaluation-harness is not installed. Install it by `{install_line('tasks')}`."
        )


def run_tasks(
    models: Sequence[nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    folder: Path | None = None,
    batch_size: int = 8,
) -> list[TaskScore]:
    """The scores of tasks, in the harness's order. models: the base, and after it the adapted model if there is one.

    folder: YAML files of tasks, found before the harness's own. batch_size: requests a forward. The settings are those
    of the tasks (shots, prompts, metrics), without a chat template. Raises `InputNotFound` for an unknown task,
    `TasksFailed` where the harness fails, for example because it is offline and a data set is not in its cache.
    """
    check_harness()
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(names, folder)
    results = []
    for model in models:
        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            results.append(evaluate(wrapped, _loaded(manager, names, DEFAULT_OTHER_SEED)))
        except Exception as error:  # tasks run code of their own, and load data sets
            raise TasksFailed(
                f"running {', '.join(names)}: {first_line(error)}. Check the task with lm-evaluation-harness itself."
            ) from error
    return scores_of(*results)


def scores_of(before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> list[TaskScore]:
    """The numbers in what `lm_eval.evaluate` returns, of the base and of the adapted model."""
    scores = []
    for task, values in before["results"].items():
        for key, value in values.items():
            if "," not in key or "_stderr," in key or not isinstance(value, (int, float)):
                continue
            metric, filtered = key.split(",", 1)
            pairs = [_by_document(r, task, metric, filtered) for r in (before, after) if r is not None]
            new = None if after is None else float(after["results"][task][key])
            scores.append(
                TaskScore(
                    task,
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    float(value),
                    new,
                    None if new is None else _change_interval(pairs, float(value), new),
                    int(values.get("sample_len", len(pairs[0]))),
                )
            )
    return scores


def _loaded(manager: Any, names: Sequence[str], seed: int) -> Any:
    """The tasks, with shots and seed as `lm_eval.simple_evaluate` sets them. That function also runs git and pip to
    describe the machine, which takes longer than a small task and writes on the terminal."""
    loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    set_seed(seed)  # of both models alike, for tasks that sample
    return loaded


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's index of tasks: of the folder where it holds all of these, which saves reading thousands of files,
    else of the folder and its own. Raises `InputNotFound`."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if not set(names) - set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        where = "the tasks of lm-evaluation-harness" + ("" if folder is None else f" nor of {folder}")
        raise InputNotFound(
            f"running tasks: {unknown[0]!r} is not among {where}. `lm-eval ls tasks` lists the harness's own; "
            "--tasks-path is a folder of YAML files."
        )
    return manager


def _by_document(results: Mapping[str, Any], task: str, metric: str, filtered: str) -> NDArray[np.float64]:
    """The metric of each document, in their order; empty where the harness does not keep one number a document."""
    rows = [s for s in results.get("samples", {}).get(task, []) if s["filter"] == filtered]
    values = [s.get(metric) for s in sorted(rows, key=lambda s: s["doc_id"])]
    if not all(isinstance(v, (int, float)) for v in values):
        return np.zeros(0)
    return np.array(values, dtype=np.float64)


def _change_interval(pairs: Sequence[NDArray[np.float64]], before: float, after: float) -> tuple[float, float] | None:
    """Of after - before, document by document; None where the scores are not the means over documents."""
    old, new = pairs
    if len(old) < 2 or len(old) != len(new):
        return None
    if not (math.isclose(old.mean(), before, abs_tol=1e-9) and math.isclose(new.mean(), after, abs_tol=1e-9)):
        return None
    totals = resampled_totals({"documents": np.ones(len(old)), "change": new - old})
    return intervals_of({"change": totals["change"] / totals["documents"]}).get("change")
