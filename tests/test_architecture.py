"""ARCHITECTURE.md says what is true: its references exist, its bounds have their values, its tables are complete.

The interfaces and methods of the 2008 document stand here as data, so that none can be left out of the table.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any, Final, Protocol

import attrs
import pytest

import grid.interfaces
import grid.interfaces_servers
from grid.wire import remote_interfaces
from grid.wire.schemas import RemoteInterface

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PACKAGES: Final = ("grid", "cache", "tahoefs")

INTERFACES_OF_2008: Final = {
    "ICodecDecoder": "set_serialized_params get_needed_shares decode",
    "ICodecEncoder": ("set_params get_encoder_type get_serialized_params get_block_size encode_proposal encode"),
    "IChecker": "check verify checker_results_for",
    "IClient": "upload create_mutable_file create_empty_dirnode create_node_from_uri",
    "IDecoder": "setup set_shareholders start",
    "IDirectoryNode": (
        "get_uri get_readonly_uri list has_child get get_metadata_for set_metadata_for get_child_at_path set_uri "
        "set_uris set_node set_nodes add_file delete create_empty_directory move_child_to build_manifest"
    ),
    "IDirnodeURI": "",
    "IDownloadTarget": "open write close fail register_canceller finish",
    "IDownloader": "download",
    "IEncoder": "set_size set_params set_encrypted_uploadable get_param set_shareholders start",
    "IEncryptedUploadable": (
        "get_size get_all_encoding_parameters get_storage_index read_encrypted get_plaintext_hashtree_leaves "
        "get_plaintext_hash close"
    ),
    "IFileNode": "download download_to_data get_size",
    "IFileURI": "get_size",
    "IFilesystemNode": "get_uri get_readonly_uri get_verifier check is_readonly is_mutable",
    "IIntroducerClient": (
        "publish subscribe_to get_all_connections get_all_connectors get_all_peerids get_all_connections_for "
        "get_permuted_peers connected_to_introducer"
    ),
    "IMutableFileNode": "download_to_data replace get_writekey",
    "IMutableFileURI": "",
    "IMutableFilesystemNode": "",
    "INewDirectoryURI": "",
    "IReadonlyNewDirectoryURI": "",
    "IStatsProducer": "get_stats",
    "IStorageBucketReader": (
        "get_block get_plaintext_hashes get_crypttext_hashes get_block_hashes get_share_hashes get_uri_extension"
    ),
    "IStorageBucketWriter": (
        "put_block put_plaintext_hashes put_crypttext_hashes put_block_hashes put_share_hashes put_uri_extension close"
    ),
    "IURI": "init_from_string is_readonly is_mutable get_readonly get_verifier to_string",
    "IUploadResults": "",
    "IUploadable": (
        "set_default_encoding_parameters get_size get_all_encoding_parameters get_encryption_key read close"
    ),
    "IUploader": "upload upload_ssk",
    "IVerifierURI": "init_from_string to_string",
    "RIBucketReader": "read",
    "RIBucketWriter": "write close abort",
    "RICHKUploadHelper": "upload",
    "RIControlClient": (
        "wait_for_client_connections upload_from_file_to_uri download_from_uri_to_file get_memory_usage speed_test "
        "measure_peer_response_time"
    ),
    "RIEncryptedUploadable": (
        "get_size get_all_encoding_parameters read_encrypted get_plaintext_hashtree_leaves get_plaintext_hash close"
    ),
    "RIHelper": "upload_chk",
    "RIIntroducerPublisher": "publish",
    "RIIntroducerPublisherAndSubscriberService": "publish subscribe",
    "RIIntroducerSubscriberClient": "announce set_encoding_parameters",
    "RIIntroducerSubscriberService": "subscribe",
    "RIStatsGatherer": "provide",
    "RIStatsProvider": "get_stats",
    "RIStorageServer": (
        "get_versions allocate_buckets renew_lease cancel_lease get_buckets slot_readv slot_testv_and_readv_and_writev"
    ),
}


# --- reading the page -----------------------------------------------------------------------------------------------


def resolve(reference: str) -> Any:
    """`module` or `module:Name.attribute`. Raises ImportError or AttributeError when there is no such thing."""
    module, _, names = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split(".") if names else ():
        found = getattr(found, name)
    return found


def tables(header: str) -> list[list[str]]:
    """The rows of all tables whose first column has this header, cell by cell."""
    rows: list[list[str]] = []
    inside = False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == header:
            inside = True
        elif inside and not cells[0].startswith("---"):
            rows.append(cells)
    assert rows, f"no table of {header}s"
    return rows


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@attrs.frozen
class Row:
    """One line of the interface table. `methods`: {name in the document of 2008 or here: name here}."""

    interface: str
    methods: dict[str, str]
    places: tuple[str, ...]

    @classmethod
    def parse(cls, cells: list[str]) -> Row:
        interface, methods, where, _ = cells
        pairs = [name.partition(" → ") for name in quoted(methods)]
        return cls(quoted(interface)[0], {old: new or old for old, _, new in pairs}, tuple(quoted(where)))


ROWS: Final = [Row.parse(cells) for cells in tables("interface")]
PROTOCOLS: Final = {
    name: value
    for module in (grid.interfaces, grid.interfaces_servers)
    for name, value in vars(module).items()
    if isinstance(value, type) and Protocol in value.__bases__
}
PRESENT: Final = [
    pytest.param(row.interface, old, new, place, id=f"{row.interface}.{new}@{place.rpartition(':')[2]}")
    for row in ROWS
    for place in row.places
    for old, new in row.methods.items()
]


def members(protocol: type) -> dict[str, Any]:
    """What a Protocol itself declares."""
    return {name: value for name, value in vars(protocol).items() if not name.startswith("_")}


# --- the page as a whole --------------------------------------------------------------------------------------------

REFERENCES: Final = sorted(set(re.findall(r"\b(?:grid|cache|tahoefs)(?:\.\w+)*:\w+(?:\.\w+)*", PAGE)))


def test_there_is_something_to_check() -> None:
    assert len(REFERENCES) > 150
    assert len(PROTOCOLS) > 30
    assert {"IURI", "IStorageServer", "IDirectoryNode"} <= PROTOCOLS.keys()


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_named_exists(reference: str) -> None:
    assert resolve(reference) is not None


def test_files_that_are_named_exist() -> None:
    named = {name for name in quoted(PAGE) if re.fullmatch(r"[\w/.-]+\.(py|md)", name)}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_floor_plan_is_complete() -> None:
    planned: list[str] = []
    for folder, text in re.findall(r"^### `([\w/]+)/`\n(.*?)(?=^#)", PAGE, re.DOTALL | re.MULTILINE):
        files = [name for line in text.splitlines() for name in quoted(line.split("|")[1] if "|" in line else "")]
        planned += [f"{folder}/{name}.py" for name in files]
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.stat().st_size]
    assert sorted(planned) == sorted(str(path.relative_to(ROOT)) for path in sources)


UNITS: Final = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@pytest.mark.parametrize(
    ("reference", "text"), [(quoted(row[0])[0], row[1]) for row in (*tables("bound"), *tables("deadline"))]
)
def test_bounds_have_their_values(reference: str, text: str) -> None:
    number, _, unit = text.partition(" ")
    value = resolve(reference)
    if inspect.isdatadescriptor(value):  # an attrs field, whose default counts
        owner, _, name = reference.rpartition(".")
        value = attrs.fields_dict(resolve(owner))[name].default
    assert value == float(number) * UNITS[unit]


# --- the table of interfaces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", INTERFACES_OF_2008)
def test_every_interface_of_2008_is_in_the_table(interface: str) -> None:
    rows = [row for row in ROWS if row.interface == interface]
    assert rows
    assert set(INTERFACES_OF_2008[interface].split()) <= {name for row in rows for name in row.methods}


@pytest.mark.parametrize("interface", [name for name in INTERFACES_OF_2008 if name.startswith("I")])
def test_every_interface_of_2008_is_a_protocol_with_its_methods(interface: str) -> None:
    kept = {
        name
        for row in ROWS
        if row.interface == interface
        for name, here in row.methods.items()
        if name == here and name in INTERFACES_OF_2008[interface].split()
    }
    assert not [name for name in kept if not hasattr(PROTOCOLS[interface], name)]


@pytest.mark.parametrize("interface", PROTOCOLS)
def test_every_protocol_is_in_the_table(interface: str) -> None:
    rows = [row for row in ROWS if row.interface == interface]
    assert rows
    known = {name for row in rows for pair in row.methods.items() for name in pair}
    assert not members(PROTOCOLS[interface]).keys() - known


@pytest.mark.parametrize(
    "name", [name for name, value in vars(remote_interfaces).items() if isinstance(value, RemoteInterface)]
)
def test_every_remote_interface_is_on_the_page(name: str) -> None:
    reference = f"grid.wire.remote_interfaces:{name}"
    if name == "RIBroker":
        return  # the connection's own object: a part of Foolscap, no service
    assert reference in REFERENCES
    rows = [row for row in ROWS if reference in row.places]
    known = {here for row in rows for here in row.methods.values()}
    assert not rows or vars(remote_interfaces)[name].methods.keys() <= known


@pytest.mark.parametrize(("interface", "old", "new", "place"), PRESENT)
def test_every_method_is_where_the_table_says(interface: str, old: str, new: str, place: str) -> None:
    found = resolve(place)
    if inspect.isfunction(found):
        assert re.search(rf"\btarget\.{new}\b", inspect.getsource(inspect.getmodule(found) or found))
        return
    if isinstance(found, RemoteInterface):
        assert new in found.methods
        return
    implemented = getattr(found, f"remote_{new}", None) if interface.startswith("RI") else None
    implemented = implemented or getattr(found, new, attrs.NOTHING)
    if implemented is attrs.NOTHING:  # set for each instance
        source = inspect.getsource(found)
        assert re.search(rf"\bself\.{new}(: [^=]+)? = |^    {new}: ", source, re.MULTILINE)
    elif old == new and interface in PROTOCOLS and hasattr(PROTOCOLS[interface], new):
        assert_agrees(getattr(PROTOCOLS[interface], new), implemented)


def assert_agrees(declared: Any, implemented: Any) -> None:
    """The implementation can be called as declared: same names in the same places, all else optional; awaited alike."""
    if isinstance(declared, property):
        assert not inspect.isfunction(implemented)
        return
    assert inspect.iscoroutinefunction(declared) == inspect.iscoroutinefunction(implemented)
    wanted = list(inspect.signature(declared).parameters.values())
    given = list(inspect.signature(implemented).parameters.values())
    assert [each.name for each in given[: len(wanted)]] == [each.name for each in wanted]
    assert all(each.default is not each.empty for each in given[len(wanted) :])
    optional = [each.name for each in wanted if each.default is not each.empty]
    assert not [each.name for each in given if each.name in optional and each.default is each.empty]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.interface)
def test_nothing_is_left_for_later(row: Row) -> None:
    """Every row names where its methods are; that they are there is tested above."""
    assert row.places


@pytest.mark.parametrize("interface", PROTOCOLS)
def test_no_protocol_speaks_of_later(interface: str) -> None:
    texts = [inspect.getdoc(value) or "" for value in (PROTOCOLS[interface], *members(PROTOCOLS[interface]).values())]
    assert not [text for text in texts if re.search(r"\b[Ll]ater: ", text)]
