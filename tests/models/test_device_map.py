"""Models larger than a device: spread by a device map with accelerate's hooks at work, against the undivided model."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from packaging.version import Version
from support.cli_harness import done, precompute, refused, text_data
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import make_samples
from torch._subclasses.fake_tensor import FakeTensorMode

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teacher import capture
from logitcache.capture.vocab_groups import token_groups
from logitcache.capture.worker import precompute as fill
from logitcache.data.batches import pad_samples
from logitcache.errors import TrainingFailed, UnsupportedModel
from logitcache.evaluation.compare import compare, compare_cached, load_adapter
from logitcache.losses.formulas import Objective
from logitcache.models import device_map
from logitcache.models.device_map import devices_of, head_device, input_device, is_spread, offloaded_parts
from logitcache.models.head import check_head, hidden_states
from logitcache.models.loading import Base, find_model, load_base
from logitcache.pairing.step_zero import Probe, probe_step_zero
from logitcache.pairing.targets import with_targets
from logitcache.storage import LogitCache
from logitcache.training.batch_loss import batch_loss
from logitcache.training.run import TrainSettings, train

CPU = torch.device("cpu")
SAMPLES = make_samples(12)
REST = {"model.rotary_emb": "cpu"}
MAPS: dict[str, dict[str, str | int]] = {
    "its end on the disk": {
        **{"model.embed_tokens": "cpu", "model.layers.0": "cpu", **REST},
        **{"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"},
    },
    "its beginning on the disk": {
        **{"model.embed_tokens": "disk", "model.layers.0": "disk", **REST},
        **{"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"},
    },
    "its ends on the disk": {
        **{"model.embed_tokens": "disk", "model.layers": "cpu", **REST},
        **{"model.norm": "cpu", "lm_head": "disk"},
    },
}
ON_DISK: dict[str, str | int] = {"model": "disk", "lm_head": "disk"}
if Version(version("accelerate")) >= Version("1.15"):
    MAPS["all on the disk"] = ON_DISK


def save(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Path:
    make_model(seed, **config).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, device_map: dict[str, str | int] | str | None = None) -> Base:
    return load_base(find_model(str(folder)), "float32", CPU, device_map=device_map)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> LogitCache:
    """Of the undivided model, with tail groups."""
    base, path = load(tiny), tmp_path_factory.mktemp("device-map") / "c"
    settings = CaptureSettings(top_k=16, max_length=64, precision="exact", tail_groups=4)
    fill(base, SAMPLES, path, settings)
    return LogitCache.open(path)


def records(base: Base) -> list[np.ndarray]:
    groups = torch.from_numpy(token_groups(base.model, 4).copy())
    found = capture(base.model, SAMPLES, 16, groups, num_tail_samples=3)
    names = ("positions", "label_ids", "label_logprobs", "alternative_ids", "alternative_logprobs", "tail_logprobs")
    more = ("tail_group_logprobs", "tail_sample_ids", "tail_sample_logprobs")
    return [groups.numpy(), *(np.asarray(getattr(r, name)) for r in found for name in (*names, *more))]


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


# --- with hooks at work: main memory and the disk ---------------------------------------------------------------------


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("kind", ["as it is", "tied", "from bfloat16"])
def test_records_of_a_spread_model_are_those_of_the_whole_one_bit_for_bit(
    where: str, kind: str, tmp_path: Path
) -> None:
    if kind == "tied" and (MAPS[where].get("model.embed_tokens") == "cpu") != (MAPS[where]["lm_head"] == "cpu"):
        pytest.skip("accelerate keeps tied weights together")
    config: dict[str, Any] = {"tied": {"tie_word_embeddings": True}}.get(kind, {})
    folder = save(tmp_path / "m", torch.bfloat16 if kind == "from bfloat16" else torch.float32, **config)
    whole, spread = load(folder), load(folder, MAPS[where])
    assert is_spread(spread.model) and offloaded_parts(spread.model) and not offloaded_parts(whole.model)
    assert torch.device("meta") in devices_of(spread.model)  # the weights are really elsewhere
    assert input_device(spread.model) == head_device(spread.model) == CPU
    assert spread.identity == whole.identity
    check_head(spread.model)
    assert equal(records(spread), records(whole))


@pytest.mark.parametrize("where", MAPS)
def test_checks_and_evaluation_of_a_spread_model(where: str, tmp_path: Path, tiny: Path, cache: LogitCache) -> None:
    whole, spread = load(tiny), load(tiny, MAPS[where])
    expected, found = (probe_step_zero(base.model, Probe(cache, Objective()), SAMPLES) for base in (whole, spread))
    assert found == expected and abs(found.kl_nats) < 1e-6
    folder = str(save(tmp_path / "whole", seed=1))  # in place of one that was trained as a whole
    before = compare(whole.model, load_adapter(whole.model, folder), SAMPLES).as_dict()
    assert compare(spread.model, load_adapter(spread.model, folder, MAPS[where]), SAMPLES).as_dict() == before
    assert offloaded_parts(load_adapter(spread.model, folder, MAPS[where]))
    before = compare_cached(load_adapter(whole.model, folder), cache, SAMPLES).as_dict()
    assert compare_cached(load_adapter(spread.model, folder, MAPS[where]), cache, SAMPLES).as_dict() == before
    attach(whole.model, AdapterSettings(rank=4, alpha=8.0), str(tiny)).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedModel, match="PEFT puts no adapter there"):
        load_adapter(spread.model, str(tmp_path / "a"))


def test_offloaded_parts_cannot_be_trained(tmp_path: Path, tiny: Path, cache: LogitCache) -> None:
    base = load(tiny, MAPS["its end on the disk"])
    with pytest.raises(TrainingFailed, match="parts do not fit on the devices"):
        train(base, SAMPLES, cache, tmp_path / "o", AdapterSettings(), Objective(), TrainSettings(max_steps=1))
    assert not (tmp_path / "o").exists()


def test_the_folder_for_rewritten_weights_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_map.tempfile, "tempdir", str(tmp_path))
    with device_map.spreading("auto", "m") as told:
        pass
    device_map.keep_while(torch.nn.Linear(1, 1), told)
    assert not list(tmp_path.iterdir())  # nothing was written to it
    with device_map.spreading("auto", "m") as told:
        (Path(told["offload_folder"]) / "weight.dat").write_bytes(b"x")
    model = torch.nn.Linear(1, 1)
    device_map.keep_while(model, told)
    assert len(list(tmp_path.iterdir())) == 1
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedModel, match="loading model"):
        load(save(tmp_path / "m"), {"model": "disk"})  # which leaves the head nowhere
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("number", "refuses"), [("1.14.0", True), ("1.15.0", False)])
def test_a_model_with_no_part_off_the_disk_is_refused_by_accelerates_version(
    number: str, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_map, "version", lambda _: number)
    refusal = pytest.raises(UnsupportedModel, match=r"accelerate 1\.15 or later.*found accelerate 1\.14\.0")
    with refusal if refuses else nullcontext(), device_map.spreading(ON_DISK, "m") as told:
        assert not refuses
        Path(told["offload_folder"]).rmdir()


def test_under_torchrun_a_device_map_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedModel, match="2 processes would each take every GPU"):
        load(tiny, "auto")


# --- two devices that cannot be mixed: fake tensors -------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Tensors without values that know their devices; an operation on two devices raises, as on real ones."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def over_two_devices(head: str = "cpu:1", embedding: str = "cpu:0") -> Any:
    model = make_model()
    places = {"model.embed_tokens": embedding, "model.layers.0": "cpu:0", "model.rotary_emb": embedding}
    places |= {"model.layers.1": "cpu:1", "model.norm": "cpu:1", "lm_head": head}
    for name, place in places.items():
        module = model.get_submodule(name)
        for owner in module.modules():
            for key, parameter in list(owner.named_parameters(recurse=False)):
                owner.register_parameter(key, torch.nn.Parameter(parameter.detach().to(place)))
            for key, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(key, buffer.to(place), persistent=False)
        hook = AlignDevicesHook()
        add_hook_to_module(module, hook)
        hook.execution_device = torch.device(place)  # only now: it cannot move fake parameters
    model.hf_device_map = places
    return model


PLACES = [("cpu:1", "cpu:0"), ("cpu:0", "cpu:0"), ("cpu:0", "cpu:1"), ("cpu:1", "cpu:1")]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("head", "embedding"), PLACES)
def test_hidden_states_lie_where_the_head_is(head: str, embedding: str) -> None:
    model = over_two_devices(head, embedding)
    assert is_spread(model) and not offloaded_parts(model)
    assert str(input_device(model)) == embedding and str(head_device(model)) == head
    for where in ("cpu", "cpu:0", "cpu:1"):
        ids = torch.zeros(2, 9, dtype=torch.int64, device=where)
        with torch.no_grad():
            hidden = hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids))
            assert str(hidden.device) == head and str(model.get_output_embeddings()(hidden).device) == head
    with pytest.raises(RuntimeError, match="same device"):  # what these tests would see
        torch.zeros(1, device="cpu:0") + torch.zeros(1, device="cpu:1")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("head", "embedding"), PLACES)
@pytest.mark.parametrize(("regularizer", "tail"), [("masked-kl", "bucket"), ("masked-js", "groups")])
def test_a_batch_s_loss_lies_where_the_batch_was_and_gradients_where_the_weights_are(
    head: str, embedding: str, regularizer: Any, tail: Any, cache: LogitCache
) -> None:
    batch = with_targets(pad_samples(SAMPLES[:4]), cache)
    groups = torch.from_numpy(cache.token_groups().copy())  # type: ignore[union-attr]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = over_two_devices(head, embedding).train()
        on_first = {name: fake.from_tensor(value).to("cpu:0") for name, value in batch.items()}
        weight = torch.ones((), device="cpu:0")
        view: Any = SimpleNamespace(vocab_size=None, token_groups=lambda device: fake.from_tensor(groups).to(device))
        found = batch_loss(model, on_first, Objective(regularizer, tail), weight, view)
        assert {str(value.device) for value in found} == {"cpu:0"}
        found.loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.device == parameter.device
        assert {str(parameter.device) for parameter in model.parameters()} == {"cpu:0", "cpu:1"}


# --- on the command line ----------------------------------------------------------------------------------------------


def test_device_map_on_the_command_line(tmp_path: Path, tiny: Path) -> None:
    data = text_data(tmp_path)
    precompute(tiny, data, tmp_path / "c")
    line = ["train", "--model", tiny, "--cache", tmp_path / "c", "--rank", 2, "--max-steps", 2]
    done(*line, "--out", tmp_path / "a")
    done(*line, "--out", tmp_path / "b", "--device-map", "auto")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    line = ["evaluate", "--model", tiny, "--adapter", tmp_path / "a", "--data", data, "--prior", data, "--json"]
    assert done(*line).out == done(*line, "--device-map", "balanced").out
    for command in (line, ["train", "--model", tiny, "--cache", tmp_path / "c", "--out", tmp_path / "d"]):
        told = refused(2, *command, "--device-map", "auto", "--device", "cpu")
        assert "--device-map auto chooses the devices itself" in told
