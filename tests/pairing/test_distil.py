"""Distillation from another model: loss and gradient of every parameter against a dense oracle in float64.

The oracle is written from docs/loss.md: distributions over the whole vocabulary, outcomes as sets of tokens, one
position at a time. It knows nothing of caches; where a cache holds fewer than all tokens it is told how many are kept.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import make_samples
from torch import Tensor

from logitcache.capture.cache_spec import cache_spec
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch, InvalidData, NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Base, Source, tokenizer_identity
from logitcache.pairing.identity_checks import PairingRules, check_identity, check_tokens
from logitcache.pairing.vocab_cut import VocabCut, cut_columns
from logitcache.storage import IdentityMismatch, LogitCache, ModelIdentity
from logitcache.storage.identity import digest
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.full_weights import unfreeze
from logitcache.training.run import TrainSettings, trainer_arguments
from logitcache.training.trainer import CachedKLTrainer

V, WIDE = 260, 272
WEIGHT = 1.7
SAMPLES = make_samples(6)

IGNORING = PairingRules(ignore_padding=True)


@dataclass(frozen=True)
class Kept:
    """What a cache keeps of a teacher: top_k alternatives, and the tail by these groups, uint8 [V], if any."""

    top_k: int
    groups: Any = None


def teacher_of(vocab_size: int = V) -> Any:
    """Another architecture than the student's, and other weights."""
    return make_model(seed=7, vocab_size=vocab_size, hidden_size=48, num_hidden_layers=1)


def student_of(vocab_size: int = V, **config: Any) -> Any:
    return unfreeze(make_model(seed=0, vocab_size=vocab_size, **config))


def base_of(model: Any, name: str = "teacher") -> Base:
    width = model.get_output_embeddings().weight.shape[0]
    weights, config = digest(name.encode()), f'{{"model_type":"{name}"}}'
    return Base(Source(name, Path(name)), model, ModelIdentity(weights, config, width, "float32", "sdpa"))


def cache_of(path: Path, teacher: Any, kept: Kept, precision: str = "exact", tokenizer: Any = None) -> LogitCache:
    settings = CaptureSettings(
        top_k=kept.top_k,
        max_length=64,
        precision=precision,
        tail_groups=0 if kept.groups is None else int(kept.groups.max()) + 1,
    )
    base = base_of(teacher)
    if kept.groups is not None:  # a cache that was begun with other groups than those of its base keeps them
        cache_spec("teacher", base.identity, tokenizer, settings, kept.groups).writer(path).close()
    precompute(base, SAMPLES, path, settings, tokenizer=tokenizer)
    return LogitCache.open(path)


def supervised(model: Any, sample: Sample) -> tuple[Tensor, list[int]]:
    """Dense logits [n, V] in the model's dtype at the supervised positions, and their labels."""
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
    mask = torch.from_numpy(sample.supervised[1:])
    return model(input_ids=ids).logits[0, :-1][mask], ids[0, 1:][mask].tolist()


def outcomes(p: Tensor, label: int, kept: Kept, tail: str, masked: bool, common: int) -> list[tuple[list[int], Tensor]]:
    """What is compared: tokens below `common`, and the teacher's mass of each as its cache has it. p: float64 [V]."""
    order = [c for c in p.argsort(descending=True).tolist() if c != label]
    alternatives, rest = order[: kept.top_k], order[kept.top_k :]
    found = [] if masked else [([label], p[label])]
    found += [([c], p[c]) for c in alternatives if c < common]
    sets: list[list[int]] = []
    if tail == "bucket":
        sets = [rest]
    if tail == "groups":
        sets = [[c for c in rest if kept.groups[c] == g] for g in range(int(kept.groups.max()) + 1)]
    for tokens in sets:
        known = [c for c in tokens if c < common]
        if known:
            found.append((known, p[tokens].sum()))
    return found


def dense_loss(student: Any, teacher: Any, objective: Objective, kept: Kept) -> Tensor:
    """mean CE + weight * mean KL over the tokens that both have, in float64, with gradient to the student."""
    ce, kl = [], []
    for sample in SAMPLES:
        z, labels = supervised(student, sample)
        with torch.no_grad():
            p = supervised(teacher, sample)[0].softmax(-1)
        common = min(z.shape[1], p.shape[1])
        q = z[:, :common].log_softmax(-1)
        t = objective.temperature
        for row, label in enumerate(labels):
            ce.append(-q[row, label])
            sets = outcomes(p[row], label, kept, objective.tail, objective.masked, common)
            log_p = torch.stack([mass.log() for _, mass in sets])
            log_q = torch.stack([q[row, tokens].logsumexp(0) for tokens, _ in sets])
            log_p, log_q = (log_p / t).log_softmax(0), (log_q / t).log_softmax(0)
            kl.append(t * t * (log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(ce).mean() + objective.weight * torch.stack(kl).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def compare_with_oracle(
    path: Path, student: Any, teacher: Any, objective: Objective, kept: Kept, vocab_size: int | None = None
) -> None:
    """The loss within 1e-5, and the gradient of every parameter within 1e-4 of its largest entry."""
    cache = cache_of(path, teacher, kept)
    anchored = CachedLoss(cache, objective, check=False, rules=PairingRules(ignore_padding=vocab_size is not None))
    found = anchored(student, pad_samples(SAMPLES))
    found.loss.backward()
    exact, frozen = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    exact.zero_grad()
    expected = dense_loss(exact, frozen, objective, kept)
    expected.backward()
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert float(found.kl) > 0.05  # the two differ: nothing is trivially zero
    mine, theirs = gradients(student), gradients(exact)
    assert mine.keys() == theirs.keys() == dict(student.named_parameters()).keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-4 * scale, msg=lambda m, name=name: name + m)


# --- one width -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_distillation_equals_the_dense_oracle_in_every_parameter(tied: bool, chunk: int | None, tmp_path: Path) -> None:
    objective = Objective("full-kl", weight=WEIGHT, tokens_per_loss_chunk=chunk)
    student = student_of(tie_word_embeddings=tied)
    assert ("lm_head.weight" in dict(student.named_parameters())) is not tied
    compare_with_oracle(tmp_path / "c", student, teacher_of(), objective, Kept(V - 1))


def test_temperature_with_the_tail_renormalised_equals_the_dense_oracle(tmp_path: Path) -> None:
    objective = Objective("full-kl", "renormalize", weight=WEIGHT, temperature=2.0)
    compare_with_oracle(tmp_path / "c", student_of(), teacher_of(), objective, Kept(V - 1))
    compare_with_oracle(tmp_path / "d", student_of(), teacher_of(), objective, Kept(12))


def test_the_trainer_has_the_gradient_of_the_loop(tmp_path: Path) -> None:
    """A live tied head too: what the trainer accumulates over micro-batches is the gradient of one batch."""
    cache, objective = cache_of(tmp_path / "c", teacher_of(), Kept(V - 1)), Objective("full-kl", weight=WEIGHT)
    student = student_of(tie_word_embeddings=True)
    CachedLoss(cache, objective, check=False)(student, pad_samples(SAMPLES)).loss.backward()
    expected = gradients(student)
    args = trainer_arguments(
        tmp_path / "o", TrainSettings(max_steps=1, batch_size=2, grad_accum=3), torch.device("cpu")
    )
    args.save_strategy, args.max_grad_norm = "no", 0.0
    found: dict[str, Tensor] = {}

    class Grab(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.update(gradients(trained))

    trained = student_of(tie_word_embeddings=True)
    trainer = CachedKLTrainer(
        model=trained,
        args=args,
        train_dataset=list(SAMPLES),
        data_collator=pad_samples,
        cache=cache,
        objective=objective,
        check=False,
        optimizers=(Grab(trained.parameters(), lr=0.0), None),
    )
    trainer.train()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


# --- two widths ------------------------------------------------------------------------------------------------------

GROUPS = np.concatenate([np.arange(V) % 5, np.full(WIDE - V, 5)]).astype(np.uint8)
"""Of the wide vocabulary: what is padding is a group of its own, as clusters of the embedding make it."""

FORMS = {
    "bucket": (Objective(tail="bucket", weight=WEIGHT), 24),
    "full-kl bucket": (Objective("full-kl", "bucket", weight=WEIGHT), 24),
    "groups": (Objective(tail="groups", weight=WEIGHT), 24),
    "full-kl groups": (Objective("full-kl", "groups", weight=WEIGHT), 24),
    "renormalize": (Objective(tail="renormalize", weight=WEIGHT), 24),
    "full-kl renormalize, warm": (Objective("full-kl", "renormalize", weight=WEIGHT, temperature=3.0), 24),
    "everything": (Objective("full-kl", weight=WEIGHT), None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padding_equals_the_dense_oracle_over_the_common_tokens(form: str, wider: str, tmp_path: Path) -> None:
    objective, top_k = FORMS[form]
    widths = (WIDE, V) if wider == "student" else (V, WIDE)
    student, teacher = student_of(widths[0]), teacher_of(widths[1])
    groups = GROUPS[: widths[1]] if objective.tail == "groups" else None
    kept = Kept(top_k or widths[1] - 1, groups)
    if wider == "teacher":  # padding is among the kept tokens, and in tails
        record = cache_of(tmp_path / "look", teacher, kept).lookup(SAMPLES[0].token_ids, SAMPLES[0].positions)
        beyond = (record.alternative_ids >= V).sum(axis=1)
        assert beyond.max() > 0 and (top_k is None or beyond.min() < WIDE - V)
    compare_with_oracle(tmp_path / "c", student, teacher, objective, kept, V)


@pytest.mark.parametrize("tail", ["bucket", "groups"])
@pytest.mark.parametrize("missing", [1, 6])
def test_a_tail_of_padding_alone_is_empty(tail: str, missing: int, tmp_path: Path) -> None:
    """All but the least probable alternatives are kept: in some positions the tail holds padding and nothing else."""
    teacher = teacher_of(WIDE)
    with torch.no_grad():
        teacher.lm_head.weight[V:] *= 0.01
        teacher.lm_head.weight[:V] += teacher.lm_head.weight[V:].mean(0)
    groups = GROUPS if tail == "groups" else None
    objective = Objective("full-kl", tail, weight=WEIGHT)  # type: ignore[arg-type]
    compare_with_oracle(tmp_path / "c", student_of(), teacher, objective, Kept(WIDE - 1 - missing, groups), V)


def test_a_cut_makes_absent_what_is_beyond_it() -> None:
    """By hand: V = 4 of 7; label 1; kept 5 and 2, and a row that keeps all below V; group 1 is tokens 3, 5, 6."""
    quarter = np.float32(np.log(0.25))
    columns = {
        "alternative_ids": np.array([[5, 2, 1], [2, 3, 0]], dtype=np.int32),
        "alternative_logprobs": np.array([[quarter, quarter, -np.inf], [quarter] * 3], dtype=np.float32),
        "label_logprobs": np.array([quarter, quarter / 2], dtype=np.float32),
        "tail_logprobs": np.log(np.array([0.3, 0.2], dtype=np.float32)),
        "tail_group_logprobs": np.log(np.array([[0.2, 0.1], [0.15, 0.05]], dtype=np.float32)),
        "draw_ids": np.array([[3], [4]], dtype=np.int32),
        "draw_logprobs": np.array([[quarter], [quarter]], dtype=np.float32),
    }
    labels = np.array([1, 1], dtype=np.int32)
    found = cut_columns(columns, labels, VocabCut(4, np.array([0, 0, 1, 1], dtype=np.uint8)))
    assert found["alternative_ids"].tolist() == [[1, 2, 1], [2, 3, 0]]
    assert found["alternative_logprobs"].tolist() == [[-np.inf, quarter, -np.inf], [quarter] * 3]
    assert found["tail_group_logprobs"][1].tolist() == [-np.inf, -np.inf]  # all below V are kept
    np.testing.assert_allclose(np.exp(found["tail_logprobs"]), [0.3, 0.0], rtol=1e-6)
    assert "draw_ids" not in found and columns["alternative_ids"][0, 0] == 5  # what was given is left alone
    alone = cut_columns(columns, labels, VocabCut(4, np.array([0, 0, 0, 0], dtype=np.uint8)))
    assert alone["tail_group_logprobs"][0].tolist() == [columns["tail_group_logprobs"][0, 0], -np.inf]
    np.testing.assert_allclose(np.exp(alone["tail_logprobs"][0]), 0.2, rtol=1e-6)  # without the group of padding
    without = {name: column for name, column in columns.items() if "group" not in name}
    np.testing.assert_array_equal(
        cut_columns(without, labels, VocabCut(4))["tail_logprobs"], [columns["tail_logprobs"][0], -np.inf]
    )
    with pytest.raises(InvalidBatch, match="the label 4, which is padding"):
        cut_columns(columns, np.array([1, 4], dtype=np.int32), VocabCut(4))


def test_one_width_is_the_same_to_the_last_bit_with_padding_ignored(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "c", teacher_of(), Kept(16))
    results = []
    for vocab_size in (None, V):
        student = student_of()
        CachedLoss(
            cache, Objective(weight=WEIGHT), check=False, rules=PairingRules(ignore_padding=vocab_size is not None)
        )(student, pad_samples(SAMPLES)).loss.backward()
        results.append(gradients(student))
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_the_trainer_ignores_padding_as_the_loop_does(tmp_path: Path) -> None:
    for teacher, student in ((WIDE, V), (V, WIDE)):
        cache = cache_of(tmp_path / f"c{teacher}", teacher_of(teacher), Kept(16, GROUPS[:teacher]))
        objective = Objective("full-kl", "groups", weight=WEIGHT)
        anchored = CachedLoss(cache, objective, check=False, rules=IGNORING)(student_of(student), pad_samples(SAMPLES))
        args = trainer_arguments(tmp_path / "o", TrainSettings(max_steps=1, batch_size=6), torch.device("cpu"))
        args.save_strategy = "no"
        trainer = CachedKLTrainer(
            model=student_of(student),
            args=args,
            train_dataset=list(SAMPLES),
            data_collator=pad_samples,
            cache=cache,
            objective=objective,
            check=False,
            rules=IGNORING,
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(anchored.loss.detach()), abs=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False])
def test_other_widths_are_refused_unless_padding_is_ignored(check: bool, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "c", teacher_of(WIDE), Kept(16))
    with pytest.raises(NotTheBase, match="expected logits over 272 tokens, found 260"):
        CachedLoss(cache, check=check)(student_of(), pad_samples(SAMPLES))
    anchored = CachedLoss(cache, check=False, rules=IGNORING, model=student_of(270))
    with pytest.raises(NotTheBase, match="expected logits over 270 tokens in both, found 272 in the cache and 260"):
        anchored(student_of(), pad_samples(SAMPLES))
    with pytest.raises(TrainingFailed, match="before a model is known"):
        CachedLoss(cache, check=False, rules=IGNORING).collator(pad_samples)


def test_draws_of_a_wider_teacher_are_refused(tmp_path: Path) -> None:
    teacher, settings = base_of(teacher_of(WIDE)), CaptureSettings(top_k=8, max_length=64, tail_samples=4)
    precompute(teacher, SAMPLES, tmp_path / "c", settings)
    with pytest.raises(TrainingFailed, match="tail sampled on 260 of the 272 tokens"):
        CachedLoss(tmp_path / "c", Objective(tail="sampled"), rules=IGNORING)(student_of(), pad_samples(SAMPLES))


def test_tokens_beyond_the_common_ones_are_refused() -> None:
    stranger = Sample(np.array([1, 261, 3], dtype=np.uint32), np.ones(3, dtype=np.bool_), "stranger:1")
    with pytest.raises(InvalidData, match="stranger:1: token id 261 is beyond the 260 tokens"):
        check_tokens([*SAMPLES, stranger], V)
    check_tokens(SAMPLES, V)


def identity_of(path: Path, teacher: Any, tokenizer: Any) -> LogitCache:
    return cache_of(path, teacher, Kept(8), tokenizer=tokenizer)


def test_a_teacher_must_have_the_students_tokenizer(tmp_path: Path) -> None:
    student, tokenizer = base_of(student_of(), "student"), make_tokenizer()
    other = make_tokenizer()
    other.add_tokens(["<more>"])
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)
    cache = identity_of(tmp_path / "c", teacher_of(), tokenizer)
    teaching = PairingRules(teacher_is_not_base=True)
    check_identity(cache, student, tokenizer, teaching)
    with pytest.raises(IdentityMismatch, match=r"differs in weights: .*--teacher-is-not-base"):
        check_identity(cache, student, tokenizer)
    with pytest.raises(IdentityMismatch, match="expected one tokenizer, found"):
        check_identity(cache, student, other, teaching)
    with pytest.raises(IdentityMismatch, match="found none in the model's folder"):
        check_identity(cache, student, None, teaching)
    bare = identity_of(tmp_path / "d", teacher_of(), None)
    with pytest.raises(IdentityMismatch, match="found none in the folder the cache was made from"):
        check_identity(bare, student, tokenizer, teaching)


@pytest.mark.parametrize("widths", [(WIDE, V), (V, WIDE)], ids=["student wider", "teacher wider"])
def test_padding_is_refused_unless_it_is_to_be_ignored(widths: tuple[int, int], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    cache = identity_of(tmp_path / "c", teacher_of(widths[1]), tokenizer)
    student = base_of(student_of(widths[0]), "student")
    told = rf"found {widths[1]} in the cache and {widths[0]} in the model \(the tokenizer has 257\).*--ignore-padding"
    with pytest.raises(IdentityMismatch, match=told):
        check_identity(cache, student, tokenizer, PairingRules(teacher_is_not_base=True))
    check_identity(cache, student, tokenizer, PairingRules(teacher_is_not_base=True, ignore_padding=True))


def test_tokens_that_one_side_lacks_are_no_padding(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(4)])  # ids up to 260
    cache = identity_of(tmp_path / "c", teacher_of(WIDE), tokenizer)
    ignoring = PairingRules(teacher_is_not_base=True, ignore_padding=True)
    with pytest.raises(IdentityMismatch, match="all 261 ids of the tokenizer, found 272 in the cache and 260"):
        check_identity(cache, base_of(student_of(), "student"), tokenizer, ignoring)
    check_identity(cache, base_of(student_of(261), "student"), tokenizer, ignoring)


def test_a_base_that_was_padded_is_still_the_base(tmp_path: Path) -> None:
    """Step 0 holds over the common tokens: an embedding that was enlarged afterwards, in a trainer of one's own."""
    base = make_model()
    cache = cache_of(tmp_path / "c", base, Kept(V - 1))
    padded = make_model()
    padded.resize_token_embeddings(WIDE, mean_resizing=False)
    found = CachedLoss(cache, rules=IGNORING)(padded, pad_samples(SAMPLES))
    assert abs(float(found.kl)) < 1e-6
    with pytest.raises(NotTheBase, match="checking step 0"):
        CachedLoss(cache, rules=IGNORING)(make_model(1, vocab_size=WIDE), pad_samples(SAMPLES))


def losses_of(history: Sequence[dict[str, float]]) -> list[float]:
    return [entry["kl"] for entry in history if "kl" in entry]


def test_a_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "c", teacher_of(), Kept(32))
    args = trainer_arguments(
        tmp_path / "o", TrainSettings(max_steps=30, batch_size=6, lr=3e-3, log_every=1), torch.device("cpu")
    )
    args.save_strategy = "no"
    trainer = CachedKLTrainer(
        model=student_of(),
        args=args,
        train_dataset=list(SAMPLES),
        data_collator=pad_samples,
        cache=cache,
        objective=replace(Objective("full-kl"), weight=5.0),
        check=False,
    )
    trainer.train()
    found = losses_of(trainer.state.log_history)
    assert found[-1] < 0.5 * found[0]
