"""A real foolscap tub, to test against: run by another Python, the one that has foolscap installed.

Listens on loopback, prints its FURL on one line, and ends when its standard input closes.
"""

from __future__ import annotations

from foolscap.api import Referenceable, Tub
from foolscap.util import allocate_tcp_port
from twisted.internet import defer, reactor, stdio
from twisted.internet.protocol import Protocol


class Canary(Referenceable):
    """An object without methods."""


class Target(Referenceable):
    def __init__(self):
        self.seen = []
        self.kept = []
        self.losses = 0

    def remote_echo(self, value):
        return value

    def remote_note(self, value):
        self.seen.append(value)

    def remote_seen(self):
        return self.seen

    def remote_boom(self):
        raise ValueError("boom " * 1000)

    def remote_length(self, data):
        return len(data)

    def remote_zeros(self, length):
        return b"\0" * length

    def remote_new_object(self):
        return Canary()

    def remote_keep(self, canary):
        """Keep a reference, and count its loss."""
        self.kept.append(canary)
        canary.notifyOnDisconnect(self._lost)

    def _lost(self):
        self.losses += 1

    def remote_losses(self):
        return self.losses

    def remote_forget(self):
        self.kept.clear()

    def remote_call_me(self, reference, method, arguments):
        """Call the caller back, and answer with its answer, or the type name of its error."""
        call = reference.callRemote(method, *arguments)
        call.addErrback(lambda failure: f"error {failure.type} {failure.value} {failure.parents}")
        return call

    def remote_call_in_order(self, reference, count):
        """Pipeline calls to the caller; answer when all were answered."""
        return defer.gatherResults([reference.callRemote("note", i) for i in range(count)])

    def remote_dial(self, furl):
        return tub.getReference(furl.decode()).addCallback(lambda reference: True)

    def remote_drop(self):
        """Drop the connection without a word, once this call has come in."""
        for broker in list(tub.brokers.values()):
            reactor.callLater(0, broker.transport.abortConnection)

    def remote_how_many_brokers(self):
        return len(tub.brokers)

    def remote_never(self):
        return defer.Deferred()


class UntilEndOfInput(Protocol):
    def connectionLost(self, reason):
        reactor.stop()


tub = Tub()
port = allocate_tcp_port()
tub.listenOn(f"tcp:{port}:interface=127.0.0.1")
tub.setLocation(f"tcp:127.0.0.1:{port}")
furl = tub.registerReference(Target(), "target")
tub.startService()
stdio.StandardIO(UntilEndOfInput())
print(furl, flush=True)
reactor.run()
