"""How long a storage server may take over each call, in seconds. A late call raises PeerTimeoutError.

They are generous, since a server's disk may be busy; that a server has stopped answering is noticed much
sooner, see `grid/peers/pulse.py`.
"""

from __future__ import annotations

from typing import Final

GET_VERSION_TIMEOUT_S: Final = 30.0
ALLOCATE_TIMEOUT_S: Final = 30.0
GET_BUCKETS_TIMEOUT_S: Final = 30.0
ADD_LEASE_TIMEOUT_S: Final = 30.0
READ_TIMEOUT_S: Final = 60.0
WRITE_TIMEOUT_S: Final = 60.0  # without any answer to the writes sent, not from the sending of each
CLOSE_TIMEOUT_S: Final = 60.0
SLOT_READ_TIMEOUT_S: Final = 60.0
SLOT_WRITE_TIMEOUT_S: Final = 60.0
ADVISE_TIMEOUT_S: Final = 10.0
GIVING_BACK_TIMEOUT_S: Final = 10.0  # for shares of a cancelled upload, by who wants to upload the same
ABANDONED_TIMEOUT_S: Final = 300.0  # for the answer to an allocation nobody waits for any more
SLOWEST_BYTES_PER_S: Final = 16 << 10  # a line slower than this, to one server, is of no use


def with_data(timeout_s: float, size: int) -> float:
    """The deadline of a call that moves `size` bytes."""
    return timeout_s + size / SLOWEST_BYTES_PER_S
