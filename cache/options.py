"""What a workspace may be told: limits and habits, each with its unit in the name."""

from __future__ import annotations

from attrs import frozen

_MIB = 1 << 20


@frozen
class WorkspaceOptions:
    """Every bound a user may want to move. The defaults suit a desktop."""

    cache_bytes: int = 5 << 30  # verified ciphertext kept on the local disk, for all mounts of a node directory
    memory_bytes: int = 64 * _MIB  # of it at most: held in memory as well
    journal_bytes: int | None = None  # open and unsent files on the local disk; then SpoolFullError. None: as it fits
    keep_bytes: int = 512 * _MIB  # of journal_bytes at most: files already stored, kept to be read back
    spool_wait_s: float = 20.0  # how long a writer waits for room in the spool
    poll_s: float = 5.0  # how long the size of a mutable file is believed
    settle_s: float = 1.0  # a file is sent when it has rested this long; at once when somebody waits for it …
    settle_latest_s: float = 10.0  # … or when it has not been sent for this long although it keeps changing
    publish_quiet_s: float = 1.0  # a directory is published when it has rested this long …
    publish_latest_s: float = 5.0  # … or when its oldest ready change is this old (doubling while it stays busy)
    new_directory_latest_s: float = 30.0  # the same for a directory's first publish, which should hold all it has
    retry_first_s: float = 1.0  # after a failure; doubles each time
    retry_most_s: float = 60.0
    mutable: str = "none"  # "sdmf", "mdmf": new files are mutable
    convergent: bool = True  # False: a random key for each file
    nickname: str | None = None  # in the names of conflict copies; None: the node's
    read_only: bool = False  # refuse every change, whatever the cap allows
    durability: str = "journal"  # "grid": whoever changes something waits for it; here it makes no difference
