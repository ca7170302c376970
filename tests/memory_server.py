"""A small honest storage server in this process, with switches to make it dishonest or ill. For tests only.

`MemoryServer` keeps immutable shares and mutable slots (test vectors, write enablers) the way a real server
does; `MemoryBroker` knows a list of them. Faults are set while a test runs:

    server.fail_on.add("close")        that call raises ConnectionLostError ("*": every call)
    server.fail_after["write"] = 3     the first three succeed, later ones fail
    server.pause() / server.resume()   as SIGSTOP and SIGCONT: calls get no answer (until their deadline)
    server.hang_on.add("read")         the same for one kind of call
    server.full = True                 no room for new immutable shares; no effect on what it holds
    server.readonly = True             advertises a maximum immutable share size of 0, and is full
    server.latency_s = 0.2             every answer takes that long (use trio's autojump_clock)
    server.corrupt(si, 3, offset=17)   flips one bit of a stored share, immutable or mutable
    server.connected = False           as if the connection were gone

Kinds of calls: get_version allocate_buckets get_buckets read write close add_lease slot_readv slot_writev.
`server.calls` is a Counter of them, `server.bytes_written` counts immutable share bytes received,
`server.slot_bytes_in` and `server.slot_bytes_out` what goes in and out of mutable slots.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import trio
from attrs import define, field

from grid.errors import ConnectionLostError, PeerTimeoutError, RemoteFailure
from grid.interfaces import IBucketReader, IBucketWriter, IStorageServer, LeaseSecrets, SlotSecrets, SlotWrite

CALL_TIMEOUT_S = 120.0
SHARES_MAX = 1 << 40  # advertised maximum share size when there is room


@define
class Slot:
    write_enabler: bytes
    shares: dict[int, bytearray] = field(factory=dict)


class MemoryServer:
    """IStorageServer. `seed` alone decides its ids, so a test grid is the same in every run."""

    def __init__(self, seed: int | str, *, call_timeout_s: float = CALL_TIMEOUT_S) -> None:
        digest = hashlib.sha256(f"memory server {seed}".encode()).digest()
        self.server_id = f"server-{seed}"
        self.name = digest.hex()[:8]
        self.nickname = f"memory {seed}"
        self.permutation_seed = digest
        self.tub_id = digest[:20]
        self.connected = True
        self.immutable: dict[bytes, dict[int, bytearray]] = {}
        self.incoming: dict[tuple[bytes, int], MemoryBucketWriter] = {}
        self.slots: dict[bytes, Slot] = {}
        self.leases: dict[bytes, set[bytes]] = {}
        self.advisories: list[tuple[str, bytes, int, str]] = []
        self.calls: Counter[str] = Counter()
        self.bytes_written = 0
        self.slot_bytes_in = 0
        self.slot_bytes_out = 0
        self.fail_on: set[str] = set()
        self.fail_after: dict[str, int] = {}
        self.hang_on: set[str] = set()
        self.full = False
        self.readonly = False
        self.latency_s = 0.0
        self._call_timeout_s = call_timeout_s
        self._running = trio.Event()
        self._running.set()

    def __repr__(self) -> str:
        return f"<MemoryServer {self.server_id}>"

    # --- faults

    def pause(self) -> None:
        self._running = trio.Event()

    def resume(self) -> None:
        self._running.set()

    def corrupt(self, storage_index: bytes, share_number: int, offset: int, mask: int = 1) -> None:
        self.share(storage_index, share_number)[offset] ^= mask

    def share(self, storage_index: bytes, share_number: int) -> bytearray:
        """The stored bytes themselves, to look at or to damage."""
        if storage_index in self.immutable:
            return self.immutable[storage_index][share_number]
        return self.slots[storage_index].shares[share_number]

    async def _arrive(self, kind: str) -> None:
        """What every call goes through first: faults, in the order a real one would show them."""
        self.calls[kind] += 1
        await trio.lowlevel.checkpoint()
        if not self.connected:
            raise ConnectionLostError(f"{self.name}: not connected")
        if kind in self.hang_on or not self._running.is_set():
            with trio.move_on_after(self._call_timeout_s):
                if kind in self.hang_on:
                    await trio.sleep_forever()
                await self._running.wait()
            if kind in self.hang_on or not self._running.is_set():
                raise PeerTimeoutError(f"{self.name}: no answer to {kind}")
        if self.latency_s:
            await trio.sleep(self.latency_s)
        if not self.connected or kind in self.fail_on or "*" in self.fail_on:
            raise ConnectionLostError(f"{self.name}: connection lost in {kind}")
        if kind in self.fail_after and self.calls[kind] > self.fail_after[kind]:
            raise ConnectionLostError(f"{self.name}: connection lost in {kind}")

    # --- what it says about itself

    @property
    def responsive(self) -> bool:
        return self.connected and self._running.is_set()

    @property
    def maximum_immutable_share_size(self) -> int:
        return 0 if self.readonly else SHARES_MAX

    @property
    def available_space(self) -> int | None:
        return 0 if self.readonly or self.full else SHARES_MAX

    async def get_version(self) -> Mapping[bytes, Any]:
        await self._arrive("get_version")
        return {
            b"application-version": b"memory/1",
            b"http://allmydata.org/tahoe/protocols/storage/v1": {
                b"maximum-immutable-share-size": self.maximum_immutable_share_size,
                b"available-space": self.available_space,
            },
        }

    # --- immutable

    async def allocate_buckets(
        self, storage_index: bytes, lease: LeaseSecrets, share_numbers: frozenset[int], allocated_size: int
    ) -> tuple[frozenset[int], dict[int, IBucketWriter]]:
        await self._arrive("allocate_buckets")
        if storage_index in self.slots:
            raise RemoteFailure("builtins.ValueError", "a mutable slot is there")
        have = frozenset(self.immutable.get(storage_index, ()))
        if have:
            self.leases.setdefault(storage_index, set()).add(lease.renew)
        writers: dict[int, IBucketWriter] = {}
        for number in share_numbers - have:
            if (storage_index, number) in self.incoming or self.full or self.readonly or allocated_size > SHARES_MAX:
                continue
            writer = MemoryBucketWriter(self, storage_index, number, lease, allocated_size)
            self.incoming[storage_index, number] = writer
            writers[number] = writer
        return have, writers

    async def get_buckets(self, storage_index: bytes) -> dict[int, IBucketReader]:
        await self._arrive("get_buckets")
        held = self.immutable.get(storage_index, {})
        return {number: MemoryBucketReader(self, storage_index, number) for number in held}

    async def add_lease(self, storage_index: bytes, lease: LeaseSecrets) -> None:
        await self._arrive("add_lease")
        if storage_index in self.immutable or storage_index in self.slots:
            self.leases.setdefault(storage_index, set()).add(lease.renew)

    async def advise_corrupt_share(self, share_type: str, storage_index: bytes, share_number: int, reason: str) -> None:
        self.advisories.append((share_type, storage_index, share_number, reason))
        await trio.lowlevel.checkpoint()

    # --- mutable

    async def slot_readv(
        self, storage_index: bytes, share_numbers: Sequence[int], read_vectors: Sequence[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        await self._arrive("slot_readv")
        slot = self.slots.get(storage_index)
        if slot is None:
            return {}
        wanted = sorted(share_numbers) or sorted(slot.shares)
        found = {n: _read_vectors(slot.shares[n], read_vectors) for n in wanted if n in slot.shares}
        self.slot_bytes_out += sum(len(data) for pieces in found.values() for data in pieces)
        return found

    async def slot_testv_and_readv_and_writev(
        self,
        storage_index: bytes,
        secrets: SlotSecrets,
        writes: Mapping[int, SlotWrite],
        read_vectors: Sequence[tuple[int, int]],
    ) -> tuple[bool, dict[int, list[bytes]]]:
        await self._arrive("slot_writev")
        self.slot_bytes_in += sum(len(data) for write in writes.values() for _, data in write.data)
        slot = self.slots.get(storage_index)
        if slot is not None and slot.shares and slot.write_enabler != secrets.write_enabler:
            raise RemoteFailure(
                "allmydata.interfaces.BadWriteEnablerError", "The write enabler was recorded by another"
            )
        held = slot.shares if slot is not None else {}
        before = {number: _read_vectors(share, read_vectors) for number, share in held.items()}
        for number, write in writes.items():
            share = held.get(number, b"")
            if any(bytes(share[t.offset : t.offset + t.length]) != bytes(t.specimen) for t in write.tests):
                return False, before
        if slot is None or not slot.shares:
            slot = self.slots[storage_index] = Slot(secrets.write_enabler)
        for number, write in writes.items():
            self._apply(slot, number, write)
        self.leases.setdefault(storage_index, set()).add(secrets.lease.renew)
        return True, before

    @staticmethod
    def _apply(slot: Slot, number: int, write: SlotWrite) -> None:
        if write.new_length == 0:
            slot.shares.pop(number, None)
            return
        share = slot.shares.setdefault(number, bytearray())
        for offset, data in write.data:
            if offset > len(share):
                share.extend(bytes(offset - len(share)))
            share[offset : offset + len(data)] = data
        if write.new_length is not None:
            del share[write.new_length :]


def _read_vectors(share: bytearray, read_vectors: Sequence[tuple[int, int]]) -> list[bytes]:
    return [bytes(share[offset : offset + length]) for offset, length in read_vectors]


class MemoryBucketWriter:
    """IBucketWriter with a window as wide as the file: a failed write shows in a later write or in close()."""

    def __init__(self, server: MemoryServer, storage_index: bytes, number: int, lease: LeaseSecrets, size: int) -> None:
        self._server = server
        self._key = storage_index, number
        self._lease = lease
        self._share = bytearray(size)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        await self._server._arrive("write")
        if self._server.incoming.get(self._key) is not self:
            raise RemoteFailure("foolscap.tokens.Violation", "this bucket writer is closed")
        if offset + len(data) > len(self._share):
            raise RemoteFailure("allmydata.interfaces.DataTooLargeError", "write past the allocated size")
        self._share[offset : offset + len(data)] = data
        self._server.bytes_written += len(data)

    async def close(self) -> None:
        await self._server._arrive("close")
        if self._server.incoming.pop(self._key, None) is not self:
            raise RemoteFailure("foolscap.tokens.Violation", "this bucket writer is closed")
        storage_index, number = self._key
        self._server.immutable.setdefault(storage_index, {})[number] = self._share
        self._server.leases.setdefault(storage_index, set()).add(self._lease.renew)

    async def abort(self) -> None:
        if self._server.incoming.get(self._key) is self:
            del self._server.incoming[self._key]
        await trio.lowlevel.checkpoint()


class MemoryBucketReader:
    """IBucketReader: looks at the server's share at every call, so damage done later is seen."""

    def __init__(self, server: MemoryServer, storage_index: bytes, number: int) -> None:
        self._server = server
        self._key = storage_index, number

    async def read(self, offset: int, length: int) -> bytes:
        await self._server._arrive("read")
        storage_index, number = self._key
        share = self._server.immutable.get(storage_index, {}).get(number)
        if share is None:
            raise RemoteFailure("exceptions.KeyError", "no such share")
        return bytes(share[offset : offset + length])

    async def advise_corrupt_share(self, reason: str) -> None:
        await self._server.advise_corrupt_share("immutable", *self._key, reason)


class MemoryBroker:
    """IStorageBroker over a list of servers; `forbidden` server ids may not be uploaded to."""

    def __init__(self, servers: Iterable[MemoryServer] | int) -> None:
        if isinstance(servers, int):
            servers = [MemoryServer(number) for number in range(servers)]
        self.servers = list(servers)
        self.forbidden: set[str] = set()
        self.hurried = 0  # times retry_now() was called
        self.looked = 0  # times look_for_life() was called

    def get_permuted_servers(self, storage_index: bytes) -> list[IStorageServer]:
        order = sorted(self.servers, key=lambda server: hashlib.sha1(storage_index + server.permutation_seed).digest())
        return [server for server in order if server.connected]

    def get_known_servers(self) -> list[IStorageServer]:
        return list(self.servers)

    def permits_upload(self, server: IStorageServer) -> bool:
        return server.server_id not in self.forbidden

    def retry_now(self) -> None:
        self.hurried += 1

    def look_for_life(self) -> None:
        self.looked += 1

    async def wait_for_servers(self, count: int, timeout_s: float) -> int:
        await trio.lowlevel.checkpoint()
        return sum(server.connected for server in self.servers)
