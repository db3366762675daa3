"""What a compressed Arrow record batch claims to unpack to, known before anything is allocated.

pyarrow allocates whatever length a compressed buffer states. This reads those statements, from the batch's metadata as
the Arrow format specifies it (Message.fbs, a flatbuffer).
"""

import struct

_MESSAGE_HEADER, _MESSAGE_BODY_LENGTH, _RECORD_BATCH_BUFFERS = 2, 3, 2


def check_sizes(data: bytes, num_buffers: int, most: int) -> None:
    """Raise ValueError unless this is one encapsulated record batch, and nothing else, of so many buffers, which state
    `most` bytes at most."""
    try:
        marker, metadata_length = struct.unpack_from("<Ii", data)
        if marker != 0xFFFFFFFF:
            raise ValueError("it does not begin as an Arrow message")
        body = 8 + metadata_length
        message = 8 + struct.unpack_from("<I", data, 8)[0]
        (body_length,) = struct.unpack_from("<q", data, _field(data, message, _MESSAGE_BODY_LENGTH))
        if body + body_length != len(data):
            raise ValueError(f"it is {len(data)} bytes, and says that it is {body + body_length}")
        header = _indirect(data, _field(data, message, _MESSAGE_HEADER))
        vector = _indirect(data, _field(data, header, _RECORD_BATCH_BUFFERS))
        (count,) = struct.unpack_from("<I", data, vector)
        if count != num_buffers:
            raise ValueError(f"it has {count} buffers, expected {num_buffers}")
        total = 0
        for i in range(count):
            offset, length = struct.unpack_from("<qq", data, vector + 4 + 16 * i)
            total += max(0, struct.unpack_from("<q", data, body + offset)[0]) if length else 0
    except struct.error as error:
        raise ValueError("it is cut short") from error
    if total > most:
        raise ValueError(f"it states {total} bytes, expected {most} at most")


def _field(data: bytes, table: int, index: int) -> int:
    """Where a field of a flatbuffer table is. Raises ValueError where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * index) if size > 4 + 2 * index else (0,)
    if not offset:
        raise ValueError(f"a field {index} is absent")
    return table + int(offset)


def _indirect(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])
