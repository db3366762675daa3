"""What docs/sweep is made of: texts, one cache and anchors of the demo's base, for `logitcache sweep`.

Owns the data of docs/sweep/demo.yaml, fixed before the first run: the demo's source code as prompt and completion (the
first quarter of a document is the prompt, so that there are prompt positions to hold), its prose as what was known, and
anchors from other prose. Every part is made where it is missing.

    python scripts/make_sweep_data.py sweep-output
    logitcache sweep --config docs/sweep/demo.yaml --out sweep-output/sweep
    logitcache report sweep-output/sweep
"""

import argparse
import json
from importlib.resources import as_file
from pathlib import Path

from bench_common import demo_base

from logitcache import LogitCache, precompute
from logitcache.capture.settings import CaptureSettings
from logitcache.demo.run import DemoSettings, spread, write_data, write_documents
from logitcache.demo.text import Document, prose_documents, split
from logitcache.models.settings import LoadSettings

NUM_ANCHORS, ANCHOR_CHARS, ANCHOR_TOKENS = 50, 500, 128


def main() -> None:
    """Make what is missing, and say what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for data/, cache/ and anchors/")
    out: Path = parser.parse_args().out
    settings = DemoSettings()
    train, new, _ = write_data(out / "data", settings)
    for path in (train, new):
        with_prompts(path)
    prose = [Document(d.name, d.text[:ANCHOR_CHARS]) for d in split(prose_documents())[0]]
    write_documents(out / "data" / "anchors.jsonl", spread(prose, NUM_ANCHORS))
    cache = CaptureSettings(settings.top_k, settings.max_length, kl_positions="all", tail_groups=64)
    anchors = CaptureSettings(settings.top_k, ANCHOR_TOKENS)
    for rows, name, job in ((train, "cache", cache), (out / "data" / "anchors.jsonl", "anchors", anchors)):
        with as_file(demo_base()) as base:
            precompute(base, rows, out / name, job, loading=LoadSettings(dtype="float32", device="cpu"))
        print(f"{out / name}: {LogitCache.open(out / name).num_positions:,} positions")


def with_prompts(path: Path) -> None:
    """Rows of text as rows of prompt and completion."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cut = [(row, len(row["text"]) // 4) for row in rows]
    said = ({"prompt": row["text"][:at], "completion": row["text"][at:], "source": row["source"]} for row, at in cut)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in said), encoding="utf-8")


if __name__ == "__main__":
    main()
