"""Files that stay open between uses: opening one takes longer than a small read or write."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Generic, TypeVar

from attrs import define

K = TypeVar("K")
F = TypeVar("F", bound="OpenFile")


@define(eq=False)
class OpenFile:
    fd: int
    users: int = 0


class OpenFiles(ABC, Generic[K, F]):
    """By key. When there are too many, the one used longest ago of those nobody uses is closed. For several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._turn = threading.Lock()
        self._files: OrderedDict[K, F] = OrderedDict()  # used longest ago first

    @abstractmethod
    def _open(self, key: K) -> F: ...

    @abstractmethod
    def _is_good(self, key: K, file: F) -> bool:
        """Whether it can be used again; it is opened anew if not."""

    def use(self, key: K) -> Use[K, F]:
        """`with` it, the file is open. Raises what opening it raises."""
        return Use(self, key)

    def acquire(self, key: K) -> F:
        with self._turn:
            file = self._files.get(key)
            if file is not None and self._is_good(key, file):
                self._files.move_to_end(key)
                file.users += 1
                return file
            self._forget(key)
            file = self._files[key] = self._open(key)
            file.users += 1
            if len(self._files) > self._most:
                idle = next((other for other, its_file in self._files.items() if not its_file.users), None)
                if idle is not None:
                    self._forget(idle)
            return file

    def release(self, key: K, file: F) -> None:
        with self._turn:
            file.users -= 1
            if not file.users and self._files.get(key) is not file:
                os.close(file.fd)

    def let_go(self, key: K) -> None:
        """Its file is closed, now or when nobody uses it any more."""
        with self._turn:
            self._forget(key)

    def close(self) -> None:
        """All of them."""
        with self._turn:
            for key in list(self._files):
                self._forget(key)

    def _forget(self, key: K) -> None:
        file = self._files.pop(key, None)
        if file is not None and not file.users:
            os.close(file.fd)


class Use(Generic[K, F]):
    """A context manager that is a generator takes longer than all the rest of a small use."""

    __slots__ = ("_file", "_files", "_key")

    def __init__(self, files: OpenFiles[K, F], key: K) -> None:
        self._files = files
        self._key = key

    def __enter__(self) -> F:
        self._file = self._files.acquire(self._key)
        return self._file

    def __exit__(self, *_: object) -> None:
        self._files.release(self._key, self._file)
