"""A backbone quantised on loading: its gradient, its place beside the cache of the base, and what is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapter_cases import sized
from support.breadth import some_of
from support.cli_harness import done, precompute, refused, text_data
from support.quantised_base import bitsandbytes
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import make_samples
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.adapters.registry import KINDS, rewrites_base
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.vocab_groups import token_groups
from logitcache.capture.worker import precompute as fill
from logitcache.data.batches import pad_samples
from logitcache.errors import NotTheBase, UnsuitableAdapter, UnsupportedModel, install_line, release_of
from logitcache.losses.formulas import Objective
from logitcache.models import quantization as quantized
from logitcache.models.head import OutputHead, check_head, hidden_states, logits_width
from logitcache.models.loading import Base, find_model, load_base
from logitcache.models.quantization import LOAD_IN, quantization_of
from logitcache.pairing.identity_checks import PairingRules, check_identity
from logitcache.pairing.step_zero import Probe, probe_step_zero
from logitcache.pairing.targets import with_targets
from logitcache.storage import CacheWriter, IdentityMismatch, LogitCache
from logitcache.storage.manifest import features_of
from logitcache.training.batch_loss import batch_loss
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.full_weights import unfreeze
from logitcache.training.run import TrainSettings, train
from logitcache.training.trainer import CachedKLTrainer

CPU = torch.device("cpu")
SAMPLES = make_samples(16)
V = 260
START = {"8bit": 0.1, "4bit": 1.0}
"""The largest KL before step 1 by default, where the other side is not quantised."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with rows of whole blocks of 64 weights, as every real model has them."""
    return save(tmp_path_factory.mktemp("models") / "tiny", 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return save(tmp_path_factory.mktemp("models") / "other", 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> LogitCache:
    """Of the tiny base as it is, every alternative, in float32."""
    return cache_of(load(tiny), tmp_path_factory.mktemp("quantized") / "c")


@pytest.fixture(scope="module")
def quantised_caches(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, LogitCache]:
    """The same of the tiny base held in each format."""
    folder = tmp_path_factory.mktemp("quantized")
    return {how: cache_of(load(tiny, how), folder / how) for how in LOAD_IN}


def cache_of(base: Base, path: Path) -> LogitCache:
    settings = CaptureSettings(top_k=V - 1, max_length=64, precision="exact")
    fill(base, SAMPLES, path, settings)
    return LogitCache.open(path)


def wide(seed: int = 0) -> Any:
    return make_model(seed, hidden_size=64, intermediate_size=128)


def save(folder: Path, seed: int) -> Path:
    wide(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, load_in: str | None = None, dtype: str = "float32") -> Base:
    return load_base(find_model(str(folder)), dtype, CPU, load_in)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(40)[None] * 6).logits
    return found


def unpacked(layer: Any) -> torch.Tensor:
    """The weights [out, in] that a quantised layer computes with, float32."""
    from bitsandbytes import functional

    if type(layer).__name__ == "Linear4bit":
        found: torch.Tensor = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return found.float()
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * scales.float()[:, None] / 127


def dense_twin(model: Any) -> Any:
    """A model without any quantisation that has the very weights of a quantised one."""
    twin = wide()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = unpacked(model.get_submodule(name))
    return twin


# --- what is loaded --------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("load_in", LOAD_IN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_quantised_and_the_identity_says_so(load_in: str, dtype: str, tiny: Path) -> None:
    base, plain = load(tiny, load_in, dtype), load(tiny, None, dtype)
    assert quantization_of(base.model) == load_in and quantization_of(plain.model) is None
    assert base.identity == replace(plain.identity, quantization=load_in) and plain.identity.quantization == ""
    assert base.identity.vocab_size == V == logits_width(base.model)
    kinds = {n: type(m).__name__ for n, m in base.model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit" if load_in == "4bit" else "Linear8bitLt"}
    check_head(base.model)
    expected, found = logits(plain.model).float(), logits(base.model).float()
    assert 0 < (found - expected).norm() < {"8bit": 0.1, "4bit": 0.6}[load_in] * expected.norm()


@bitsandbytes
def test_rows_of_broken_blocks_are_refused_in_4_bits_on_a_cpu(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "narrow")
    with pytest.raises(UnsupportedModel, match="expected layers with a multiple of 64 inputs, found 32"):
        load(tmp_path / "narrow", "4bit")
    load(tmp_path / "narrow", "8bit")


@bitsandbytes
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_weights_are_near_those_of_the_files(load_in: str, tiny: Path) -> None:
    """Relative to their size, by the formats: 1/127 of the largest of a row; NormalFloat .09 on normal weights."""
    plain, model = load(tiny).model, load(tiny, load_in).model
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            error = (
                unpacked(model.get_submodule(name)) - module.weight.detach()
            ).norm() / module.weight.detach().norm()
            assert 1e-3 < error < {"8bit": 0.01, "4bit": 0.1}[load_in], name


@bitsandbytes
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_a_packed_output_embedding_still_tells_how_many_logits_it_makes(load_in: str, tiny: Path) -> None:
    settings = BitsAndBytesConfig(**{f"load_in_{load_in}": True}, llm_int8_skip_modules=["nothing"])
    model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings, device_map={"": "cpu"})
    quantized.make_trainable(model, "tiny")
    head = model.get_output_embeddings()
    assert type(head).__name__ != "Linear"
    assert (head.weight.shape[0] == V) is (load_in == "8bit")
    ids = torch.arange(9)[None]
    assert logits_width(model) == V == OutputHead(model)(hidden_states(model, input_ids=ids)).shape[-1]
    if load_in == "4bit":
        with pytest.raises(UnsupportedModel, match="its output embedding is packed"):
            token_groups(model, 4)


def test_a_packed_output_embedding_that_hides_its_width_is_refused() -> None:
    model = make_model()
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    model.lm_head = packed
    with pytest.raises(UnsupportedModel, match="hides how many logits it makes"):
        logits_width(model)


def test_without_the_package_one_sentence_says_what_to_install(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(tiny, text_data(tmp_path), tmp_path / "c")
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    line = ["train", "--model", tiny, "--cache", tmp_path / "c", "--out", tmp_path / "o", "--load-in", "4bit"]
    told = refused(2, *line)
    assert "expected the package bitsandbytes, found none" in told and install_line("quantized") in told
    assert not (tmp_path / "o").exists()


# --- the gradient ----------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_the_gradient_is_that_of_the_weights_it_computes_with(load_in: str, tiny: Path, cache: LogitCache) -> None:
    """After checks in evaluation mode, as before a run: bitsandbytes packs weights there, and drops gradients then."""
    model = load(tiny, load_in).model
    check_head(model)
    batch = with_targets(pad_samples(SAMPLES[:4]), cache)
    found = []
    for body in (model, dense_twin(model)):
        torch.manual_seed(0)
        adapted = attach(body, AdapterSettings(rank=4, alpha=8.0), "tiny")
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        logits(adapted)
        batch_loss(adapted.train(), batch, Objective(), 1.0, None).loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    mine, theirs = found
    assert mine.keys() == theirs.keys() and len(mine) == 2 * 7 * 2
    tolerance = 0.1 if load_in == "8bit" else 1e-3  # 8-bit layers round their inputs too
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() < tolerance * gradient.norm(), name


@bitsandbytes
def test_a_model_that_another_has_loaded_keeps_its_gradient(tmp_path: Path, tiny: Path, cache: LogitCache) -> None:
    """Through the checks, in evaluation mode; weights that were packed for inference before are refused."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=how, device_map={"": "cpu"})
    twin = attach(dense_twin(base), AdapterSettings(rank=4, alpha=8.0), "tiny")
    student = attach(base, AdapterSettings(rank=4, alpha=8.0), "tiny")
    for model in (student, twin):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(parameter, std=0.1)
    batch, rules = pad_samples(SAMPLES[:4]), PairingRules(other_precision=True)
    CachedLoss(cache, rules=rules)(student.train(), batch)
    for model in (student, twin):
        batch_loss(model.train(), with_targets(batch, cache), Objective(), 1.0, None).loss.backward()
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None and "lora_B" in n}
    found = {n: p.grad for n, p in student.named_parameters() if n in expected}
    assert len(expected) == 2 * 7
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-3 * gradient.norm(), name
    layer = base.get_submodule("model.layers.1.mlp.down_proj").get_base_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(UnsupportedModel, match="packed for inference"):
        CachedKLTrainer(model=student, args=arguments, train_dataset=SAMPLES, cache=cache, rules=rules)
    with pytest.raises(UnsupportedModel, match="packed for inference"):
        CachedLoss(cache, rules=rules)(student, batch)


class Linear4bit(nn.Linear):
    """By its name one of bitsandbytes'; without a gradient with respect to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class Linear8bitLt(nn.Linear):
    """One whose gradient is another's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach()) + (x - x.detach()).sum()


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
def test_layers_that_lose_or_spoil_the_gradient_are_refused(kind: Callable[..., nn.Module]) -> None:
    model = wide()
    quantized.make_trainable(model, "tiny")
    model.model.layers[0].mlp.up_proj = kind(64, 128, bias=False)
    with pytest.raises(UnsupportedModel, match="the gradient does not pass its Linear"):
        quantized.make_trainable(model, "tiny")


# --- beside the cache ------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_step_zero_tells_what_quantisation_costs_and_refuses_another(
    load_in: str, tiny: Path, other: Path, cache: LogitCache
) -> None:
    plain = probe_step_zero(load(tiny).model, Probe(cache, Objective()), SAMPLES)
    found = probe_step_zero(load(tiny, load_in).model, Probe(cache, Objective()), SAMPLES)
    assert plain.kl_nats < 1e-6 and 1e-4 < found.kl_nats < found.tolerance_nats
    assert plain.tolerance_nats == 1e-5 and found.tolerance_nats == START[load_in]
    with pytest.raises(NotTheBase, match="checking step 0"):
        probe_step_zero(load(other, load_in).model, Probe(cache, Objective()), SAMPLES)


@bitsandbytes
@pytest.mark.parametrize("theirs", [None, *LOAD_IN])
@pytest.mark.parametrize("ours", [None, *LOAD_IN])
def test_another_precision_is_refused_unless_it_is_asked_for(
    ours: str | None,
    theirs: str | None,
    tiny: Path,
    other: Path,
    cache: LogitCache,
    quantised_caches: dict[str, LogitCache],
) -> None:
    held, base = cache if theirs is None else quantised_caches[theirs], load(tiny, ours)
    probe = probe_step_zero(base.model, Probe(held, Objective()), SAMPLES)
    allowed = max(START[how] for how in (ours, theirs) if how) if ours != theirs else 1e-5
    if ours == theirs == "8bit":  # 8 bits differ from themselves in another batch
        assert probe.own_noise_nats is not None and probe.own_noise_nats > 1e-5
        allowed += 5 * probe.own_noise_nats
    assert probe.kl_nats < probe.tolerance_nats and probe.tolerance_nats == pytest.approx(allowed)
    check_identity(held, base, None, PairingRules(other_precision=True))
    with pytest.raises(IdentityMismatch, match="differs in weights"):
        check_identity(held, load(other, ours), None, PairingRules(other_precision=True))
    if ours == theirs:
        check_identity(held, base, None)
        return
    assert probe.kl_nats > 1e-4
    for pairing in (None, PairingRules()):
        with pytest.raises(IdentityMismatch) as caught:
            check_identity(held, base, None, pairing)
        told = str(caught.value)
        assert f"made from {theirs or 'unquantised'} weights, the model has {ours or 'unquantised'} weights" in told
        assert "--other-precision" in told


@bitsandbytes
@pytest.mark.parametrize(("ours", "theirs"), [("4bit", None), (None, "4bit"), ("8bit", "8bit")])
def test_trainers_and_loops_refuse_another_precision_too(
    ours: str | None,
    theirs: str | None,
    tmp_path: Path,
    tiny: Path,
    cache: LogitCache,
    quantised_caches: dict[str, LogitCache],
) -> None:
    held = cache if theirs is None else quantised_caches[theirs]
    model = attach(load(tiny, ours).model, AdapterSettings(rank=2, alpha=4.0), "tiny")
    batch = pad_samples(SAMPLES[:4])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])

    def in_a_trainer(rules: PairingRules | None = None) -> object:
        return CachedKLTrainer(model=model, args=arguments, train_dataset=SAMPLES, cache=held, rules=rules)

    def in_a_loop(rules: PairingRules | None = None) -> object:
        return CachedLoss(held, rules=rules)(model, batch)

    def in_a_run(rules: PairingRules | None = None) -> object:
        base, pairing = load(tiny, ours), rules
        name = f"o{rules is not None}"
        settings, steps = AdapterSettings(rank=2, alpha=4.0), TrainSettings(max_steps=1)
        return train(base, SAMPLES, held, tmp_path / name, settings, Objective(), steps, pairing=pairing)

    for start in (in_a_trainer, in_a_loop, in_a_run):
        start(PairingRules(other_precision=True))
        if ours == theirs:
            start()
            continue
        with pytest.raises(IdentityMismatch, match="--other-precision"):
            start()


@bitsandbytes
def test_an_adapter_that_is_no_identity_does_not_hide_below_what_quantisation_costs(
    tiny: Path, cache: LogitCache
) -> None:
    """Within the bound of 4 bits, and further away than the model below it."""
    model = attach(load(tiny, "4bit").model, AdapterSettings(rank=2, alpha=4.0), "tiny")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    anchored = CachedLoss(cache, rules=PairingRules(other_precision=True))
    with pytest.raises(NotTheBase, match=r"\(that of the model below it\), found .* it does not start as the identity"):
        anchored(model, pad_samples(SAMPLES[:4]))


@bitsandbytes
def test_a_cache_goes_on_in_one_precision(tiny: Path, quantised_caches: dict[str, LogitCache]) -> None:
    held = quantised_caches["4bit"]
    for how in (None, "8bit"):
        base = load(tiny, how)
        manifest = replace(held.manifest, model=base.identity)
        manifest = replace(manifest, reader_features=features_of(manifest.capture, manifest.model))
        with pytest.raises(IdentityMismatch, match=r"model\.quantization"):
            CacheWriter(held.path, manifest)


CASES = [(kind, load_in) for kind in KINDS for load_in in LOAD_IN if kind != "lora-null"]


@bitsandbytes
@pytest.mark.parametrize(("kind", "load_in"), some_of(CASES, 10))
def test_an_adapter_stands_on_quantised_weights_or_is_refused(
    kind: str, load_in: str, tmp_path: Path, tiny: Path, cache: LogitCache
) -> None:
    settings, start = sized(kind, 4), logits(load(tiny, load_in).model)
    if load_in not in KINDS[kind].quantized:
        why = (
            "it takes part of each weight out" if rewrites_base(settings) else "first values are made from the weights"
        )
        with pytest.raises(UnsuitableAdapter, match=f"attaching {kind} to weights of {load_in}: .*{why}"):
            attach(load(tiny, load_in).model, settings, "tiny", SAMPLES)
        return
    if release_of(version("peft")) < release_of(KINDS[kind].quantized_since):
        with pytest.raises(UnsuitableAdapter, match=f"attaching {kind} to weights of {load_in}: expected PEFT 0.21"):
            attach(load(tiny, load_in).model, settings, "tiny", SAMPLES)
        return
    assert torch.equal(logits(attach(load(tiny, load_in).model, settings, "tiny", SAMPLES)), start)
    base, out = load(tiny, load_in), tmp_path / "o"
    steps = TrainSettings(lr=1e-2, max_steps=4, batch_size=4)
    report = train(base, SAMPLES, cache, out, settings, Objective(), steps, pairing=PairingRules(other_precision=True))
    assert report.step_zero is not None and report.step_zero.kl_nats > 1e-4
    again = PeftModel.from_pretrained(load(tiny, load_in).model, str(out))
    assert torch.equal(logits(again), logits(base.model)) and not torch.equal(logits(again), start)


def test_kinds_that_rewrite_the_base_stand_on_no_quantised_weights() -> None:
    for kind, row in KINDS.items():
        assert not (row.quantized and row.rewrites_base), kind
    assert KINDS["lora"].quantized == LOAD_IN and not KINDS["lora-null"].quantized


@bitsandbytes
def test_a_whole_quantised_model_cannot_be_trained(tiny: Path) -> None:
    with pytest.raises(UnsuitableAdapter, match="its weights are quantised"):
        unfreeze(load(tiny, "8bit").model)


@bitsandbytes
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_train_load_in_on_the_command_line(load_in: str, tmp_path: Path, tiny: Path, other: Path) -> None:
    data = text_data(tmp_path)
    precompute(tiny, data, tmp_path / "c")
    line = ["train", "--model", tiny, "--cache", tmp_path / "c", "--out", tmp_path / "o", "--load-in", load_in]
    line += ["--rank", 2, "--max-steps", 2]
    told = refused(4, *line)
    assert f"made from unquantised weights, the model has {load_in} weights" in told and "--other-precision" in told
    line.append("--other-precision")
    said = done(*line).err
    start = f"nats ({load_in} weights against a cache of unquantised ones; --max-start-kl is {START[load_in]:g})"
    assert start in said and "Not compared: weights: 14 packed (of 21 tensors of the checkpoint)." in said
    assert "cast" not in said
    near = ["--max-start-kl", 1e-5, "--out", tmp_path / "near"]
    told = refused(4, *line, *near)
    assert "at most 1e-05 nats with an untrained adapter (--max-start-kl), found" in told
    assert f"quantization: none in the cache, {load_in} in the model" in told
    assert re.search(r"adapter: with it off the KL is [\d.e-]+ nats, so it starts as the identity", told)
    assert f"precompute with --load-in {load_in}" in told
    told = refused(2, *[a for a in line if a != "--other-precision"], *near)
    assert "--max-start-kl goes with --other-precision" in told
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["pairing"]["load_in"] == load_in and run["pairing"]["other_precision"] is True
    assert run["model"]["quantization"] == load_in
    assert 1e-5 < run["result"]["step_zero"]["kl_nats"] < run["result"]["step_zero"]["tolerance_nats"]
    done(*line, "--resume")
    message = refused(4, *[a for a in line if a not in ("--load-in", load_in)], "--resume")
    assert f"--load-in: {load_in} there, None here) (see its run.json)" in message
    done("evaluate", "--model", tiny, "--adapter", tmp_path / "o", "--data", data, "--prior", data)
    elsewhere = [tmp_path / "p" if a == tmp_path / "o" else other if a is tiny else a for a in line]
    assert "differs in weights" in refused(4, *elsewhere)
    told = refused(2, *line[:6], tmp_path / "p", *line[7:], "--adapter", "pissa")
    assert "it takes part of each weight out" in told


@bitsandbytes
def test_a_cache_of_a_quantised_base_on_the_command_line(
    tmp_path: Path, tiny: Path, quantised_caches: dict[str, LogitCache]
) -> None:
    path = quantised_caches["4bit"].path
    assert "float32 with 4bit weights, sdpa attention" in done("inspect", path).out
    line = ["train", "--model", tiny, "--cache", path, "--out", tmp_path / "o", "--rank", 2, "--max-steps", 1]
    assert "made from 4bit weights, the model has unquantised weights" in refused(4, *line)
    said = done(*line, "--load-in", "4bit").err
    assert "nats (noise floor)." in said
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["pairing"]["other_precision"] is False and run["result"]["step_zero"]["kl_nats"] < 1e-5
    line[line.index(tmp_path / "o")] = tmp_path / "p"
    said = done(*line, "--other-precision").err
    assert "(unquantised weights against a cache of 4bit ones; --max-start-kl is 1)" in said


def test_another_precision_is_of_the_base_s_own_cache(tmp_path: Path, tiny: Path) -> None:
    line = ["train", "--model", tiny, "--data", text_data(tmp_path), "--out", tmp_path / "o", "--other-precision"]
    assert "is for the cache of the student's own base" in refused(2, *line, "--regularizer", "none")
    told = refused(2, *line, "--cache", tmp_path / "c", "--teacher-is-not-base", "--regularizer", "full-kl")
    assert "is for the cache of the student's own base" in told
