"""push and pull against a Hub on localhost: real bytes through huggingface_hub, there and back."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from support import stub_hub
from support.cli_harness import (
    copy_of,
    done,
    flip_byte,
    precompute,
    refused,
    shard_folders,
    snapshot,
    text_data,
    train_line,
    unchanged,
)
from support.storage_samples import SHARDS, cache_bits, make_manifest, make_sample, make_shards, write_cache
from support.stub_hub import Hub

from logitcache.hub import transfer as hub_module
from logitcache.storage import CacheWriter, LogitCache, merge

pytest_plugins = ["support.hub_fixtures"]

REPO = "someone/a-cache"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
"""huggingface_hub 2.4's own, of how it calls its HTTP client."""


def named_files(cache: Path) -> set[str]:
    """What contents.json names, from docs/format.md."""
    contents = json.loads((cache / "contents.json").read_text())["body"]
    names = {"manifest.json", "contents.json", contents["index"]["name"], "token_groups.npy"}
    for entry in contents["shards"]:
        body = json.loads((cache / f"shards/{entry['unit']}.json").read_text())["body"]
        canonical = json.dumps(body["files"], sort_keys=True, separators=(",", ":")).encode()
        folder = f"shards/{entry['unit']}-{hashlib.blake2b(canonical, digest_size=16).hexdigest()[:16]}"
        names |= {f"shards/{entry['unit']}.json"} | {f"{folder}/{file['name']}" for file in body["files"]}
    return names


# --- there and back --------------------------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_pushed(cache: Path, tmp_path: Path, hub: Hub) -> None:
    with unchanged(cache):
        pushed = done("push", cache, REPO)
    assert f"Pushed {cache} to {hub.url}/datasets/{REPO}, commit " in pushed.out
    assert "The repository is public" in pushed.err
    assert set(hub.files(REPO)) == {*named_files(cache), "README.md", ".gitattributes"}
    same = named_files(cache) - {"manifest.json", "contents.json"}
    assert all(hub.files(REPO)[name] == (cache / name).read_bytes() for name in same)
    back = tmp_path / "back"
    pulled = done("pull", REPO, back)
    assert pulled.out.startswith(f"Pulled {REPO} to {back}, commit ") and "2 shards" in pulled.out
    assert done("verify", back).out.startswith(f"{back} is intact: 2 shards, 5 samples")
    assert cache_bits(back) == cache_bits(cache)
    assert {p.relative_to(back).as_posix() for p in back.rglob("*") if p.is_file()} == {
        *named_files(cache),
        "README.md",
    }
    assert not (tmp_path / "back.pulling").exists()
    assert LogitCache.open(back).contents_checksum == LogitCache.open(cache).contents_checksum
    assert set(hub.tokens) == {f"Bearer {stub_hub.TOKEN}"}, hub.tokens


@pytest.mark.usefixtures("hub")
def test_a_model_trains_from_a_pulled_cache_as_from_its_own(tiny_model: Path, tmp_path: Path) -> None:
    precompute(tiny_model, text_data(tmp_path), tmp_path / "cache", "--shard-positions", 100)
    done("push", tmp_path / "cache", REPO)
    done("pull", REPO, tmp_path / "back")
    for name in ("cache", "back"):
        done(*train_line(tiny_model, tmp_path / name, tmp_path / f"of-{name}"))
    logs = [(tmp_path / f"of-{name}/train_log.jsonl").read_text().splitlines() for name in ("cache", "back")]
    losses = [[(row.get("loss"), row.get("kl")) for row in map(json.loads, log)] for log in logs]
    assert losses[0] == losses[1] and losses[0]
    weights = [(tmp_path / f"of-{name}/adapter_model.safetensors").read_bytes() for name in ("cache", "back")]
    assert weights[0] == weights[1]


def test_commands_of_the_page_run(tiny_model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model)
    precompute(Path("base"), text_data(tmp_path), Path("cache"))
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "share.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split()[1:] for block in blocks for line in block.splitlines()]
    assert [line[0] for line in lines] == ["push", "push", "pull", "train", "verify"]
    for line in lines:
        done(*line, *(["--max-steps", 1] if line[0] == "train" else []))
    assert hub.repos["owner/name"].private


def test_processes_with_nothing_but_the_environment(tmp_path: Path) -> None:
    """As a user has it: HF_ENDPOINT, HF_TOKEN, no patches."""
    write_cache(tmp_path / "cache", "arrow", SHARDS)
    with stub_hub.running() as found:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            **{"HF_ENDPOINT": found.url, "HF_TOKEN": stub_hub.TOKEN, "HF_HOME": str(tmp_path / "home")},
            **{"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
        }
        for line in (["push", str(tmp_path / "cache"), REPO, "--private"], ["pull", REPO, str(tmp_path / "back")]):
            ran = subprocess.run(
                [sys.executable, "-m", "logitcache", *line], env=environment, capture_output=True, text=True
            )
            assert ran.returncode == 0, ran.stderr
            assert "public" not in ran.stderr and "Traceback" not in ran.stderr
        assert found.repos[REPO].private
    assert cache_bits(tmp_path / "back") == cache_bits(tmp_path / "cache")


def test_a_grown_cache_sends_only_what_is_new(tmp_path: Path, hub: Hub) -> None:
    shards = make_shards(5, [[30, 9], [17, 12]])
    cache = write_cache(tmp_path / "cache", "zarr", shards[:1])
    done("push", cache, REPO)
    old = hub.files(REPO)
    hub.stored.clear()
    write_cache(cache, "zarr", shards)
    out = done("push", cache, REPO).out
    new = hub.files(REPO)
    expected = {
        hashlib.sha256(data).hexdigest() for name, data in new.items() if name not in old and name.endswith("/c/0")
    }
    indices = {name for name in new if name.startswith("index-")}
    assert len(indices) == 1 and not indices & old.keys()
    expected |= {hashlib.sha256(new[name]).hexdigest() for name in indices}
    assert set(hub.stored) >= expected
    assert not set(hub.stored) & {hashlib.sha256(data).hexdigest() for data in old.values()}
    assert re.search(rf"of which {len(new.keys() - old.keys())} were new", out)
    done("pull", REPO, tmp_path / "back")
    assert cache_bits(tmp_path / "back") == cache_bits(cache)


def test_shards_behind_a_link_are_pushed_as_files(cache: Path, tmp_path: Path, hub: Hub) -> None:
    done("push", cache, REPO)
    sent = hub.files(REPO)
    shutil.move(cache / "shards", tmp_path / "larger disk")
    (cache / "shards").symlink_to(tmp_path / "larger disk")
    hub.stored.clear()
    assert "of which 0 were new" in done("push", cache, REPO).out
    done("push", cache, "someone/again")
    assert {n: d for n, d in hub.files("someone/again").items() if n != "README.md"} == {
        n: d for n, d in sent.items() if n != "README.md"
    }
    done("pull", "someone/again", tmp_path / "back")
    assert cache_bits(tmp_path / "back") == cache_bits(cache) and not (tmp_path / "back" / "shards").is_symlink()


def test_a_link_below_is_not_pushed(cache: Path, tmp_path: Path, hub: Hub) -> None:
    folder = shard_folders(cache)[0]
    shutil.move(folder, tmp_path / "kept")
    folder.symlink_to(tmp_path / "kept")
    assert "symbolic link" in refused(2, "push", cache, REPO)
    assert hub.requests == []


def test_of_what_lies_there_only_older_indexes_go(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS[:1])
    done("push", cache, REPO)
    (older,) = (name for name in hub.files(REPO) if name.startswith("index-"))
    theirs = {"index-of-authors.npy": b"theirs", "shards/notes.txt": b"theirs", "notes.md": b"theirs"}
    hub.put(REPO, theirs)
    write_cache(cache, "arrow", SHARDS)
    done("push", cache, REPO)
    assert {name: hub.files(REPO).get(name) for name in theirs} == theirs
    assert older not in hub.files(REPO)


def test_pushing_the_same_again_changes_nothing(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    commits = len(hub.repos[REPO].commits)
    hub.stored.clear()
    assert "of which 0 were new" in done("push", cache, REPO).out
    assert len(hub.repos[REPO].commits) == commits and hub.stored == []


def test_many_files_are_many_commits_and_contents_come_last(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_FILES_A_COMMIT", 3)
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    trees = list(hub.repos[REPO].commits.values())
    assert len(trees) == 1 + 3 + 1  # the empty repository; an index, two commits and four files of shards; the heads
    assert [("contents.json" in tree, "manifest.json" in tree) for tree in trees] == [(False, False)] * 4 + [
        (True,) * 2
    ]


def test_an_interrupted_push_goes_on(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_FILES_A_COMMIT", 3)
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    commit, calls = HfApi.create_commit, []

    def fail_once(self: HfApi, *arguments: Any, **settings: Any) -> Any:
        calls.append(settings)
        if len(calls) == 3:
            raise ConnectionError("the line is dead")
        return commit(self, *arguments, **settings)

    monkeypatch.setattr(HfApi, "create_commit", fail_once)
    assert "(the line is dead)" in refused(1, "push", cache, REPO)
    refused(2, "pull", REPO, tmp_path / "back")  # without contents it is not there
    hub.stored.clear()
    done("push", cache, REPO)
    assert len(hub.stored) <= 1
    done("pull", REPO, tmp_path / "back")
    assert cache_bits(tmp_path / "back") == cache_bits(cache)


def test_a_branch_is_made_and_pulled_by_name_or_commit(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO, "--revision", "small")
    assert "contents.json" not in hub.files(REPO) and "contents.json" in hub.files(REPO, "small")
    assert f"found no manifest.json and contents.json in commit {hub.repos[REPO].branches['main']}" in refused(
        2, "pull", REPO, tmp_path / "none"
    )
    done("pull", REPO, tmp_path / "a", "--revision", "small")
    done("pull", REPO, tmp_path / "b", "--revision", hub.repos[REPO].branches["small"])
    assert cache_bits(tmp_path / "a") == cache_bits(tmp_path / "b") == cache_bits(cache)
    assert "no such data set or revision" in refused(2, "pull", REPO, tmp_path / "c", "--revision", "nothing")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_damaged_cache_is_refused_before_anything_is_asked_or_sent(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "zarr", SHARDS)
    for file in ("alternative_ids/c/0/0", "zarr.json"):
        damaged = copy_of(cache, tmp_path / f"damaged-{file[:4]}")
        flip_byte(shard_folders(damaged)[1] / file)
        assert "expected a cache without damage, found" in refused(3, "push", damaged, REPO)
    assert hub.requests == []


def test_an_unfinished_cache_and_no_cache_are_refused(tmp_path: Path, hub: Hub) -> None:
    with CacheWriter(tmp_path / "cache", make_manifest("arrow")) as writer:
        writer.commit(SHARDS[0])
    assert "was interrupted after 1 committed shards" in refused(5, "push", tmp_path / "cache", REPO)
    refused(2, "push", tmp_path / "none", REPO)
    assert "expected a local folder" in refused(2, "push", "memory://somewhere/cache", REPO)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["cache", "a/b/c", "../x", "a/b c", ""])
def test_a_name_that_the_hub_cannot_have_is_refused(repo_id: str, tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    assert "owner/name" in refused(2, "push", cache, repo_id)
    assert "owner/name" in refused(2, "pull", repo_id, tmp_path / "back")
    assert hub.requests == []


def test_another_cache_is_not_overwritten(tmp_path: Path, hub: Hub) -> None:
    mine = write_cache(tmp_path / "mine", "arrow", SHARDS)
    done("push", mine, REPO)
    before = hub.files(REPO)
    narrower = make_manifest("arrow", top_k=4)
    other = write_cache(tmp_path / "other", "arrow", [[make_sample(np.random.default_rng(9), 20, top_k=4)]], narrower)
    assert "capture.top_k: 4 here, 5 on the Hub" in refused(4, "push", other, REPO)
    fewer = write_cache(tmp_path / "fewer", "arrow", SHARDS[:1])
    assert "has 1 shards that this one lacks" in refused(1, "push", fewer, REPO)
    assert hub.files(REPO) == before
    more = make_shards(8, [[12, 13]])
    write_cache(tmp_path / "more", "arrow", more)
    merge([mine, tmp_path / "more"], tmp_path / "all")
    done("push", tmp_path / "all", REPO)
    done("pull", REPO, tmp_path / "back")
    assert cache_bits(tmp_path / "back") == cache_bits(tmp_path / "all")


def test_a_push_in_between_is_not_overwritten(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    write_cache(cache, "arrow", [*SHARDS, *make_shards(8, [[12, 13]])])
    check = hub_module._check_same

    def then_somebody_pushes(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        hub.put(REPO, {"theirs.txt": b"x"})

    monkeypatch.setattr(hub_module, "_check_same", then_somebody_pushes)
    assert "A commit has happened since" in refused(1, "push", cache, REPO)
    assert hub.files(REPO)["theirs.txt"] == b"x"


def test_private_is_never_public(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    before = len(hub.repos[REPO].commits)
    assert "expected a private repository, found a public one" in refused(1, "push", cache, REPO, "--private")
    assert len(hub.repos[REPO].commits) == before
    outcome = done("push", cache, "someone/hidden", "--private")
    assert hub.repos["someone/hidden"].private and "public" not in outcome.err


def test_files_that_the_hub_leaves_out_are_noticed(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    name = f"{shard_folders(cache)[0].relative_to(cache)}/samples.arrow"
    hub.ignored.add(name)
    assert f"found 1 missing or of another size ({name})" in refused(1, "push", cache, REPO)


@pytest.mark.parametrize(
    "name", ["manifest.json", "contents.json", "index", "samples.arrow", "logprobs.arrow", "commit"]
)
def test_a_damaged_download_is_refused_and_fetched_anew(name: str, tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    whole = hub.files(REPO)
    (path,) = [
        n for n in sorted(whole) if re.search({"index": "^index-", "commit": r"^shards/\w+\.json"}.get(name, name), n)
    ][:1]
    changed = bytearray(whole[path])
    changed[len(changed) // 2] ^= 1
    hub.put(REPO, {path: bytes(changed)})
    message = refused(3, "pull", REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    if name in ("manifest.json", "contents.json"):
        assert "what the Hub has is damaged" in message
        assert "what the Hub has is damaged" in refused(3, "push", cache, REPO)
    else:
        assert "Nothing was put at" in message
        assert (tmp_path / "back.pulling").is_dir()
    hub.put(REPO, {path: whole[path]})
    done("pull", REPO, tmp_path / "back")
    assert cache_bits(tmp_path / "back") == cache_bits(cache)


def test_bytes_that_rot_on_the_way_are_fetched_anew(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes a file that is there for the one of its commit; a damaged one has to go."""
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    verify = hub_module.verify

    def damaged(path: Path) -> object:
        flip_byte(shard_folders(path)[0] / "logprobs.arrow")
        return verify(path)

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "verify", damaged)
        assert "Nothing was put at" in refused(3, "pull", REPO, tmp_path / "back")
    hub.requests.clear()
    done("pull", REPO, tmp_path / "back")
    fetched = {path.split("/", 5)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert cache_bits(tmp_path / "back") == cache_bits(cache)
    kept = shard_folders(cache)[1].name
    assert not any(kept in path for path in fetched)  # the shard that was whole was not fetched again


def test_an_interrupted_pull_goes_on(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    last = sorted(n for n in hub.files(REPO) if n.endswith("samples.arrow"))[-1]
    hub.failing.add(last)
    assert "the Hub refused or cannot be reached" in refused(1, "pull", REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    there = {p.relative_to(tmp_path / "back.pulling").as_posix() for p in (tmp_path / "back.pulling").rglob("*")}
    hub.failing.clear()
    hub.requests.clear()
    done("pull", REPO, tmp_path / "back")
    fetched = {
        p.split(f"{REPO}/resolve/")[1].split("/", 1)[1] for m, p in hub.requests if m == "GET" and "/resolve/" in p
    }
    assert last in fetched
    assert fetched & there <= {
        "manifest.json",
        "contents.json",
    }  # these two are asked for first, to a place of their own
    assert cache_bits(tmp_path / "back") == cache_bits(cache)


@pytest.mark.usefixtures("hub")
def test_what_is_at_the_target_stays(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    other = write_cache(tmp_path / "other", "arrow", SHARDS[:1])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("text")
    damaged = copy_of(cache, tmp_path / "damaged", lambda c: flip_byte(shard_folders(c)[0] / "logprobs.arrow"))
    for target in (other, folder, damaged):
        with unchanged(target):
            assert "exists and is not that cache" in refused(2, "pull", REPO, target)
    with unchanged(cache):
        assert done("pull", REPO, cache).out.startswith(f"{cache} holds {REPO} already, commit ")
    (tmp_path / "empty").mkdir()
    done("pull", REPO, tmp_path / "empty")
    assert cache_bits(tmp_path / "empty") == cache_bits(cache)


def test_files_of_others_in_the_repository_do_not_come(tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    hub.put(REPO, {"run_me.py": b"x", f"shards/{'0' * 32}.json": b"{}", "shards/x/y": b"z", "index-0.npy": b"0"})
    done("pull", REPO, tmp_path / "back")
    files = {p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*")}
    assert not files & {"run_me.py", f"shards/{'0' * 32}.json", "shards/x", "shards/x/y", "index-0.npy", ".cache"}


@pytest.mark.parametrize("name", ["shards/../../escaped", "/escaped", "shards/./escaped"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path, hub: Hub) -> None:
    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    hub.put(REPO, {name: b"out"})
    assert "names that stay in their folder" in refused(3, "pull", REPO, tmp_path / "deep" / "back")
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}


@pytest.mark.usefixtures("hub")
def test_without_a_network_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", cache, REPO)
    shutil.copytree(cache, tmp_path / "back.pulling")  # which must not be taken for what the Hub has
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for line in (["push", cache, REPO], ["pull", REPO, tmp_path / "back"]):
        assert "the Hub refused or cannot be reached" in refused(1, *line)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(1, "pull", REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.usefixtures("hub")
def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    assert "no such data set or revision" in refused(2, "pull", "no/body", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


# --- before it is sent -----------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_go_and_asks_nobody(cache: Path, hub: Hub) -> None:
    with unchanged(cache):
        out = done("push", cache, REPO, "--dry-run").out
    assert hub.requests == []
    listed = {n: int(s.replace(",", "")) for s, n in re.findall(r"^ *([\d,]+)  (\S+)$", out, flags=re.MULTILINE)}
    done("push", cache, REPO)
    sent = {name: len(data) for name, data in hub.files(REPO).items() if name != ".gitattributes"}
    assert listed == sent
    assert hub.files(REPO)["README.md"].decode() in out
    assert f"Would push {len(sent)} files" in out


def test_the_inventory_is_what_the_format_says(cache: Path) -> None:
    from logitcache.storage.inventory import take_inventory

    found = take_inventory(cache).sizes
    assert found == {n: (cache / n).stat().st_size for n in named_files(cache) - {"manifest.json", "contents.json"}}
    assert snapshot(cache)["work/left"] == b"private"
