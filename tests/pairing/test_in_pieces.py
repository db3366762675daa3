"""A model that FSDP has divided is held against the cache by all processes together, as the whole one is by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_model import make_model
from support.tiny_runs import V, make_samples
from support.two_processes import in_two_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.errors import NotTheBase
from logitcache.losses.formulas import Objective
from logitcache.models.head import causal_lm_of
from logitcache.models.loading import Base, Source
from logitcache.models.sharding import dtype_as_called
from logitcache.pairing.step_zero import NOISE_TOKENS, NUM_NOISE, own_noise
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache, ModelIdentity

SAMPLES = make_samples(12)
DTYPES = ("bfloat16", "float32 cast to bfloat16", "float32 in autocast")
CASES = [(sharding, dtype) for sharding in ("fsdp1", "fsdp2") for dtype in DTYPES]


def base_in(dtype: torch.dtype) -> Any:
    """As it is loaded: its rotary frequencies stay in float32."""
    model = make_model(hidden_size=64, intermediate_size=128)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def student(dtype: str) -> Any:
    model = base_in(torch.float32 if dtype.startswith("float32") else torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def divided(model: Any, sharding: str, dtype: str) -> Any:
    cast = torch.bfloat16 if "cast to" in dtype else None
    if sharding == "fsdp1":
        policy = MixedPrecision(param_dtype=cast)
        return FullyShardedDataParallel(
            model, mixed_precision=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": MixedPrecisionPolicy(param_dtype=cast)}
    for layer in causal_lm_of(model).model.layers:
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def found_on(rank: int, path: Path) -> list[dict[str, Any]]:
    """What each process finds of the base, and then of a model near it; the second one's batch has no position."""
    torch.distributed.init_process_group("gloo")
    cache, batch, found = LogitCache.open(path), pad_samples(SAMPLES[3 * rank : 3 * rank + 3]), []
    if rank:
        batch["labels"][:] = -100
    for sharding, dtype in CASES:
        said = dict[str, Any]()
        for near in (False, True):
            whole = student(dtype)
            if near:
                whole.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight.data.mul_(1.3)
            model = divided(whole, sharding, dtype)
            view = CacheView.paired(cache, model, Objective()).held_against(model)
            looked_up = view.collator().looked_up(batch)
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in dtype):
                    said["dtype"] = str(dtype_as_called(model))
                    start = view.check_first_batch(model, looked_up)
            except NotTheBase as error:
                said["refused"] = str(error)
            else:
                said["near" if near else "base"] = None if start is None else (start.kl_nats, start.own_noise_nats)
        found.append(said | {"left_out": view.left_out})
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the base in bfloat16, whose checkpoint is nowhere."""
    identity = ModelIdentity("a" * 32, "{}", V, "bfloat16", "sdpa")
    base = Base(Source("nowhere", Path("nowhere")), base_in(torch.bfloat16), identity)
    path = tmp_path_factory.mktemp("in-pieces") / "cache"
    precompute(base, SAMPLES, path, CaptureSettings(top_k=V - 1, max_length=256, precision="exact"))
    return path


def test_a_model_in_pieces_starts_as_the_whole_one_does_or_is_refused(path: Path) -> None:
    first, second = in_two_processes(found_on, path)
    cache, whole = LogitCache.open(path), student("bfloat16")
    view = CacheView.paired(cache, whole, Objective()).held_against(whole)
    expected = view.check_first_batch(whole, view.collator().looked_up(pad_samples(SAMPLES[:3])))
    noise = own_noise(whole, [cache.sample(i).token_ids[:NOISE_TOKENS] for i in range(0, 12, 12 // NUM_NOISE)])
    assert expected is not None and noise > 0
    for case, here, there in zip(CASES, first, second, strict=True):
        kl, own = here["base"]
        if "autocast" in case[1]:  # which rounds elsewhere than 16 bits do
            assert own is None and 1e-4 < kl < 5e-3 and "in another dtype or attention" in here["refused"]
        else:
            assert kl == pytest.approx(expected.kl_nats, rel=0.2, abs=1e-6), case
            assert own == pytest.approx(noise, rel=0.2), case
            assert "5 times its own noise of" in here["refused"], case
        assert "near" not in here, case
        assert there["base"] is None and there["near"] is None  # it took part, and has nothing to say
        assert here["dtype"] == there["dtype"] == "torch.bfloat16"
        assert "weights (FSDP or ZeRO-3 divides them over processes)" in here["left_out"]
