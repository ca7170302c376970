"""What is below a pinned path, and how much of it is held; and having the rest fetched.

    resolve    the path, by listings from the root on: those are held too, or the path would lead nowhere offline
    survey     every directory once: its listing, then its files; what was complete is only asked for its version
    fill       the directories that lacked something, file by file

What is still to be visited stands in a traversal's agenda on the local disk, so a tree may be of any size. Remembered
in memory is at most REMEMBERED_MAX of what directories hold; one that was forgotten is looked through again. Nothing
else is needed to go on after a kill: what is held already is found held.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio
from attrs import define, field, frozen
from cachetools import LRUCache

from cache.backoff import delay_s
from cache.connectivity import Connectivity
from cache.kept import Kept, listing_name
from cache.pin_holder import Holder, is_file
from cache.pin_list import Pin
from cache.pin_store import PinsFullError
from grid.errors import FormatError, GridError, GridUnreachableError, NoSuchChildError, WrongKindError
from grid.formats.caps import Cap, DirectoryCap
from grid.formats.directory import normalize_name
from grid.nodes.dirnode import DirectoryContents
from grid.nodes.traversal import PATH_PARTS_MAX, Agenda, Path, visit_key
from grid.operations.lanes import in_lanes

log = logging.getLogger(__name__)

DIRECTORIES_AT_ONCE: Final = 4
FILES_AT_ONCE: Final = 6
REMEMBERED_MAX: Final = 100_000  # directories, by what they held; some 30 MB
FAILED_MAX: Final = 10_000  # files that could not be had, and when to try again
STEPS_MAX: Final = 10_000  # directories on the way to pinned paths
DIRECTORY_TIMEOUT_S: Final = 60.0  # for one listing
RETRY_FIRST_S: Final = 10.0  # after a file could not be had; doubles each time
RETRY_MOST_S: Final = 600.0


@define
class Survey:
    """What there is below a path, as counted so far."""

    files: int = 0
    files_held: int = 0
    bytes: int = 0
    bytes_held: int = 0
    missing_bytes: int = 0  # of what is not held, each file once however often it is linked
    lacking: int = 0  # directories, or a single file, of which something is not held
    troubles: int = 0  # directories that could not be read, files that could not be had
    trouble: str | None = None  # one of them, and why
    offline: bool = False  # the reason is that the grid is not there

    def add(self, seen: _Seen) -> None:
        self.files += seen.files
        self.files_held += seen.files_held
        self.bytes += seen.bytes
        self.bytes_held += seen.bytes_held
        self.lacking += not seen.is_held

    def note(self, path: Path, error: Exception) -> None:
        self.troubles += 1
        self.offline = self.offline or isinstance(error, GridUnreachableError)
        if self.trouble is None:
            self.trouble = f"/{'/'.join(path)}: {str(error) or 'the grid did not answer in time'}"


@frozen
class _Seen:
    """One directory, when it was looked through last."""

    version: bytes
    epoch: int
    children: tuple[tuple[str, DirectoryCap], ...] = field(repr=False)
    files: int = 0
    files_held: int = 0
    bytes: int = 0
    bytes_held: int = 0
    is_steady: bool = True  # as long as its version is the same, nothing in it needs another look

    @property
    def is_held(self) -> bool:
        return self.files == self.files_held


class PinTree:
    """For the pins of one root."""

    def __init__(self, client: Any, root: DirectoryCap, kept: Kept, holder: Holder, connectivity: Connectivity) -> None:
        self._client = client
        self._root = root
        self._kept = kept
        self._holder = holder
        self._connectivity = connectivity
        self._seen: LRUCache[bytes, _Seen] = LRUCache(REMEMBERED_MAX, getsizeof=lambda seen: 1 + len(seen.children))
        self._steps: LRUCache[tuple[bytes, str], tuple[bytes, Cap]] = LRUCache(STEPS_MAX)
        self._failed: LRUCache[Cap, tuple[int, float, Exception]] = LRUCache(FAILED_MAX)

    def forget_failures(self) -> None:
        """Try again at once what could not be had."""
        self._failed.clear()

    # --- looking

    async def hold_listings(self, caps: Sequence[DirectoryCap]) -> None:
        """As they were seen last. Raises OSError."""
        for cap in caps:
            if (name := listing_name(cap)) is not None:
                with suppress(PinsFullError):
                    await self._holder.hold(name)

    async def resolve(self, path: Sequence[str]) -> Cap:
        """What stands there on the grid. Raises NoSuchChildError, GridError, TooSlowError, PinsFullError, OSError."""
        cap: Cap = self._root
        for part in path:
            if not isinstance(cap, DirectoryCap) or cap.is_verifier:
                raise WrongKindError("a part of the path is no directory any more")
            name, key = normalize_name(part), visit_key(cap)
            step = None if key is None else self._steps.get((key, name))
            version, contents = await self._listing(cap, None if step is None else step[0])
            if contents is None:
                assert step is not None
                cap = step[1]
                continue
            if (entry := contents.entries.get(name)) is None:
                raise NoSuchChildError(name)
            cap = entry.cap
            if key is not None:
                self._steps[key, name] = (version, cap)
        return cap

    async def survey(self, pin: Pin, cap: Cap, lacking: Agenda, survey: Survey) -> None:
        """Count what is at and below `cap` into `survey`, and put what is incomplete into `lacking`.

        Raises PinsFullError, OSError.
        """
        if not isinstance(cap, DirectoryCap) or cap.is_verifier:
            if not is_file(cap):
                raise WrongKindError("this cap shows nothing that could be kept")
            (look,) = await self._holder.look([cap])
            held = look.bytes if look.is_held else look.bytes_held
            survey.add(_Seen(b"", 0, (), 1, int(look.is_held), look.bytes, held))
            if look.error is not None:
                survey.note(pin.path, look.error)
            if not look.is_held:
                survey.missing_bytes += look.bytes - look.bytes_held
                lacking.push([(pin.path, cap)])
            return
        with Agenda() as agenda:
            agenda.is_new(cap)
            agenda.push([(pin.path, cap)])
            look_at = partial(self._look, survey, lacking)
            while here := list(itertools.islice(iter(agenda.pop, None), DIRECTORIES_AT_ONCE)):
                looked = await in_lanes(DIRECTORIES_AT_ONCE, here, look_at)
                for item in here:
                    if (seen := looked[item]) is None:
                        continue
                    survey.add(seen)
                    if not seen.is_held:
                        lacking.push([item])
                    path = item[0]
                    if len(path) < PATH_PARTS_MAX:
                        agenda.push([((*path, name), child) for name, child in seen.children if agenda.is_new(child)])

    async def _look(self, survey: Survey, lacking: Agenda, item: tuple[Path, Cap]) -> _Seen | None:
        """One directory. None if it cannot be read."""
        path, cap = item
        assert isinstance(cap, DirectoryCap)
        key = visit_key(cap)
        known = None if key is None else self._seen.get(key)
        if known is not None and (known.epoch != self._holder.epoch or not known.is_steady):
            known = None
        try:
            version, contents = await self._listing(cap, None if known is None else known.version)
        except PinsFullError:
            raise
        except (GridError, trio.TooSlowError) as error:
            survey.note(path, error)
            return None
        if contents is None:
            return known
        files, children = _sorted_out(contents)
        looks = await self._holder.look(list(files.values()))
        for name, look in zip(files, looks, strict=True):
            if look.error is not None:
                survey.note((*path, name), look.error)
            if not look.is_held and lacking.is_new(files[name]):
                survey.missing_bytes += look.bytes - look.bytes_held
        seen = _Seen(
            version,
            self._holder.epoch,
            children,
            len(looks),
            sum(look.is_held for look in looks),
            sum(look.bytes for look in looks),
            sum(look.bytes if look.is_held else look.bytes_held for look in looks),
            is_steady=all(look.is_held for look in looks) and not any(cap.is_mutable for cap in files.values()),
        )
        if key is not None and len(children) < REMEMBERED_MAX:
            self._seen[key] = seen
        return seen

    async def _listing(self, cap: DirectoryCap, known: bytes | None) -> tuple[bytes, DirectoryContents | None]:
        """The directory's version, and what is in it unless that is the version `known`. Held when this returns.

        The grid is asked for the version alone as long as it is the one that was seen last.
        """
        name = listing_name(cap)
        seen = known if known is not None or name is None else await self._kept.kept_version(cap)
        if name is not None and seen is not None and (not cap.is_mutable or await self._is_still(cap, seen)):
            contents = None if known is not None else await self._kept.kept_directory(cap)
            if (known is not None or contents is not None) and await self._holder.hold(name):
                return seen, contents
        with trio.fail_after(DIRECTORY_TIMEOUT_S):
            contents, _ = await self._kept.read_directory(cap)
        if name is not None and not await self._holder.hold(name):
            await self._kept.note_directory(cap, contents)
            if not await self._holder.hold(name):
                raise FormatError("its listing could not be kept")
        return contents.version, contents

    async def _is_still(self, cap: DirectoryCap, version: bytes) -> bool:
        """Also if nobody can tell: then what was seen last must do."""
        node = self._client.nodemaker.create_from_cap(cap, keep=False)  # those that the mount uses stay
        try:
            with trio.fail_after(DIRECTORY_TIMEOUT_S):
                snapshot = await self._connectivity.reach(node.file.open_snapshot)
        except (GridError, trio.TooSlowError) as error:
            log.info("a pinned directory was not asked for its version: %s", error or "the grid takes too long")
            return True
        return bool(snapshot.version == version)

    # --- fetching

    async def fill(self, pin: Pin, lacking: Agenda, survey: Survey) -> int:
        """Have fetched what `survey` found lacking; `pin` is told how it goes, `survey` what goes wrong.

        Returns how many files are not held yet. Raises GridUnreachableError, PinsFullError, OSError.
        """
        left = 0
        while (item := lacking.pop()) is not None:
            path, cap = item
            files: Mapping[str, Cap] = {path[-1]: cap} if path else {}
            if isinstance(cap, DirectoryCap):
                contents = await self._kept.kept_directory(cap)
                if contents is None and cap.storage_index is not None:
                    survey.note(path, FormatError("its listing was lost again"))
                    continue
                files = _sorted_out(contents)[0] if contents is not None else await self._files_of_literal(cap)
            else:
                path = path[:-1]
            looks = await self._holder.look(list(files.values()))
            wanted: dict[Cap, list[Path]] = {}  # fetched once, however many names it has
            for name, look in zip(files, looks, strict=True):
                if not look.is_held:
                    wanted.setdefault(files[name], []).append((*path, name))
            items = [(paths[0], cap, len(paths)) for cap, paths in wanted.items()]
            fetched = await in_lanes(FILES_AT_ONCE, items, partial(self._fetch, pin, survey))
            left += sum(names for (_, _, names), is_held in fetched.items() if not is_held)
        return left

    async def _files_of_literal(self, cap: DirectoryCap) -> Mapping[str, Cap]:
        contents, _ = await self._kept.read_directory(cap)
        return _sorted_out(contents)[0]

    async def _fetch(self, pin: Pin, survey: Survey, item: tuple[Path, Cap, int]) -> bool:
        """A file with so many names in its directory; whether it is held then."""
        path, cap, names = item
        attempts, retry_at, failure = self._failed.get(cap, (0, 0.0, None))
        if failure is not None and trio.current_time() < retry_at:
            survey.note(path, failure)
            return False

        def tell(size: int) -> None:
            pin.bytes_held = min(pin.bytes, pin.bytes_held + size * names)

        try:
            await self._holder.fetch(cap, tell)
        except (GridUnreachableError, PinsFullError):
            raise
        except (GridError, trio.TooSlowError) as error:
            log.info("a pinned file cannot be had now: %s", error or "the grid takes too long")
            retry_at = trio.current_time() + delay_s(attempts + 1, RETRY_FIRST_S, RETRY_MOST_S)
            self._failed[cap] = (attempts + 1, retry_at, error)
            survey.note(path, error)
            return False
        self._failed.pop(cap, None)
        pin.files_held = min(pin.files, pin.files_held + names)
        return True


def _sorted_out(contents: DirectoryContents) -> tuple[dict[str, Cap], tuple[tuple[str, DirectoryCap], ...]]:
    """Files that can be read, by name, and directories. What neither is shows nothing, with the grid or without."""
    entries = contents.entries
    files = {name: entry.cap for name, entry in entries.items() if is_file(entry.cap)}
    caps = [(name, entry.cap) for name, entry in entries.items()]
    return files, tuple((name, cap) for name, cap in caps if isinstance(cap, DirectoryCap) and not cap.is_verifier)
