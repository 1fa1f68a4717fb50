"""This node's volumes as the daemon has them open: image, metadata, and what the two say about each other.

Rules:
- M1 An image of another size than the metadata say is refused; another image (A8), or metadata older than the node file
  (F15), are `distrusted`: the volume is neither served nor a source until everything was copied again.
- M2 Everything is opened and locked, or nothing.
- M9 A new epoch goes to the superblocks first, to the node file last.
- Every `update` is durable when it returns, and blocks: the node calls it in a thread, one at a time.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mirrorpair.errors import RefusedError, UsageError
from mirrorpair.history import NO_ID, Ids, Side, adopt, began_alone, first, forget_bitmap
from mirrorpair.identity import boot_id, difference, identify
from mirrorpair.image import Image, open_target
from mirrorpair.metadata import NodeFile, Superblock, check_owner, open_node, open_volume, rolled_back
from mirrorpair.text import printable
from mirrorpair.units import format_exact

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from mirrorpair.config import Config, Node, Volume
    from mirrorpair.history import DiskState, Role
    from mirrorpair.twofold import Stored


class OpenVolume:
    """One volume. `index` is its number in the engine."""

    def __init__(
        self, index: int, volume: Volume, image: Image, meta: Stored[Superblock], distrust: str | None
    ) -> None:
        self.index = index
        self.name = volume.name
        self.size = volume.size
        self.block_size = volume.block_size
        self.image = image
        self.meta = meta
        self.distrust = distrust
        """why the image and its metadata do not belong together, one sentence; None: they do"""
        self.failed: str | None = None
        """the first disk or journal error of this run"""

    @property
    def block(self) -> Superblock:
        return self.meta.value

    def obstacle(self) -> str | None:
        """Why it cannot be served, or None."""
        if self.failed is not None:
            return f"volume {self.name}: {self.failed}"
        if self.distrust is not None:
            return f"volume {self.name}: {self.distrust}"
        if self.block.inconsistent:
            return f"volume {self.name} is {self.block.disk}: a resync into it has not ended"
        return None

    def engine_entry(self) -> tuple[int, int, int, int]:
        return self.image.fd, self.size, self.meta.fd, self.block_size


class OpenNode:
    """Node file and volumes, open and locked. A context manager."""

    def __init__(self, file: Stored[NodeFile], volumes: list[OpenVolume], stack: ExitStack) -> None:
        self.file = file
        self.volumes = volumes
        self.boot_id = boot_id()
        self._stack = stack

    def close(self) -> None:
        self._stack.close()

    def volume(self, name: str) -> OpenVolume:
        """UsageError: there is none of this name."""
        for volume in self.volumes:
            if volume.name == name:
                return volume
        raise UsageError(f"there is no volume {name!r}; there are: {', '.join(one.name for one in self.volumes)}")

    @property
    def value(self) -> NodeFile:
        return self.file.value

    def obstacle(self) -> str | None:
        return next((found for one in self.volumes if (found := one.obstacle()) is not None), None)

    # --- durable changes; each blocks

    def started(self, *, settled: bool) -> None:
        """The daemon runs. `settled` False: an earlier end is not settled yet, so what the node file says of it stays
        until it is. F15: that a volume is distrusted is durable with this, hence before an epoch or uuid is written
        that would take the evidence away."""
        for volume in self.volumes:
            changes: dict[str, Any] = {} if volume.distrust is None else {"full_id": 0}
            volume.meta.update(clean=False, boot_id=self.boot_id, distrusted=volume.distrust is not None, **changes)
        if settled:
            self.file.update(clean=False, boot_id=self.boot_id, role="secondary")

    def raise_epoch_floor(self, epoch: int) -> None:
        """A13."""
        if epoch > self.value.epoch_floor:
            self.file.update(epoch_floor=epoch)

    def learned(self, *, epoch: int, version: int, role: Role, settled: bool) -> None:
        """The register has changed: its epoch and version, and this node's role in it."""
        epoch = max(epoch, self.value.epoch)
        for volume in self.volumes:
            volume.meta.update(epoch=epoch)
        changes: dict[str, Any] = {
            "epoch": epoch,
            "epoch_floor": max(epoch, self.value.epoch_floor),
            "register_epoch": epoch,
            "register_version": version,
        }
        if settled:
            changes |= {"role": role, "clean": False, "boot_id": self.boot_id}
        self.file.update(**changes)

    def settled(self, role: Role) -> None:
        """What an earlier end left open is over."""
        self.file.update(role=role, clean=False, boot_id=self.boot_id)

    def met(self, pair_uuid: str) -> None:
        """The pair has a uuid; it was durable nowhere before."""
        _met(self.file, self.volumes, pair_uuid)

    def began_alone(self, new_id: Callable[[], int]) -> None:
        """G1, G2: the new generation of every volume."""
        for volume in self.volumes:
            volume.meta.update(ids=began_alone(volume.block.ids, new_id()))

    def stopped(self, *, settled: bool) -> None:
        """A18: everything is durable."""
        for volume in self.volumes:
            volume.meta.update(clean=True, boot_id=self.boot_id)
        if settled:
            self.file.update(clean=True, boot_id=self.boot_id)


def prepare(volume: OpenVolume, *, volume_uuid: str, first_id: int, full_id: int, target: bool) -> None:
    """Before a data link begins: M10's ids; R1 for the target of a copy, R6 for that of a full compare. Blocks."""
    changes: dict[str, Any] = {"volume_uuid": volume_uuid}
    if first_id:
        changes["ids"] = first(first_id)
    if target:
        changes["disk"] = "inconsistent"
        if full_id:
            changes["full_id"] = full_id
    volume.meta.update(**changes)


def began_full(volume: OpenVolume, full_id: int) -> None:
    """R6, at the source: all bits are durable. Blocks."""
    volume.meta.update(full_id=full_id)


def finish_target(volume: OpenVolume, source: Ids) -> None:
    """R1, G4: everything is here and durable; the source's ids, then the flag: one write holds both. Blocks."""
    volume.meta.update(
        ids=adopt(source),
        disk="consistent",
        identity=identify(volume.image.fd),
        discard=False,
        peer_disk="up-to-date",
        distrusted=False,
        full_id=0,
    )
    volume.distrust = None


def finish_source(volume: OpenVolume) -> None:
    """G4: the target has said that it is durable there. Blocks."""
    if volume.block.ids.bitmap != NO_ID or volume.block.full_id:
        volume.meta.update(ids=forget_bitmap(volume.block.ids), peer_disk="up-to-date", full_id=0)


def side_of(
    volume: OpenVolume,
    *,
    node: str,
    role: Role,
    epoch: int,
    disk: DiskState,
    dirty: bool,
    crashed: bool,
    boot_lost: bool,
    survivor: bool,
    alone: bool,
) -> Side:
    """What this node says about the volume in a handshake."""
    block = volume.block
    return Side(
        node=node,
        size=volume.size,
        block_size=volume.block_size,
        ids=block.ids,
        new=block.new,
        role=role,
        disk=disk,
        crashed_primary=crashed,
        boot_lost=boot_lost,
        connected_survivor=survivor,
        dirty=dirty,
        alone=alone,
        epoch=epoch,
        discard=block.discard,
        distrusted=volume.distrust is not None,
        full_id=block.full_id,
    )


def _check_all_there(config: Config, node: Node) -> None:
    """A part of the node's files missing is a loss, and `init` alone would not mend it."""
    paths = (node.node_file, *(node.meta_path(volume.name) for volume in config.volumes))
    missing = [path for path in paths if not os.path.lexists(path)]
    if missing and len(missing) < len(paths):
        raise RefusedError(
            f"{printable(missing[0])} is missing, while other files of this node are there: `mirrorpair meta check` "
            "says what can be saved"
        )


def _image(path: str, volume: Volume) -> Image:
    """M1."""
    shown = printable(path)
    anew = "`mirrorpair init --force` makes this node new, and it takes everything from its peer"
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UsageError(
            f"the image {shown} of volume {volume.name} does not exist: if its file system is only not mounted, mount "
            f"it; if it is lost, {anew}"
        ) from None
    except OSError:
        found = None  # opening it says what is wrong
    if found is not None and stat.S_ISREG(found.st_mode) and found.st_size != volume.size:
        raise RefusedError(
            f"the image {shown} has {format_exact(found.st_size)}, volume {volume.name} {format_exact(volume.size)}: "
            f"it was cut, grown or replaced; put the right one back, or {anew}"
        )
    return open_target(path, size=volume.size, create=False)


def open_all(config: Config, node: Node) -> OpenNode:
    """RefusedError: another daemon has them, they are another node's, damaged, or of another size. UsageError: they
    were never made. ImageError: they cannot be read."""
    _check_all_there(config, node)
    with ExitStack() as stack:
        file = stack.enter_context(open_node(node.node_file))
        check_owner(file.value, pair=config.name, node=node.name)
        volumes = []
        for index, volume in enumerate(config.volumes):
            meta = stack.enter_context(open_volume(node.meta_path(volume.name)))
            check_owner(
                meta.value,
                pair=config.name,
                node=node.name,
                volume=volume.name,
                size=volume.size,
                block_size=volume.block_size,
                pair_uuid=file.value.pair_uuid,
            )
            image = stack.enter_context(_image(node.images[volume.name], volume))
            distrust = difference(meta.value.identity, identify(image.fd)) or rolled_back(meta.value, file.value)
            volumes.append(OpenVolume(index, volume, image, meta, distrust))
        pairs = {one.block.pair_uuid for one in volumes if one.block.pair_uuid}
        if len(pairs) > 1:
            raise RefusedError("the volumes' metadata are of different pairs: some of them were restored or copied")
        if pairs and not file.value.pair_uuid:
            # The first meeting was cut short between the superblocks and the node file. With an empty one this node
            # would agree on another uuid at the next meeting, which its own superblocks then refuse for ever.
            _met(file, volumes, pairs.pop())
        return OpenNode(file, volumes, stack.pop_all())


def _met(file: Stored[NodeFile], volumes: list[OpenVolume], pair_uuid: str) -> None:
    """M10: superblocks first."""
    for volume in volumes:
        if not volume.block.pair_uuid:
            volume.meta.update(pair_uuid=pair_uuid)
    if not file.value.pair_uuid:
        file.update(pair_uuid=pair_uuid)
