"""A TCP proxy in threads that counts what those who dial it send, and can stop them at a given byte."""

from __future__ import annotations

import contextlib
import socket
import threading

PIECE_BYTES = 16 << 10


class CountingProxy:
    """Passes connections on to `target`, a port of this machine. `sent`: bytes from those who dialled, all together.

    With `hold_at` set, no more than so many bytes pass until `release()`; `holding` is set when it comes to that. What
    it held when its connection broke is lost, as on any line.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._released = threading.Event()
        self.port: int = self._listener.getsockname()[1]
        self.sent = 0
        self.hold_at: int | None = None
        self.holding = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self.release()

    def release(self) -> None:
        self.hold_at = None
        self._released.set()

    def hold(self, at: int) -> None:
        self._released.clear()
        self.holding.clear()
        self.hold_at = at

    def _serve(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            try:
                outer = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                inner.close()
                continue
            for source, sink, counted in ((inner, outer, True), (outer, inner, False)):
                threading.Thread(target=self._pump, args=(source, sink, counted), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                if counted:
                    with self._lock:
                        self.sent += len(piece)
                        hold = self.hold_at is not None and self.sent >= self.hold_at
                    if hold:
                        self.holding.set()
                        self._released.wait()
                sink.sendall(piece)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
