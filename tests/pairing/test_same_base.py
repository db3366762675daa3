"""One base in many spellings is one base, and what changes its distributions is refused by its field: precompute goes
on with the cache, and the cache is paired with the base, or neither."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_harness import cache_bytes, copy_of, edit_json
from support.tiny_model import CHAT_TEMPLATE, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from logitcache import CaptureSettings, Objective, precompute
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, distinct, make_samples
from logitcache.errors import NotTheBase, UnsupportedModel
from logitcache.models.loading import Base, find_model, load_base, load_tokenizer, tokenizer_identity
from logitcache.models.same_base import config_differences, described_differences
from logitcache.pairing import step_zero
from logitcache.pairing.targets import samples_of
from logitcache.pairing.view import CacheView
from logitcache.storage import IdentityMismatch, LogitCache, verify
from logitcache.storage.configs import config_text
from logitcache.storage.identity import weights_fingerprint

WEIGHTS = "model.safetensors"
SETTINGS = CaptureSettings(top_k=4, max_length=64)
TEXT = [{"text": f"{i} some text <pad> of its own"} for i in range(3)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(3)
]
ROWS = {"text": TEXT, "chats": CHATS, "both": [*TEXT, *CHATS]}

Edit = Callable[[Path], object]


def gemma() -> Any:
    """With a soft cap on its logits, and a window of its attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=260, sliding_window=16, **sizes, **heads)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "plain": make_model,
    "tied": lambda: make_model(tie_word_embeddings=True),
    "gemma": gemma,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny bases, by name."""
    root = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A JSONL file of each kind of rows."""
    root = tmp_path_factory.mktemp("rows")
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: root / f"{name}.jsonl" for name in ROWS}


@pytest.fixture(scope="module")
def caches(
    tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], data: dict[str, Path]
) -> dict[tuple[str, str], Path]:
    """Of each base a cache of text, and of the plain one also of the other rows. To be read only."""
    root = tmp_path_factory.mktemp("caches")
    made = [(name, "text") for name in bases] + [("plain", "chats"), ("plain", "both")]
    for name, rows in made:
        precompute(str(bases[name]), str(data[rows]), root / f"{name}-{rows}", SETTINGS)
    return {pair: root / "-".join(pair) for pair in made}


def load(folder: Path) -> Base:
    return load_base(find_model(str(folder)), "auto", torch.device("cpu"))


def samples(folder: Path, data: Path) -> list[Sample]:
    return make_samples(read_rows(str(data)), load_tokenizer(find_model(str(folder))), SETTINGS.max_length, 260).samples


def pair(folder: Path, cache: Path, data: Path | None) -> None:
    """All that training asks before step 1; without data on the samples of the cache."""
    opened, base = LogitCache.open(cache), load(folder)
    view = CacheView.paired(opened, base, Objective(), tokenizer=load_tokenizer(base.source))
    chosen = samples_of(opened) if data is None else samples(folder, data)
    view.require(chosen)
    view.step_zero(base.model, chosen)


def config(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda folder: edit_json(folder / "config.json", change)


def weights(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **metadata})

    return edit


def tokenizer(change: Callable[[Any], object]) -> Edit:
    def edit(folder: Path) -> None:
        loaded = AutoTokenizer.from_pretrained(folder)
        change(loaded)
        loaded.save_pretrained(folder)

    return edit


def rules(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda folder: edit_json(folder / "tokenizer.json", change)


def template(text: str) -> Edit:
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def set_all(**values: Any) -> Callable[[Any], object]:
    return lambda loaded: [setattr(loaded, name, value) for name, value in values.items()]


def old_rope(fields: dict[str, Any]) -> None:
    """As transformers 4 wrote it."""
    fields["rope_theta"], fields["rope_scaling"] = fields.pop("rope_parameters")["rope_theta"], None


def save_again(folder: Path, **how: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, **how)


def in_shards(folder: Path) -> None:
    save_again(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def pad_and_truncate(loaded: PreTrainedTokenizerFast) -> None:
    loaded(["a", "a longer one"], padding="max_length", truncation=True, max_length=5)
    assert loaded.backend_tokenizer.padding and loaded.backend_tokenizer.truncation


def swap_dtype(fields: dict[str, Any]) -> None:
    fields["torch_dtype"] = fields.pop("dtype")


def head_again(tensors: dict[str, torch.Tensor]) -> None:
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)


def one_unit(tensors: dict[str, torch.Tensor]) -> None:
    row = tensors["model.layers.0.mlp.up_proj.weight"][0]
    row[0] = torch.nextafter(row[0], torch.tensor(torch.inf))


def swap_tokens(fields: dict[str, Any]) -> None:
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


SAME: dict[str, tuple[str, Edit]] = {
    "saved again": ("plain", save_again),
    "saved in shards": ("plain", in_shards),
    "another transformers_version": ("plain", config(lambda c: c.update(transformers_version="4.57.0"))),
    "torch_dtype": ("plain", config(swap_dtype)),
    "rope_theta of transformers 4": ("plain", config(old_rope)),
    "rope_theta of transformers 4, gemma": ("gemma", config(old_rope)),
    "a default left out": ("plain", config(lambda c: c.pop("rms_norm_eps"))),
    "use_cache": ("plain", config(lambda c: c.update(use_cache=False))),
    "_name_or_path": ("plain", config(lambda c: c.update(_name_or_path="/home/me/model"))),
    "special tokens": ("plain", config(lambda c: c.update(eos_token_id=[2, 3], pad_token_id=None))),
    "attention_dropout": ("plain", config(lambda c: c.update(attention_dropout=0.1))),
    "padding_side": ("plain", tokenizer(set_all(padding_side="left", model_max_length=77))),
    "no pad_token": ("plain", tokenizer(set_all(pad_token=None))),
    "a pad_token of its own": ("plain", tokenizer(lambda t: t.add_special_tokens({"pad_token": "<|my_pad|>"}))),
    "padded and truncated": ("plain", tokenizer(pad_and_truncate)),
    "a tied head stored": ("tied", weights(head_again)),
    "metadata": ("plain", weights(lambda _: None, note="x")),
    "another template": ("plain", template("{{ messages }}")),
    "no template": ("plain", lambda folder: (folder / "chat_template.jinja").unlink()),
}

DIFFERENT: dict[str, tuple[str, Edit, str]] = {
    "rope_theta": (
        "plain",
        config(lambda c: c["rope_parameters"].update(rope_theta=5e5)),
        "rope_parameters.rope_theta",
    ),
    "rope_scaling": (
        "plain",
        config(lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0)),
        "rope_parameters.factor: ",
    ),
    "a weight": ("plain", weights(one_unit), "weights: "),
    "rms_norm_eps": ("plain", config(lambda c: c.update(rms_norm_eps=1e-5)), "config.rms_norm_eps: "),
    "soft cap": ("gemma", config(lambda c: c.update(final_logit_softcapping=20.0)), "final_logit_softcapping: "),
    "window": ("gemma", config(lambda c: c.update(sliding_window=8)), "sliding_window: "),
    "vocabulary": ("plain", rules(swap_tokens), "fingerprint: "),
    "normalizer": ("plain", rules(lambda r: r.update(normalizer={"type": "Lowercase"})), "fingerprint: "),
    "pre-tokenizer": ("plain", rules(lambda r: r["pre_tokenizer"].update(add_prefix_space=True)), "fingerprint: "),
    "end of text": ("plain", tokenizer(set_all(eos_token="a")), "fingerprint: "),
    "untied": (
        "tied",
        lambda f: [weights(other_head)(f), config(lambda c: c.update(tie_word_embeddings=False))(f)],
        "tie_word_embeddings: ",
    ),
    "tied, with another head": ("plain", config(lambda c: c.update(tie_word_embeddings=True)), "tie_word_embeddings"),
    "transformers_weights": (
        "plain",
        lambda f: [
            shutil.copy(f / WEIGHTS, f / "other.safetensors"),
            config(lambda c: c.update(transformers_weights="other.safetensors"))(f),
        ],
        "transformers_weights",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_base_goes_on_with_its_cache(
    name: str, tmp_path: Path, bases: dict[str, Path], caches: dict[tuple[str, str], Path], data: dict[str, Path]
) -> None:
    of, edit = SAME[name]
    folder, cache = copy_of(bases[of], tmp_path / "model", edit), copy_of(caches[of, "text"], tmp_path / "c")
    before = cache_bytes(cache)
    report = precompute(str(folder), str(data["text"]), cache, SETTINGS)
    assert report.is_final and report.num_samples == 0 and report.num_samples_found == len(TEXT)
    assert cache_bytes(cache) == before
    pair(folder, cache, data["text"])
    pair(folder, cache, None)


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_base_is_refused_by_its_field(
    name: str, tmp_path: Path, bases: dict[str, Path], caches: dict[tuple[str, str], Path], data: dict[str, Path]
) -> None:
    of, edit, field = DIFFERENT[name]
    folder, cache = copy_of(bases[of], tmp_path / "model", edit), copy_of(caches[of, "text"], tmp_path / "c")
    before = cache_bytes(cache)
    for use in (
        lambda: precompute(str(folder), str(data["text"]), cache, SETTINGS),
        lambda: pair(folder, cache, data["text"]),
    ):
        with pytest.raises((IdentityMismatch, UnsupportedModel), match=field):
            use()
        assert cache_bytes(cache) == before


def test_a_cache_gains_from_a_base_that_is_spelt_otherwise(
    tmp_path: Path, bases: dict[str, Path], caches: dict[tuple[str, str], Path], data: dict[str, Path]
) -> None:
    """The manifest stays as it was, and what comes from another cache may be spelt otherwise too."""
    folder = copy_of(bases["plain"], tmp_path / "model", config(old_rope))
    cache, manifest = copy_of(caches["plain", "text"], tmp_path / "c"), "manifest.json"
    before = (cache / manifest).read_bytes()
    report = precompute(str(folder), str(data["both"]), cache, SETTINGS, samples_from=caches["plain", "chats"])
    assert (report.num_samples_found, report.num_samples_copied, report.num_samples) == (3, 3, 0)
    assert (cache / manifest).read_bytes() == before and verify(cache).is_intact
    assert load(folder).identity.config != LogitCache.open(cache).manifest.model.config


# --- chat templates --------------------------------------------------------------------------------------------------

OTHER = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NOTED = CHAT_TEMPLATE + "{# a note #}"
"""Another template that renders the same."""


@pytest.mark.parametrize("text", [OTHER, NOTED], ids=["other", "noted"])
def test_another_template_is_refused_where_samples_were_rendered(
    text: str, tmp_path: Path, bases: dict[str, Path], caches: dict[tuple[str, str], Path], data: dict[str, Path]
) -> None:
    """Also one that renders the same ids: nobody can tell of the next chat."""
    folder, cache = (
        copy_of(bases["plain"], tmp_path / "m", template(text)),
        copy_of(caches["plain", "chats"], tmp_path / "c"),
    )
    before = cache_bytes(cache)
    for use in (
        lambda: precompute(str(folder), str(data["chats"]), cache, SETTINGS),
        lambda: pair(folder, cache, data["chats"]),
        lambda: pair(folder, cache, None),
    ):
        with pytest.raises(IdentityMismatch, match="chat_template: "):
            use()
        assert cache_bytes(cache) == before


def test_chats_of_another_template_are_not_copied(
    tmp_path: Path, bases: dict[str, Path], caches: dict[tuple[str, str], Path], data: dict[str, Path]
) -> None:
    """Where some would be found; of one that renders other ids none is."""
    folders = {
        text: copy_of(bases["plain"], tmp_path / name, template(text)) for name, text in (("n", NOTED), ("o", OTHER))
    }
    with pytest.raises(IdentityMismatch, match="chat_template: "):
        precompute(
            str(folders[NOTED]), str(data["chats"]), tmp_path / "c", SETTINGS, samples_from=caches["plain", "chats"]
        )
    report = precompute(
        str(folders[OTHER]), str(data["both"]), tmp_path / "d", SETTINGS, samples_from=caches["plain", "both"]
    )
    assert (report.num_samples_copied, report.num_samples) == (3, 3)
    kinds = {(bool(s.commit.chat_template), s.commit.num_samples) for s in LogitCache.open(tmp_path / "d").shards()}
    assert kinds == {(True, 3), (False, 3)}


def test_text_goes_with_any_template(
    tmp_path: Path, bases: dict[str, Path], caches: dict[tuple[str, str], Path], data: dict[str, Path]
) -> None:
    """Also of a cache that holds chats of another one, which are in shards of their own."""
    folder = copy_of(bases["plain"], tmp_path / "model", template(OTHER))
    cache = copy_of(caches["plain", "both"], tmp_path / "c")
    kinds = {bool(shard.commit.chat_template): shard.commit.num_samples for shard in LogitCache.open(cache).shards()}
    assert kinds == {True: 3, False: 3} and len(LogitCache.open(cache).chat_templates()) == 1
    pair(folder, cache, data["text"])
    assert precompute(str(folder), str(data["text"]), cache, SETTINGS).num_samples_found == 3
    with pytest.raises(IdentityMismatch, match="chat_template: "):
        pair(folder, cache, data["chats"])
    with pytest.raises(IdentityMismatch, match="chat_template: "):
        pair(folder, cache, None)


def test_tokens_that_stand_as_text_too_were_not_rendered() -> None:
    rows = [("a", {"messages": CHATS[0]["messages"]})]
    chat = make_samples(rows, make_tokenizer(), 64, 260).samples[0]
    assert chat.chat_template
    ids = [("b", {"input_ids": chat.token_ids.tolist()})]
    plain = make_samples(ids, make_tokenizer(), 64, 260).samples[0]
    for both in ([chat, plain], [plain, chat], [chat, chat, plain]):
        assert [sample.chat_template for sample in distinct(both)] == [""]
    assert [sample.chat_template for sample in distinct([chat, chat])] == [chat.chat_template]


# --- TF32 -------------------------------------------------------------------------------------------------------------


def test_tf32_is_recorded_and_named(
    tmp_path: Path, bases: dict[str, Path], data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache goes on as it was begun; training may differ, and is told where that may be why there is no match."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        precompute(str(bases["plain"]), str(data["text"]), tmp_path / "c", SETTINGS)
    finally:
        torch.set_float32_matmul_precision(before)
    assert LogitCache.open(tmp_path / "c").manifest.model.tf32
    with pytest.raises(IdentityMismatch, match=r"model\.tf32: False here, True there"):
        precompute(str(bases["plain"]), str(data["text"]), tmp_path / "c", SETTINGS)
    pair(bases["plain"], tmp_path / "c", data["text"])
    monkeypatch.setattr(step_zero, "KL_FLOAT32_NATS", -1.0)
    with pytest.raises(NotTheBase, match="What differs: tf32: True in the cache, False in the model"):
        pair(bases["plain"], tmp_path / "c", data["text"])


# --- what the comparison itself says ----------------------------------------------------------------------------------


def text_of(**fields: Any) -> str:
    return config_text({"model_type": "llama", **fields})


def test_configs_differ_by_what_they_are_loaded_as() -> None:
    assert not config_differences(text_of(), text_of(rope_theta=10000.0, rms_norm_eps=1e-6, hidden_size=4096))
    found = config_differences(text_of(), text_of(rope_scaling={"type": "linear", "factor": 4.0}))
    assert found.keys() >= {"rope_parameters.factor", "rope_parameters.rope_type"}
    assert config_differences(text_of(), text_of(not_of_llama=1)).keys() == {"not_of_llama"}
    assert "model_type" in config_differences(text_of(), config_text({"model_type": "mistral"}))


def test_a_description_of_a_job_differs_in_the_fields_of_its_model() -> None:
    model = {"weights": "w", "config": text_of()}
    mine = {"settings": 1, "model": model}
    assert not described_differences(mine, {**mine, "model": {**model, "config": text_of(rms_norm_eps=1e-6)}}, "model")
    other = {"settings": 2, "model": {**model, "config": text_of(rms_norm_eps=1e-3)}}
    assert described_differences(mine, other, "model") == [
        "model config.rms_norm_eps: 1e-06 here, 0.001 there",
        "settings",
    ]
    assert described_differences(mine, {"settings": 1}, "model") == ["model"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"model_type":7}', '{"model_type":"no such"}', "[" * 100_000])
def test_what_cannot_be_loaded_is_compared_as_it_is_spelt(text: str) -> None:
    assert not config_differences(text, text)
    assert config_differences(text_of(), text) and config_differences(text, text_of())


def test_padding_counts_where_positions_are_numbered_from_it() -> None:
    for kind, counts in (("llama", False), ("roberta", True)):
        texts = [config_text({"model_type": kind, "pad_token_id": token}) for token in (1, 2)]
        assert bool(config_differences(*texts)) == counts


def test_a_config_over_the_bound_is_refused(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = copy_of(bases["plain"], tmp_path / "model", config(lambda c: c.update(notes="x" * 2**18)))
    with pytest.raises(UnsupportedModel, match="at most 262,144 bytes"):
        load(folder)


def test_heads_are_the_embedding_again_or_their_own(tmp_path: Path, bases: dict[str, Path]) -> None:
    once = weights_fingerprint(bases["tied"])
    assert weights_fingerprint(copy_of(bases["tied"], tmp_path / "again", weights(head_again))) == once
    assert weights_fingerprint(copy_of(bases["tied"], tmp_path / "other", weights(other_head))) != once


def test_only_padding_is_left_out_of_added_tokens() -> None:
    plain, padded, more = make_tokenizer(), make_tokenizer(), make_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    more.add_tokens(["[PADDLE]"])
    assert tokenizer_identity(plain) == tokenizer_identity(padded) != tokenizer_identity(more)
