"""Every kind of adapter: where it starts, what it does to the base, how it is saved, and how a run goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapter_cases import CASES, IDS, RANK, SAMPLES, Keep, logits, settings_of, sized
from support.adapter_cases import null_space as null_space
from support.breadth import some_of
from support.cli_harness import precompute, refused, text_data
from support.cli_harness import train_line as cli_train_line
from support.tiny_model import make_model
from support.tiny_runs import V, make_base, make_cache, run
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from logitcache.adapters.adalora import orthogonality_gradient
from logitcache.adapters.attach import AdapterSettings, attach, save, save_start
from logitcache.adapters.registry import (
    KINDS,
    NAME,
    keeps_start,
    lora_layers,
    rewrites_base,
)
from logitcache.adapters.settings import REFUSED, VARIANTS, AdapterKind
from logitcache.adapters.start import minor_components
from logitcache.data.batches import pad_samples
from logitcache.errors import InvalidSettings, TrainingFailed, UnsuitableAdapter
from logitcache.evaluation.compare import load_adapter
from logitcache.losses.formulas import Objective
from logitcache.pairing.step_zero import Probe, probe_step_zero
from logitcache.pairing.targets import with_targets
from logitcache.storage import LogitCache
from logitcache.training.batch_loss import batch_loss

REWRITING = {"pissa", "olora", "milora", "corda", "lora-ga", "lora-null", "lora-null-v2"}
"""As facts of the methods: W becomes W - s B A. Not read from the table, which is tested by it."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Every alternative, in float32."""
    return make_cache(tmp_path_factory.mktemp("adapter-cache") / "c", SAMPLES, top_k=V - 1)


def untrained(settings: AdapterSettings, **changes: Any) -> Any:
    torch.manual_seed(0)
    return attach(make_model(**changes), settings, "tiny", SAMPLES).eval()


def moved(settings: AdapterSettings) -> Any:
    """An adapter as after some training: everything that is trained has changed."""
    model = untrained(settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_command_line_offers_the_table() -> None:
    assert set(get_args(AdapterKind)) == KINDS.keys() | REFUSED.keys() | {"none"}


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=IDS)
def test_starts_at_the_base_and_leaves_it_or_not(
    kind: str, variant: str, null_space: Path, cache: LogitCache, request: pytest.FixtureRequest
) -> None:
    """base + adapter is the base; `disable_adapter()` is the base where W is intact, and far from it where not."""
    settings = settings_of(kind, variant, null_space)
    model, base = untrained(settings), logits(make_model())
    assert rewrites_base(settings) is (request.node.callspec.id in REWRITING)
    difference = (logits(model) - base).abs().max()
    assert difference < 1e-5 * base.abs().max()
    with model.disable_adapter():
        disabled = (logits(model) - base).abs().max()
    if rewrites_base(settings):
        assert disabled > 0.1 * base.abs().max()
    else:
        assert disabled == 0
    found = probe_step_zero(model, Probe(cache, Objective()), SAMPLES)
    assert abs(found.kl_nats) < 1e-6 and found.label_error_nats < 1e-4
    with model.disable_adapter(), torch.no_grad():
        if rewrites_base(settings):
            with pytest.raises(Exception, match="does not start from the distributions"):
                probe_step_zero(model, Probe(cache, Objective()), SAMPLES)
        else:
            probe_step_zero(model, Probe(cache, Objective()), SAMPLES)


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=IDS)
def test_only_the_adapter_is_trained(kind: str, variant: str, null_space: Path) -> None:
    model = untrained(settings_of(kind, variant, null_space))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(NAME in n.split(".")[-2:] for n in names)
    frozen = {"mica": "lora_B", "lora-null-v2": "lora_A"}.get(kind if variant == "v1" else f"{kind}-{variant}")
    assert names and (frozen is None or not any(frozen in n for n in names))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def masked_kl(base: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Mean KL(p without y || q without y) over [N, V] logits, where the base leaves 1e-4 beside y; float64."""
    hole = torch.nn.functional.one_hot(labels, base.shape[1]).bool()
    p, q = (z.double().masked_fill(hole, -torch.inf).log_softmax(1).masked_fill(hole, 0.0) for z in (base, student))
    terms = (p.exp().masked_fill(hole, 0.0) * (p - q)).sum(1)
    kept = base.double().softmax(1).gather(1, labels[:, None])[:, 0] <= 1 - 1e-4
    return terms[kept].mean()


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=IDS)
def test_the_cached_regulariser_is_towards_the_true_base(
    kind: str, variant: str, null_space: Path, cache: LogitCache
) -> None:
    """Its value is that against the untouched base, and not that against `disable_adapter()` where W was rewritten."""
    settings = settings_of(kind, variant, null_space)
    model, used = moved(settings), SAMPLES[:8]
    batch = with_targets(pad_samples(used), cache)
    with torch.no_grad():
        found = batch_loss(model, batch, Objective(), 1.0, None)
    rows = [s.positions.tolist() for s in used]
    labels = torch.cat([torch.from_numpy(s.token_ids[s.positions + 1].astype(np.int64)) for s in used])

    def at_labels(which: Any) -> Tensor:
        return torch.cat([logits(which, [s])[r] for s, r in zip(used, rows, strict=True)])

    student = at_labels(model)
    true = masked_kl(at_labels(make_model()), student, labels)
    assert true > 1e-4
    assert float(found.kl) / len(labels) == pytest.approx(float(true), rel=1e-3)
    with model.disable_adapter():
        live = masked_kl(at_labels(model), student, labels)
    if rewrites_base(settings):
        assert abs(live - true) > 0.05 * true
    else:
        assert float(live) == pytest.approx(float(true), rel=1e-5)


# --- saving ----------------------------------------------------------------------------------------------------------


def train_once(
    settings: AdapterSettings, cache: LogitCache, out: Path, keep: Keep, resume: bool = False, steps: int = 6
) -> Any:
    from logitcache.models.loading import Source
    from logitcache.training.run import TrainSettings, train

    base = make_base()
    base.model.config.save_pretrained(out.parent / "tiny")
    base = replace(base, source=Source("tiny", out.parent / "tiny"))
    job = TrainSettings(lr=2e-2, max_steps=steps, batch_size=4, log_every=1)
    return train(base, SAMPLES, cache, out, settings, Objective(weight=0.1), job, resume, [keep])


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=IDS)
def test_the_saved_adapter_computes_what_was_trained_on_the_untouched_base(
    kind: str, variant: str, tmp_path: Path, null_space: Path, cache: LogitCache
) -> None:
    settings, keep = settings_of(kind, variant, null_space), Keep()
    report = train_once(settings, cache, tmp_path / "o", keep)
    assert report.step_zero is not None and abs(report.step_zero.kl_nats) < 1e-6
    base, scale = logits(make_model()), keep.logits.abs().max()
    assert (keep.logits - base).abs().max() > 0.02 * scale  # it has learnt something
    for again in (
        PeftModel.from_pretrained(make_model(), str(tmp_path / "o")).eval(),
        load_adapter(make_model(), str(tmp_path / "o")),
    ):
        assert (logits(again) - keep.logits).abs().max() < 1e-4 * scale
        with again.disable_adapter():
            assert torch.equal(logits(again), base)  # nothing is rewritten by who loads it
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny"
    if rewrites_base(settings):
        assert config["r"] == (RANK if variant == "v2" else 2 * RANK) and config["init_lora_weights"] is True


def test_v2_leaves_a_untouched(tmp_path: Path, null_space: Path, cache: LogitCache) -> None:
    for variant in VARIANTS[:2]:
        keep = Keep()
        train_once(settings_of("lora-null", variant, null_space), cache, tmp_path / variant, keep)
        first, last = keep.factors
        same = {name: torch.equal(first[name], last[name]) for name in first}
        assert all(equal is (variant == "v2" and "lora_A" in name) for name, equal in same.items())
        saved = load_file(tmp_path / variant / "adapter_model.safetensors")
        if variant == "v2":
            assert all(torch.equal(saved[name], last[name]) for name in last if "lora_A" in name)


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "variant", "stop_at", "steps"),
    [
        *some_of(((*c, 4, 5) for c in CASES if c[0] not in ("lora", "gaussian", "rslora", "dora", "orthogonal")), 4),
        *some_of((("pissa", "v1", 1, 5), ("lora-null", "v2", 5, 5)), 1),
        *some_of(
            (("adalora", "v1", stop_at, 10) for stop_at in (1, 9, 10)), 1
        ),  # before, at, after the last allocation
    ],
)
def test_a_resumed_run_is_bitwise_an_uninterrupted_one(
    kind: str, variant: str, stop_at: int, steps: int, tmp_path: Path, null_space: Path, cache: LogitCache
) -> None:
    """To the last bit of what is saved, of the log, and of the weights that the adapter was taken out of."""
    settings, whole, begun, rest = settings_of(kind, variant, null_space), Keep(), Keep(stop_at), Keep()
    train_once(settings, cache, tmp_path / "whole", whole, steps=steps)
    with pytest.raises(KeyboardInterrupt):
        train_once(settings, cache, tmp_path / "o", begun, steps=steps)
    assert (tmp_path / "o" / "checkpoints" / "start").is_dir() is keeps_start(settings)
    train_once(settings, cache, tmp_path / "o", rest, resume=True, steps=steps)
    for name in ("adapter_model.safetensors", "train_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    mine, theirs = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("o", "whole"))
    names = [sorted(config.pop("target_modules")) for config in (mine, theirs)]  # PEFT writes a set as it comes
    assert mine == theirs and names[0] == names[1]
    assert whole.weights and whole.weights.keys() == rest.weights.keys()
    assert all(torch.equal(weight, rest.weights[name]) for name, weight in whole.weights.items())
    assert torch.equal(whole.logits, rest.logits)


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_run_without_its_first_factors_does_not_go_on(
    damage: str, tmp_path: Path, null_space: Path, cache: LogitCache
) -> None:
    settings = settings_of("pissa", "v1", null_space)
    with pytest.raises(KeyboardInterrupt):
        train_once(settings, cache, tmp_path / "o", Keep(4))
    factors = tmp_path / "o" / "checkpoints" / "start" / "adapter_model.safetensors"
    factors.write_bytes(factors.read_bytes()[:100])
    if damage == "gone":
        factors.unlink()
    with pytest.raises(TrainingFailed, match="first factors of this run are missing or damaged"):
        train_once(settings, cache, tmp_path / "o", Keep(), resume=True)


# --- kinds of our own, and what PEFT's need --------------------------------------------------------------------------


def test_milora_is_the_smallest_singular_components() -> None:
    weights = {n: m.weight.detach().double() for n, m in make_model().named_modules() if hasattr(m, "weight")}
    for name, layer in lora_layers(untrained(AdapterSettings("milora", RANK, 8.0))):
        u, s, vt = torch.linalg.svd(weights[name], full_matrices=False)
        b, a = (m[NAME].weight.detach().double() for m in (layer.lora_B, layer.lora_A))
        minor = (u[:, -RANK:] * s[-RANK:]) @ vt[-RANK:]
        torch.testing.assert_close(layer.scaling[NAME] * b @ a, minor, rtol=0, atol=1e-6)
        kept = layer.get_base_layer().weight.detach().double()
        torch.testing.assert_close(torch.linalg.svdvals(kept)[: len(s) - RANK], s[:-RANK], rtol=1e-5, atol=1e-6)
    b, a = minor_components(torch.diag(torch.tensor([5.0, 3.0, 2.0])), 1, 0.5)
    torch.testing.assert_close(0.5 * b @ a, torch.diag(torch.tensor([0.0, 0.0, 2.0])).double())


@pytest.mark.parametrize("kind", sorted(REWRITING - {"lora-null-v2"}))
def test_what_is_taken_out_is_what_the_adapter_holds_in_bfloat16(kind: str, null_space: Path) -> None:
    """W' + s B A differs from W by the rounding of W' alone, though PEFT rounds B and A after it has used them."""
    settings = settings_of(kind, "v1", null_space)
    model = attach(make_model().to(torch.bfloat16), settings, "tiny", SAMPLES)
    layers = {n: m for n, m in make_model().named_modules() if hasattr(m, "weight")}
    originals = {n: layer.weight.detach().bfloat16().double() for n, layer in layers.items()}
    for name, layer in lora_layers(model):
        b, a = (m[NAME].weight.detach() for m in (layer.lora_B, layer.lora_A))
        assert b.dtype == a.dtype == torch.float32
        kept = layer.get_base_layer().weight.detach()
        assert kept.dtype == torch.bfloat16
        error = kept.double() + layer.scaling[NAME] * b.double() @ a.double() - originals[name]
        assert bool((error.abs() <= kept.double().abs() / 256 + 1e-7).all())


def test_eva_spreads_its_ranks_over_the_layers_in_float32() -> None:
    model = attach(make_model().to(torch.bfloat16), AdapterSettings("eva", RANK, 8.0), "tiny", SAMPLES)
    ranks = [layer.r[NAME] for _, layer in lora_layers(model)]
    assert len(set(ranks)) > 1 and max(ranks) <= 2 * RANK and sum(ranks) <= RANK * 14
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    a = {layer.lora_A[NAME].weight for _, layer in lora_layers(model)}
    assert all(torch.allclose(w @ w.T, torch.eye(len(w)), atol=1e-2) for w in a)  # components, in bfloat16 once


def test_eva_with_too_little_text_is_refused() -> None:
    short = [s for s in SAMPLES if len(s.positions) < 5][:1]
    with pytest.raises(UnsuitableAdapter, match="expected at least 8 labels"):
        attach(make_model(), AdapterSettings("eva", RANK), "tiny", short)


def test_random_bases_follow_the_seed() -> None:
    for kind, buffer in (("vera", "vera_A"), ("randlora", "randlora_A")):
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            base = make_model()
            torch.manual_seed(seed)
            model = attach(base, AdapterSettings(kind, RANK), "tiny")
            found.append(getattr(model.base_model, buffer)[NAME].clone())
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------


def test_the_orthogonality_term_is_the_one_that_peft_adds_to_a_models_loss() -> None:
    """Gradient of model(labels=...).loss with the term less the one without it, against ours."""
    model = untrained(AdapterSettings("adalora", RANK, 8.0)).train()
    ids = torch.from_numpy(SAMPLES[0].token_ids.astype(np.int64))[None]
    gradients = []
    for weight in (0.5, 0.0):
        model.peft_config[NAME].orth_reg_weight = weight
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    factors = {n: p.detach() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    assert len(factors) == 28
    for name, factor in factors.items():
        ours = 0.5 / len(factors) * orthogonality_gradient(factor, ".lora_A." in name)
        torch.testing.assert_close(ours, gradients[0][name] - gradients[1][name], rtol=1e-3, atol=1e-6)
    assert not orthogonality_gradient(torch.eye(3, 5), True).any()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_term_is_added_once_a_step(accumulate: int, tmp_path: Path, cache: LogitCache) -> None:
    """Whatever the number of micro-batches: gradients of two trainings that differ in the term's weight alone."""
    from support.tiny_runs import gradients_after_one_step

    from logitcache.adapters.adalora import AdaLoraCallback
    from logitcache.training.run import TrainSettings, trainer_arguments
    from logitcache.training.trainer import CachedKLTrainer

    found = []
    for weight in (0.5, 0.0):
        model = untrained(AdapterSettings("adalora", RANK, 8.0))
        args = trainer_arguments(tmp_path, TrainSettings(max_steps=1, batch_size=2), torch.device("cpu"))
        args.save_strategy, args.gradient_accumulation_steps = "no", accumulate
        factors = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
        callback = AdaLoraCallback(model)
        model.peft_config[NAME].orth_reg_weight = weight
        trainer = CachedKLTrainer(
            model=model, args=args, train_dataset=SAMPLES, data_collator=pad_samples, cache=cache, callbacks=[callback]
        )
        found.append(gradients_after_one_step(trainer))
    for name, factor in factors.items():
        ours = 0.5 / len(factors) * orthogonality_gradient(factor, ".lora_A." in name)
        torch.testing.assert_close(found[0][name] - found[1][name], ours, rtol=1e-4, atol=1e-6)


def test_adalora_prunes_to_its_budget(tmp_path: Path, cache: LogitCache) -> None:
    """14 layers begin with 1.5 r triplets each, and r a layer on average are left; the file keeps the others at 0."""
    settings = AdapterSettings("adalora", RANK, 8.0)
    keep = Keep()
    train_once(settings, cache, tmp_path / "o", keep, steps=20)
    saved = load_file(tmp_path / "o" / "adapter_model.safetensors")
    energies = torch.cat([t.flatten() for n, t in saved.items() if n.endswith("lora_E")])
    assert len(energies) == 14 * 6 and int((energies != 0).sum()) == 14 * RANK
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (20, 1, 2)
    assert config["rank_pattern"] is None


# --- what is refused -------------------------------------------------------------------------------------------------


def test_loftq_is_refused_and_why_is_true() -> None:
    """Four bits a weight, from a table of 16 values a block as NF4 has: W_q - W is of full rank, W_q + B A is not W."""
    with pytest.raises(InvalidSettings, match="full rank"):
        AdapterSettings("loftq", RANK)
    weight = make_model().model.layers[0].mlp.up_proj.weight.detach().double()
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    quantised = ((blocks / scale * 7.5).round() / 7.5 * scale).reshape(weight.shape)
    values = torch.linalg.svdvals(quantised - weight)
    assert values[-1] > 0.02 * values[0] and len(values) == 32
    assert values[RANK:].norm() > 0.5 * values.norm()  # what a LoftQ adapter of this rank leaves


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 17}, "k_proj has a weight of 16 x 32, which allows a rank of at most 16. Use a lower --rank"),
        ({"kind": "dora", "rank": 17}, "which allows a rank of at most 16"),
        ({"kind": "adalora", "rank": 40}, "which allows a rank of at most"),
        ({"kind": "pissa", "rank": 17}, "k_proj has a weight of 16 x 32, which allows a rank of at most 16"),
        ({"kind": "mica", "rank": 17}, "which allows a rank of at most 16"),
        ({"kind": "lora-ga", "rank": 9}, "which allows a rank of at most 8"),
        ({"kind": "milora", "target_modules": "q_proj,embed_tokens"}, "model.embed_tokens is no linear layer"),
        ({"kind": "oft", "block_size": 5}, "inputs of .*q_proj, found 32 inputs.*--block-size that divides 32, or"),
        ({"kind": "oft", "block_size": 64}, "in blocks of 64: expected whole blocks of the inputs of .*q_proj"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsuitableAdapter, match=said):
        attach(make_model(), with_rank(changes), "tiny", SAMPLES)


def with_rank(changes: dict[str, Any]) -> AdapterSettings:
    """These settings, and a small rank where none is given and the kind has one."""
    return AdapterSettings(**{**({} if changes.get("kind") in ("oft", "none") else {"rank": 2}), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "nonsense"}, "kind: expected one of lora, dora"),
        ({"kind": "loftq"}, "full rank"),
        ({"kind": "orthogonal", "rank": 3}, "expected an even rank, found 3. Use --rank 4"),
        ({"kind": "lora-null"}, "it starts from a null space"),
        ({"kind": "pissa", "nullspace": "n"}, "are for --adapter lora-null, not for pissa"),
        ({"variant": "v1"}, "are for --adapter lora-null, not for lora"),
        ({"kind": "lora-null", "nullspace": "n", "variant": "v3"}, "variant: expected one of v1, v2, base-intact"),
        ({"kind": "vera", "alpha": 8.0}, "whose scale is trained"),
        ({"kind": "none", "rank": 4}, "trains every weight"),
        ({"kind": "oft", "rank": 4}, "--rank has no place in --adapter oft, whose size is --block-size"),
        ({"kind": "oft", "alpha": 8.0}, "whose rotations have no scale"),
        ({"kind": "oft", "dropout": 0.1}, "a dropout that no forward applies"),
        ({"kind": "oft", "block_size": 1}, "block_size: expected a whole number of 2 or more"),
        ({"kind": "oft", "cayley": "4"}, "cayley: expected one of neumann, exact"),
        ({"block_size": 8}, "--block-size and --cayley are for --adapter oft, not for lora"),
        ({"kind": "vera", "cayley": "exact"}, "are for --adapter oft, not for vera"),
    ],
)
def test_settings_that_no_model_could_be_given_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        with_rank(changes)


@pytest.mark.parametrize("kind", ["eva", "corda", "lora-ga"])
def test_kinds_that_start_from_samples_need_them(kind: str) -> None:
    with pytest.raises(UnsuitableAdapter, match="it is initialised by samples"):
        attach(make_model(), AdapterSettings(kind, RANK), "tiny")


def test_a_start_that_is_not_finite_is_refused() -> None:
    broken = make_model()
    broken.model.embed_tokens.weight.data[:] = torch.nan
    with pytest.raises(UnsuitableAdapter, match="initialising corda of rank 4: Invalid value"):
        attach(broken, AdapterSettings("corda", RANK), "tiny", SAMPLES)


def test_a_weight_that_two_modules_share_is_not_rewritten() -> None:
    tied = make_model(tie_word_embeddings=True)
    tied.tie_weights()
    with pytest.raises(UnsuitableAdapter, match="lm_head is another module's too"):
        attach(tied, AdapterSettings("pissa", RANK, target_modules="q_proj,lm_head"), "tiny")


@pytest.mark.parametrize("kind", ["vera", "randlora"])
def test_dimensions_that_do_not_matter_to_a_kind_are_not_asked_for(kind: str) -> None:
    """Their rank is that of fixed random factors, of which a larger one says more."""
    attach(make_model(), AdapterSettings(kind, 40), "tiny")  # type: ignore[arg-type]


def gpt2() -> Any:
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"lora-null", "olora", "oft"}))
def test_weights_that_are_kept_transposed(kind: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D: starts at the base, and reloads."""
    settings, base = AdapterSettings(kind, RANK), logits(gpt2())
    model = attach(gpt2(), settings, "tiny", SAMPLES).eval()
    assert (logits(model) - base).abs().max() < 1e-5 * base.abs().max()
    if keeps_start(settings):
        save_start(model, tmp_path / "start")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save(model, tmp_path / "o", settings, "tiny", tmp_path / "start")
    again = PeftModel.from_pretrained(gpt2(), str(tmp_path / "o")).eval()
    trained = logits(model)
    assert (trained - base).abs().max() > 1e-3
    assert (logits(again) - trained).abs().max() < 1e-4 * trained.abs().max()


@pytest.mark.parametrize("kind", ["olora", "oft"])
def test_transposed_weights_that_a_kind_does_not_know_are_refused(kind: str) -> None:
    with pytest.raises(UnsuitableAdapter, match="keeps its weight transposed"):
        attach(gpt2(), sized(kind), "tiny")


# --- the command line ------------------------------------------------------------------------------------------------


def test_train_refuses_adapters_in_a_sentence(tmp_path: Path, tiny_model: Path) -> None:
    precompute(tiny_model, text_data(tmp_path), tmp_path / "c")
    line = cli_train_line(tiny_model, tmp_path / "c", tmp_path / "o")
    assert "'--adapter'" in refused(2, *line, "--adapter", "nonsense")
    assert "differ from the original in full rank" in refused(2, *line, "--adapter", "loftq")
    assert "expected an even rank" in refused(2, *line, "--adapter", "orthogonal", "--rank", 3)
    assert "--alpha has no place" in refused(2, *line, "--adapter", "vera", "--alpha", 1)
    assert "at most 16" in refused(2, *line, "--adapter", "pissa", "--rank", 20)
    assert not (tmp_path / "o" / "run.json").exists()


def test_a_run_of_any_kind_is_described_as_before(tmp_path: Path, cache: LogitCache) -> None:
    run(make_base(), SAMPLES, cache, tmp_path / "o", max_steps=1, adapter=AdapterSettings("pissa", 2, 4.0))
    described = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))["adapter"]
    expected = {"kind": "pissa", "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}
    assert described == expected | {"modules_to_save": ""}
