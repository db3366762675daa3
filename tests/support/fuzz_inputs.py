"""Inputs that nobody would write by accident: valid files, changed in their bytes, their text or their structure.

Owns the changes; a file with a checksum gets the right one again, so that what is behind the checksum is reached.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from logitcache.storage.identity import digest

DIGITS, DEEP, NAN, WIDE = "@@DIGITS@@", "@@DEEP@@", "@@NAN@@", "@@WIDE@@"
"""Stand for what `json.dumps` does not write: 5,000 digits, 2,000 lists in one another, NaN, 2,000 values."""

RAW = {
    DIGITS: b"9" * 5000,
    DEEP: b"[" * 2000 + b"]" * 2000,
    NAN: b"NaN",
    WIDE: b"[" + b"{}," * 2000 + b"{}]",
}

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**63, 10**30, -(10**30), 1.5, 1e308, -1e308, 5e-324, -0.0),
    *("", " ", "0", "x", "x" * 5000, "\x1b[31mred", "a\r\nb", "a\nb", "\0", "\ud800", "‮evil", "​", "é", "=1+1"),
    *("../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "$x^{", "|", "<b>", "`", "***", "user:SECRET@host", "?a=b"),
    *("f" * 32, "F" * 32, "0" * 31, "zarr", "NaN", "1e5", "finished", DIGITS, DEEP, NAN, WIDE),
    *([], {}, [[]], [{}], [None], [0], ["x"], {"x": None}, {"a": {"a": {"a": 1}}}),
]

TOKENS = [
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[2J", b"\r", b"\n", b"\t", b"\xef\xbb\xbf", b"\x85"),
    *(
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"1e999",
        b"-",
        b"NaN",
        b"Infinity",
        b"\\ud800",
        b"\\u0000",
        b'"',
        b",",
    ),
    *(b"{", b"}", b"[", b"]", b":", b"null", b"true", b"0x" + b"f" * 5000, b"\\"),
]

YAML_TOKENS = [
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!int ",
        b"!!float ",
        b"!!binary ",
        b"!!timestamp ",
        b"!!set ",
        b"!!omap ",
        b"!!bool ",
    ),
    *(
        b"!!python/object/apply:os.system [true]",
        b"!!null ",
        b"!x ",
        b"%YAML 9.9\n",
        b"---\n",
        b"...\n",
        b"? ",
        b"- ",
        b"| ",
    ),
    *(
        b"2024-99-99",
        b"1:59:59",
        b"1" + b":59" * 3000,
        b"0b_",
        b"0o9",
        b"1_000",
        b".inf",
        b".nan",
        b"1e3",
        b"~",
        b"'",
        b"#",
    ),
    *(
        b"[" * 500,
        b"{a: " * 500,
        b"- " * 500,
        b"&a [*a, *a]",
        b'"\\ud800"',
        b'"\\e[31m"',
        b"grid:\n",
        b"methods:\n",
        b"lr: ",
    ),
    *(b"  ", b"> ", b"@", b"!!str ", b"!!seq ", b"!!map ", b"!!pairs ", b"!!merge ", b"!!value "),
]


def changed_bytes(data: bytes, rng: random.Random, tokens: list[bytes] = TOKENS) -> bytes:
    """One to four changes of a file as bytes: bits, ends, pieces, signs that mean something to somebody."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(7):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                del found[at : at + rng.randrange(1, 40)]
            case 3:
                found[at:at] = found[at : at + rng.randrange(1, 200)]
            case 4:
                found[at : at + rng.randrange(0, 8)] = rng.randbytes(rng.randrange(1, 8))
            case _:
                found[at : at + rng.choice((0, 0, 1, 8))] = rng.choice(tokens)
    return bytes(found)


def changed_yaml(data: bytes, rng: random.Random) -> bytes:
    """The same with what means something to YAML."""
    return changed_bytes(data, rng, YAML_TOKENS if rng.random() < 0.8 else TOKENS)


def changed_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value, changed in one to three places."""
    found = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(found)) or [(None, None)])
        if holder is None:
            return copy.deepcopy(rng.choice(VALUES))
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("x", "", "\x1b", "name", "\ud800", "a" * 3000))] = copy.deepcopy(holder[key])
            case 2 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 3:
                other, name = rng.choice(list(_places(found)))
                holder[key] = json.loads(json.dumps(other[name]))
            case 4 if isinstance(holder[key], (int, float)):
                holder[key] = rng.choice((-1, 0, 1, holder[key] + 1, -holder[key], holder[key] * 2**20, 2**32, 2.5))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return found


def enveloped(body: Any) -> bytes:
    """A file of a cache with this body, whose checksum is right."""
    canonical = _raw(json.dumps(body, sort_keys=True, separators=(",", ":")))
    return b'{"body":' + canonical + b',"checksum":"' + digest(canonical).encode() + b'"}\n'


def sealed_again(fields: Any) -> bytes:
    """JSON that people read, with these fields, whose checksum is right."""
    if not isinstance(fields, dict):
        return _raw(json.dumps(fields))
    canonical = _raw(json.dumps(fields, sort_keys=True, separators=(",", ":")))
    return _raw(json.dumps({**fields, "checksum": digest(canonical)}, indent=2)) + b"\n"


def plain_json(value: Any) -> bytes:
    """JSON without a checksum."""
    return _raw(json.dumps(value))


Change = Callable[[random.Random], bytes]


def of_json(data: bytes, value: Any, written: Callable[[Any], bytes]) -> Change:
    """Half as bytes, half in the structure with the right checksum."""
    return lambda rng: changed_bytes(data, rng) if rng.random() < 0.4 else written(changed_value(value, rng))


def json_bombs(written: Callable[[Any], bytes], most: int = 16 * 2**20) -> Iterator[bytes]:
    """Files of the greatest size that is read, of which each value takes as much more memory as can be."""
    size = most - 200
    bodies: list[Callable[[], bytes]] = [
        lambda: b"[" + b"[]," * (size // 3 - 2) + b"[]]",
        lambda: b"[" + b"300," * (size // 4 - 2) + b"300]",
        lambda: b"{" + b",".join(b'"%x":1' % i for i in range(size // 10)) + b"}",
        lambda: b"[" + b'"ab",' * (size // 5 - 2) + b'"ab"]',
        lambda: b"[" * (size // 2) + b"]" * (size // 2),
        lambda: b'"' + b"a" * size + b'"',
        lambda: b"[" + b"70000," * (size // 6 - 2) + b"70000]",
        lambda: b"[" + b",".join(b'"%010d"' % i for i in range(size // 13)) + b"]",
        lambda: b"{" + b",".join(b'"%010d":700' % i for i in range(size // 17)) + b"}",
        lambda: b"[" + b"[    ]," * (size // 9) + b"        " * (size // 40) + b"[]]",
    ]
    for body in bodies:
        yield b'{"body":' + (made := body()) + b',"checksum":"' + digest(made).encode() + b'"}\n'
        yield made
    yield b"\0" * size
    yield b"x" * (2 * size)
    yield written({"x": "\\" * (size // 4)})


def _raw(text: str) -> bytes:
    data = text.encode()
    for name, raw in RAW.items():
        data = data.replace(f'"{name}"'.encode(), raw)
    return data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) in a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)
