"""The one table: every error has its row, and gives the errno and exit code that are promised."""

import errno

import pytest
import trio

from cache import FileTooLargeError, SpoolFullError
from grid import errors
from tahoefs import errnos
from tahoefs.errnos import FSError, errno_of, exit_code_of, is_expected
from tahoefs.options import OptionError


def _family(error_class: type) -> set[type]:
    return {error_class}.union(*(_family(each) for each in error_class.__subclasses__()))


def test_table_names_every_error_of_the_grid_layer() -> None:
    """No error on the errors page falls through to a default that nobody chose."""
    declared = {each for each in _family(errors.GridError) if each.__module__ == "grid.errors"}
    assert len(declared) > 20
    assert declared <= set(errnos._TABLE)


@pytest.mark.parametrize(
    ("error", "number", "exit_code"),
    [
        (FSError(errno.ENOTEMPTY), errno.ENOTEMPTY, 1),
        (errors.NoSuchChildError("x"), errno.ENOENT, 1),
        (errors.ChildExistsError("x"), errno.EEXIST, 1),
        (errors.NotWriteableError(), errno.EACCES, 4),
        (errors.BadCapError(), errno.EIO, 4),
        (errors.CorruptShareError("s", 1, "r"), errno.EIO, 5),
        (errors.InconsistentEncodingError(), errno.EIO, 5),
        (errors.NotEnoughServersError(7, 3, 3), errno.EIO, 3),
        (errors.NotEnoughServersError(7, 3, 10, refused_for_space=True), errno.ENOSPC, 3),
        (errors.NotEnoughSharesError(3, 2, (errors.CorruptShareError("s", 1, "r"),)), errno.EIO, 5),
        (errors.NotEnoughSharesError(3, 2, (errors.ConnectionLostError(),)), errno.EIO, 3),
        (errors.GridUnreachableError(), errno.EIO, 3),
        (SpoolFullError(), errno.ENOSPC, 1),
        (FileTooLargeError(), errno.EFBIG, 1),
        (trio.TooSlowError(), errno.EIO, 3),
        (OSError(errno.ENOSPC, "disk full"), errno.ENOSPC, 1),
        (OSError(errno.ENOENT, "a file of ours is gone"), errno.EIO, 1),
        (OptionError("no such option"), errno.EINVAL, 2),
        (ExceptionGroup("several", [errors.NoSpaceError()]), errno.ENOSPC, 3),
    ],
)
def test_errno_and_exit_code(error: Exception, number: int, exit_code: int) -> None:
    assert (errno_of(error), exit_code_of(error), is_expected(error)) == (number, exit_code, True)


def test_a_bug_is_told_from_an_error() -> None:
    assert not is_expected(ValueError("bug"))
    assert (errno_of(ValueError("bug")), exit_code_of(ValueError("bug"))) == (errno.EIO, 1)


def test_a_new_kind_of_error_takes_its_familys_row() -> None:
    class NewError(errors.CorruptShareError):
        pass

    assert exit_code_of(NewError("s", 1, "r")) == 5
