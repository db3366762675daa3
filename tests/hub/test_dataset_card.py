"""What goes out with a cache besides its numbers: the card, licences, names."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from support import stub_hub
from support.cli_harness import copy_of, done, edit_json, precompute, refused, shard_folders, text_data
from support.storage_samples import SHARDS, make_manifest, make_shards, uneven_shards, write_cache
from support.stub_hub import Hub

from logitcache.hub.dataset_card import UNKNOWN, Licence, make_card, public_name
from logitcache.storage import CacheWriter, LogitCache
from logitcache.storage.manifest import features_of

pytest_plugins = ["support.hub_fixtures"]

REPO = "someone/a-cache"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
"""huggingface_hub 2.4's own, of how it calls its HTTP client."""


def card_of(hub: Hub, repo_id: str = REPO) -> DatasetCard:
    return DatasetCard(hub.files(repo_id)["README.md"].decode())


def test_the_card_says_what_the_cache_is(cache: Path, hub: Hub) -> None:
    line = ["--model-license", "llama3.1", "--data-license", "cc-by-4.0", "--base-model", "meta/Llama-8B"]
    done("push", cache, REPO, *line)
    card = card_of(hub)
    assert card.data.license == ["llama3.1", "cc-by-4.0"]
    assert card.data.size_categories == "n<1K"
    assert "logitcache" in card.data.tags and card.data.to_dict()["base_model"] == "meta/Llama-8B"
    manifest = json.loads((cache / "manifest.json").read_text())["body"]
    opened = LogitCache.open(cache)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, flags=re.MULTILINE))
    samples = list(opened.samples())
    num_bytes = sum(f.stat().st_size for folder in shard_folders(cache) for f in folder.rglob("*") if f.is_file())
    assert rows["fingerprint of the weights"] == f"`{manifest['model']['weights']}`"
    assert rows["fingerprint of the tokenizer"] == f"`{manifest['tokenizer']['fingerprint']}`"
    assert rows["alternatives a position (top_k)"] == "5"
    assert rows["tail"] == "one mass, split into 4 groups of the vocabulary"
    assert rows["precision"] == "exact; maximum error 0 nats"
    assert rows["positions"] == str(sum(len(s.logprobs.positions) for s in samples))
    assert rows["samples"] == "5 of at most 4,096 tokens"
    assert rows["tokens"].startswith(f"{sum(len(s.token_ids) for s in samples)}; ")
    assert rows["bytes"].startswith(f"{num_bytes:,}; ")
    assert rows["format"] == f"version 2, {manifest['store']} store"
    kept = float(np.mean(np.concatenate([s.logprobs.kept_mass() for s in samples])))
    assert rows["mass kept of what is not the label's"] == f"{100 * kept:.2f} % on average"
    assert f"logitcache pull {REPO} cache/" in card.text and "--model meta/Llama-8B --cache cache/" in card.text
    assert "fall under its licence" in card.text and "The cache contains the text itself" in card.text


def test_the_card_says_how_the_base_was_held_and_what_its_tail_is(tmp_path: Path) -> None:
    plain = make_manifest("arrow")
    capture = replace(plain.capture, num_tail_samples=4)
    model = replace(plain.model, quantization="4bit")
    special = replace(plain, model=model, capture=capture, reader_features=features_of(capture, model))
    for name, manifest, num_draws, held, tail in (
        ("plain", plain, 0, "", "one mass"),
        ("special", special, 4, " on 4bit weights", "one mass, 4 draws from it"),
    ):
        with CacheWriter(tmp_path / name, manifest) as writer:
            writer.commit(uneven_shards(3, None, num_draws)[2])
            writer.finalize()
        card = make_card(LogitCache.open(tmp_path / name), REPO, "base", Licence(), Licence())
        assert f"run in {plain.model.dtype}{held} with " in card and f"| tail | {tail} |" in card


def test_nothing_of_a_local_path_goes_out(cache: Path, tmp_path: Path, hub: Hub) -> None:
    done("push", cache, REPO)
    sent = hub.files(REPO)
    for text in (b"secret-project", b"/home/", str(tmp_path).encode(), stub_hub.TOKEN.encode(), b"private"):
        assert not any(text in data for data in sent.values()), text
    assert b"llama-8b" in sent["README.md"] and b'"model_name":"llama-8b"' in sent["manifest.json"]
    assert "base_model" not in card_of(hub).data.to_dict()
    text = card_of(hub).text
    assert f"Licence of the base model: {UNKNOWN}" in text and f"Licence of the data: {UNKNOWN}" in text
    assert card_of(hub).data.license == "unknown"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/a/b/model/", "model"),
        ("models/llama", "llama"),
        ("~/x", "x"),
        ("C:\\Users\\me\\model", "model"),
        ("https://user:password@host/model", "model"),
        ("gpt2", "gpt2"),
        ("x|y\n---\nlicense: mit", "x_y_---_license_ mit"),
        ("/", "unnamed"),
    ],
)
def test_only_the_last_part_of_a_name_is_said(name: str, said: str) -> None:
    assert public_name(name, None) == said
    assert public_name(name, "a/b") == "a/b"


@pytest.mark.usefixtures("hub")
def test_a_name_that_was_loaded_from_the_hub_is_said_whole() -> None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / "models--meta--Llama-8B"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert public_name("meta/Llama-8B", None) == "meta/Llama-8B"
    assert public_name("meta/Llama-9B", None) == "Llama-9B"


def test_the_licence_is_that_of_the_card_beside_the_very_weights(tiny_model: Path, tmp_path: Path, hub: Hub) -> None:
    front = {"license": "other", "license_name": "tiny-1", "license_link": "https://example.org/LICENSE"}
    base = copy_of(tiny_model, tmp_path / "base")
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n\n# Tiny\n")
    precompute(base, text_data(tmp_path), tmp_path / "cache")
    err = done("push", tmp_path / "cache", REPO).err
    assert "licence of the data is not known" in err and "licence of the base" not in err
    card = card_of(hub)
    assert card.data.license == ["other", "unknown"]
    assert card.data.to_dict()["license_name"] == "tiny-1"
    assert "Licence of the base model: other (tiny-1, https://example.org/LICENSE)" in card.text
    edit_json(base / "config.json", lambda c: c.update(hidden_act="gelu"))  # another model in the same folder
    assert "licence of the base is not known" in done("push", tmp_path / "cache", "another/name").err
    assert f"Licence of the base model: {UNKNOWN}" in card_of(hub, "another/name").text
    done("push", tmp_path / "cache", REPO, "--model-license", "mit", "--data-license", "mit")
    assert card_of(hub).data.license == "mit"


def test_licences_are_carried_over_from_the_card_that_is_there(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO, "--model-license", "llama3.1", "--data-license", "cc-by-4.0")
    write_cache(cache, "arrow", [*SHARDS, *make_shards(8, [[12, 13]])])
    assert "not known" not in done("push", cache, REPO).err
    assert card_of(hub).data.license == ["llama3.1", "cc-by-4.0"]
    done("push", cache, REPO, "--data-license", "mit")
    assert card_of(hub).data.license == ["llama3.1", "mit"]
    done("pull", REPO, tmp_path / "back")
    done("push", tmp_path / "back", "another/name")
    assert card_of(hub, "another/name").data.license == "unknown"  # the card in a folder is anybody's
    hub.put(REPO, {"README.md": b"---\nlicense: gpl-3.0\n---\n# Written by hand\n"})
    assert "licence of the base is not known" in done("push", cache, REPO).err


def test_the_card_of_other_weights_of_the_same_architecture_does_not_count(
    tiny_model: Path, other_model: Path, tmp_path: Path, hub: Hub
) -> None:
    base = copy_of(tiny_model, tmp_path / "base")
    precompute(base, text_data(tmp_path), tmp_path / "cache")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copy(other_model / "model.safetensors", base)
    done("push", tmp_path / "cache", REPO)
    assert f"Licence of the base model: {UNKNOWN}" in card_of(hub).text


@pytest.mark.parametrize("text", ["Apache 2.0", "mit\nx: y", "MIT", "/etc"])
def test_a_licence_is_an_identifier(text: str, tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    assert "expected an identifier" in refused(2, "push", cache, REPO, "--model-license", text)
    assert hub.requests == []


def test_the_card_in_the_folder_of_a_cache_is_not_trusted(cache: Path, hub: Hub) -> None:
    """Whoever the cache was pulled from wrote it: a licence that it states is not passed on."""
    front = "logitcache: {model_license: [mit], data_license: [cc0-1.0]}"
    (cache / "README.md").write_text(f"---\n{front}\n---\n# Of a stranger\n", encoding="utf-8")
    done("push", cache, REPO)
    said = hub.files(REPO)["README.md"].decode()
    assert "mit" not in card_of(hub).data.license and "cc0-1.0" not in said and "Of a stranger" not in said
