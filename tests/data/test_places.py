"""What a name of data leads to: which files of a folder, of which split and configuration, and what is said of it.

The oracle of which file is which split is `datasets` itself, on folders of files made up by hypothesis.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from logitcache.data.places import Place, are_names, open_hub, places_of, settings_for
from logitcache.data.rows import count_rows, read_rows, sizes_of
from logitcache.data.settings import DataSettings
from logitcache.errors import InputNotFound, InvalidData, InvalidSettings, PipelineError

INPUTS = Path(__file__).parent / "inputs"
KING = ["One and two are three, said the king.", "Two and two are four, said the king."]
HELD_OUT = ["This is the held out text, said the king."]


def texts(data: object, told: list[str] | None = None, **how: object) -> list[str]:
    """The texts of all rows, in order."""
    found = read_rows(data, DataSettings(**how), (told if told is not None else []).append)  # type: ignore[arg-type]
    return [row["text"] for _, row in found if isinstance(row, dict)]


@pytest.mark.parametrize(("name", "said"), [("mac", ""), ("withinfo", ""), ("emptyshard", "b.jsonl holds no rows")])
def test_what_lies_beside_the_data_is_no_data(name: str, said: str) -> None:
    told: list[str] = []
    assert texts(INPUTS / name, told) == KING
    assert len(told) == bool(said) and said in "".join(told)
    assert count_rows(INPUTS / name) == 2


@pytest.mark.parametrize(
    ("name", "folder", "end"), [("splits", "", ".jsonl"), ("repo", "data/", "-00000-of-00001.parquet")]
)
def test_of_train_beside_test_train_is_read_aloud(name: str, folder: str, end: str) -> None:
    told: list[str] = []
    train, test = f"{folder}train{end}", f"{folder}test{end}"
    assert texts(INPUTS / name, told) == KING
    assert told == [f"{INPUTS / name}: reading split train: {train}; not read: {test} (--split test)."]
    assert texts(INPUTS / name, split="test") == HELD_OUT
    assert (count_rows(INPUTS / name), count_rows(INPUTS / name, DataSettings(split="test"))) == (2, 1)
    sizes = [sizes_of(INPUTS / name, DataSettings(split=split)) for split in ("", "test")]
    assert [[Path(str(size[0])).name for size in found] for found in sizes] == [[Path(train).name], [Path(test).name]]
    with pytest.raises(InputNotFound, match=r"a split named 'dev', found train, test\. Nothing was read"):
        texts(INPUTS / name, split="dev")


@pytest.mark.parametrize("through_library", [False, True])
def test_of_configurations_and_splits_without_a_usual_one_all_are_named(through_library: bool) -> None:
    """A cloned repository, and the same opened as the Hub's are."""

    def read(folder: Path, **how: str) -> int:
        if through_library:
            return len(list(open_hub(Place(str(folder), hub_id=str(folder)), DataSettings(**how), lambda _: None)))  # type: ignore[arg-type]
        return len(list(read_rows(folder, DataSettings(**how))))  # type: ignore[arg-type]

    multi, ultra = INPUTS / "hub" / "multi", INPUTS / "hub" / "ultra"
    with pytest.raises(InputNotFound, match=r"found 2 configurations, a, b, and none named default.*--config-name a\."):
        read(multi)
    with pytest.raises(InputNotFound, match="a configuration named 'c', found a, b"):
        read(multi, config_name="c")
    with pytest.raises(InputNotFound, match=r"splits, train_sft, test_sft, and none named train\..*--split train_sft"):
        read(ultra)
    with pytest.raises(InputNotFound, match="a split named 'train', found train_sft, test_sft"):
        read(ultra, split="train")
    assert (read(multi, config_name="b"), read(ultra, split="train_sft")) == (1, 1)


def test_the_hub_says_what_is_not_read() -> None:
    told: list[str] = []
    name = str(INPUTS / "hub" / "ultra")
    open_hub(Place(name, hub_id=name), DataSettings(split="test_sft", streaming=True), told.append)
    assert told == [f"{name}: reading split test_sft of configuration default; not read: split train_sft."]


def test_a_card_that_names_files_that_are_not_there_is_refused(tmp_path: Path) -> None:
    shutil.copytree(INPUTS / "hub" / "multi", tmp_path / "multi")
    (tmp_path / "multi" / "b" / "train.jsonl").rename(tmp_path / "multi" / "b" / "train.csv")
    with pytest.raises(InputNotFound, match=r"README.md says that b/train.jsonl is of split train, and no file of it"):
        texts(tmp_path / "multi", config_name="b")
    (tmp_path / "multi" / "README.md").write_text("---\nconfigs: 7\n---\n", encoding="utf-8")
    with pytest.raises(InvalidData, match=r"its README\.md does not say as the Hub does which files there are"):
        texts(tmp_path / "multi")


def test_a_configuration_of_a_folder_has_its_splits_by_their_names(tmp_path: Path) -> None:
    shutil.copytree(INPUTS / "splits", tmp_path / "d" / "sub")
    card = "---\nconfigs:\n- config_name: small\n  data_dir: sub\n  default: true\n"
    card += "- config_name: other\n  data_files: '*.csv'\n---\n"
    (tmp_path / "d" / "README.md").write_text(card, encoding="utf-8")
    told: list[str] = []
    assert texts(tmp_path / "d", told) == KING
    assert "reading split train of configuration small: sub/train.jsonl" in told[0]
    assert texts(tmp_path / "d", split="test", config_name="small") == HELD_OUT


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": text} for text in KING])
    held_out = datasets.Dataset.from_list([{"text": text} for text in HELD_OUT])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=held_out).save_to_disk(tmp_path / "two")
    told: list[str] = []
    assert texts(tmp_path / "one", told) == KING and not told
    assert texts(tmp_path / "two", told) == KING
    assert told == [f"{tmp_path / 'two'}: reading split train; not read: test (--split)."]
    assert texts(tmp_path / "two", split="test") == HELD_OUT
    assert sizes_of(tmp_path / "two") != sizes_of(tmp_path / "two", DataSettings(split="test"))
    for how, expected in (
        (DataSettings(split="dev"), "found test, train"),
        (DataSettings(config_name="a"), "--config-name"),
    ):
        with pytest.raises(InputNotFound, match=expected):
            read_rows(tmp_path / "two", how)
    with pytest.raises(InputNotFound, match="one split without a name"):
        read_rows(tmp_path / "one", DataSettings(split="train"))
    (tmp_path / "one" / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidData, match="not what save_to_disk of datasets wrote"):
        read_rows(tmp_path / "one")


def test_several_names_follow_one_another() -> None:
    train, test = INPUTS / "splits" / "train.jsonl", str(INPUTS / "splits" / "test.jsonl")
    assert texts([test, train]) == HELD_OUT + KING
    assert texts((str(INPUTS / "splits"), test), split="test") == HELD_OUT * 2  # of the folder; a file is read whole
    assert count_rows([test, train]) == 3
    assert [place.name for place in places_of([test, train], DataSettings())] == [test, str(train)]
    with pytest.raises(InputNotFound, match="found no name"):
        places_of([], DataSettings())


def test_a_split_that_nothing_has_is_refused() -> None:
    train = INPUTS / "splits" / "train.jsonl"
    for how in (DataSettings(split="test"), DataSettings(config_name="test")):
        with pytest.raises(InvalidSettings, match="found files by themselves, of which all is read"):
            texts(train, **how.plain())
        with pytest.raises(InvalidSettings, match="files by themselves"):
            settings_for({"new": train, "prior": str(train), "none": None}, how)


def test_of_several_texts_those_that_have_splits_are_asked_for_one() -> None:
    how = DataSettings(split="test", skip_bad_rows=True)
    found = settings_for({"new": INPUTS / "splits", "prior": INPUTS / "splits" / "train.jsonl", "none": None}, how)
    assert found == {"new": how, "prior": DataSettings(skip_bad_rows=True)}
    assert settings_for({"new": "a.jsonl"}, DataSettings()) == {"new": DataSettings()}


def test_names_and_samples_are_told_apart() -> None:
    assert are_names("a") and are_names(Path("a")) and are_names(["a", Path("b")])
    assert not are_names([]) and not are_names(None) and not are_names([1]) and not are_names({"a": 1})


def test_home_is_where_a_shell_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(INPUTS / "splits", tmp_path / "d")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/d") == KING


@pytest.fixture
def memory() -> Iterator[str]:
    """A prefix of memory://, emptied afterwards."""
    yield "memory://places-test/data"
    fs, _ = fsspec.core.url_to_fs("memory://")
    fs.rm("/places-test", recursive=True)


def test_a_url_has_splits_too(memory: str) -> None:
    fs, root = fsspec.core.url_to_fs(memory)
    for path in (INPUTS / "splits").iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    told: list[str] = []
    assert texts(memory, told) == KING
    assert told == [f"{memory}: reading split train: train.jsonl; not read: test.jsonl (--split test)."]
    assert texts(memory, split="test") == HELD_OUT
    fs.pipe_file(f"{root}/notes.txt", b"not data")
    with pytest.raises(InputNotFound, match="found a file of another kind"):
        texts(f"{memory}/notes.txt")
    with pytest.raises(InputNotFound, match="no such file or folder"):
        texts(f"{memory}/none")


WORDS = st.sampled_from(["train", "test", "dev", "valid", "eval", "a", "b", "0", "training", "contest", "sub", "data"])
NAMES = st.builds(
    lambda folders, parts, sign, end: "/".join([*folders, sign.join(parts) + end]),
    st.lists(WORDS, max_size=2),
    st.lists(WORDS, min_size=1, max_size=3),
    st.sampled_from(["-", "_", ".", " "]),
    st.sampled_from([".jsonl", ".parquet", "-00000-of-00001.parquet", ".jsonl.gz"]),
)


@settings(deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_which_file_is_which_split_is_what_datasets_says(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    for name in names:
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    try:
        expected = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except ValueError:  # a split whose name has a hyphen: no library's folder is written so
        reject()
    for split, files in expected.items():
        (place,) = places_of(folder, DataSettings(split=str(split)))
        assert sorted(place.files) == sorted(set(map(str, files)))
    with pytest.raises(PipelineError, match=f"found {', '.join(map(str, expected))}\\."):
        places_of(folder, DataSettings(split="none such"))


def test_a_log_beside_the_data_decides_nothing(tmp_path: Path) -> None:
    """`datasets` takes the only file with a split's name for all that there is."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "train.log").write_text("step 1\n", encoding="utf-8")
    assert [str(f) for files in get_data_patterns(str(tmp_path)).values() for f in files] != ["**"]
    assert texts(tmp_path) == ["a"]


def test_files_of_no_split_and_of_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("train.jsonl", "more.jsonl", "deep/train.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-8")
    told: list[str] = []
    texts(tmp_path, told)
    assert told == [
        f"{tmp_path}: reading split train: deep/train.jsonl, train.jsonl; not read: more.jsonl (of no split)."
    ]


# --- what a person may not know ---------------------------------------------------------------------------------------


def written(folder: Path, *names: str) -> Path:
    """A folder of files with one row each, which says its file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}"}}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        (["a.jsonl", "b.JSONL", "c.jsonl.zst", "d.csv"], ["a.jsonl"], "b.JSONL, c.jsonl.zst, d.csv."),
        (["train.json", "train.jsonl"], ["train.json", "train.jsonl"], "reading split train: train.json, train.jsonl."),
        (["Test.jsonl", "Train.jsonl"], ["Test.jsonl", "Train.jsonl"], "capital letters count"),
        (["test.jsonl", "train-test.jsonl"], ["train-test.jsonl"], "train-test.jsonl is of split test too."),
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            "Missing: 1 of the 3 files train-*-of-00003.",
        ),
    ],
)
def test_what_a_person_may_not_know_of_a_folder_is_said(
    names: list[str], read: list[str], said: str, tmp_path: Path
) -> None:
    told: list[str] = []
    assert texts(written(tmp_path, *names), told) == read
    assert len(told) == 1 and said in told[0]


def test_no_file_is_both_read_and_not_read(tmp_path: Path) -> None:
    told: list[str] = []
    texts(written(tmp_path, "test.jsonl", "train-test.jsonl"), told)
    assert "; not read: test.jsonl (--split test)." in told[0]


def test_nothing_is_said_of_shards_that_are_all_there(tmp_path: Path) -> None:
    told: list[str] = []
    texts(written(tmp_path, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "NOTES.txt"), told)
    assert told == []


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    """A data folder on a larger disk; and a link that leads back."""
    written(tmp_path / "far", "b.jsonl")
    folder = written(tmp_path / "data", "a.jsonl")
    for name, target in (("more", tmp_path / "far"), ("same", tmp_path / "far"), ("back", folder)):
        (folder / name).symlink_to(target)
    assert texts(folder) == ["a.jsonl", "b.jsonl"]


def test_a_folder_without_a_file_that_is_read_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"found files of other kinds \(a\.csv, b\.parquet\.zip\)\. Convert them"):
        places_of(written(tmp_path, "a.csv", "b.parquet.zip"), DataSettings())


def test_a_file_that_is_given_twice_is_read_twice_aloud(tmp_path: Path) -> None:
    told: list[str] = []
    folder = written(tmp_path, "a.jsonl", "b.jsonl")
    assert texts([folder, folder / "a.jsonl"], told) == ["a.jsonl", "b.jsonl", "a.jsonl"]
    assert told == [f"Given more than once, and read as often: {folder / 'a.jsonl'}."]


def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--data "$DATA" where DATA is not set."""
    monkeypatch.chdir(written(tmp_path, "train.jsonl"))
    for data in ("", ["train.jsonl", ""]):
        with pytest.raises(InputNotFound, match="found an empty name"):
            texts(data)
