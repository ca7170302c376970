"""Objects for the tests to call."""

from __future__ import annotations

from typing import Any

import trio

from grid.errors import RemoteFailure
from grid.wire.references import Referenceable


class Target(Referenceable):
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.kept: list[Any] = []
        self.gate = trio.Event()

    async def remote_echo(self, value: Any) -> Any:
        return value

    async def remote_note(self, value: Any) -> None:
        self.seen.append(value)
        await trio.lowlevel.checkpoint()

    async def remote_length(self, data: bytes) -> int:
        return len(data)

    async def remote_zeros(self, length: int) -> bytes:
        return bytes(length)

    async def remote_boom(self) -> None:
        raise RemoteFailure("allmydata.interfaces.NoSpace", "boom " * 1000)

    async def remote_bug(self) -> None:
        raise ZeroDivisionError("the secret of this bug")

    async def remote_new_object(self) -> Referenceable:
        return Referenceable()

    async def remote_keep(self, reference: Any) -> None:
        self.kept.append(reference)

    async def remote_wait(self) -> str:
        await self.gate.wait()
        return "waited"

    async def remote_open_gate(self) -> None:
        self.gate.set()
