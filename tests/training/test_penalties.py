"""L2-SP and EWC: the change of the weights as PEFT merges it, Fisher information sample by sample, and training."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapter_cases import CASES, IDS, RANK, SAMPLES, Keep, settings_of
from support.breadth import some_of
from support.tiny_model import make_model
from support.tiny_runs import (
    Step,
    assert_same_step,
    gradients_after_one_step,
    make_base,
    make_cache,
    make_samples,
    make_trainer,
    step_of,
)
from support.two_processes import in_two_processes
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from logitcache.adapters.attach import AdapterSettings, attach, target_layers
from logitcache.adapters.covariances import linear_layers, spread
from logitcache.adapters.null_space import NullSpaceSettings, compute_null_space
from logitcache.adapters.registry import NAME, lora_layers, rewrites_base
from logitcache.cli.train import train as train_verb
from logitcache.errors import TrainingFailed, UnsuitableAdapter
from logitcache.losses.formulas import Objective, Regularizer
from logitcache.models.loading import Source
from logitcache.storage import IdentityMismatch, LogitCache
from logitcache.training.penalties import PENALTIES, Penalty, PenaltySettings, fisher_diagonal
from logitcache.training.run import TrainSettings, train
from logitcache.training.trainer import CachedKLTrainer

cases = pytest.mark.parametrize(("kind", "variant"), CASES, ids=IDS)
kinds_of_penalty = pytest.mark.parametrize("which", PENALTIES)


@pytest.fixture(scope="module")
def null_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("penalty-null") / "n"
    compute_null_space(make_base(), SAMPLES, NullSpaceSettings(rank=RANK)).save(folder)
    return folder


def weights_of(model: Any) -> dict[str, Tensor]:
    """W [in, out] or [out, in], as the model keeps it, of every linear layer, float64."""
    return {n: m.weight.detach().double().clone() for n, m in linear_layers(model).items()}


def random_fisher(base: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(w.shape, generator=generator) for n, w in weights_of(base).items()}


def prepared(settings: AdapterSettings, which: str, make: Callable[[], Any] = make_model) -> tuple[Any, Penalty]:
    """An adapter that is trained a little, and a penalty that was made before."""
    torch.manual_seed(0)
    model = attach(make(), settings, "tiny", SAMPLES).eval()
    fisher = random_fisher(make()) if which == "ewc" else None
    if fisher is not None and isinstance(model.get_base_model(), GPT2LMHeadModel):
        fisher = {name: f.T for name, f in fisher.items()}
    return model, Penalty(model, fisher=fisher, rewritten=rewrites_base(settings))


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def move(model: Any) -> None:
    for parameter in trained(model):
        parameter.data += 0.05 * torch.randn_like(parameter)


def merged_penalty(model: Any, base: Any, which: str) -> float:
    """1/2 sum (F or 1) (W' - W)^2 in float64, W' being what PEFT itself merges the adapter into."""
    changed = weights_of(copy.deepcopy(model).double().merge_and_unload())
    fisher, total = random_fisher(base), 0.0
    for name, weight in weights_of(base).items():
        factor = fisher[name].double() if which == "ewc" else 1.0
        total += float((factor * (changed[name] - weight) ** 2).sum()) / 2
    return total


# --- the value and its gradient --------------------------------------------------------------------------------------


@kinds_of_penalty
@cases
def test_value_and_directional_derivative(kind: str, variant: str, which: str, null_space: Path) -> None:
    """Of every kind: 0 at the start; then what PEFT's merged weights say, and how these change with the factors."""
    settings = settings_of(kind, variant, null_space)
    model, penalty = prepared(settings, which)
    start = float(penalty().detach())
    move(model)
    value = penalty()
    assert value.dtype == torch.float32 and value.shape == ()
    expected = merged_penalty(model, make_model(), which)
    assert expected > 1e-4 and abs(start) < 1e-6 * expected
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        assert float(penalty()) == pytest.approx(float(value.detach()), rel=1e-6)
    gradients = torch.autograd.grad(value, trained(model))
    double, step = copy.deepcopy(model).double(), 1e-4
    torch.manual_seed(5)
    slope = torch.cat([g.double().flatten() for g in gradients])
    noise = torch.randn_like(slope)
    for direction in (slope / slope.norm(), noise / noise.norm() + slope / slope.norm()):

        def at(distance: float, direction: Tensor = direction) -> float:
            other = copy.deepcopy(double)
            parts = direction.split([p.numel() for p in trained(other)])
            for parameter, part in zip(trained(other), parts, strict=True):
                parameter.data += distance * part.view_as(parameter)
            return merged_penalty(other, make_model(), which)

        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(float(slope @ direction), rel=1e-4)


@kinds_of_penalty
@pytest.mark.parametrize("kind", ["lora", "rslora", "gaussian", "pissa", "milora", "mica"])
def test_every_entry_of_the_gradient(kind: str, which: str) -> None:
    """With G = (F or 1) DeltaW in float64: s G A^T by B and s B^T G by A; mica's B is frozen and has none."""
    settings = AdapterSettings(kind, RANK)
    model, penalty = prepared(settings, which)
    first = {
        name: layer.scaling[NAME]
        * layer.lora_B[NAME].weight.detach().double()
        @ layer.lora_A[NAME].weight.detach().double()
        for name, layer in lora_layers(model)
    }
    move(model)
    penalty().backward()
    fisher = random_fisher(make_model())
    for name, layer in lora_layers(model):
        s, b, a = layer.scaling[NAME], layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
        change = s * b.detach().double() @ a.detach().double()
        if rewrites_base(settings):
            change = change - first[name]
        g = change * (fisher[name].double() if which == "ewc" else 1.0)
        for parameter, expected in ((b, s * g @ a.detach().double().T), (a, s * b.detach().double().T @ g)):
            if not parameter.requires_grad:
                assert kind == "mica" and parameter is b
                continue
            assert parameter.grad is not None
            torch.testing.assert_close(
                parameter.grad.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@kinds_of_penalty
@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "adalora", "vera", "randlora"])
def test_transposed_weights(kind: str, which: str) -> None:
    """GPT-2 keeps W as [in, out]; Fisher information and change are of [out, in]."""

    def make() -> Any:
        torch.manual_seed(2)
        config = GPT2Config(vocab_size=260, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).eval()

    settings = AdapterSettings(kind, 2, target_modules="c_attn,c_proj")
    model, penalty = prepared(settings, which, make)
    move(model)
    changed = weights_of(copy.deepcopy(model).double().merge_and_unload())
    fisher, expected = random_fisher(make()), 0.0
    for name, weight in weights_of(make()).items():
        factor = fisher[name].double() if which == "ewc" else 1.0
        expected += float((factor * (changed[name] - weight) ** 2).sum()) / 2
    assert expected > 1e-4
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-4)


def test_gradients_scale_and_accumulate() -> None:
    model, penalty = prepared(AdapterSettings("lora", RANK, 8.0), "l2-sp")
    move(model)
    once = torch.autograd.grad(penalty(), trained(model))
    (3.0 * penalty() - penalty() / 2).backward()
    for parameter, gradient in zip(trained(model), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2.5 * gradient)


def test_autocast_does_not_round_it() -> None:
    for which in PENALTIES:
        model, penalty = prepared(AdapterSettings("lora", RANK, 8.0), which)
        move(model)
        expected = penalty().detach()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(penalty().detach(), expected)


# --- Fisher information ----------------------------------------------------------------------------------------------


def fisher_by_autograd(model: Any, names: Sequence[str], samples: Sequence[Any]) -> dict[str, Tensor]:
    """float64: sum over samples of the squared gradient of a sample's summed -log q(label), over all positions."""
    model, total = copy.deepcopy(model).double(), 0
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in names}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        log_q = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        nll = -sum(log_q[p, ids[p + 1]] for p in sample.positions.tolist())
        for name, g in zip(names, torch.autograd.grad(nll, list(weights.values())), strict=True):
            found[name] += g**2
        total += len(sample.positions)
    return {name: f.detach() / total for name, f in found.items()}


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head", "lm_head"])
def test_fisher_is_that_of_a_loop_over_samples(targets: str) -> None:
    model = make_model()
    names = list(target_layers(model, AdapterSettings(target_modules=targets)))
    assert ("lm_head" in names) is ("lm_head" in targets)
    found, samples = fisher_diagonal(model, names, SAMPLES, 5), spread(SAMPLES, 5)
    assert len({len(s.positions) for s in samples}) > 2
    for name, expected in fisher_by_autograd(model, names, samples).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_fisher_of_transposed_weights() -> None:
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    names = list(linear_layers(model))
    found = fisher_diagonal(model, names, SAMPLES, 3)
    for name, expected in fisher_by_autograd(model, names, spread(SAMPLES, 3)).items():
        torch.testing.assert_close(found[name].double(), expected.T, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_fisher_leaves_the_base_as_it_was() -> None:
    model = make_model().train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    first, again = (fisher_diagonal(model, list(linear_layers(model)), SAMPLES, 4) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) and bool(first[name].any()) for name in first)
    assert all(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad is before[name][1]
        assert parameter.grad is None and not getattr(parameter, "_post_accumulate_grad_hooks", None)


def test_fisher_of_a_base_in_bfloat16_is_near() -> None:
    names = list(linear_layers(make_model()))
    exact, found = (fisher_diagonal(m, names, SAMPLES, 4) for m in (make_model(), make_model().to(torch.bfloat16)))
    for name, expected in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - expected).norm() < 0.2 * expected.norm()


# --- refusals --------------------------------------------------------------------------------------------------------


def tied() -> Any:
    return make_model(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (make_model, ["model.embed_tokens"], "it is no linear layer"),
        (lambda: make_model().half(), ["model.layers.0.mlp.up_proj"], "found torch.float16"),
        (tied, ["lm_head"], "another module's too"),
    ],
)
def test_fisher_that_cannot_be_had(make: Callable[[], Any], names: list[str], message: str) -> None:
    with pytest.raises(UnsuitableAdapter, match=message):
        fisher_diagonal(make(), names, SAMPLES, 1)


def test_fisher_that_is_not_finite() -> None:
    model = make_model()
    model.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(TrainingFailed, match="expected finite gradients"):
        fisher_diagonal(model, ["model.layers.0.mlp.up_proj"], SAMPLES, 1)


def biased() -> Any:
    return make_model(attention_bias=True)


def peft(make: Callable[[], Any] = make_model, **changes: Any) -> Any:
    changes = {"target_modules": ["q_proj"], **changes}
    return get_peft_model(make(), LoraConfig(r=2, task_type="CAUSAL_LM", **changes))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_model, {}, "LlamaForCausalLM: it has no layers"),
        (lambda: peft().requires_grad_(False), {}, "it has no layers"),
        (lambda: peft(target_modules=["embed_tokens"]), {}, "embed_tokens: it is no linear layer"),
        (lambda: peft(modules_to_save=["lm_head"]), {}, "lm_head.* trained beside"),
        (lambda: peft(bias="all", make=biased), {}, "bias: it is trained beside"),
        (lambda: peft(alora_invocation_tokens=[1]), {}, "ALoraLinearVariant does more"),
        (lambda: peft(use_dora=True), {"rewritten": True}, "not known to start from rewritten weights"),
        (peft, {"fisher": {}}, "there is no Fisher information"),
        (
            peft,
            {"fisher": {f"model.layers.{i}.self_attn.q_proj": torch.zeros(32, 1) for i in range(2)}},
            r"there is no Fisher information of its \[32, 32\] weights",
        ),
    ],
)
def test_a_change_that_is_not_known(make: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsuitableAdapter, match=message):
        Penalty(make(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "l2"}, "expected one of l2-sp, ewc"),
        ({"weight": -1.0}, "weight: expected"),
        ({"weight": float("nan")}, "weight: expected"),
        ({"num_fisher_samples": 0}, "num_fisher_samples: expected"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PenaltySettings(**changes)


def test_the_command_line_offers_the_penalties() -> None:
    (offered,) = (p.type.choices for p in train_verb.params if p.name == "regularizer")
    assert set(offered) == {*get_args(Regularizer), *PENALTIES}


# --- in the trainer --------------------------------------------------------------------------------------------------


def with_penalty(trainer: CachedKLTrainer, which: str, weight: float) -> CachedKLTrainer:
    model: Any = trainer.model
    trainer.penalty = Penalty(model, weight, random_fisher(make_model()) if which == "ewc" else None)
    return trainer


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], LogitCache]:
    samples = make_samples()
    return samples, make_cache(tmp_path_factory.mktemp("penalty-cache") / "c", samples)


@kinds_of_penalty
@pytest.mark.parametrize("regularizer", ["none", "masked-kl"])
def test_gradients_do_not_depend_on_how_a_batch_is_accumulated(
    which: str, regularizer: Any, tmp_path: Path, cached: tuple[list[Any], LogitCache]
) -> None:
    """The gradient without a penalty, plus weight times the penalty's own, for every way to accumulate."""
    samples, cache = cached

    def trainer(batch: int = 16, accumulate: int = 1) -> CachedKLTrainer:
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        return make_trainer(tmp_path, samples, cache, Objective(regularizer), **sizes)

    plain = gradients_after_one_step(trainer())
    alone = with_penalty(trainer(), which, 0.3)
    assert alone.penalty is not None
    value, names = alone.penalty(), [n for n, p in alone.model.named_parameters() if p.requires_grad]
    pulls = dict(zip(names, torch.autograd.grad(value, trained(alone.model)), strict=True))
    assert max(float(p.abs().max()) for p in pulls.values()) > 1e-2
    for batch, accumulate in ((16, 1), (4, 4), (1, 16)):
        run = with_penalty(trainer(batch, accumulate), which, 0.3)
        found = gradients_after_one_step(run)
        assert found.keys() == plain.keys() == pulls.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, plain[name] + 0.3 * pulls[name], rtol=1e-4, atol=1e-5)
        log = run.state.log_history[0]
        assert log["penalty"] == pytest.approx(float(value.detach()), rel=1e-5)
        weighted = log["ce"] + log["kl_weight"] * log["kl"] + 0.3 * log["penalty"]
        assert log["loss"] == pytest.approx(weighted, rel=1e-5)


def _step_of_a_rank(_rank: int, folder: str) -> Step:
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(Path(folder), make_samples(), None, Objective("none"), **sizes)
    return step_of(with_penalty(trainer, "ewc", 5.0))


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_samples(), None, Objective("none"), per_device_train_batch_size=16)
    expected = step_of(with_penalty(trainer, "ewc", 5.0))
    assert_same_step(in_two_processes(_step_of_a_rank, str(tmp_path))[0], expected, ("loss", "ce", "penalty"))


def test_a_penalty_and_label_smoothing_are_two_baselines(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_samples(), None, Objective("none"))
    with pytest.raises(TrainingFailed, match="two baselines"):
        CachedKLTrainer(
            model=trainer.model,
            args=trainer.args,
            cache=None,
            objective=Objective("none", label_smoothing=0.1),
            penalty=Penalty(trainer.model),
        )


# --- a whole run -----------------------------------------------------------------------------------------------------


def train_once(
    out: Path,
    penalty: PenaltySettings | None,
    adapter: AdapterSettings | None = None,
    resume: bool = False,
    keep: Keep | None = None,
    **settings: Any,
) -> Any:
    base = make_base()
    base.model.config.save_pretrained(out.parent / "tiny")
    base = replace(base, source=Source("tiny", out.parent / "tiny"))
    job = TrainSettings(**{"lr": 1e-2, "max_steps": 6, "batch_size": 4, "log_every": 1, **settings})
    adapter = AdapterSettings(rank=RANK) if adapter is None else adapter
    callbacks = [] if keep is None else [keep]
    return train(base, SAMPLES, None, out, adapter, Objective("none"), job, resume, callbacks, penalty)


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "checksum"} for line in lines]


def test_a_weight_of_0_trains_plain_cross_entropy(tmp_path: Path) -> None:
    """To the last bit; and what it would have cost is logged."""
    train_once(tmp_path / "plain", None)
    expected = (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    plain = log_of(tmp_path / "plain")
    assert all("penalty" not in entry for entry in plain)
    for which in PENALTIES:
        train_once(tmp_path / which, PenaltySettings(which, 0.0))  # type: ignore[arg-type]
        assert (tmp_path / which / "adapter_model.safetensors").read_bytes() == expected
        log = log_of(tmp_path / which)
        assert log[0]["penalty"] == 0 and log[-1]["penalty"] > 0
        assert [{k: v for k, v in entry.items() if k != "penalty"} for entry in log] == plain


@kinds_of_penalty
@pytest.mark.parametrize("kind", some_of(["lora", "pissa"], 1))
def test_a_great_weight_keeps_the_base(which: Any, kind: str, tmp_path: Path) -> None:
    adapter, last = AdapterSettings(kind, RANK), {}
    for weight in (0.0, 1e4):
        out = tmp_path / str(weight)
        train_once(out, PenaltySettings(which, weight), adapter, max_steps=60, log_every=60)
        last[weight] = log_of(out)[-1]["penalty"]
        assert log_of(out)[0]["penalty"] == 0
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
        assert run["penalty"] == {"kind": which, "weight": weight, "num_fisher_samples": 64}
    assert 0 < last[1e4] < 0.05 * last[0.0]


@pytest.mark.parametrize(("which", "kind"), [("l2-sp", "pissa"), ("ewc", "pissa"), ("ewc", "lora"), ("l2-sp", "eva")])
def test_a_resumed_run_is_bitwise_an_uninterrupted_one(which: Any, kind: str, tmp_path: Path) -> None:
    adapter, penalty = AdapterSettings(kind, RANK), PenaltySettings(which, 0.5, 8)
    train_once(tmp_path / "whole", penalty, adapter)
    with pytest.raises(KeyboardInterrupt):
        train_once(tmp_path / "o", penalty, adapter, keep=Keep(4))
    for other in (None, replace(penalty, weight=1.0), replace(penalty, num_fisher_samples=9)):
        with pytest.raises(IdentityMismatch, match="differs in penalty "):
            train_once(tmp_path / "o", other, adapter, resume=True)
    train_once(tmp_path / "o", penalty, adapter, resume=True)
    for name in ("adapter_model.safetensors", "train_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_fisher_is_of_the_base_before_it_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiSSA leaves W - s B0 A0, whose gradients are others."""
    given: list[dict[str, Tensor]] = []
    original = Penalty.__init__

    def init(self: Penalty, adapted: Any, weight: float, fisher: Any, rewritten: bool) -> None:
        given.append(dict(fisher))
        original(self, adapted, weight, fisher, rewritten)

    monkeypatch.setattr(Penalty, "__init__", init)
    train_once(tmp_path / "o", PenaltySettings("ewc", 1.0, 4), AdapterSettings("pissa", RANK, 8.0), max_steps=1)
    expected = fisher_diagonal(make_model(), list(linear_layers(make_model())), SAMPLES, 4)
    assert given and given[0].keys() == expected.keys()
    assert all(torch.equal(given[0][name], expected[name]) for name in expected)


def test_a_penalty_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"not finite.*penalty"):
        train_once(tmp_path / "o", PenaltySettings("l2-sp", 1e38), max_steps=20, lr=1e10)
