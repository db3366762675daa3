"""Models in pieces of kinds that train wrongly or not at all are refused before anything runs."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_model import make_model
from support.two_processes import in_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.models.sharding import check_parts
from logitcache.training.custom_loop import CachedLoss


def test_stages_of_a_pipeline_are_refused() -> None:
    """transformers runs forwards of them only."""
    model = make_model()
    model._pp_stage = SimpleNamespace(pp_rank=0, pp_size=2)  # as apply_pipeline_parallelism does
    with pytest.raises(TrainingFailed, match="stages of a pipeline"):
        CachedLoss(None, Objective("none"))(model, {})


def test_layers_that_deepspeed_has_divided_are_refused() -> None:
    model = make_model()
    check_parts(model)
    kind = type("LinearLayer", (nn.Linear,), {"__module__": "deepspeed.module_inject.layers"})
    model.model.layers[0].mlp.up_proj = type("LinearOfOurs", (kind,), {})(32, 64)
    with pytest.raises(TrainingFailed, match="autotp_size"):
        check_parts(model)


def test_sequences_that_deepspeed_takes_for_cut_are_refused() -> None:
    engine = nn.Sequential()
    engine.module, engine.sequence_parallel_size = make_model(), 2
    with pytest.raises(TrainingFailed, match="sequence_parallel_size"):
        check_parts(engine)


def found_on(_rank: int) -> list[str]:
    """What is said of a sharded model before a forward, after one, and with a parameter that others have divided."""
    torch.distributed.init_process_group("gloo")
    mesh, said = init_device_mesh("cpu", (2,)), list[str]()
    model = make_model(tie_word_embeddings=True).requires_grad_(True)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([model.model.norm, model.model.embed_tokens, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    for again in range(3):
        try:
            check_parts(model)
            said.append("right")
        except TrainingFailed as error:
            said.append(str(error))
        if not again:
            with torch.no_grad():
                model(input_ids=torch.arange(8)[None])
        if again == 1:
            divided = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])
            model.model.layers[1].mlp.lora_B = nn.Parameter(divided)
    return said


def test_what_fully_shard_has_not_divided_is_told_from_what_it_has() -> None:
    """Whether its weights are together or not; also of a tensor that is divided by something else."""
    for said in in_two_processes(found_on):
        assert said[:2] == ["right", "right"]
        assert "found 1 parameters that it has not, the first model.layers.1.mlp.lora_B" in said[2]
