"""Chunks of HTTP/1.1's chunked coding, where a read holds nothing but whole ones, as of a stream it nearly always does. Pure.

    b6\r\n                          what a server writes for an event
    data: {"id": …}\n\n\r\n         and what `whole_chunks` leaves of it: the event

Whatever else comes, the beginning of a chunk, extensions, the end of the body, an error, is left to a parser.
"""

_MAX_SIZE_LINE = 8


def whole_chunks(data: bytes) -> bytes | None:
    """What the chunks hold that `data` is made of; None if it is not made of whole ones, written as simply as can be.

    `data` begins where a chunk may begin.
    """
    end = data.find(b"\r\n")
    size = len(data) - end - 4
    if size > 0 and data[:end] == b"%x" % size and data.endswith(b"\r\n"):
        return data[end + 2 : -2]
    parts, start = list[bytes](), 0
    while start < len(data):
        end = data.find(b"\r\n", start, start + _MAX_SIZE_LINE)
        line = data[start:end]
        if end < 0 or not line.isalnum() or line.startswith(b"0"):  # `int` takes signs, blanks and 0x too; 0 is the end
            return None
        try:
            start = end + int(line, 16) + 4
        except ValueError:
            return None
        if data[start - 2 : start] != b"\r\n":  # it ends elsewhere, or has not ended
            return None
        parts.append(data[end + 2 : start - 2])
    return b"".join(parts)
