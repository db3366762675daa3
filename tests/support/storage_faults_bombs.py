"""Forged blocks: Zarr chunks and Arrow record batches whose crc32c is right and whose content is a bomb or nonsense."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import pyarrow as pa
from pcodec import ChunkConfig, standalone
from support.storage_faults import KINDS, TOP_K
from support.storage_faults_hostile import Case, Forged

EXACT, FINE, _ = KINDS


def recoded(stream: str, change: Callable[[bytes], bytes], number: int = 0) -> Callable[[Forged], None]:
    return lambda forged: forged.recode(stream, change, number)


@cache
def zeros(count: int, dtype: str) -> bytes:
    data: bytes = standalone.simple_compress(np.zeros(count, dtype), ChunkConfig(compression_level=4))
    return data


def wide_zarr(forged: Forged) -> None:
    """K = 2^24 - 2: the chunks, a few kB long, hold 16 GiB, and the counts say so."""
    forged.manifest["model"]["vocab_size"], forged.manifest["capture"]["top_k"] = 2**24 - 1, 2**24 - 2
    for stream, dtype in (("alternative_ids", "<u4"), ("alternative_drops", "<u2")):
        for number in range(len(forged.commit["blocks"][stream])):
            forged.recode(stream, lambda _, dtype=dtype: zeros(10**7, dtype), number)  # type: ignore[misc]


def _zarr_bombs() -> list[Case]:
    changes: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
        "10^8 numbers": ("label_steps", lambda _: zeros(10**8, "<u4")),
        "10^8 numbers of the ids": ("alternative_ids", lambda _: zeros(10**8, "<u4")),
        "10^8 tokens": ("token_ids", lambda _: zeros(10**8, "<u4")),
        "one number": ("label_steps", lambda _: zeros(1, "<u4")),
        "255 numbers": ("label_steps", lambda _: zeros(255, "<u4")),
        "257 numbers": ("label_steps", lambda _: zeros(257, "<u4")),
        "uint16 instead of uint32": ("label_steps", lambda _: zeros(256, "<u2")),
        "uint64 instead of uint32": ("label_steps", lambda _: zeros(256, "<u8")),
        "float32 instead of uint32": ("label_steps", lambda _: zeros(256, "<f4")),
        "one byte": ("label_steps", lambda _: b"\0"),
        "zeros": ("label_steps", lambda _: bytes(100)),
        "noise": ("label_steps", lambda _: np.random.default_rng(1).bytes(1000)),
        "half of a chunk": ("alternative_ids", lambda data: data[: len(data) // 2]),
        "two chunks": ("alternative_ids", lambda data: data * 2),
        "more after it": ("alternative_ids", lambda data: data + bytes(100)),
        "ids of the other rows": ("alternative_ids", lambda _: zeros(256 * TOP_K, "<u4")),
        "negative positions": ("positions", lambda _: standalone.simple_compress(-np.ones(256, "<i4"), ChunkConfig())),
        "positions of 2^31 - 1": (
            "positions",
            lambda _: standalone.simple_compress(np.full(270, 2**31 - 1, "<i4"), ChunkConfig()),
        ),
        "tokens beyond V": (
            "token_ids",
            lambda _: standalone.simple_compress(np.full(300, 2**32 - 1, "<u4"), ChunkConfig()),
        ),
    }
    cases = [
        Case(
            f"chunk: {name}", recoded(stream, change), "zarr", by="" if "chunks" in name or "after" in name else "read"
        )
        for name, (stream, change) in changes.items()
    ]
    return [*cases, Case("chunk: 16 GiB of alternatives, as the counts say", wide_zarr, "zarr")]


def batch(
    data: bytes,
    change: Callable[[dict[str, pa.Array]], dict[str, pa.Array]],
    forged: Forged,
    codec: str | None = "zstd",
) -> bytes:
    """A record batch of a block with other columns, as Arrow writes it."""
    schema, found = _decoded(data, forged)
    columns = change({name: found.column(name) for name in schema.names})
    out = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec(codec) if codec else None)
    with pa.ipc.new_stream(sink, out.schema, options=options) as writer:
        writer.write_batch(out)
        end = sink.tell()
    whole: bytes = sink.getvalue().to_pybytes()[:end]
    return whole[len(out.schema.serialize()) :]


def _decoded(data: bytes, forged: Forged) -> tuple[pa.Schema, pa.RecordBatch]:
    for name in ("logprobs.arrow", "samples.arrow"):
        schema = pa.ipc.open_file(pa.BufferReader(_original(forged, name))).schema
        try:
            return schema, pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(data)), schema)
        except (pa.ArrowInvalid, OSError):
            continue
    raise AssertionError("neither samples nor rows")


def _original(forged: Forged, name: str) -> bytes:
    return forged.data[forged.unit][name]


def rebatched(
    stream: str, change: Callable[[dict[str, pa.Array]], dict[str, pa.Array]], codec: str | None = "zstd"
) -> Callable[[Forged], None]:
    return lambda forged: forged.recode(stream, lambda data: batch(data, change, forged, codec))


def with_null(name: str) -> Callable[[dict[str, pa.Array]], dict[str, pa.Array]]:
    def change(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
        values = columns[name].to_pylist()
        return columns | {name: pa.array([None, *values[1:]], columns[name].type)}

    return change


def with_null_inside(name: str) -> Callable[[dict[str, pa.Array]], dict[str, pa.Array]]:
    def change(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
        values = columns[name].to_pylist()
        return columns | {name: pa.array([[None, *values[0][1:]], *values[1:]], columns[name].type)}

    return change


def with_offsets(*offsets: int) -> Callable[[dict[str, pa.Array]], dict[str, pa.Array]]:
    """Lists whose offsets are wild, which Arrow writes as they are. Three samples."""

    def change(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
        values = columns["token_ids"].values
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32))]
        wild = pa.Array.from_buffers(columns["token_ids"].type, len(offsets) - 1, buffers, children=[values])
        return columns | {"token_ids": wild}

    return change


def many_samples(forged: Forged) -> None:
    """The forged shard is the one of three samples."""
    forged.unit = max(forged.commits, key=lambda unit: int(forged.commits[unit]["num_samples"]))


def wild_offsets(*offsets: int) -> Callable[[Forged], None]:
    def forge(forged: Forged) -> None:
        many_samples(forged)
        rebatched("samples.arrow", with_offsets(*offsets))(forged)

    return forge


def rows_of(start: int, stop: int) -> Callable[[dict[str, pa.Array]], dict[str, pa.Array]]:
    def change(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
        return {n: pa.concat_arrays([a, a]).slice(start, stop - start) for n, a in columns.items()}

    return change


def stating(size: int, filler: int = 0) -> Callable[[bytes], bytes]:
    """The buffer of the labels, 256 uint32, states that it unpacks to `size` bytes."""

    def change(data: bytes) -> bytes:
        at = data.index(struct.pack("<q", 256 * 4))
        return data[:at] + struct.pack("<q", size) + data[at + 8 :] + bytes(filler)

    return change


def metadata_length(length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:4] + struct.pack("<i", length) + data[8:]


def shifted_rows(forged: Forged) -> None:
    """200 rows in the first batch and the rest in the second: as many as the commit says, not where they belong."""
    file = _original(forged, "logprobs.arrow")
    blocks = forged.commit["blocks"]["logprobs.arrow"]
    parts = [file[at : at + length] for at, length, _ in blocks]
    found = [_decoded(part, forged)[1] for part in parts]
    whole = {n: pa.concat_arrays([b.column(n) for b in found]) for n in found[0].schema.names}
    total = len(next(iter(whole.values())))
    for number, (start, stop) in enumerate(((0, 200), (200, total))):
        part = {n: a.slice(start, stop - start) for n, a in whole.items()}
        forged.recode("logprobs.arrow", lambda data, part=part: batch(parts[0], lambda _: part, forged), number)  # type: ignore[misc]


def end_of_stream(data: bytes) -> bytes:
    """Arrow's end of a stream, followed by what a check of the metadata may take for a batch without buffers."""
    length = struct.unpack_from("<i", data, 4)[0]
    return data[:4] + struct.pack("<i", 0) + data[8 : 8 + length] + bytes(64)


def end_of_stream_empty(_: bytes) -> bytes:
    """The same, with a flatbuffer made by hand: a message whose header is a batch of no buffers."""
    table = struct.pack("<HHHHH", 10, 12, 0, 0, 4) + struct.pack("<H", 0)
    head = struct.pack("<I", 4 + len(table)) + table + struct.pack("<i", len(table)) + struct.pack("<I", 4)
    inner = struct.pack("<HHHHH", 10, 12, 0, 0, 4) + struct.pack("<H", 0)
    at = len(head)
    head = (
        head[:-4] + struct.pack("<I", 4 + len(inner)) + inner + struct.pack("<i", len(inner)) + struct.pack("<II", 4, 0)
    )
    assert at
    return b"\xff\xff\xff\xff" + struct.pack("<i", 0) + head + bytes(64)


def schema_message(data: bytes) -> bytes:
    message: bytes = pa.schema({"a": pa.int32()}).serialize().to_pybytes()
    return message + data


def _arrow_bombs() -> list[Case]:
    rows, samples = "logprobs.arrow", "samples.arrow"
    nulls = [
        Case(f"batch: a null in {name}", rebatched(rows, with_null(name)), "arrow", kind)
        for kind, names in (
            (
                FINE,
                ("label_steps", "tail_steps", "alternative_ids_low", "alternative_drops_high", "tail_group_steps_low"),
            ),
            (EXACT, ("label_logprobs", "alternative_logprobs", "tail_logprobs")),
        )
        for name in names
    ]
    nulls += [
        Case(f"batch: a null inside {name}", rebatched(rows, with_null_inside(name)), "arrow")
        for name in ("alternative_ids_low", "alternative_ids_high", "alternative_drops_low")
    ]
    nulls += [
        Case(f"batch: a null in {name}", rebatched(samples, with_null(name)), "arrow")
        for name in ("sample_id", "token_ids", "positions", "num_tokens_cut")
    ]
    nulls += [
        Case(f"batch: a null inside {name}", rebatched(samples, with_null_inside(name)), "arrow")
        for name in ("token_ids", "positions")
    ]
    offsets = [
        (0, 10**9, 10, 18),
        (0, -5, 10, 18),
        (10, 5, 0, 18),
        (0, 18, 0, 18),
        (0, 17, 3, 18),
        (0, 0, 0, 18),
        (18, 0, 0, 18),
        (3, 3, 3, 3),
    ]
    changes: dict[str, Callable[[bytes], bytes]] = {
        "4 GiB stated": stating(2**32),
        "2^62 bytes stated": stating(2**62),
        "2^63 - 1 bytes stated": stating(2**63 - 1),
        "-2 bytes stated": stating(-2),
        "-1: not packed": stating(-1),
        "no bytes stated": stating(0),
        "1.5 GiB stated in 1 MB": stating(3 * 2**29, 2**20),
        "6 GiB stated in 4 MB": stating(3 * 2**31, 2**22),
        "one byte": lambda _: b"\0",
        "zeros": lambda _: bytes(1000),
        "noise": lambda _: np.random.default_rng(1).bytes(1000),
        "half of a batch": lambda data: data[: len(data) // 2],
        "two batches": lambda data: data * 2,
        "a schema": schema_message,
        "metadata of no length": metadata_length(0),
        "metadata of 2^31 - 1 bytes": metadata_length(2**31 - 1),
        "metadata of -8 bytes": metadata_length(-8),
        "an end of the stream": end_of_stream,
        "an end of the stream without buffers": end_of_stream_empty,
    }
    batches = {
        "no rows": rows_of(0, 0),
        "one row less": rows_of(0, 255),
        "one row more": rows_of(0, 257),
        "twice the rows": rows_of(0, 512),
        "a column less": lambda columns: dict(list(columns.items())[:-1]),
        "a column more": lambda columns: columns | {"more": columns["label_steps"]},
        "columns exchanged": lambda columns: dict(reversed(columns.items())),
        "int64 instead of uint32": lambda columns: columns | {"label_steps": columns["label_steps"].cast(pa.int64())},
        "uint8 instead of uint32": lambda columns: columns | {"label_steps": pa.array(np.zeros(256, np.uint8))},
        "a dictionary": lambda columns: columns | {"label_steps": columns["label_steps"].dictionary_encode()},
        "strings": lambda columns: columns | {"label_steps": pa.array(["x"] * 256)},
        "narrower lists": lambda columns: (
            columns | {"alternative_ids_low": pa.array([[1, 2]] * 256, pa.list_(pa.uint16(), 2))}
        ),
    }
    cases = [
        Case(f"batch: {name}", recoded(rows, change), "arrow", by="" if name == "two batches" else "read")
        for name, change in changes.items()
    ]
    cases += [Case(f"batch: {name}", rebatched(rows, change), "arrow") for name, change in batches.items()]
    cases += [Case(f"batch of samples: offsets {o}", wild_offsets(*o), "arrow") for o in offsets]
    samples_changes = {
        "no samples": rows_of(0, 0),
        "two samples instead of one": rows_of(0, 2),
        "an id of 8 bytes": lambda columns: columns | {"sample_id": pa.array([b"x" * 8], pa.binary(8))},
        "an id of no fixed length": lambda columns: columns | {"sample_id": pa.array([b"x" * 16])},
        "negative positions": lambda columns: (
            columns | {"positions": pa.array([[-1] * len(columns["positions"][0])], pa.list_(pa.int32()))}
        ),
        "positions of 2^31 - 1": lambda columns: (
            columns | {"positions": pa.array([[2**31 - 1] * len(columns["positions"][0])], pa.list_(pa.int32()))}
        ),
        "a sample without positions": lambda columns: columns | {"positions": pa.array([[]], pa.list_(pa.int32()))},
    }
    cases += [
        Case(f"batch of samples: {name}", rebatched(samples, change), "arrow")
        for name, change in samples_changes.items()
    ]
    return [*cases, *nulls, Case("batch: rows in other batches than they belong", shifted_rows, "arrow")]


CASES: list[Case] = [*_zarr_bombs(), *_arrow_bombs()]
