"""Two real daemons: writes through a real NBD socket are on both images, through restarts, crashes and lost links."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pair import Pair


def test_a_write_is_on_both_images(pair: Pair) -> None:
    pair.up()
    with pair.alpha.client() as client:
        client.write(4096, b"\xab" * 8192)
        client.write(1234567, b"odd bytes", fua=True)
        assert client.read(1234567, 9) == b"odd bytes"
        client.flush()
    assert pair.alpha.stop() == 0
    assert pair.beta.stop() == 0
    pair.same_images()
    assert pair.beta.image().read_bytes()[4096:12288] == b"\xab" * 8192
