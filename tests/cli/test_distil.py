"""Distillation and full fine-tuning on the command line: what is written, what goes on, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cli_harness import (
    CliResult,
    copy_of,
    done,
    logitcache,
    precompute,
    refused,
    text_data,
    unchanged,
)
from support.tiny_model import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from logitcache.cli.progress import TrainBar
from logitcache.models.loading import find_model, load_tokenizer, tokenizer_identity

FULL_KL = ["--teacher-is-not-base", "--regularizer", "full-kl", "--tail", "renormalize", "--temperature", 2]
WHOLE = ["--adapter", "none", "--max-steps", 10, "--batch-size", 4, "--lr", 1e-3, "--log-every", 1]


def folder_of(path: Path, model: Any, tokenizer: Any = None) -> Path:
    model.save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_data(tmp_path_factory.mktemp("distil-data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and shallower than the tiny base, with its tokenizer."""
    model = make_model(seed=7, hidden_size=48, num_hidden_layers=1)
    return folder_of(tmp_path_factory.mktemp("distil") / "teacher", model)


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A cache of the teacher's, to be read only."""
    cache = tmp_path_factory.mktemp("distil-cache") / "c"
    precompute(teacher, data, cache, "--top-k", 32, "--tail-groups", 4)
    return cache


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    """A cache of the tiny base's, to be read only."""
    cache = tmp_path_factory.mktemp("own-cache") / "c"
    precompute(tiny_model, data, cache)
    return cache


def train_line(student: Path, cache: Path, out: Path, *more: object) -> list[object]:
    return ["train", "--student", student, "--cache", cache, "--out", out, *more]


class Weights(dict[str, Any]):
    """What a model held when its training ended."""

    def take(self, _bar: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update({name: weight.detach().clone() for name, weight in kwargs["model"].state_dict().items()})


@pytest.fixture(scope="module")
def taught(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, lessons: Path
) -> tuple[Path, CliResult, Weights]:
    """A student trained as a whole for ten steps, to be read only, what was said, and the weights in memory."""
    out, weights = tmp_path_factory.mktemp("taught") / "o", Weights()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainBar, "on_train_end", lambda bar, *args, **kwargs: weights.take(bar, *args, **kwargs))
        return out, done(*train_line(tiny_model, lessons, out, *FULL_KL, *WHOLE)), weights


def read_run(out: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return run


# --- from another teacher, as a whole --------------------------------------------------------------------------------


def test_a_whole_student_is_an_ordinary_model_folder(
    taught: tuple[Path, CliResult, Weights], tiny_model: Path, data: Path
) -> None:
    out, said, trained = taught
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.float32
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert trained.keys() == before.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, trained[name]) and not torch.equal(weight, before[name]), name
    assert tokenizer_identity(load_tokenizer(find_model(str(out)))) == tokenizer_identity(
        load_tokenizer(find_model(str(tiny_model)))
    )
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]
    done("evaluate", "--model", out, "--data", data, "--prior", data)
    assert not (out / "adapter_config.json").exists()
    assert said.out.startswith("Trained 10 steps")


def test_step_zero_is_off_and_says_so(taught: tuple[Path, CliResult, Weights], teacher: Path, tiny_model: Path) -> None:
    out, said, _ = taught
    assert f"The teacher is {teacher}, not the base: step 0 is not checked." in said.err.splitlines()
    assert "Before step 1" not in said.err
    run = read_run(out)
    assert run["result"]["step_zero"] is None and run["adapter"] == {"kind": "none"}
    expected = {
        "teacher_is_not_base": True,
        "ignore_padding": False,
        "other_precision": False,
        "max_start_kl": None,
        "load_in": None,
    }
    assert run["pairing"] == expected
    assert run["model"]["name"] == str(tiny_model)


def test_evaluate_compares_a_whole_student_with_its_base(
    taught: tuple[Path, CliResult, Weights], tiny_model: Path, other_model: Path, data: Path
) -> None:
    out, _, _ = taught
    line = ["evaluate", "--model", tiny_model, "--adapter", out, "--data", data, "--prior", data, "--json"]
    both = json.loads(done(*line).out)["new"]
    alone = json.loads(done("evaluate", "--model", out, "--data", data, "--prior", data, "--json").out)["new"]
    base = json.loads(done("evaluate", "--model", tiny_model, "--data", data, "--prior", data, "--json").out)["new"]
    assert both["before"] == base["before"] and both["after"] == alone["before"] and both["kl_nats"] > 0
    line[2] = other_model
    assert "it was trained on" in refused(4, *line)


def test_evaluate_refuses_a_whole_model_that_is_damaged_or_of_another_width(
    tmp_path: Path, taught: tuple[Path, CliResult, Weights], tiny_model: Path, data: Path
) -> None:
    bad = copy_of(taught[0], tmp_path / "bad", lambda f: (f / "model.safetensors").unlink())
    line = ["evaluate", "--model", tiny_model, "--adapter", bad, "--data", data, "--prior", data]
    assert "model.safetensors is missing" in refused(1, *line)
    (bad / "files.json").unlink()  # as a model of another program's
    assert "expected weights (model.safetensors)" in refused(1, *line)
    line[4] = folder_of(tmp_path / "wide", make_model(vocab_size=272))
    assert "expected logits over 260 tokens as the base has, found 272" in refused(1, *line)


def test_an_adapter_learns_from_another_teacher_too(tmp_path: Path, tiny_model: Path, lessons: Path) -> None:
    done(*train_line(tiny_model, lessons, tmp_path / "o", "--teacher-is-not-base", "--rank", 2, "--max-steps", 1))
    assert read_run(tmp_path / "o")["result"]["step_zero"] is None
    assert (tmp_path / "o" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("tail", ["bucket", "groups", "renormalize"])
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_widths_of_padding_are_ignored_where_it_is_said(
    tail: str, wider: str, tmp_path: Path, tiny_model: Path, lessons: Path, data: Path
) -> None:
    student, cache = folder_of(tmp_path / "student", make_model(vocab_size=272)), lessons
    if wider == "teacher":
        model = make_model(seed=7, hidden_size=48, num_hidden_layers=1, vocab_size=272)
        folder_of(tmp_path / "teacher", model)
        cache, student = tmp_path / "c", tiny_model
        precompute(tmp_path / "teacher", data, cache, "--top-k", 32, "--tail-groups", 4)
    line = train_line(student, cache, tmp_path / "o", "--teacher-is-not-base", "--tail", tail, *WHOLE)
    told = refused(4, *line)
    assert "260" in told and "272" in told and "257" in told and "--ignore-padding" in told
    done(*line, "--ignore-padding")
    assert read_run(tmp_path / "o")["pairing"]["ignore_padding"] is True


# --- a whole model towards its own base ------------------------------------------------------------------------------


def test_a_whole_model_starts_at_its_base_and_that_is_checked(
    tmp_path: Path, tiny_model: Path, other_model: Path, own: Path
) -> None:
    said = done(*train_line(tiny_model, own, tmp_path / "o", *WHOLE, "--max-steps", 2))
    assert "(noise floor)" in said.err and "not checked" not in said.err
    step_zero = read_run(tmp_path / "o")["result"]["step_zero"]
    assert abs(step_zero["kl_nats"]) < step_zero["tolerance_nats"] < 3e-4
    assert "differs in weights" in refused(4, *train_line(other_model, own, tmp_path / "p", *WHOLE))


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_bfloat16_model_has_float32_weights_and_computes_in_bfloat16(
    dtype: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate whose steps bfloat16 weights would lose moves every weight; the body's outputs are bfloat16."""
    from transformers import LlamaModel

    model = make_model(tie_word_embeddings=True).to(torch.bfloat16)
    base = folder_of(tmp_path / "base", model)
    precompute(base, data, tmp_path / "c")
    original = LlamaModel.forward
    seen: set[tuple[bool, torch.dtype]] = set()

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.layers[0].mlp.up_proj.weight.dtype == torch.float32
        self.layers[0].mlp.up_proj.register_forward_hook(lambda m, _i, o: seen.add((m.training, o.dtype)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    monkeypatch.setattr("logitcache.training.job.check_head", lambda _: None)  # before the weights are float32
    line = train_line(base, tmp_path / "c", tmp_path / "o", *WHOLE, "--lr", 1e-6, "--dtype", dtype)
    done(*line)
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert (False, torch.float32) in seen  # step 0 is measured outside autocast
    step_zero = read_run(tmp_path / "o")["result"]["step_zero"]
    assert 0 < abs(step_zero["kl_nats"]) < 0.01
    weights, before = load_file(tmp_path / "o" / "model.safetensors"), model.state_dict()
    for name, weight in weights.items():
        moved = (weight - before[name].float()).abs()
        assert weight.dtype == torch.float32 and 0 < moved.max() < 2e-5, name
        assert (weight.to(torch.bfloat16) == before[name]).float().mean() > 0.9  # there nothing would have happened


class Stop(TrainerCallback):
    """Interrupts after a step, once it has been saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resumed_whole_run_is_bitwise_an_uninterrupted_one(
    tied: bool, tmp_path: Path, lessons: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = folder_of(tmp_path / "student", make_model(tie_word_embeddings=tied))
    done(*train_line(student, lessons, tmp_path / "whole", *FULL_KL, *WHOLE))
    line = train_line(student, lessons, tmp_path / "o", *FULL_KL, *WHOLE)
    with monkeypatch.context() as patched:
        patched.setattr(TrainBar, "on_save", Stop(4).on_save, raising=False)
        assert logitcache(*line).status == 130
    assert not (tmp_path / "o" / "model.safetensors").exists()
    done(*line, "--resume")
    for name in ("model.safetensors", "train_log.jsonl", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with unchanged(tmp_path / "o"):
        done(*line, "--resume")
    others = [argument for argument in line if argument != "--teacher-is-not-base"]
    assert "differs in weights" in refused(4, *others, "--resume")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--regularizer", "none", "--teacher-is-not-base"], "nothing is learnt from the teacher"),
        (["--ignore-padding"], "--ignore-padding is for --teacher-is-not-base"),
        (["--adapter", "none", "--rank", 4], "--rank has no place in --adapter none"),
        (["--adapter", "none", "--alpha", 4], "--alpha has no place in --adapter none"),
        (["--adapter", "none", "--dropout", 0.0], "--dropout has no place in --adapter none"),
        (["--adapter", "none", "--target-modules", "all-linear"], "--target-modules has no place in --adapter none"),
        (["--adapter", "none", "--nullspace", "n"], "--nullspace and --variant are for --adapter lora-null"),
        (["--adapter", "oft", "--rank", 16], "--rank has no place in --adapter oft, whose size is --block-size"),
        (["--block-size", 8], "--block-size and --cayley are for --adapter oft, not for lora"),
        (["--adapter", "none", "--load-in", "8bit"], "quantised weights cannot be trained"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    more: list[object], told: str, tmp_path: Path, tiny_model: Path, own: Path
) -> None:
    assert told in refused(2, *train_line(tiny_model, own, tmp_path / "o", *more))
    assert not (tmp_path / "o").exists()


def test_a_teacher_needs_a_cache(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    line = ["train", "--student", tiny_model, "--data", data, "--out", tmp_path / "o", "--teacher-is-not-base"]
    assert "--regularizer masked-kl needs --cache" in refused(2, *line)


def test_settings_of_an_adapter_in_a_config_file_are_refused_too(tmp_path: Path, tiny_model: Path, own: Path) -> None:
    (tmp_path / "c.yaml").write_text("rank: 8\n", encoding="utf-8")
    line = train_line(tiny_model, own, tmp_path / "o", "--config", tmp_path / "c.yaml", "--adapter", "none")
    assert "--rank has no place" in refused(2, *line)


def test_student_and_model_are_one_flag(tmp_path: Path, tiny_model: Path, own: Path) -> None:
    for name in ("student", "model"):
        (tmp_path / f"{name}.yaml").write_text(f"{name}: {tiny_model}\nmax-steps: 1\n", encoding="utf-8")
        line = ["train", "--config", tmp_path / f"{name}.yaml", "--cache", own, "--out", tmp_path / name, "--rank", 2]
        done(*line)
        assert read_run(tmp_path / name)["model"]["name"] == str(tiny_model)
    (tmp_path / "both.yaml").write_text(f"model: {tiny_model}\nstudent: {tiny_model}\n", encoding="utf-8")
    line = ["train", "--config", tmp_path / "both.yaml", "--cache", own, "--out", tmp_path / "o"]
    assert "expected each key once" in refused(2, *line)


def test_a_teacher_with_another_tokenizer_is_4(tmp_path: Path, lessons: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    student = folder_of(tmp_path / "student", make_model(), tokenizer)
    told = refused(4, *train_line(student, lessons, tmp_path / "o", *FULL_KL))
    assert str(student) in told and str(lessons) in told and "expected one tokenizer" in told


def test_a_student_without_a_tokenizer_is_4(tmp_path: Path, lessons: Path) -> None:
    make_model().save_pretrained(tmp_path / "student")
    told = refused(4, *train_line(tmp_path / "student", lessons, tmp_path / "o", *FULL_KL))
    assert "found none in the model's folder" in told


def test_another_model_is_refused_unless_it_is_the_teacher(tmp_path: Path, tiny_model: Path, lessons: Path) -> None:
    told = refused(4, *train_line(tiny_model, lessons, tmp_path / "o"))
    assert "differs in weights" in told and "--teacher-is-not-base" in told


def test_float16_is_refused_as_a_whole_too(tmp_path: Path, tiny_model: Path, own: Path) -> None:
    told = refused(1, *train_line(tiny_model, own, tmp_path / "o", *WHOLE, "--dtype", "float16"))
    assert "in float16" in told


def test_a_loss_that_is_not_finite_saves_no_model(tmp_path: Path, tiny_model: Path, own: Path) -> None:
    assert "not finite" in refused(1, *train_line(tiny_model, own, tmp_path / "o", *WHOLE, "--lr", 1e30))
    assert not (tmp_path / "o" / "model.safetensors").exists() and read_run(tmp_path / "o")["status"] == "started"


def test_the_words_of_the_model_are_not_lost(tmp_path: Path, lessons: Path) -> None:
    """A base's generation settings and chat template are in the student's folder."""
    model: PreTrainedModel = make_model()
    model.generation_config.max_new_tokens = 7
    student = folder_of(tmp_path / "student", model)
    done(*train_line(student, lessons, tmp_path / "o", *FULL_KL, "--adapter", "none", "--max-steps", 1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "o").chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize("more", [["--adapter", "none"], ["--load-in", "8bit"]])
def test_a_penalty_on_the_weights_needs_an_adapter_on_weights_that_can_be_read(
    more: list[object], tmp_path: Path, tiny_model: Path, own: Path
) -> None:
    told = refused(2, *train_line(tiny_model, own, tmp_path / "o", "--regularizer", "l2-sp", *more))
    assert "not with --adapter none or --load-in" in told
