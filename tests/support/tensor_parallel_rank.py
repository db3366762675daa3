"""One rank of `test_ranks`: the records of a divided model, written by the rank that leads."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from support.tiny_runs import make_samples

from logitcache.capture.teacher import capture
from logitcache.capture.vocab_groups import token_groups
from logitcache.models.head import check_head
from logitcache.models.loading import find_model, load_base
from logitcache.models.tensor_parallel import agreed, leads

COLUMNS = ("label_logprobs", "alternative_ids", "alternative_logprobs", "tail_logprobs", "tail_group_logprobs")


def main(folder: str, out: Path) -> None:
    """Write out/<rank>.npz: the groups of the vocabulary and the columns of all records."""
    base = load_base(find_model(folder), "float32", torch.device("cpu"), tensor_parallel=True)
    assert agreed(dist.get_rank()) == 0 and leads() == (dist.get_rank() == 0)
    check_head(base.model)
    groups = token_groups(base.model, 4)
    records = capture(base.model, make_samples(12), 16, torch.from_numpy(groups.copy()))
    columns = {name: np.concatenate([getattr(r, name) for r in records]) for name in COLUMNS}
    weight = base.model.get_submodule("model.layers.0.self_attn.q_proj").weight
    local = weight.to_local().shape[0] if hasattr(weight, "to_local") else weight.shape[0]
    np.savez(out / f"{dist.get_rank()}.npz", groups=groups, rows_held=local, **columns)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
