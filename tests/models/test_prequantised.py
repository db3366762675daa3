"""Checkpoints that are quantised in their files: one identity whichever engine runs them, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.cli_harness import cache_bytes, done, facts, precompute_line, refused, text_data, train_line
from support.hidden_engine import HELD, in_place_of_vllm
from support.quantised_base import bitsandbytes
from support.tiny_model import make_model, make_tokenizer, text_rows
from support.tiny_runs import make_samples
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.cache_spec import cache_spec
from logitcache.capture.calibration import read_calibration
from logitcache.capture.engines.process import EngineProcess
from logitcache.capture.engines.vllm import VllmBase, vllm_identity, vllm_teacher
from logitcache.capture.settings import CaptureSettings, EngineSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.errors import EngineFailed, UnsupportedModel
from logitcache.models import quantization
from logitcache.models.checkpoint_head import headed_model
from logitcache.models.loading import Base, Source, find_model, load_base
from logitcache.models.quantization import LOAD_IN, format_of, held_in
from logitcache.pairing.identity_checks import PairingRules, check_identity
from logitcache.pairing.targets import samples_of
from logitcache.storage import CachedSample, CacheWriter, IdentityMismatch, LogitCache, ModelIdentity
from logitcache.training.custom_loop import CachedLoss

CPU = torch.device("cpu")
UNPACKS_FP8 = Version(version("transformers")) >= Version("5.17")
SAMPLES = make_samples(8)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


class LikeGptq(HfQuantizer):
    """Takes a checkpoint's word that it is quantised, and computes with its weights as they are: GPTQ's own packages
    are not here. What is under test is how such a model is called, and transformers itself calls it so."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gptq", LikeGptq)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_vllm(monkeypatch)


def save(folder: Path, **config: Any) -> Path:
    """The tiny base, its rows whole blocks, with more in its config.json."""
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return edited(folder, lambda found: found.update(config))


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base quantised by bitsandbytes, and saved so: really packed weights, with their scales."""
    folder = tmp_path_factory.mktemp("packed")
    plain = save(folder / "plain")
    for how in LOAD_IN:
        settings = BitsAndBytesConfig(**{f"load_in_{how}": True})
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map={"": "cpu"})
        model.save_pretrained(folder / how)
        make_tokenizer().save_pretrained(folder / how)
    return {name: folder / name for name in ("plain", *LOAD_IN)}


def load(folder: Path, dtype: str = "auto", load_in: str | None = None) -> Base:
    return load_base(find_model(str(folder)), dtype, CPU, load_in)


def started(source: Source, identity: ModelIdentity) -> EngineProcess:
    return VllmBase(source, identity, "0.32.0", EngineSettings(), 64, 512, CPU).start()


def assert_one_identity(folder: Path, quantization: str, dtype: str = "auto") -> ModelIdentity:
    """By transformers, which has loaded the model, and by vLLM, which has not: equal in all but the attention."""
    loaded, told = load(folder, dtype).identity, vllm_identity(find_model(str(folder)), dtype)
    assert told == replace(loaded, attention="vllm")
    assert told.quantization == quantization
    cache_spec("m", told, None, CaptureSettings(top_k=64), engine=("vllm", "0"))
    return told


# --- one identity -----------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("how", LOAD_IN)
def test_packed_weights_have_one_identity(how: str, packed: dict[str, Path]) -> None:
    found = assert_one_identity(packed[how], how)
    assert found.weights != assert_one_identity(packed["plain"], "").weights


@pytest.mark.usefixtures("gptq")
def test_gptq_has_one_identity(tmp_path: Path) -> None:
    folder = save(tmp_path / "gptq", quantization_config=GPTQ)
    assert_one_identity(folder, "gptq")
    edited(folder, lambda c: c.update(quantization_config={**GPTQ, "bits": 8}))
    assert vllm_identity(find_model(str(folder)), "auto").config != load(save(tmp_path / "plain")).identity.config


METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("eetq", "fp8", "mxfp8", "mxfp4", "quanto", "bitnet", "fbgemm_fp8")},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm"},
    "gptq": {"bits": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_format_has_one_name_in_the_file_and_in_the_model(method: str) -> None:
    stated = {"quant_method": method, **METHODS[method]}
    model: Any = SimpleNamespace(
        hf_quantizer=SimpleNamespace(quantization_config=auto.AutoQuantizationConfig.from_dict(stated))
    )
    assert held_in(model) == format_of(stated) == method
    assert method in auto.AUTO_QUANTIZATION_CONFIG_MAPPING


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("of_the_text", [None, "float32"])
def test_a_nested_configuration_has_one_dtype(dtype: str, of_the_text: str | None, tmp_path: Path) -> None:
    """transformers goes by the outer one; vocabularies are the text's."""
    text = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config={**text, "intermediate_size": 64}, vision_config={**vision, "intermediate_size": 32}
    )
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    edited(tmp_path, lambda found: found["text_config"].update(dtype=of_the_text))
    assert assert_one_identity(tmp_path, "", dtype).dtype == ("bfloat16" if dtype == "auto" else dtype)


# --- what fills a cache, and what trains on it ------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.usefixtures("vllm")
def test_vllm_fills_a_cache_of_packed_weights_that_transformers_trains_on(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    model, data = packed["4bit"], tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in text_rows(40)), encoding="utf-8")
    lines = ["--model", model, "--data", data, "--max-length", 100]
    done("calibrate", *lines, "--out", tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json").engine.model.quantization == "4bit"
    engine = ["--engine", "vllm", "--calibration", tmp_path / "c.json", "--max-length", 100]
    done(*precompute_line(model, data, tmp_path / "by-vllm", *engine))
    done(*precompute_line(model, data, tmp_path / "by-transformers", "--max-length", 100))
    ours, theirs = (facts(tmp_path / name)["model"] for name in ("by-vllm", "by-transformers"))
    assert ours == {**theirs, "attention": "vllm"} and ours["quantization"] == "4bit"
    assert "4bit" in done("inspect", tmp_path / "by-vllm").out
    for name in ("by-vllm", "by-transformers"):
        done(*train_line(model, tmp_path / name, tmp_path / f"trained-{name}"))


@bitsandbytes
@pytest.mark.usefixtures("vllm")
def test_unquantised_weights_are_refused_by_a_cache_that_vllm_made_of_packed_ones(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    """In a loop, which knows the model and not its files: only the format tells the two apart."""
    source = find_model(str(packed["4bit"]))
    identity = vllm_identity(source, "auto")
    manifest = cache_spec("m", identity, None, CaptureSettings(top_k=259, max_length=64), engine=("vllm", "0")).manifest
    with started(source, identity) as process:
        records = vllm_teacher(process, headed_model(source, identity.dtype, CPU), 259)(SAMPLES)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.commit([CachedSample(s.token_ids, r) for s, r in zip(SAMPLES, records, strict=True)])
        writer.finalize()
    cache = LogitCache.open(tmp_path / "c")
    for how in ("4bit", "plain"):
        model = attach(load(packed[how]).model, AdapterSettings(rank=2), "m")
        if how == "4bit":
            CachedLoss(cache)(model, pad_samples(SAMPLES[:2]))
            continue
        with pytest.raises(IdentityMismatch, match="made from 4bit weights, the model has unquantised weights"):
            CachedLoss(cache)(model, pad_samples(SAMPLES[:2]))
        with pytest.raises(IdentityMismatch, match="differs in weights"):
            check_identity(cache, load(packed[how]), None, PairingRules(other_precision=True))
    with pytest.raises(IdentityMismatch, match=r"model\.quantization"):  # and no other engine goes on with it
        CacheWriter(
            tmp_path / "c", cache_spec("m", replace(identity, quantization=""), None, CaptureSettings()).manifest
        )


@pytest.mark.usefixtures("gptq", "vllm")
def test_a_cache_of_gptq_is_made_and_learnt_from(tmp_path: Path) -> None:
    model, data = save(tmp_path / "gptq", quantization_config=GPTQ), text_data(tmp_path)
    done(*precompute_line(model, data, tmp_path / "c"))
    assert facts(tmp_path / "c")["model"]["quantization"] == "gptq"
    before = cache_bytes(tmp_path / "c")
    done(*precompute_line(model, data, tmp_path / "c"))
    assert cache_bytes(tmp_path / "c") == before
    assert "no adapter has been trained here on others" in refused(
        2, *train_line(model, tmp_path / "c", tmp_path / "o")
    )
    base, cache = load(model), LogitCache.open(tmp_path / "c")
    check_identity(cache, base, None)
    adapted = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    loss, _, kl = CachedLoss(cache)(adapted, pad_samples(samples_of(cache)))
    loss.backward()
    assert float(kl) < 1e-3


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def test_what_transformers_5_16_fails_on_is_not_called_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fp8 quantizer asks None for `layer_overrides`."""

    def fails(_: object, model: Any, **_rest: Any) -> Any:
        overrides: Any = {"deepgemm_megamoe": {}}.get(model.config._experts_implementation)
        return overrides.get("colwise")

    folder = in_fp8(save(tmp_path / "m", quantization_config=FP8))
    if UNPACKS_FP8:
        monkeypatch.setattr(auto.AUTO_QUANTIZER_MAPPING["fp8"], "_process_model_before_weight_loading", fails)
        with pytest.raises(UnsupportedModel, match=r"'get'\. Check that the checkpoint"):
            load(folder, "float32")
        monkeypatch.setattr(quantization, "version", lambda _: "5.16.1")
    with pytest.raises(UnsupportedModel, match=r"'get'\. transformers 5\.16 fails so.*Install transformers 5\.17"):
        load(folder, "float32")


@pytest.mark.skipif(not UNPACKS_FP8, reason="transformers 5.16 loads no fp8 checkpoint: refused, see above")
def test_weights_unpacked_while_they_are_loaded_are_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp8 without a GPU: transformers computes with what the weights stand for, vLLM with fp8."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = in_fp8(save(tmp_path / "m", quantization_config=FP8))
    base, told = load(folder, "float32"), vllm_identity(find_model(str(folder)), "float32")
    assert base.identity.quantization == "" and told == replace(base.identity, attention="vllm", quantization="fp8")
    settings = CaptureSettings(top_k=8, max_length=64)
    for name, identity in (("fp8", told), ("unpacked", base.identity)):
        precompute(replace(base, identity=identity), SAMPLES, tmp_path / name, settings)
    check_identity(LogitCache.open(tmp_path / "unpacked"), base, None)
    check_identity(LogitCache.open(tmp_path / "fp8"), base, None, PairingRules(other_precision=True))
    with pytest.raises(IdentityMismatch, match="from fp8 weights, the model has unquantised weights, or unpacked ones"):
        check_identity(LogitCache.open(tmp_path / "fp8"), base, None)


def in_fp8(folder: Path) -> Path:
    """The linear layers' weights in 8 bits, with a scale for each block of 32 x 32."""
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith("proj.weight"):
            rows, columns = weight.shape
            blocks = weight.reshape(rows // 32, 32, columns // 32, 32)
            scales = blocks.abs().amax(dim=(1, 3)) / 448
            tensors[name] = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- what is refused --------------------------------------------------------------------------------------------------


def beside(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("{}", encoding="utf-8")


def in_config(**stated: Any) -> Callable[[Path], object]:
    return lambda folder: edited(folder, lambda found: found.update(stated))


UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "ModelOpt": (in_config(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"}), "'modelopt'"),
    "ModelOpt before 0.31": (beside("hf_quant_config.json"), "hf_quant_config.json"),
    "AutoGPTQ": (beside("quantize_config.json"), "quantize_config.json"),
    "AutoAWQ": (beside("quant_config.json"), "quant_config.json"),
    "old compressed-tensors": (
        in_config(compression_config={"quant_method": "compressed-tensors"}),
        "compression_config",
    ),
    "no method": (in_config(quantization_config={"bits": 4}), "quant_method 'none'"),
    "bitsandbytes of no width": (in_config(quantization_config={"quant_method": "bitsandbytes"}), "'bitsandbytes'"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_transformers_would_take_for_weights_is_refused_by_both_engines(name: str, tmp_path: Path) -> None:
    """Without a word of it: it drops the scales, and multiplies with what they should scale."""
    change, said = UNKNOWN[name]
    folder = in_fp8(save(tmp_path / "m"))
    change(folder)
    if name != "no method":  # transformers itself refuses that one
        wrong = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert wrong.model.layers[0].mlp.up_proj.weight.abs().max() == 448
    for told in (lambda: load(folder, "float32"), lambda: vllm_identity(find_model(str(folder)), "float32")):
        with pytest.raises(UnsupportedModel) as caught:
            told()
        assert said in str(caught.value) and "packed weights for weights" in str(caught.value)


@bitsandbytes
def test_weights_that_are_quantised_already_are_not_quantised_otherwise(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    assert load(packed["4bit"], load_in="4bit").identity == load(packed["4bit"]).identity
    with pytest.raises(UnsupportedModel, match=r"in 8bit: its checkpoint is quantised already \(4bit\)"):
        load(packed["4bit"], load_in="8bit")
    told = refused(
        1, *precompute_line(packed["4bit"], text_data(tmp_path), tmp_path / "c", "--load-in", "8bit", "--device", "cpu")
    )
    assert "Leave --load-in out" in told and not (tmp_path / "c").exists()


@bitsandbytes
def test_packed_rows_of_broken_blocks_are_refused_on_a_cpu(tmp_path: Path) -> None:
    """As they are where they are packed while they are loaded: bitsandbytes reads others than are there."""
    make_model().save_pretrained(tmp_path / "narrow")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "narrow", quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(UnsupportedModel, match="expected layers with a multiple of 64 inputs, found 32"):
        load(tmp_path / "packed")


@bitsandbytes
@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("how", "held"), [("4bit", None), ("plain", "fp8")])
def test_vllm_that_holds_them_otherwise_is_refused(
    how: str, held: str | None, packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(str(packed[how]))
    identity = vllm_identity(source, "auto")
    started(source, identity).close()
    monkeypatch.setenv(HELD, held or "none")
    with pytest.raises(EngineFailed, match=f"holds {held or 'unquantised'} ones"):
        started(source, identity)
