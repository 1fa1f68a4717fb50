"""Text from elsewhere, made safe to show.

Rules:
- What a peer, a file name or a far command says reaches a terminal or a log only through `printable`: one line, no
  control character, no terminal escape, no bidirectional override, bounded length.
- Nothing is dropped silently: what cannot be shown is written as an escape, what is cut ends in "...".
"""

from __future__ import annotations

LIMIT = 4096


def printable(text: str, limit: int = LIMIT) -> str:
    """`text` as one harmless line; bytes that came in by surrogateescape are shown as \\xNN."""
    if text.isprintable() and len(text) <= limit:
        return text
    shown: list[str] = []
    length = 0
    for char in text:
        piece = char if char.isprintable() else _escape(ord(char))
        length += len(piece)
        if length > limit:
            shown.append("...")
            break
        shown.append(piece)
    return "".join(shown)


def last_words(said: bytes, lines: int = 3, limit: int = 500) -> str:
    """The last lines a command wrote, as one harmless line; empty when it said nothing."""
    kept = [line.strip() for line in said.decode("utf-8", "surrogateescape").splitlines() if line.strip()]
    return printable(" / ".join(kept[-lines:]), limit)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
