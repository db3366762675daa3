"""JSON that carries its own checksum, so that a flipped bit is a refusal and never another value.

Owns the two forms: `envelope`, whose every byte is fixed (the files of a cache), and `sealed`, an object that people
read too (what runs, sweeps and calibrations leave), whose last field is the checksum of the canonical JSON of the
others: spaces and line breaks are free, names and values are not. Trade-off: the checksum finds what disks and kills
do, not a forgery. Must not know what the values mean, or which file they are in.
"""

import json
from typing import Any

from .errors import InvalidRecord
from .identity import digest
from .plain_text import shown

MAX_JSON_BYTES = 16 * 2**20
MAX_SEALED_BYTES = 12 * 2**20
"""Of what people read too: it is parsed pair by pair, which takes a quarter more memory."""

MAX_DEPTH = 64
"""Objects and lists within one another: ten times what anything here has."""

CHECKSUM = "checksum"
_DAMAGED = "expected a JSON object, found a damaged or half-written file"


def envelope(body: Any) -> bytes:
    """Canonical JSON of {"body", "checksum"}; the checksum is `digest` of the canonical body."""
    return _enveloped(canonical(body))


def body_of(data: bytes) -> Any:
    """What `envelope` was made of. Raises `ValueError`, the middle of a sentence, for any other byte."""
    check_density(data)
    try:
        found = json.loads(data)
        body, checksum = found["body"], found["checksum"]
        inside = canonical(body)
        right = digest(inside)
        intact = data == _enveloped(inside)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected the JSON this program writes, found {shown(error)}") from error
    if not intact:
        what = (
            f"checksum {_bare(checksum)}, found {right}"
            if checksum != right
            else "canonical JSON, found the same otherwise"
        )
        raise ValueError(f"expected {what}")
    return body


def checksum_of(fields: dict[str, Any]) -> str:
    """The checksum that `sealed` puts to these fields."""
    return digest(canonical(_plain(fields), allow_nan=True))


def sealed(fields: dict[str, Any], indent: int | None = 2) -> bytes:
    """An object with its checksum as the last field, and a line break. indent: None for one line.

    NaN and infinity are kept as Python writes them: who takes a number decides. Raises `InvalidRecord` for more than
    readers take.
    """
    data = json.dumps({**fields, CHECKSUM: checksum_of(fields)}, indent=indent).encode() + b"\n"
    if CHECKSUM in fields or len(data) > MAX_SEALED_BYTES or _is_dense(data):
        raise InvalidRecord(
            f"writing JSON: expected at most {MAX_SEALED_BYTES:,} bytes and no field named {CHECKSUM}, found "
            f"{len(data):,} bytes of {', '.join(fields)[:200]}. Readers would refuse it. Write less into one file."
        )
    return data


def unsealed(data: bytes) -> dict[str, Any]:
    """The fields that `sealed` was given. Raises `ValueError`, the middle of a sentence, for anything else."""
    if len(data) > MAX_SEALED_BYTES:
        raise ValueError(f"expected at most {MAX_SEALED_BYTES:,} bytes, found more")
    check_density(data)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("expected text, found other bytes") from error
    try:
        found = json.loads(text, object_pairs_hook=_each_once)
        shallow = isinstance(found, dict) and _depth_is_sane(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(_DAMAGED) from error
    if not shallow:
        raise ValueError(_DAMAGED)
    stated = found.pop(CHECKSUM, None)
    right = digest(canonical(found, allow_nan=True))
    if stated != right:
        raise ValueError(f"expected the {CHECKSUM} {right} as a field, found {shown(stated)}")
    fields: dict[str, Any] = found
    return fields


def _enveloped(inside: bytes) -> bytes:
    return b'{"body":' + inside + b',"checksum":"' + digest(inside).encode() + b'"}\n'


def canonical(value: object, allow_nan: bool = False) -> bytes:
    """Canonical JSON: ASCII, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=allow_nan).encode()


def _plain(fields: dict[str, Any]) -> Any:
    """As they are read back: tuples are lists, and every name is text."""
    return json.loads(json.dumps(fields))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def check_density(data: bytes) -> None:
    """Raise `ValueError` for more lists, names, numbers and texts than files of this size have.

    Parsed, each takes 20 times the bytes that it can be written in. What is written here has a list in 18 bytes, a name
    in 21, a number in 6, a text in 12, at the least.
    """
    if _is_dense(data):
        raise ValueError(f"expected a JSON object with fewer values in {len(data):,} bytes, found more")


def _is_dense(data: bytes) -> bool:
    size = len(data)
    most = {b"[": size // 8, b"{": size // 8, b":": size // 16, b",": size // 5, b'"': size // 5}
    return any(data.count(sign) > 1000 + count for sign, count in most.items())


def _bare(checksum: object) -> str:
    return shown(checksum).strip("'")


def _depth_is_sane(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [v for values in inner for v in values]
        if not level:
            return True
    return False
