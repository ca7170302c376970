"""Every remote interface, declared once: storage, introducer, helper, and the connection's own object.

Callers and servers are both driven from here: what a method's arguments are called, in which order they go,
what is accepted, and what the answer must look like.
Source: Tahoe-LAFS 1.20's remote interfaces; where schema and implementation of the original disagree on names
(slot_testv_and_readv_and_writev, upload_chk), positional arguments are the only form that works, so we send
no other.
"""

from __future__ import annotations

from typing import Final

from grid.wire.schemas import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    NONE,
    OFFSET,
    Between,
    Bytes,
    DictOf,
    ListOf,
    OneOf,
    Reference,
    RemoteInterface,
    SetOf,
    TupleOf,
    method,
)

SHARES_MAX: Final = 256  # per storage index
_HELD_SHARE: Final = Between(0, SHARES_MAX - 1)  # in answers; what is asked for is the server's to judge

_BYTES = Bytes()
_STORAGE_INDEX = Bytes(most=16)
_SECRET = Bytes(exactly=32)
_CONTROL_URI = Bytes(most=300)
_HASH = Bytes(exactly=32)
_VERSION = DictOf(_BYTES, ANY)

RIBroker: Final = RemoteInterface(
    "RIBroker",
    {
        "getReferenceByName": method(ANY, name=_BYTES),
        "decref": method(NONE, clid=INT, count=INT),
        "decgift": method(NONE, giftID=INT, count=INT),
    },
)

RIBucketWriter: Final = RemoteInterface(
    "RIBucketWriter",
    {
        "write": method(NONE, offset=OFFSET, data=Bytes(in_pieces=True)),
        "close": method(NONE),
        "abort": method(NONE),
    },
)

RIBucketReader: Final = RemoteInterface(
    "RIBucketReader",
    {
        "read": method(_BYTES, offset=OFFSET, length=INT),
        "advise_corrupt_share": method(NONE, reason=_BYTES),
    },
)

_TEST_VECTOR = ListOf(TupleOf((OFFSET, INT, _BYTES, _BYTES)))
_DATA_VECTOR = ListOf(TupleOf((OFFSET, _BYTES)))
_READ_VECTOR = ListOf(TupleOf((OFFSET, INT)))
_READ_DATA = DictOf(_HELD_SHARE, ListOf(_BYTES), SHARES_MAX)

RIStorageServer: Final = RemoteInterface(
    "RIStorageServer.tahoe.allmydata.com",
    {
        "get_version": method(_VERSION),
        "allocate_buckets": method(
            TupleOf((SetOf(_HELD_SHARE, SHARES_MAX), DictOf(_HELD_SHARE, Reference("RIBucketWriter"), SHARES_MAX))),
            storage_index=_STORAGE_INDEX,
            renew_secret=_SECRET,
            cancel_secret=_SECRET,
            sharenums=SetOf(INT, SHARES_MAX),
            allocated_size=OFFSET,
            canary=Reference(),
        ),
        "add_lease": method(ANY, storage_index=_STORAGE_INDEX, renew_secret=_SECRET, cancel_secret=_SECRET),
        "get_buckets": method(
            DictOf(_HELD_SHARE, Reference("RIBucketReader"), SHARES_MAX),
            storage_index=_STORAGE_INDEX,
        ),
        "slot_readv": method(_READ_DATA, storage_index=_STORAGE_INDEX, shares=ListOf(INT), readv=_READ_VECTOR),
        "slot_testv_and_readv_and_writev": method(
            TupleOf((BOOL, _READ_DATA)),
            storage_index=_STORAGE_INDEX,
            secrets=TupleOf((_SECRET, _SECRET, _SECRET)),
            tw_vectors=DictOf(INT, TupleOf((_TEST_VECTOR, _DATA_VECTOR, OneOf((NONE, OFFSET))))),
            r_vector=_READ_VECTOR,
        ),
        "advise_corrupt_share": method(NONE, share_type=_BYTES, storage_index=_STORAGE_INDEX, shnum=INT, reason=_BYTES),
    },
)

RIIntroducerSubscriberClient_v2: Final = RemoteInterface(
    "RIIntroducerSubscriberClient_v2.tahoe.allmydata.com",
    {"announce_v2": method(NONE, announcements=SetOf(ANY))},
)

RIIntroducerPublisherAndSubscriberService_v2: Final = RemoteInterface(
    "RIIntroducerPublisherAndSubscriberService_v2.tahoe.allmydata.com",
    {
        "get_version": method(_VERSION),
        "publish_v2": method(NONE, announcement=ANY, canary=Reference()),
        "subscribe_v2": method(
            NONE,
            subscriber=Reference(RIIntroducerSubscriberClient_v2.name),
            service_name=_BYTES,
            subscriber_info=DictOf(_BYTES, ANY),
        ),
    },
)

RIEncryptedUploadable: Final = RemoteInterface(
    "RIEncryptedUploadable.tahoe.allmydata.com",
    {
        "get_size": method(OFFSET),
        "get_all_encoding_parameters": method(TupleOf((INT, INT, INT, INT))),
        "read_encrypted": method(ListOf(_BYTES), offset=OFFSET, length=INT),
        # asked by helpers of 2008 only
        "get_plaintext_hashtree_leaves": method(ListOf(_HASH), first=INT, last=INT, num_segments=INT),
        "get_plaintext_hash": method(_HASH),
        "close": method(NONE),
    },
)

RIUploadHelper: Final = RemoteInterface(
    "RIUploadHelper.tahoe.allmydata.com",
    {
        "get_version": method(_VERSION),
        "upload": method(ANY, reader=Reference(RIEncryptedUploadable.name)),
    },
)

RIHelper: Final = RemoteInterface(
    "RIHelper.tahoe.allmydata.com",
    {
        "get_version": method(_VERSION),
        "upload_chk": method(
            TupleOf((ANY, OneOf((NONE, Reference(RIUploadHelper.name))))),
            si=_STORAGE_INDEX,
        ),
    },
)

RIStatsProvider: Final = RemoteInterface(
    "RIStatsProvider.tahoe.allmydata.com",
    {"get_stats": method(DictOf(_BYTES, DictOf(_BYTES, ANY)))},
)

RIStatsGatherer: Final = RemoteInterface(
    "RIStatsGatherer.tahoe.allmydata.com",
    {"provide": method(NONE, provider=Reference(RIStatsProvider.name), nickname=_BYTES)},
)

RIControlClient: Final = RemoteInterface(
    "RIControlClient",
    {
        "wait_for_client_connections": method(NONE, num_clients=INT),
        "upload_from_file_to_uri": method(
            _CONTROL_URI, filename=_BYTES, convergence=OneOf((NONE, Bytes(most=1 << 20)))
        ),
        "download_from_uri_to_file": method(_BYTES, uri=_CONTROL_URI, filename=_BYTES),
        # of 2015, in the place of the two above
        "upload_random_data_from_file": method(_CONTROL_URI, size=INT, convergence=_BYTES),
        "download_to_tempfile_and_delete": method(NONE, uri=_CONTROL_URI),
        "get_memory_usage": method(DictOf(_BYTES, INT)),
        "speed_test": method(TupleOf((FLOAT, FLOAT)), count=INT, size=INT, mutable=ANY),
        "measure_peer_response_time": method(DictOf(_BYTES, FLOAT)),
    },
)

INTERFACES: Final = {
    interface.name: interface
    for interface in (
        RIBucketWriter,
        RIBucketReader,
        RIStorageServer,
        RIIntroducerSubscriberClient_v2,
        RIIntroducerPublisherAndSubscriberService_v2,
        RIEncryptedUploadable,
        RIUploadHelper,
        RIHelper,
        RIStatsProvider,
        RIStatsGatherer,
        RIControlClient,
    )
}
