"""What a step takes, reckoned from the config: against what autograd keeps of a real one, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_harness import done, logitcache, refused
from support.families import FAMILIES, make_family
from support.saved_bytes import saved_bytes
from support.tiny_model import make_model
from support.tiny_runs import make_base, make_cache, make_samples, run
from torch import nn
from transformers import AutoConfig, TrainerCallback

from logitcache.adapters.attach import AdapterSettings, attach, target_layers
from logitcache.adapters.registry import KINDS
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.models.checkpointing import checkpoint_layers
from logitcache.models.head import body_of, causal_lm_of
from logitcache.training.memory import StepMemory, largest_micro_batch, step_memory
from logitcache.training.penalties import fisher_diagonal
from logitcache.training.settings import TrainSettings
from logitcache.training.trainer import CachedKLTrainer

ROWS, WIDTH = 4, 48
SETTINGS = TrainSettings(batch_size=ROWS, batch_tokens=ROWS * WIDTH)
LORA = AdapterSettings(rank=4)


def kept_of(student: Any, autocast: bool) -> int:
    """By the body of a real model, of a batch with padding."""
    mask = torch.ones(ROWS, WIDTH, dtype=torch.int64)
    mask[-1, -3:] = 0
    body = body_of(causal_lm_of(student))

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return body(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False).last_hidden_state

    return saved_bytes(student, forward)


def reckoned(model: Any, dtype: torch.dtype, adapter: AdapterSettings, **changes: Any) -> StepMemory:
    return step_memory(model.config, dtype, adapter, replace(SETTINGS, **changes), WIDTH, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_what_is_kept_is_what_a_forward_keeps(family: str, dtype: torch.dtype) -> None:
    """Within 10 %, without checkpointed layers and with them: then without the layer that is run again."""
    model = (make_model() if family == "tiny" else make_family(family)).to(dtype)
    found = reckoned(model, dtype, LORA)
    student = attach(model, LORA, "tiny").train()
    assert found.kept == pytest.approx(kept_of(student, dtype == torch.bfloat16), rel=0.1)
    checkpoint_layers(student)
    inputs = kept_of(student, dtype == torch.bfloat16)
    assert found.kept_checkpointed - found.kept // 2 == pytest.approx(inputs, rel=0.1)


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if not row.decomposes])
def test_every_kind_is_counted(kind: str) -> None:
    """Trained numbers to the last one; kept within 10 %."""
    adapter = AdapterSettings(kind) if kind == "oft" else AdapterSettings(kind, rank=4)  # type: ignore[arg-type]
    model = make_model().to(torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found = reckoned(model, torch.bfloat16, adapter)
    student = attach(model, adapter, "tiny").train()
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert (found.num_trained, found.trained, found.gradients) == (trained, 4 * trained, 4 * trained)
    assert found.optimizer == 8 * trained and weights <= found.weights < 1.3 * weights + 2**20
    assert found.kept == pytest.approx(kept_of(student, autocast=True), rel=0.1)


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if row.decomposes and kind != "lora-null"])
def test_kinds_that_start_from_weights_are_counted_as_lora(kind: str) -> None:
    model = make_model()
    adapter = AdapterSettings(kind, rank=4)  # type: ignore[arg-type]
    assert reckoned(model, torch.float32, adapter) == reckoned(model, torch.float32, LORA)


def test_every_weight_is_held_and_trained_in_float32() -> None:
    model = make_model()
    found = reckoned(model, torch.bfloat16, AdapterSettings("none"))
    count = sum(p.numel() for p in model.parameters())
    assert (found.weights, found.num_trained, found.num_weights) == (0, count, count)
    assert found.held == 16 * count


def test_packed_weights_are_smaller_and_the_rest_is_not() -> None:
    """Of the tiny model: all linear layers but the head are packed."""
    model = make_model()
    sizes = {load_in: _weights_in(model, load_in) for load_in in (None, "8bit", "4bit")}
    head = causal_lm_of(model).get_output_embeddings()
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    assert sizes[None] - sizes["8bit"] == packed  # of two bytes each
    assert sizes[None] - sizes["4bit"] == pytest.approx(packed * (2 - 0.5 - 1 / 64), abs=1)


def _weights_in(model: Any, load_in: str | None) -> int:
    return step_memory(model.config, torch.bfloat16, LORA, SETTINGS, WIDTH, load_in=load_in).weights


def test_a_7b_fits_at_the_defaults() -> None:
    """Its shape, two layers of 28 of it: 16 GiB of the rest leave these to a GPU of 40, and to one of 24 with
    checkpointed layers."""
    sizes: dict[str, Any] = {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False}
    two, four = (
        step_memory(
            AutoConfig.for_model("qwen2", num_hidden_layers=layers, **sizes),
            *(torch.bfloat16, AdapterSettings(), TrainSettings(), 1024),
        )
        for layers in (2, 4)
    )
    whole = {
        name: getattr(four, name) + 12 * (getattr(four, name) - getattr(two, name))
        for name in ("num_weights", "num_trained", "kept", "total_without", "total_with")
    }
    assert whole["num_weights"] == 7_615_616_512 and whole["num_trained"] == 40_370_176
    assert 5.5 < whole["kept"] / 2048 / 2**20 < 6.5  # MiB a token
    assert 24 * 2**30 < whole["total_without"] < 32 * 2**30
    assert whole["total_with"] < 18 * 2**30


def test_a_slice_of_the_head_is_the_larger_of_two_ways() -> None:
    """On a card half a GiB of float32 logits and, in 16 bits, those of the head; or, by kernels, 1,024 rows or more."""
    vocab, width, rows = 262_144, 64, 2048
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 4}
    config = AutoConfig.for_model("qwen2", num_hidden_layers=1, num_key_value_heads=4, vocab_size=vocab, **sizes)
    settings = TrainSettings(batch_size=2, batch_tokens=rows)
    for dtype, device, of_slice in (
        (torch.float32, "cuda", 1024 * vocab * 4),
        (torch.bfloat16, "cuda", 512 * vocab * (4 + 2)),
        (torch.float32, "cpu", 128 * vocab * 4),
    ):
        found = step_memory(config, dtype, AdapterSettings(), settings, 1024, device=device).head
        assert found == of_slice + 2 * rows * width * dtype.itemsize


@pytest.mark.parametrize(
    ("batch", "tokens", "length", "expected"),
    [(8, 2048, 1024, (2, 1024)), (8, 2048, 64, (8, 64)), (8, 512, 1024, (1, 1024)), (1, 2048, 64, (1, 64))],
)
def test_the_largest_micro_batch(batch: int, tokens: int, length: int, expected: tuple[int, int]) -> None:
    assert largest_micro_batch(TrainSettings(batch_size=batch, batch_tokens=tokens), length) == expected


def test_anchors_are_kept_beside_the_batch() -> None:
    model = make_model()
    alone = reckoned(model, torch.float32, LORA)
    with_anchors = step_memory(
        *(model.config, torch.float32, LORA, SETTINGS, WIDTH), device="cpu", anchor_tokens=ROWS * WIDTH
    )
    assert with_anchors.kept == pytest.approx(2 * alone.kept, rel=1e-6) and with_anchors.held == alone.held


def test_eager_attention_keeps_its_weights() -> None:
    """Of every head a number for each pair of tokens, which other kernels make again."""
    model = make_model(attn_implementation="eager")
    found = step_memory(*(model.config, torch.float32, LORA, SETTINGS, WIDTH), device="cpu", attention="eager")
    student = attach(model, LORA, "tiny").train()
    assert found.kept == pytest.approx(kept_of(student, False), rel=0.1)
    assert found.kept > 1.2 * reckoned(make_model(), torch.float32, LORA).kept


def test_the_fisher_information_is_held() -> None:
    model = make_model()
    layers = target_layers(model, LORA)
    plain = reckoned(model, torch.bfloat16, LORA)
    found = step_memory(*(model.config, torch.bfloat16, LORA, SETTINGS, WIDTH), device="cpu", with_fisher=True)
    held = fisher_diagonal(model, list(layers), make_samples(), 2)
    assert found.fisher == sum(f.numel() * f.element_size() for f in held.values()) > 0
    assert found.total - plain.total == found.fisher


@pytest.mark.parametrize("kind", ["lora", "eva"])
def test_whole_modules_are_counted(kind: str) -> None:
    """The head: V x D of them, beside the adapter, of a kind that starts from samples too."""
    whole = AdapterSettings(kind, rank=4, modules_to_save="lm_head")  # type: ignore[arg-type]
    model = make_model()
    more = reckoned(model, torch.float32, whole).num_trained - reckoned(model, torch.float32, LORA).num_trained
    assert more == model.lm_head.weight.numel()


# --- what is said ----------------------------------------------------------------------------------------------------


def plan_line(model: Path, out: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--regularizer", "none", "--data", "none.jsonl", "--out", out, "--plan", *more]


def test_the_plan_reads_no_weight_and_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """A folder with config.json alone will do."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    line = plan_line(tmp_path / "base", tmp_path / "o", "--rank", 4, "--max-length", 64)
    said = done(*line).out
    rows = [row[:11].strip() for row in said.splitlines()]
    assert rows == ["model", "weights", "trained", "optimizer", "kept", "", "head", "in all", "", ""]
    assert "8 x 64 tokens" in said and "Nothing was loaded or written." in said
    assert "KiB, as this run is set" in said.splitlines()[-3] or "MiB, as this run is set" in said.splitlines()[-3]
    checkpointed = done(*line, "--gradient-checkpointing").out
    assert "--gradient-checkpointing, as this run is set" in checkpointed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_the_plan_is_of_the_run_that_is_set(tiny_model: Path, tmp_path: Path) -> None:
    line = plan_line(tiny_model, tmp_path / "o", "--max-length", 64)
    assert "2 x 64 tokens" in done(*line, "--batch-tokens", 150).out
    assert "an adapter (dora) of" in done(*line, "--adapter", "dora").out
    assert "every weight" in done(*line, "--adapter", "none").out
    assert "in 4bit" in done(*line, "--load-in", "4bit").out
    assert "of ewc, a float32 of each adapted weight" in done(*line, "--regularizer", "ewc").out
    outcome = logitcache(*plan_line(tmp_path / "nothing", tmp_path / "o"))
    assert outcome.status == 2 and "loading model" in outcome.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "optim=sgd"], "--plan with --set optim=sgd: it reckons with AdamW's two moments"),
        (["--target-modules", "nothing"], "target modules 'nothing', or one of them, name no layer"),
        (["--adapter", "pissa", "--modules-to-save", "lm_head"], "pissa is saved as the change of weights"),
        (["--revision", "v1"], "--revision v1:"),
    ],
)
def test_a_plan_of_what_cannot_be_reckoned_is_refused(
    more: list[object], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    assert said in refused(2, *plan_line(tiny_model, tmp_path / "o", "--max-length", 64, *more))


class RunsOut(TrainerCallback):
    """As torch says it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_that_runs_out_of_memory_says_by_how_many_bytes(checkpointed: bool, tmp_path: Path) -> None:
    samples = make_samples()
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointed, "callbacks": [RunsOut()], "max_steps": 1}
    with pytest.raises(TrainingFailed, match=r"memory ran out .*Tried to allocate") as caught:
        run(make_base(), samples, None, tmp_path / "o", objective=Objective("none"), **settings)
    message = str(caught.value)
    longest = max(len(sample.token_ids) for sample in samples)
    assert f"kept of 8 x {longest} tokens" in message and "of weights" in message
    assert "--batch-tokens 1024" in message
    assert ("--gradient-checkpointing, or" in message) is not checkpointed


def test_another_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(CachedKLTrainer, "train", fails)
    cache = make_cache(tmp_path / "c", make_samples())
    with pytest.raises(RuntimeError, match="something else"):
        run(make_base(), make_samples(), cache, tmp_path / "o", max_steps=1)
