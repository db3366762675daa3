"""Bad input, damaged files and refusals of the machine: the status, one sentence, and nothing lost."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.cli_fixtures import SHARDS
from support.cli_fixtures import cache as cache
from support.cli_fixtures import caches as caches
from support.cli_fixtures import data as data
from support.cli_harness import (
    ROWS,
    Edit,
    cache_bytes,
    commits,
    copy_of,
    cut_short,
    done,
    edit_json,
    facts,
    precompute,
    precompute_line,
    refused,
    shard_folders,
    train_line,
    unchanged,
)
from support.tiny_model import make_model, make_tokenizer, text_rows

from logitcache.capture.teacher import TransformersTeacher
from logitcache.cli import run
from logitcache.storage import lesser_systems, local_files
from logitcache.storage.arrow_backend import ArrowBackend
from logitcache.storage.zarr_backend import ZarrBackend

WriteRows = Callable[..., Path]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cache: Path) -> Path:
    """An adapter trained for one step, to be read only."""
    out = tmp_path_factory.mktemp("bad-adapter") / "adapter"
    done(*train_line(tiny_model, cache, out))
    return out


def evaluate_line(model: Path, adapter: object, data: Path) -> list[object]:
    """The arguments of `evaluate`."""
    return ["evaluate", "--model", model, "--adapter", adapter, "--data", data, "--prior", data]


# --- data ------------------------------------------------------------------------------------------------------------

USER_TURN = {"role": "user", "content": "a"}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "broken JSON": (b'{"text": "b', "line 2 is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "line 2: expected UTF-8, found the byte 0xff"),
    "nested without end": (b"[" * 100_000, "line 2 is not JSON"),
    "a list": (["text"], "line 2 is not a JSON object"),
    "a string": ("text", "line 2 is not a JSON object"),
    "null": (None, "line 2 is not a JSON object"),
    "no known field": (
        {"body": "abc"},
        ":2: expected text, prompt + completion, messages or input_ids, found ['body']",
    ),
    "no field": ({}, ":2: expected text, prompt + completion, messages or input_ids, found []"),
    "a prompt alone": ({"prompt": "abc"}, ":2: expected text, prompt + completion"),
    "null text": ({"text": None}, ":2: expected text, prompt + completion"),
    "text of another type": ({"text": ["a"]}, ":2: expected a string in 'text', found ['a']"),
    "half a surrogate pair": ({"text": "a\ud800"}, ":2: its text is not valid Unicode"),
    "half a pair in a prompt": ({"prompt": "\udc00", "completion": "a"}, ":2: its text is not valid Unicode"),
    "empty completion": ({"prompt": "abc", "completion": ""}, ":2: its completion is empty"),
    "prompt of another type": ({"prompt": 1, "completion": "a"}, ":2: expected a string in 'prompt', found 1"),
    "completion of messages": ({"prompt": "a", "completion": [USER_TURN]}, ":2: expected a string in 'completion'"),
    "no assistant turn": ({"messages": [USER_TURN]}, ":2: no turn of its messages is the assistant's"),
    "an assistant turn first": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        ":2: its messages begin with the assistant's turn",
    ),
    "no messages": ({"messages": []}, ":2: expected a list of {role, content}"),
    "messages of another type": ({"messages": "hello"}, ":2: expected a list of {role, content}"),
    "a message without a role": ({"messages": [{"content": "a"}]}, ":2: expected a list of {role, content}"),
    "half a pair in a message": (
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]},
        ":2: its text is not valid Unicode",
    ),
    "shifted labels": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, ":2: expected labels equal to input_ids"),
    "too few labels": ({"input_ids": [1, 2, 3], "labels": [1, 2]}, ":2: expected labels equal to input_ids"),
    "a token beyond the vocabulary": ({"input_ids": [1, 260]}, ":2: token id 260 is outside the model's vocabulary"),
    "a negative token": ({"input_ids": [1, -2]}, ":2: token id -2 is outside the model's vocabulary of 260"),
    "huge tokens": ({"input_ids": [2**63, 2**63]}, " is outside the model's vocabulary"),
    "tokens of two kinds": ({"input_ids": [1, 2**63]}, ":2: expected a list of integers in 'input_ids'"),
    "a gigantic token": ({"input_ids": [1, 2**70]}, ":2: expected a list of integers in 'input_ids'"),
    "broken numbers": ({"input_ids": [1.5, 2]}, ":2: expected a list of integers in 'input_ids', found [1.5, 2]"),
    "truth values": ({"input_ids": [True, False]}, ":2: expected a list of integers in 'input_ids'"),
    "words for tokens": ({"input_ids": ["a", "b"]}, ":2: expected a list of integers in 'input_ids'"),
    "lists of tokens": ({"input_ids": [[1, 2], [3]]}, ":2: expected a list of integers in 'input_ids'"),
    "a hole in the tokens": ({"input_ids": [1, None]}, ":2: expected a list of integers in 'input_ids'"),
    "a number for tokens": ({"input_ids": 7}, ":2: expected a list of integers in 'input_ids', found 7"),
    "words for labels": ({"input_ids": [1, 2], "labels": "12"}, ":2: expected a list of integers in 'labels'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_is_written(name: str, tmp_path: Path, tiny_model: Path) -> None:
    row, expected = BAD_ROWS[name]
    data = tmp_path / "data.jsonl"
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    data.write_bytes(b'{"text": "abc"}\n' + line + b'\n{"text": "def"}\n')
    with unchanged(tmp_path):
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c"))
    assert expected in message and str(data) in message


def test_a_line_is_counted_with_the_empty_ones(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('\n\n{"text": "abc"}\n\n{"text": 7}\n', encoding="utf-8")
    assert "data.jsonl:5: " in refused(1, *precompute_line(tiny_model, data, tmp_path / "c"))


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path, tiny_model: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "data.parquet")
    message = refused(1, *precompute_line(tiny_model, tmp_path / "data.parquet", tmp_path / "c"))
    assert "data.parquet, row 2: expected text" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data.jsonl", b"", "the file holds no rows"),
        ("data.jsonl", b"\n \n", "the file holds no rows"),
        ("data.parquet", b"", "not a readable Parquet file"),
        ("data.parquet", b'{"text": "a"}\n', "not a readable Parquet file"),
    ],
)
def test_a_file_without_rows_is_1(name: str, content: bytes, expected: str, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with unchanged(tmp_path):
        message = refused(1, *precompute_line(tiny_model, tmp_path / name, tmp_path / "c"))
    assert expected in message and name in message


def test_an_empty_file_among_others_is_left_out_aloud(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8")
    (tmp_path / "d" / "b.jsonl").write_bytes(b"")
    assert "b.jsonl holds no rows and is left out." in precompute(tiny_model, tmp_path / "d", tmp_path / "c").err


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none", "org/none", "text.csv", "empty"])
def test_data_that_are_not_there_are_2(name: str, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("text\nabc\n", encoding="utf-8")
    path = Path(name) if name == "org/none" else tmp_path / name
    with unchanged(tmp_path):
        assert f"reading data '{path}': " in refused(2, *precompute_line(tiny_model, path, tmp_path / "c"))
        assert not Path("org").exists()


@pytest.mark.parametrize("kind", ["text", "completion", "messages"])
def test_text_without_a_tokenizer_is_1(kind: str, tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    model = copy_of(tiny_model, tmp_path / "model", remove_tokenizer)
    message = refused(1, *precompute_line(model, write_rows(ROWS[kind]), tmp_path / "c"))
    assert "the model's folder has no tokenizer" in message
    assert not (tmp_path / "c").exists()


def test_token_ids_need_no_tokenizer(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    model = copy_of(tiny_model, tmp_path / "model", remove_tokenizer)
    precompute(model, write_rows(ROWS["labels"]), tmp_path / "c")
    assert facts(tmp_path / "c")["tokenizer"] is None
    assert "tokenizer    none" in done("inspect", tmp_path / "c").out
    done(*train_line(model, tmp_path / "c", tmp_path / "o"))
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "p"))  # ids are ids


def test_messages_without_a_chat_template_are_1(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    model = copy_of(tiny_model, tmp_path / "model", lambda f: (f / "chat_template.jinja").unlink())
    message = refused(1, *precompute_line(model, write_rows(ROWS["messages"]), tmp_path / "c"))
    assert "data.jsonl:1: it holds messages, but the tokenizer has no chat template" in message
    precompute(model, write_rows(ROWS["text"]), tmp_path / "c")  # text needs none


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}",
            "renders turn 1 different",
        ),
        ("{{ messages[-1].content }}", "renders turn 1 differently once later turns follow"),
        ("{{ raise_exception('two turns\nat most') }}", "the chat template refuses its messages (two turns at most)"),
        ("{% if %}", "the chat template cannot be parsed (line 1: "),
        ("nothing of it", "has nothing of turn 1 that is learnt"),
    ],
)
def test_a_chat_template_that_does_not_fit_is_1(
    template: str, expected: str, tmp_path: Path, tiny_model: Path, write_rows: WriteRows
) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    message = refused(1, *precompute_line(model, write_rows(ROWS["messages"][1:]), tmp_path / "c"))
    assert "data.jsonl:1: " in message and expected in message
    assert not (tmp_path / "c").exists()


# --- truncation ------------------------------------------------------------------------------------------------------


def test_what_is_cut_is_counted_and_reported(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    rows = [{"text": "a" * 30}, {"text": "b" * 19}, {"text": "c" * 20}]  # and an end of text each
    outcome = precompute(tiny_model, write_rows(rows), tmp_path / "c", "--max-length", 20)
    assert "2 rows are longer than 20 tokens and were cut (12 tokens lost); 0 of them" in outcome.err
    contents = facts(tmp_path / "c")["contents"]
    assert (contents["num_tokens_cut"], contents["num_tokens"], contents["num_positions"]) == (12, 60, 57)
    assert "truncated    12 tokens were cut off" in done("inspect", tmp_path / "c").out


def test_a_sample_of_exactly_the_length_is_not_cut(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    outcome = precompute(tiny_model, write_rows([{"text": "a" * 19}]), tmp_path / "c", "--max-length", 20)
    assert "cut" not in outcome.err
    assert facts(tmp_path / "c")["contents"]["num_tokens_cut"] == 0


def test_nothing_supervised_after_truncation_is_1(tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    data = write_rows([{"prompt": "a" * 30, "completion": "b"}, {"prompt": "c" * 20, "completion": "d"}])
    with unchanged(tmp_path):
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", "--max-length", 20))
    assert "no supervised token is left in any of 2 rows after truncation to 20 tokens" in message
    assert "--max-length" in message


def test_a_long_prompt_among_good_rows_is_left_out_and_reported(
    tmp_path: Path, tiny_model: Path, write_rows: WriteRows
) -> None:
    data = write_rows([{"prompt": "a" * 30, "completion": "b"}, *ROWS["completion"]])
    outcome = precompute(tiny_model, data, tmp_path / "c", "--max-length", 20)
    assert "3 rows: 2 distinct samples" in outcome.err
    assert "1 rows are longer than 20 tokens" in outcome.err
    assert "1 of them kept no supervised token and are left out" in outcome.err
    assert facts(tmp_path / "c")["contents"]["num_samples"] == 2
    training = done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--data", data))  # the same rule there
    assert "1 rows were cut to 20 tokens" in training.err


# --- models ----------------------------------------------------------------------------------------------------------


def remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def edit_weights(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Changes the tensors of a safetensors file."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return edit


def overwrite(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


WEIGHTS = "model.safetensors"
BAD_MODELS: dict[str, tuple[Edit, str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "expected weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "expected a config.json"),
    "weights cut short": (cut_short(WEIGHTS, 100_000), "loading model"),
    "weights cut short in the header": (cut_short(WEIGHTS, 100), "loading model"),
    "empty weights": (cut_short(WEIGHTS, 0), "loading model"),
    "weights that are none": (overwrite(WEIGHTS, "x" * 1000), "loading model"),
    "a tensor is missing": (
        edit_weights(WEIGHTS, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "model.layers.1.mlp.up_proj.weight, ...). They would be random.",
    ),
    "the output head is missing": (
        edit_weights(WEIGHTS, lambda w: w.pop("lm_head.weight")),
        "lm_head.weight, ...). They would be random.",
    ),
    "a tensor of another shape": (
        edit_weights(WEIGHTS, lambda w: w.update({"model.norm.weight": torch.ones(5)})),
        "model.norm.weight, ...). They would be random.",
    ),
    "config is not JSON": (overwrite("config.json", "{"), "config"),
    "config is no object": (overwrite("config.json", "[]"), "loading"),
    "config of nothing": (overwrite("config.json", "{}"), "loading"),
    "config of an unknown kind": (overwrite("config.json", '{"model_type": "unheard"}'), "`unheard`"),
    "config of no language model": (overwrite("config.json", '{"model_type": "vit"}'), "loading model"),
    "tokenizer is not JSON": (overwrite("tokenizer.json", "{"), "loading the tokenizer of"),
    "tokenizer config is not JSON": (overwrite("tokenizer_config.json", "{"), "loading the tokenizer of"),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "loading the tokenizer of"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_damaged_model_is_1_and_nothing_is_written(name: str, tmp_path: Path, tiny_model: Path, data: Path) -> None:
    edit, expected = BAD_MODELS[name]
    model = copy_of(tiny_model, tmp_path / "model", edit)
    with unchanged(tmp_path):
        message = refused(1, *precompute_line(model, data, tmp_path / "c"))
    assert expected in message and str(model) in message


@pytest.mark.parametrize("name", ["config is no object", "config of nothing", "config of an unknown kind"])
def test_a_damaged_config_is_1_in_a_plan(name: str, tmp_path: Path, tiny_model: Path, write_rows: WriteRows) -> None:
    edit, _ = BAD_MODELS[name]
    model = copy_of(tiny_model, tmp_path / "model", edit)
    remove_tokenizer(model)
    message = refused(1, *precompute_line(model, write_rows(ROWS["input_ids"]), tmp_path / "c", "--plan"))
    assert str(model) in message


@pytest.mark.parametrize("name", ["none", "org/none", "text.jsonl"])
@pytest.mark.parametrize("verb", ["precompute", "train", "evaluate"])
def test_a_model_that_is_not_there_is_2(verb: str, name: str, tmp_path: Path, data: Path, cache: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    model = {"none": tmp_path / "none", "org/none": Path(name), "text.jsonl": data}[name]
    lines = {
        "precompute": precompute_line(model, data, tmp_path / "c"),
        "train": train_line(model, cache, tmp_path / "o"),
        "evaluate": evaluate_line(model, tmp_path, data),
    }
    with unchanged(tmp_path):
        message = refused(2, *lines[verb])
    assert f"loading model '{model}': no such folder" in message


def test_samples_beyond_a_table_of_positions_are_1(tmp_path: Path, write_rows: WriteRows) -> None:
    config = transformers.GPT2Config(vocab_size=260, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = write_rows([{"text": "a" * 32}, {"text": "b"}])
    plain = ["--data", data, "--regularizer", "none"]
    for line in (
        precompute_line(tmp_path / "model", data, tmp_path / "c"),
        [
            a
            for a in train_line(tmp_path / "model", Path("c"), tmp_path / "o", *plain)
            if a not in ("--cache", Path("c"))
        ],
        ["evaluate", "--model", tmp_path / "model", "--data", data, "--prior", data],
    ):
        assert "a sample of 33 tokens: it learned 32 positions" in refused(1, *line)
    assert not (tmp_path / "c").exists() and not (tmp_path / "o" / "run.json").exists()
    precompute(tmp_path / "model", data, tmp_path / "c", "--max-length", 32)


@pytest.mark.parametrize("verb", ["precompute", "train", "evaluate"])
def test_cuda_without_a_device_is_2(
    verb: str, tmp_path: Path, tiny_model: Path, data: Path, cache: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = {
        "precompute": precompute_line(tiny_model, data, tmp_path / "c"),
        "train": train_line(tiny_model, cache, tmp_path / "o"),
        "evaluate": evaluate_line(tiny_model, adapter, data),
    }
    with unchanged(tmp_path):
        assert "no CUDA device is available" in refused(2, *lines[verb], "--device", "cuda")


def test_a_base_with_nan_is_1_and_names_sample_and_position(
    tmp_path: Path, tiny_model: Path, write_rows: WriteRows
) -> None:
    token = make_tokenizer().convert_tokens_to_ids("z")
    edit = edit_weights(WEIGHTS, lambda w: w["model.embed_tokens.weight"][token].fill_(float("nan")))
    model = copy_of(tiny_model, tmp_path / "model", edit)
    data = write_rows([{"text": "a" * 40}, {"text": "bbb"}, {"text": "cczcc"}, {"text": "dd"}])
    message = refused(1, *precompute_line(model, data, tmp_path / "c", "--batch-tokens", 16, "--shard-positions", 1))
    assert f"{data}:3, position 0: its logits are not finite" in message  # attention spreads it: 0 * nan is nan
    assert "(5 positions of this batch)" in message  # its own
    kept = cache_bytes(tmp_path / "c")
    assert sum(name.endswith(".json") for name in kept if name.startswith("shards/")) == 2  # the others
    refused(5, "inspect", tmp_path / "c")


def test_a_base_that_is_all_nan_is_1(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    edit = edit_weights(WEIGHTS, lambda w: w["lm_head.weight"].fill_(float("nan")))
    model = copy_of(tiny_model, tmp_path / "model", edit)
    assert "position 0: its logits are not finite" in refused(1, *precompute_line(model, data, tmp_path / "c"))
    message = refused(1, *evaluate_line(model, "", data)[:3], "--data", data, "--prior", data)
    assert "not finite" in message


# --- whose cache is it -----------------------------------------------------------------------------------------------


def swap_tokens(folder: Path) -> None:
    """A tokenizer that gives two letters each other's ids."""

    def change(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(folder / "tokenizer.json", change)


IDENTITIES: dict[str, tuple[Edit, list[object], str]] = {
    "weights": (edit_weights(WEIGHTS, lambda w: w["lm_head.weight"][0, 0].add_(1)), [], "model.weights: "),
    "config": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        [],
        "model.config.rms_norm_eps: 0.001 here, 1e-06 there",
    ),
    "tokenizer": (swap_tokens, [], "tokenizer.fingerprint: "),
    "no tokenizer": (remove_tokenizer, [], "tokenizer"),
    "top-k": (lambda _: None, ["--top-k", 9], "capture.top_k: 9 here, 8 there"),
    "max-length": (lambda _: None, ["--max-length", 512], "capture.max_length: 512 here, 1024 there"),
    "dtype": (lambda _: None, ["--dtype", "bfloat16"], "model.dtype: bfloat16 here, float32 there"),
    "store": (lambda _: None, ["--store", "zarr"], "store: zarr here, arrow there"),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half-written"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_a_cache_of_another_identity_is_4_and_not_touched(
    name: str, finished: bool, tmp_path: Path, tiny_model: Path, cache: Path, write_rows: WriteRows
) -> None:
    edit, more, expected = IDENTITIES[name]
    model = copy_of(tiny_model, tmp_path / "model", edit)
    mine = copy_of(cache, tmp_path / "c")
    if not finished:
        (mine / "contents.json").unlink()
        commits(mine)[0].unlink()
        (mine / "shards" / f"{'0' * 32}-{'0' * 16}.{'0' * 32}.new").mkdir()
    data = write_rows(ROWS["input_ids"])
    with unchanged(mine):
        message = refused(4, *precompute_line(model, data, mine, *more))
    assert expected in message and "Nothing was changed" in message and str(mine) in message


def test_a_folder_with_other_files_is_2_and_not_touched(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    for name in ("shards", "mine"):
        folder = tmp_path / name
        (folder / "shards").mkdir(parents=True)
        (folder / (name if name == "mine" else "shards/notes.txt")).write_text("precious", encoding="utf-8")
        with unchanged(tmp_path):
            message = refused(2, *precompute_line(tiny_model, data, folder))
        assert "found other files" in message and "Nothing was changed" in message


def test_a_cache_that_is_a_file_is_2(tmp_path: Path, tiny_model: Path, data: Path, cache: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with unchanged(tmp_path):
        assert "is a file" in refused(2, *precompute_line(tiny_model, data, tmp_path / "file"))
        assert "is a file; a cache is a folder" in refused(2, "inspect", tmp_path / "file")
        assert "is a file" in refused(2, *train_line(tiny_model, cache, tmp_path / "file"))


@pytest.mark.parametrize("verb", ["inspect", "verify", "train"])
@pytest.mark.parametrize("kind", ["none", "empty", "other"])
def test_reading_what_is_no_cache_is_2(verb: str, kind: str, tmp_path: Path, tiny_model: Path) -> None:
    if kind != "none":
        (tmp_path / kind).mkdir()
    if kind == "other":
        (tmp_path / kind / "notes.txt").write_text("mine", encoding="utf-8")
    line = train_line(tiny_model, tmp_path / kind, tmp_path / "o") if verb == "train" else [verb, tmp_path / kind]
    with unchanged(tmp_path):
        assert "expected a logit cache, found no " in refused(2, *line)


TRAINED_WITH: dict[str, tuple[Edit, str]] = {
    "weights": (IDENTITIES["weights"][0], "weights: "),
    "config": (IDENTITIES["config"][0], "config.rms_norm_eps: 1e-06 in the cache, 0.001 in the model"),
    "tokenizer": (swap_tokens, "tokenizer fingerprint: "),
}


@pytest.mark.parametrize("name", TRAINED_WITH)
def test_training_with_a_cache_of_another_model_is_4(name: str, tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    edit, expected = TRAINED_WITH[name]
    model = copy_of(tiny_model, tmp_path / "model", edit)
    with unchanged(cache, tmp_path):
        message = refused(4, *train_line(model, cache, tmp_path / "o"))
    assert expected in message and str(cache) in message
    assert ("--teacher-is-not-base" in message) == (name != "tokenizer")  # which is refused of a teacher too


def test_training_another_model_of_the_same_kind_is_4(
    tmp_path: Path, other_model: Path, cache: Path, data: Path
) -> None:
    with unchanged(cache, tmp_path):
        refused(4, *train_line(other_model, cache, tmp_path / "o"))
        refused(4, *train_line(other_model, cache, tmp_path / "o", "--data", data))
        refused(4, *train_line(other_model, cache, tmp_path / "o", "--regularizer", "none"))


def test_training_with_a_larger_max_length_is_4_and_a_smaller_one_takes_prefixes(
    tmp_path: Path, tiny_model: Path, cache: Path, data: Path
) -> None:
    line = train_line(tiny_model, cache, tmp_path / "o", "--data", data)
    with unchanged(tmp_path):
        message = refused(4, *line, "--max-length", 2048)
    assert "--max-length 2048: expected at most the 1024 tokens a sample that the cache was made with" in message
    assert "rows were cut to 12 tokens" in done(*line, "--max-length", 12).err
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["num_positions"] == run["data"]["num_tokens"] - run["data"]["num_samples"]
    assert run["data"]["num_tokens"] <= 12 * run["data"]["num_samples"]


def test_training_on_a_row_that_is_not_cached_is_4_and_names_it(
    tmp_path: Path, tiny_model: Path, cache: Path, write_rows: WriteRows
) -> None:
    data = write_rows([*text_rows(12)[:4], {"text": "never seen"}, *text_rows(12)[4:]])
    message = refused(4, *train_line(tiny_model, cache, tmp_path / "o", "--data", data))
    assert f"{data}:5: " in message and "not cached" in message
    assert not (tmp_path / "o" / "run.json").exists()


def test_training_on_a_position_that_is_not_cached_is_4_and_names_it(
    tmp_path: Path, tiny_model: Path, write_rows: WriteRows
) -> None:
    cached = write_rows([{"prompt": "abc", "completion": "def"}], "cached.jsonl")
    precompute(tiny_model, cached, tmp_path / "c")
    data = write_rows([{"text": "abcdef"}])  # the same tokens, more of them supervised
    message = refused(4, *train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--data", data))
    assert f"{data}:1: " in message and "position 0 and 1 more were not captured" in message
    done(*precompute_line(tiny_model, data, tmp_path / "c"))
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--data", data))


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTER = "adapter_model.safetensors"
BAD_ADAPTERS: dict[str, tuple[int, Edit, str]] = {
    "no config": (2, lambda f: (f / "adapter_config.json").unlink(), "expected adapter_config.json"),
    "config is not JSON": (1, overwrite("adapter_config.json", "{"), "it is damaged"),
    "config of nothing": (1, overwrite("adapter_config.json", "{}"), "it is damaged"),
    "config of another rank": (1, lambda f: edit_json(f / "adapter_config.json", lambda c: c.update(r=3)), "damaged"),
    "no weights": (1, lambda f: (f / ADAPTER).unlink(), "it is damaged"),
    "weights cut short": (1, cut_short(ADAPTER, 3000), "it is damaged"),
    "a factor is missing": (1, edit_weights(ADAPTER, lambda w: w.pop(min(w))), "it is damaged"),
    "a factor of another shape": (1, edit_weights(ADAPTER, lambda w: w.update({min(w): torch.ones(2, 3)})), "damaged"),
    "a factor is nan": (1, edit_weights(ADAPTER, lambda w: w[min(w)].fill_(float("nan"))), "not finite"),
    "run.json is not JSON": (1, overwrite("run.json", "{"), "does not say which model"),
    "run.json is another's": (1, overwrite("run.json", '{"model": "x"}'), "does not say which model"),
    "run.json is a list": (1, overwrite("run.json", "[]"), "does not say which model"),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_damaged_adapter_is_refused(name: str, tmp_path: Path, tiny_model: Path, data: Path, adapter: Path) -> None:
    status, edit, expected = BAD_ADAPTERS[name]
    """Without its list of files, as PEFT writes one; with the list, whatever differs from it is refused."""
    bad = copy_of(adapter, tmp_path / "adapter", lambda f: (edit(f), (f / "files.json").unlink()))
    with unchanged(bad):
        message = refused(status, *evaluate_line(tiny_model, bad, data))
    assert expected in message
    if not name.startswith("run.json"):
        listed = copy_of(adapter, tmp_path / "listed", edit)
        told = refused(status if "no config" in name else 1, *evaluate_line(tiny_model, listed, data))
        assert "files.json" in told or expected in told
    if "not finite" not in message:
        assert str(bad) in message


def test_an_adapter_of_another_model_is_4(other_model: Path, data: Path, adapter: Path, tiny_model: Path) -> None:
    message = refused(4, *evaluate_line(other_model, adapter, data))
    assert str(other_model) in message and str(tiny_model) in message and "Give the model it was trained on" in message


def test_an_adapter_made_elsewhere_is_taken_where_it_fits(
    tmp_path: Path, tiny_model: Path, data: Path, adapter: Path
) -> None:
    foreign = copy_of(adapter, tmp_path / "adapter", lambda f: (f / "run.json").unlink())
    done(*evaluate_line(tiny_model, foreign, data))
    make_model(hidden_size=48).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    assert "of a model of other sizes" in refused(1, *evaluate_line(tmp_path / "wide", foreign, data))


@pytest.mark.parametrize("name", ["none", "empty", "text.jsonl", "org/none"])
def test_an_adapter_that_is_not_there_is_2(name: str, tmp_path: Path, tiny_model: Path, data: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = {"text.jsonl": data, "org/none": Path(name)}.get(name, tmp_path / name)
    assert f"loading adapter '{path}': expected adapter_config.json" in refused(
        2, *evaluate_line(tiny_model, path, data)
    )


# --- the machine refuses ---------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Until it ends, the operating system refuses to write more than `size` bytes into any file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> list[int]:
    """Make the `call`-th call of owner.name (from 1) and all later ones raise. Returns the list of calls made."""
    original = getattr(owner, name)
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) >= call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


def assert_goes_on(
    path: Path, reference: Path, model: Path, data: Path, more: list[object] | None = None, at_least: int = 0
) -> None:
    """What a failed `precompute` left is a part of the whole, and the same command completes it."""
    whole, left = cache_bytes(reference), cache_bytes(path)
    commits = [name for name in left if name.startswith("shards/") and name.endswith(".json")]
    committed = [name for name in commits if name.count("/") == 1]
    assert len(committed) >= at_least
    assert {name: left[name] for name in committed} == {name: whole[name] for name in committed}
    assert "contents.json" not in left
    done(*precompute_line(model, data, path, *SHARDS, *(more or [])))
    assert cache_bytes(path) == whole


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


@pytest.mark.parametrize("call", [1, 2, 4, 6, 9, 15, 22])
def test_a_full_disk_at_any_sync_is_1_and_the_rerun_completes(
    call: int, tmp_path: Path, tiny_model: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, os, "fsync", call, FULL)
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *SHARDS))
    assert "No space left on device: /disk/file" in message and "run the same command again" in message
    assert_goes_on(tmp_path / "c", cache, tiny_model, data)


@pytest.mark.parametrize(("store", "backend"), [("zarr", ZarrBackend), ("arrow", ArrowBackend)])
def test_a_full_disk_in_the_store_is_1_and_keeps_the_committed_shards(
    store: str,
    backend: type,
    tmp_path: Path,
    tiny_model: Path,
    data: Path,
    caches: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = precompute_line(tiny_model, data, tmp_path / "c", *SHARDS, "--store", store)
    with monkeypatch.context() as patch:
        fail_at(patch, backend, "write", 3, FULL)
        assert "No space left on device" in refused(1, *line)
    assert len(shard_folders(tmp_path / "c")) == 2
    assert_goes_on(tmp_path / "c", caches[store], tiny_model, data, ["--store", store], at_least=2)


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("size", [200, 1000])
def test_a_write_that_the_system_refuses_is_1(
    store: str, size: int, tmp_path: Path, tiny_model: Path, data: Path, caches: dict[str, Path]
) -> None:
    """Not simulated: the write call itself fails, in the manifest or in a shard."""
    line = precompute_line(tiny_model, data, tmp_path / "c", *SHARDS, "--store", store)
    with file_size_limit(size):
        message = refused(1, *line)
    assert "File too large" in message
    assert_goes_on(tmp_path / "c", caches[store], tiny_model, data, ["--store", store])


@pytest.mark.parametrize("size", [100, 8000, 13_000])
def test_training_on_a_full_disk_is_1_and_can_be_resumed(
    size: int, tmp_path: Path, tiny_model: Path, cache: Path
) -> None:
    """Run.json, the checkpoint's adapter, or its optimizer is what cannot be written."""
    line = train_line(tiny_model, cache, tmp_path / "o", "--max-steps", 2)
    with file_size_limit(size):
        message = refused(1, *line)
    assert "reading or writing a file failed" in message
    assert not (tmp_path / "o" / "adapter_config.json").exists()
    done(*line, "--resume")
    done(*train_line(tiny_model, cache, tmp_path / "p", "--max-steps", 2))
    assert (tmp_path / "o" / ADAPTER).read_bytes() == (tmp_path / "p" / ADAPTER).read_bytes()


def test_a_file_that_ends_too_early_is_no_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says EOFError of an empty file, which click takes for ctrl-c: 130, and the same again for ever."""

    def ends_early(*_: Any) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("logitcache.training.job.read_rows", ends_early)
    make_model().save_pretrained(tmp_path / "tiny")
    line = ["train", "--model", tmp_path / "tiny", "--regularizer", "none", "--data", "x", "--out", tmp_path / "o"]
    assert "a file ends before its time (Ran out of input)" in refused(1, *line)


def test_a_cache_below_a_file_is_1(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    """Where root may write anything: a folder that nobody can make."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with unchanged(tmp_path):
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "file" / "c"))
        assert "Not a directory" in message
        refused(2, "inspect", tmp_path / "file" / "c")


@pytest.mark.parametrize(("owner", "name"), [(os, "open"), (os, "link"), (Path, "mkdir"), (os, "rename")])
def test_a_folder_that_may_not_be_written_is_1(
    owner: Any, name: str, tmp_path: Path, tiny_model: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "c"))
    with monkeypatch.context() as patch:
        if owner is os:
            for module in (local_files, lesser_systems):
                patch.setattr(module, "os", _Refusing(error, name))
        else:
            fail_at(patch, owner, name, 1, error)
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *SHARDS))
    assert f"Permission denied: {tmp_path / 'c'}" in message
    done(*precompute_line(tiny_model, data, tmp_path / "c", *SHARDS))
    assert cache_bytes(tmp_path / "c") == cache_bytes(cache)


class _Refusing:
    """The module os, one function of which raises."""

    def __init__(self, error: OSError, name: str) -> None:
        self._error, self._name = error, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise self._error
        return getattr(os, name)


@pytest.mark.parametrize("call", [1, 3])
def test_ctrl_c_in_the_middle_of_precompute_is_130_and_goes_on(
    call: int, tmp_path: Path, tiny_model: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, TransformersTeacher, "launch", call, KeyboardInterrupt())
        message = refused(130, *precompute_line(tiny_model, data, tmp_path / "c", *SHARDS))
    assert "interrupted" in message and "run the same command again" in message
    refused(5, "inspect", tmp_path / "c")
    assert_goes_on(tmp_path / "c", cache, tiny_model, data, at_least=call - 2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_1_and_the_rerun_completes(
    error: Exception, tmp_path: Path, tiny_model: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, TransformersTeacher, "launch", 3, error)
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *SHARDS))
    assert "memory ran out" in message and "--batch-tokens" in message
    assert_goes_on(tmp_path / "c", cache, tiny_model, data, at_least=1)


def test_a_defect_of_the_program_keeps_its_traceback(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, TransformersTeacher, "launch", 1, RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        run([str(a) for a in precompute_line(tiny_model, data, tmp_path / "c")])
