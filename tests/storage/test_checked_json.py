"""JSON with its own checksum: what is kept, what is refused, and that the cache's form is another one."""

import json
import math
import random
from typing import Any

import pytest

from logitcache.storage import InvalidRecord
from logitcache.storage.checked_json import (
    MAX_DEPTH,
    MAX_SEALED_BYTES,
    body_of,
    checksum_of,
    envelope,
    sealed,
    unsealed,
)

FIELDS: dict[str, Any] = {"b": [1, 1.5, -0.0, True, None], "a": {"10": "ü\ud800", "9": 1e-300}, "": "x" * 50}


def test_what_was_written_is_read() -> None:
    for indent in (2, None):
        assert unsealed(sealed(FIELDS, indent)) == FIELDS
    assert list(json.loads(sealed(FIELDS))) == [*FIELDS, "checksum"]
    assert sealed(FIELDS, indent=None).count(b"\n") == 1
    assert body_of(envelope(FIELDS)) == FIELDS
    assert unsealed(sealed({"a": (1, 2), "b": {10: 1, 9: 2}})) == {"a": [1, 2], "b": {"10": 1, "9": 2}}
    kept = unsealed(sealed({"a": math.nan, "b": -math.inf}))
    assert math.isnan(kept["a"]) and kept["b"] == -math.inf


def test_spaces_and_order_are_free_and_nothing_else() -> None:
    found = json.loads(sealed(FIELDS))
    assert unsealed(json.dumps(found, indent=7, sort_keys=True).encode()) == FIELDS
    for changed in ({**found, "c": 1}, {**found, "": "y"}, {**found, "b": [1.0, 1.5, -0.0, True, None]}):
        with pytest.raises(ValueError, match=f"expected the checksum .* found '{found['checksum']}'"):
            unsealed(json.dumps(changed).encode())
    assert checksum_of(FIELDS) == found["checksum"]


def nested(depth: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return {"a": value}


DAMAGES = {
    "nothing": (b"", "expected a JSON object"),
    "a list": (b"[]", "expected a JSON object"),
    "half": (sealed(FIELDS)[:-9], "expected a JSON object"),
    "two": (sealed(FIELDS) * 2, "expected a JSON object"),
    "other bytes": (b"\xff\xfe{}", "expected text, found other bytes"),
    "UTF-16": (sealed(FIELDS).decode().encode("utf-16"), "expected text, found other bytes"),
    "a field twice": (b'{"a": 1, ' + sealed({"a": 1})[1:], "expected a JSON object"),
    "a field twice inside": (sealed({"a": {"b": 1}}).replace(b'"b": 1', b'"b": 1, "b": 1'), "expected a JSON object"),
    "too deep": (sealed(nested(MAX_DEPTH)), "expected a JSON object"),
    "far too deep": (b'{"a":' + b"[" * 10**6, "expected a JSON object"),
    "no checksum": (b'{"a": 1}', "expected the checksum .* found None"),
    "a checksum that is a list": (b'{"a": 1, "checksum": []}', r"expected the checksum .* found \[\]"),
    "too large": (b" " * (MAX_SEALED_BYTES + 1), "expected at most 12,582,912 bytes, found more"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(name: str) -> None:
    data, said = DAMAGES[name]
    with pytest.raises(ValueError, match=said):
        unsealed(data)


def test_as_deep_as_is_allowed() -> None:
    assert unsealed(sealed(nested(MAX_DEPTH - 2))) == nested(MAX_DEPTH - 2)


def test_every_flipped_bit_is_refused_or_changes_nothing() -> None:
    for indent in (2, None):
        data, same = sealed(FIELDS, indent), 0
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                assert repr(unsealed(bytes(damaged))) == repr(FIELDS)
                same += 1
            except ValueError:
                continue
        assert same < len(data)  # spaces that became other spaces


def test_what_readers_would_refuse_is_not_written() -> None:
    for fields in ({"a": "x" * MAX_SEALED_BYTES}, {"checksum": 1}):
        with pytest.raises(InvalidRecord, match="writing JSON: expected at most"):
            sealed(fields)


def test_the_envelope_takes_no_other_byte() -> None:
    data, draws = envelope(FIELDS), random.Random(0)
    with pytest.raises(ValueError, match="expected canonical JSON"):
        body_of(data + b"\n")
    for bit in draws.sample(range(8 * len(data)), 500):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="expected"):
            body_of(bytes(damaged))
