"""Claims about which failures may pass by themselves."""

from __future__ import annotations

import errno

import grpc
import pytest

from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument, Overloaded, Unavailable, may_pass


def call(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("away"),
        Overloaded("full"),
        call(grpc.StatusCode.UNAVAILABLE),
        call(grpc.StatusCode.UNKNOWN),  # of a call whose server was killed
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.ENOSPC, "no space left on device"),
        ExceptionGroup("both", [Unavailable("away"), TimeoutError()]),
    ],
)
def test_what_is_away_or_short_may_pass(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        FailedPrecondition("the job failed"),
        InvalidArgument("text", "is empty"),
        DataLoss("damaged"),
        call(grpc.StatusCode.INVALID_ARGUMENT),
        call(grpc.StatusCode.PERMISSION_DENIED),
        ValueError("line 3"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        Exception("what a library raises"),
        ExceptionGroup("both", [Unavailable("away"), ValueError("line 3")]),
    ],
)
def test_what_data_or_settings_are_to_blame_for_does_not(error: Exception) -> None:
    assert not may_pass(error)
