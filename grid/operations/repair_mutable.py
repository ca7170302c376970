"""Makes a mutable file's missing shares again, of the version that is there; good shares are not touched.

    the best version ── coded again (see `recode`) ── its root hash must come out: then shares of the same version
    missing numbers                     on servers with none of the file first
    damaged ones, and of other versions replaced where they are

What fits in one step of coding is written whole, in one call a share. A larger share takes many calls, and is not to be
seen half:

    first    the place is as the map saw it -> MARKER where the header will be, and the first blocks
    then     MARKER is still there          -> more blocks, the block hash tree
    last     MARKER is still there          -> keys, chain, signature, header

To every reader the marker is a share without a valid signature: it counts for nothing, and the next repair or any other
writer replaces it. Who does that meanwhile is noticed by the next call, which then ends the repair. Two repairs of the
same version write the same bytes. What was begun and does not come to its end is taken away again.

A change in place puts a constant into the share tree for each share it does not reach (see `mdmf_update`): such a
share cannot be made as part of that version. If all shares that are there are what coding gives, then a new version is
made of the same contents, for which they get a new head and nothing else. Memory: two steps of coding, and the hashes.

Source: ours. Tahoe-LAFS 1.20 repairs by writing every share anew, as the next version.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import trio
from attrs import define, field

from grid.errors import (
    CorruptShareError,
    FormatError,
    InconsistentEncodingError,
    NotEnoughSharesError,
    PeerError,
    ShareError,
    UncoordinatedWriteError,
)
from grid.formats.chk_share import unpack_share_hashes
from grid.formats.hashtree import IncompleteHashTree
from grid.formats.hashutil import HASH_BYTES
from grid.formats.mdmf_share import mdmf_signed_prefix, pack_mdmf_head
from grid.formats.mutable_share import (
    MDMF_HEADER_BYTES,
    MDMF_PREFIX,
    MDMF_VERSION,
    SDMF_HEADER_BYTES,
    MutableHeader,
    parse_header,
)
from grid.interfaces import IStorageBroker, IStorageServer, SlotWrite, TestVector
from grid.operations import recode
from grid.operations.happiness import place_missing
from grid.operations.keys import MutableKeys
from grid.operations.lanes import in_lanes
from grid.operations.leases import Secrets
from grid.operations.mdmf_update import PatchedVersion, can_update
from grid.operations.publish import CALLS_IN_FLIGHT, WRITE_TIMEOUT_S, publish
from grid.operations.recode import Recoding, Write
from grid.operations.retrieve import MutableVersion
from grid.operations.servermap import BadShare, ServerMap, ShareKey
from grid.operations.slot_share import FoundShare

log = logging.getLogger(__name__)

ROOTS_AT_ONCE: Final = 16  # shares asked for theirs
WITHDRAW_TIMEOUT_S: Final = 5.0  # to take away what was begun

Writes = Mapping[int, Sequence[Write]]  # {share number: what to write}
Work = Callable[[], Awaitable[None]]


def marker_of(header: MutableHeader) -> bytes:
    """What stands where a share's header will be, while it is made: no header, since it says that k and N are 0."""
    return MDMF_PREFIX.pack(MDMF_VERSION, header.seqnum, header.root_hash, 0, 0, 0, 0).ljust(MDMF_HEADER_BYTES, b"\0")


@define(eq=False)
class _Place:
    """Where a share is to be made; `test` is what has to be there by now."""

    server: IStorageServer
    number: int
    test: TestVector
    marked: bool = field(default=False, init=False)  # the marker stands there
    failed: bool = field(default=False, init=False)

    @property
    def key(self) -> ShareKey:
        return self.server.server_id, self.number


@define(eq=False)
class MutableRepair:
    """One pass over a file, from a map of every server.

    `version`: the best one there is. `out`: ids of servers that did not take a share in an earlier pass. `renumber`:
    make a new version in any case, because another one has the same number.
    """

    _broker: IStorageBroker
    _secrets: Secrets = field(repr=False)
    _keys: MutableKeys = field(repr=False)
    _map: ServerMap
    _version: MutableVersion
    _out: Collection[str] = ()
    _renumber: bool = False
    made: set[ShareKey] = field(factory=set, init=False)
    failed: set[str] = field(factory=set, init=False)  # ids of servers that did not take a share
    found_bad: set[ShareKey] = field(factory=set, init=False)  # shares, in passing
    _header: MutableHeader = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._header = self._version.header

    async def run(self) -> None:
        """Raises UncoordinatedWriteError, InconsistentEncodingError, NotEnoughSharesError, NotEnoughServersError."""
        places = self._places()
        was_bad = set(self._map.bad)
        if places or self._renumber:
            try:
                await self._make(places)
            except BaseException:
                await self._withdraw(places)
                raise
        self.made = {place.key for place in places if not place.failed}
        self.failed = {place.server.server_id for place in places if place.failed}
        self.found_bad = {*self._map.bad, *self._version.servermap.bad} - was_bad - {place.key for place in places}
        log.info("repair of a mutable file: made %d shares of %d wanted", len(self.made), len(places))

    async def _make(self, places: Sequence[_Place]) -> None:
        coding = Recoding(self._version, sorted({place.number for place in places}))
        rest = await self._write_blocks(places, coding)
        if self._left(places) or self._renumber:
            await coding.finish()
            trees = {number: (self._header.offsets.block_hash_tree[0], tree) for number, tree in coding.trees.items()}
            if any(place.marked for place in places):
                await self._write_trees(places, trees)
                trees = {}
            if coding.root_hash == self._header.root_hash and not self._renumber:
                heads = await self._heads_of_same(coding)
            else:
                heads = await self._heads_of_next(coding)
            whole = {n: [*rest[n], *([trees[n]] if n in trees else []), *heads[n]] for n in coding.numbers}
            await self._write(places, whole)

    # --- where to

    def _places(self) -> list[_Place]:
        header, servermap = self._header, self._map
        wanted = range(header.n)  # a share number from the time of a larger N stays as it is
        places: dict[ShareKey, _Place] = {}
        for key, share in servermap.shares.items():
            if share.header.version_key != header.version_key and share.number in wanted:
                specimen = share.header.checkstring
                places[key] = _Place(share.server, share.number, TestVector(0, len(specimen), specimen))
        for key, bad in servermap.bad.items():
            if bad.number in wanted:
                test = TestVector(0, len(bad.specimen) or 1, bad.specimen)
                places[key] = _Place(bad.server, bad.number, test)
        occupied = {*servermap.incompatible, *places}
        places = {key: place for key, place in places.items() if place.server.server_id not in self._out}
        held: dict[str, set[int]] = {}
        for server_id, number in (*places, *((s.server.server_id, s.number) for s in servermap.shares_of(header))):
            held.setdefault(server_id, set()).add(number)
        missing = sorted(set(wanted).difference(*held.values()))
        servers = {
            server.server_id: server
            for server in self._broker.get_permuted_servers(self._version.storage_index)
            if self._broker.permits_upload(server)
            and server.server_id not in self._out
            and server.server_id not in servermap.failures
        }
        for number, server_id in place_missing(list(servers), missing, held, occupied).items():
            places[server_id, number] = _Place(servers[server_id], number, TestVector(0, 1, b""))
        return [places[key] for key in sorted(places)]

    @staticmethod
    def _left(places: Sequence[_Place]) -> list[_Place]:
        return [place for place in places if not place.failed]

    # --- writing

    async def _write_blocks(self, places: Sequence[_Place], coding: Recoding) -> Writes:
        """Code the file and write its blocks. If one step is all, they are not written but returned."""
        steps = coding.steps()
        coded: Writes = await coding.code(steps[0])
        if len(steps) == 1:
            return coded
        marker = (0, marker_of(self._header))
        coded = {number: [marker, *writes] for number, writes in coded.items()}
        for step in [*steps[1:], None]:
            coded_next: dict[int, list[Write]] = {}

            async def write(coded: Writes = coded) -> None:
                await self._write(places, coded, marking=True)

            async def code(step: range | None = step, coded_next: dict[int, list[Write]] = coded_next) -> None:
                if step is not None:
                    coded_next.update(await coding.code(step))

            both: tuple[Work, Work] = (write, code)
            await in_lanes(2, both, lambda work: work())
            if not self._left(places) and not self._renumber:
                break
            coded = coded_next
        return {number: [] for number in coding.numbers}

    async def _write_trees(self, places: Sequence[_Place], trees: Mapping[int, Write]) -> None:
        piece_bytes = max(HASH_BYTES, recode.STEP_BYTES // len(trees))
        for at in range(0, max(len(tree) for _, tree in trees.values()), piece_bytes):
            pieces = {number: [(offset + at, tree[at : at + piece_bytes])] for number, (offset, tree) in trees.items()}
            await self._write(places, pieces, marking=True)

    async def _write(self, places: Sequence[_Place], writes: Writes, *, marking: bool = False) -> None:
        """One call to each place that is left. Raises UncoordinatedWriteError."""
        marker = marker_of(self._header)
        index = self._version.storage_index

        async def write(place: _Place) -> None:
            server, number = place.server, place.number
            secrets = self._secrets.slot(self._keys.writekey, index, server.tub_id)
            call = {number: SlotWrite([place.test], writes[number])}
            try:
                with trio.fail_after(WRITE_TIMEOUT_S):
                    written, _ = await server.slot_testv_and_readv_and_writev(index, secrets, call, [])
            except (PeerError, trio.TooSlowError) as error:
                log.info("repair: share %d on %s: %s", number, server.name, str(error) or "took too long")
                place.failed = True
                return
            if not written:
                raise UncoordinatedWriteError(f"share {number} on {server.name} is not as it was")
            if marking and not place.marked:
                place.marked, place.test = True, TestVector(0, len(marker), marker)
                self._map.shares.pop(place.key, None)
                being_made = CorruptShareError(server.name, number, "it is being made")
                self._map.bad[place.key] = BadShare(server, number, marker, being_made)

        await in_lanes(CALLS_IN_FLIGHT, self._left(places), write)

    async def _withdraw(self, places: Sequence[_Place]) -> None:
        """Take away what was begun, where it still stands."""
        index = self._version.storage_index

        async def withdraw(place: _Place) -> None:
            secrets = self._secrets.slot(self._keys.writekey, index, place.server.tub_id)
            call = {place.number: SlotWrite([place.test], [], new_length=0)}
            try:
                await place.server.slot_testv_and_readv_and_writev(index, secrets, call, [])
            except PeerError as error:
                log.info("repair: share %d on %s stays half made: %s", place.number, place.server.name, error)

        with trio.move_on_after(WITHDRAW_TIMEOUT_S, shield=True):
            await in_lanes(CALLS_IN_FLIGHT, [place for place in places if place.marked], withdraw)

    # --- what a share begins with

    async def _heads_of_same(self, coding: Recoding) -> Writes:
        """The header last."""
        offsets = self._header.offsets
        share, signature = await self._signed_share()
        header_bytes = SDMF_HEADER_BYTES if self._header.format == "sdmf" else MDMF_HEADER_BYTES
        heads = {}
        for number in coding.numbers:
            parts = (
                (offsets.encrypted_private_key, self._keys.encrypted_private_key),
                (offsets.share_hash_chain, coding.packed_chain(number)),
                (offsets.signature, signature),
                (offsets.public_key, self._keys.public_der),
            )
            if any(len(data) != length for (_, length), data in parts):
                raise InconsistentEncodingError("its shares are laid out as nobody writes them: publish it anew")
            heads[number] = [*((offset, data) for (offset, _), data in parts), (0, share.head[:header_bytes])]
        return heads

    async def _signed_share(self) -> tuple[FoundShare, bytes]:
        """A share of the version, and the signature they all have, which was checked when the map was made."""
        failures: list[Exception] = []
        for share in self._map.shares_of(self._header):
            try:
                return share, (await share.read([self._header.offsets.signature]))[0]
            except (PeerError, ShareError) as error:
                failures.append(error)
        raise NotEnoughSharesError(self._header.k, 0, tuple(failures))

    async def _heads_of_next(self, coding: Recoding) -> Writes:
        """Of a new version with the same contents; the shares that are there get theirs here."""
        header = self._header
        if coding.root_hash != header.root_hash:
            await self._check_held(coding)
        if not can_update(header):
            raise InconsistentEncodingError("the missing shares are no part of its newest version: publish it anew")
        prefix = mdmf_signed_prefix(
            seqnum=self._map.highest_seqnum + 1,
            root_hash=coding.root_hash,
            k=header.k,
            n=header.n,
            segment_size=header.segment_size,
            data_size=header.data_size,
        )
        signature = await trio.to_thread.run_sync(self._keys.private.sign_pss, prefix)
        tree_at, tree_bytes = header.block_hash_tree_range
        heads = {
            number: pack_mdmf_head(
                prefix,
                public_key=self._keys.public_der,
                signature=signature,
                share_hash_chain=coding.chain(number),
                encrypted_private_key=self._keys.encrypted_private_key,
                tree_at=tree_at,
                eof=tree_at + tree_bytes,
            )
            for number in range(header.n)
        }
        held = {share.number for share in self._map.shares_of(header)}
        patches = {number: [(0, heads[number])] for number in held}
        next_version = PatchedVersion(parse_header(heads[0]), header, patches)
        # happy with any server: the shares that are there are as many as before, and more are about to come
        await publish(self._broker, self._secrets, self._keys, next_version, self._map, happy=1)
        return {number: [(0, heads[number])] for number in coding.numbers}

    async def _check_held(self, coding: Recoding) -> None:
        """Whether the shares that are there are what was coded. Raises InconsistentEncodingError if one is not."""
        header = self._header
        root_range = (header.offsets.block_hash_tree[0], HASH_BYTES)

        async def check(share: FoundShare) -> None:
            try:
                chain, root = await share.read([header.offsets.share_hash_chain, root_range])
                share_tree = IncompleteHashTree(header.n, header.root_hash)
                share_tree.set_hashes(unpack_share_hashes(chain), leaves={share.number: root})
            except FormatError as error:
                self._map.mark_bad(share, share.corrupt(str(error)))
            except ShareError as error:
                self._map.mark_bad(share, error)
            except PeerError as error:
                log.info("repair: %s", error)
            else:
                if root != coding.roots[share.number]:
                    raise InconsistentEncodingError(
                        f"share {share.number} on {share.server.name} is not what the others are coded to, though "
                        "it is signed: nothing was repaired"
                    )

        await in_lanes(ROOTS_AT_ONCE, self._map.shares_of(header), check)
