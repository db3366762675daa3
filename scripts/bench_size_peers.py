"""Bytes a token, and random-read speed, of the layouts in which other projects store a teacher's top-k.

Owns re-implementations of the *layouts* at the named commits, written from descriptions; the projects themselves are
not run: Megatron-LM d98e8a64, DistillKit a61c2e7, axolotl 067b021c8, and SE-KD3x 08b2763 for the 17 + 7 bits of random
sampling. Megatron's top-p padding was read at 0e099c76, DistillKit's Parquet writer (snappy) at 40198e1. Only what
holds the teacher's predictions is counted, not the tokens. All layouts get the same rows: 4,096 of the synthetic
teacher, seed 0, the k most probable tokens whether the label is among them or not, as 8 samples of 512. Must not import
`logitcache`: what these are compared with is measured elsewhere.

The trade-off: reading is warm (files in the page cache) and in one thread, and DistillKit's bytes reach numpy without
Python lists and from a row group a sample, so its speed here says what the layout allows, not what the project does.

    python scripts/bench_size_peers.py         writes docs/benchmarks/size_peers.csv; 2 minutes
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_common import BENCHMARKS, Line, out_of, write_csv
from numpy.typing import NDArray
from synthetic_teacher import VOCABULARY_SIZE, Rows, rows

TOP_KS = (8, 32, 64, 128)
SAMPLE_TOKENS = 512
ID_BITS = math.ceil(math.log2(VOCABULARY_SIZE))
MEGATRON_MAX_ID = 2**17 - 1
MEGATRON_NO_VALUE, MEGATRON_NO_ID = -1e4, -1
TOP_P = 0.99
POLYNOMIAL_TERMS, POLYNOMIAL_EXACT = 6, 16
SAMPLING_ID_BITS, SAMPLING_COUNT_BITS = 17, 7
READ_SECONDS, READ_ROUNDS = 1.0, 5

DEFAULT_OUT = BENCHMARKS / "size_peers.csv"


@dataclass(frozen=True)
class Top:
    """The k most probable tokens of N rows, most probable first: int64 and float32 [N, k]."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, teacher: Rows) -> Top:
        """The best K + 1 where the label is one of the best K, else the best K and the label, which is last."""
        ids = np.column_stack([teacher.label_ids, teacher.alternative_ids]).astype(np.int64)
        logprobs = np.column_stack([teacher.label_logprobs, teacher.alternative_logprobs])
        order = np.argsort(-logprobs, axis=1, kind="stable")
        return cls(np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1))

    def best(self, k: int) -> Top:
        return Top(np.ascontiguousarray(self.ids[:, :k]), np.ascontiguousarray(self.logprobs[:, :k]))

    def samples(self) -> Iterator[Top]:
        """Consecutive samples of 512 rows."""
        for start in range(0, len(self.ids), SAMPLE_TOKENS):
            part = slice(start, start + SAMPLE_TOKENS)
            yield Top(self.ids[part], self.logprobs[part])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    layout: str
    top_k: int
    bytes_a_token: float
    remark: str
    read_tokens_per_second: float | None = None


# Bits


def pack_bits(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Each row's values in `bits` bits each, least significant first: uint8 [N, ceil(k * bits / 8)]."""
    digits = (values[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(len(values), -1), axis=1, bitorder="little")


def unpack_bits(packed: NDArray[np.uint8], bits: int, k: int) -> NDArray[np.int64]:
    """What `pack_bits` packed, int64 [N, k]; at most 25 bits a value, so that 4 bytes hold any one of them."""
    first_bit = np.arange(k) * bits
    padded = np.pad(packed, ((0, 0), (0, 4)))
    words = np.zeros((len(packed), k), np.int64)
    for byte in range(4):
        words |= padded[:, first_bit // 8 + byte].astype(np.int64) << (8 * byte)
    return (words >> (first_bit % 8)) & ((1 << bits) - 1)


def bfloat16_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [N, 2 k], rounded to nearest even."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()


def from_bfloat16_bytes(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [N, k]."""
    return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# Layouts


def megatron_bytes(values: list[NDArray[np.float32]], ids: list[NDArray[np.int64]]) -> int:
    """Size of one iteration's tar member: torch.save of lists of tensors, a microbatch each, zstd level 3."""
    clamped = [np.minimum(part, MEGATRON_MAX_ID) for part in ids]
    tensors = {
        "values": [torch.from_numpy(part.astype(np.float16)) for part in values],
        "indices_low": [torch.from_numpy((part & 0xFFFF).astype(np.uint16)) for part in clamped],
        "bit_17": [torch.from_numpy((part >> 16 & 1).astype(np.bool_)) for part in clamped],
    }
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return len(pa.Codec("zstd", compression_level=3).compress(buffer.getvalue(), asbytes=True))


def megatron(top: Top) -> Iterator[Measured]:
    """fp16 log-probs, u16 ids and a 17th bit: all k, and three readings of the best .99 of the mass."""
    num, k = top.ids.shape
    parts = list(top.samples())
    size = megatron_bytes([part.logprobs for part in parts], [part.ids for part in parts])
    yield Measured("Megatron-LM fp16, zstd 3", k, size / num, f"ids clamped to {MEGATRON_MAX_ID}; refused there")

    probs = np.exp(top.logprobs.astype(np.float64))
    before = np.cumsum(probs, axis=1) - probs
    kept = before < TOP_P  # the smallest prefix that holds p, or all k
    remark = f"{kept.sum(axis=1).mean():.1f} kept in the mean, masked to the batch's widest row, as there"
    yield Measured(f"Megatron-LM top-p {TOP_P}, padded", k, megatron_padded_bytes(top, kept) / num, remark)
    kept_of_k = before < TOP_P * probs.sum(axis=1, keepdims=True)
    for what, mask in (("", kept), (" of the best k", kept_of_k)):
        size = megatron_bytes([top.logprobs[mask]], [top.ids[mask]]) + num  # and a u8 count for each row
        remark = f"{mask.sum(axis=1).mean():.1f} kept in the mean, not padded: not there, for comparison"
        yield Measured(f"Megatron-LM top-p {TOP_P}{what}, ragged", k, size / num, remark)


def megatron_padded_bytes(top: Top, kept: NDArray[np.bool_]) -> int:
    """Size where each microbatch is as wide as its widest row, and sentinels fill the others."""
    values = np.where(kept, top.logprobs, np.float32(MEGATRON_NO_VALUE))
    ids = np.where(kept, top.ids, MEGATRON_NO_ID)
    batches = [slice(start, start + SAMPLE_TOKENS) for start in range(0, len(top), SAMPLE_TOKENS)]
    padded = [(batch, slice(int(kept[batch].sum(axis=1).max()))) for batch in batches]
    return megatron_bytes([values[part] for part in padded], [ids[part] for part in padded])


def distillkit(top: Top, folder: Path) -> Iterator[Measured]:
    """All values exact, bf16 and packed ids, as bytes and in Parquet; and the polynomial codec, by its sizes."""
    num, k = top.ids.shape
    columns = {"compressed_logprobs": bfloat16_bytes(top.logprobs), "bytepacked_indices": pack_bits(top.ids, ID_BITS)}
    raw = sum(column.nbytes for column in columns.values())
    yield Measured("DistillKit all exact bf16, tensors", k, raw / num, f"{ID_BITS} + 16 bits, packed by row")

    table = pa.table({name: nested_bytes(column) for name, column in columns.items()})
    for codec, why in (("snappy", "the writer's default there"), ("zstd", "not there, for comparison")):
        path, by_sample = folder / f"{codec}{k}.parquet", folder / f"{codec}{k}_by_sample.parquet"
        pq.write_table(table, path, compression=codec)
        pq.write_table(table, by_sample, compression=codec, row_group_size=1)
        reader = DistillKitReader(by_sample, k)
        check_read(reader, top, exact=False)
        remark = f"{codec}: {why}. Read a row group a sample, pyarrow {pa.__version__} to numpy without Python lists"
        speed = tokens_per_second(reader, len(table))
        yield Measured(f"DistillKit all exact bf16, Parquet {codec}", k, path.stat().st_size / num, remark, speed)

    if k > POLYNOMIAL_EXACT:
        size = POLYNOMIAL_EXACT * 2 + POLYNOMIAL_TERMS * 4 + math.ceil(k * ID_BITS / 8)
        remark = f"by arithmetic: {POLYNOMIAL_EXACT} bf16, {POLYNOMIAL_TERMS} fp32 coefficients, ids of {ID_BITS} bits"
        yield Measured("DistillKit polynomial 6 + 16 exact", k, size, remark)


def axolotl(top: Top, folder: Path) -> Iterator[Measured]:
    """The prepared data set's three columns: float64 renormalised log-probs, int64 ids and mask, as Arrow on disk."""
    num, k = top.ids.shape
    target = axolotl_target(top)
    columns: dict[str, list[Any]] = {"target_logprobs": [], "target_token_ids": [], "target_mask": []}
    for part in target.samples():
        columns["target_logprobs"].append(part.logprobs.astype(np.float64).tolist())
        columns["target_token_ids"].append(part.ids.tolist())
        columns["target_mask"].append(np.ones(part.ids.shape, np.int64).tolist())
    path = folder / f"axolotl{k}"
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    size = sum(file.stat().st_size for file in path.glob("*.arrow"))
    reader = AxolotlReader(path)
    check_read(reader, target, exact=True)
    remark = f"float64, int64 and an int64 mask; row to Python lists to numpy, datasets {datasets.__version__}"
    speed = tokens_per_second(reader, math.ceil(num / SAMPLE_TOKENS))
    yield Measured("axolotl prepared Arrow", k, size / num, remark, speed)


def axolotl_target(top: Top) -> Top:
    """The top-k renormalised to 1, which is what is stored; computed in float32 there too."""
    shifted = top.logprobs - np.log(np.exp(top.logprobs).sum(axis=1, keepdims=True))
    return Top(top.ids, shifted.astype(np.float32))


def random_sampling(top: Top) -> Iterator[Measured]:
    """k ids of 17 bits with counts of 7 bits, and a byte for how many: 3 k + 1 whatever the ids are."""
    num, k = top.ids.shape
    counts = np.clip(np.rint(np.exp(top.logprobs) * 127), 1, 127).astype(np.int64)
    entries = (top.ids & (2**SAMPLING_ID_BITS - 1)) | counts << SAMPLING_ID_BITS
    size = pack_bits(entries, SAMPLING_ID_BITS + SAMPLING_COUNT_BITS).nbytes + num
    yield Measured("random sampling, 17 + 7 bits", k, size / num, "k distinct ids; 17 bits wrap at this vocabulary")


# Reading


class DistillKitReader:
    """Reads one sample: a Parquet row group to packed bytes to int64 ids and float32 values."""

    def __init__(self, path: Path, k: int) -> None:
        self.file, self.k = pq.ParquetFile(path), k

    def __call__(self, sample: int) -> Top:
        table = self.file.read_row_group(sample, use_threads=False)
        values, ids = (flat_bytes(table, name) for name in ("compressed_logprobs", "bytepacked_indices"))
        packed = ids.reshape(-1, math.ceil(self.k * ID_BITS / 8))
        return Top(unpack_bits(packed, ID_BITS, self.k), from_bfloat16_bytes(values.reshape(-1, 2 * self.k)))


class AxolotlReader:
    """Reads one sample: a row of the data set, as Python lists, to numpy arrays."""

    def __init__(self, path: Path) -> None:
        self.rows = datasets.load_from_disk(str(path))

    def __call__(self, sample: int) -> Top:
        row = self.rows[sample]
        mask = np.asarray(row["target_mask"], np.int64)
        ids, logprobs = np.asarray(row["target_token_ids"], np.int64), np.asarray(row["target_logprobs"], np.float32)
        return Top(np.where(mask == 1, ids, 0), logprobs)


def nested_bytes(column: NDArray[np.uint8]) -> pa.Array:
    """uint8 [N, bytes] as list<list<uint8>>: samples of 512 rows of bytes."""
    num, width = column.shape
    by_row = pa.ListArray.from_arrays(
        pa.array(np.arange(num + 1, dtype=np.int32) * width), pa.array(column.reshape(-1))
    )
    ends = np.minimum(np.arange(0, num + SAMPLE_TOKENS, SAMPLE_TOKENS, dtype=np.int32), num)
    return pa.ListArray.from_arrays(pa.array(ends), by_row)


def flat_bytes(table: pa.Table, name: str) -> NDArray[np.uint8]:
    """All bytes of a list<list<uint8>> column."""
    flat: NDArray[np.uint8] = table.column(name).combine_chunks().flatten().flatten().to_numpy()
    return flat


def check_read(read: Callable[[int], Top], top: Top, exact: bool) -> None:
    """Raises ValueError where what is read is not what was written; without `exact`, values within bfloat16."""
    for index, expected in enumerate(top.samples()):
        found = read(index)
        tolerance = 0 if exact else 2.0**-8
        if not np.array_equal(found.ids, expected.ids) or not np.allclose(
            found.logprobs, expected.logprobs, rtol=tolerance, atol=0
        ):
            raise ValueError(
                f"Read of sample {index} by {type(read).__name__}: expected what was written, found other ids or "
                "values. Its size and speed mean nothing. Check how it packs."
            )


def tokens_per_second(read: Callable[[int], Top], num_samples: int) -> float:
    """Median over 5 rounds of random reads of one sample each, in tokens a second."""
    rng, speeds = np.random.default_rng(0), []
    read(0)
    for _ in range(READ_ROUNDS):
        num_tokens, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < READ_SECONDS:
            num_tokens += len(read(int(rng.integers(num_samples))))
        speeds.append(num_tokens / seconds)
    return median(speeds)


# Report


def measure(top: Top) -> Iterator[Measured]:
    """Every layout at every k; 12 ids of random sampling too, which is what 8 others are compared with."""
    with tempfile.TemporaryDirectory() as folder:
        for k in TOP_KS:
            best = top.best(k)
            yield from megatron(best)
            yield from distillkit(best, Path(folder))
            yield from axolotl(best, Path(folder))
            yield from random_sampling(best)
            if k == 8:
                yield from random_sampling(top.best(12))


def line_of(row: Measured) -> Line:
    """A row of the CSV; the speed is empty where it is not measured."""
    speed = "" if row.read_tokens_per_second is None else f"{row.read_tokens_per_second:.0f}"
    return {
        "layout": row.layout,
        "top_k": str(row.top_k),
        "bytes_a_token": f"{row.bytes_a_token:.1f}",
        "read_tokens_per_second": speed,
        "remark": row.remark,
    }


def print_table(measured: list[Measured]) -> None:
    """Bytes a token by layout and k, with thousands of tokens read a second where measured."""
    cells = {(row.layout, row.top_k): row for row in measured}
    top_ks = sorted({row.top_k for row in measured})
    print(f"{'bytes a token (thousand tokens/s read)':46}" + "".join(f"{f'k={k}':>16}" for k in top_ks))
    for layout in dict.fromkeys(row.layout for row in measured):
        line = f"{layout:46}"
        for k in top_ks:
            row = cells.get((layout, k))
            speed = f" ({row.read_tokens_per_second / 1000:.0f})" if row and row.read_tokens_per_second else ""
            line += f"{f'{row.bytes_a_token:.1f}{speed}' if row else '-':>16}"
        print(line)


def main() -> None:
    """Make the rows, measure, print the table and write the CSV."""
    parser = argparse.ArgumentParser(description="Bytes a token of the layouts of other projects.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/size_peers.csv")
    args = parser.parse_args()
    out = out_of(parser, args, DEFAULT_OUT)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    datasets.disable_progress_bars()
    measured = list(measure(Top.of(rows(args.rows, max(TOP_KS), args.seed))))
    measured.sort(key=lambda row: row.layout)  # stable: k ascends within a layout
    print_table(measured)
    print(f"{args.rows} rows, seed {args.seed}; torch {torch.__version__}, numpy {np.__version__}, one thread, warm")
    write_csv([line_of(row) for row in measured], out)


if __name__ == "__main__":
    main()
