"""What a failed call becomes for a caller: one exception that says what was wrong and what to do."""

from __future__ import annotations

import grpc

from honed._client.details import Details, read_details

_ADVICE = {
    "UNAVAILABLE": "check that the run is up (`honed status`; `honed up` starts one); a retry is safe",
    "UNAUTHENTICATED": "give the token of this run, for example token_file='<run>/tokens/application.token'",
    "PERMISSION_DENIED": "use a token with that scope; a local run's tokens/operator.token has all of them",
    "DEADLINE_EXCEEDED": "give the call a longer timeout, or ask for less",
    "RESOURCE_EXHAUSTED": "send less at once, or come back later",
    "UNIMPLEMENTED": "check the address: another service, or an older honed, may listen there",
}


class RequestError(Exception):
    """A call that failed.

    Attributes:
        code: name of the gRPC status, for example `INVALID_ARGUMENT`.
        message: what was wrong.
        field: path of the wrong field in the request, for example `sampling.max_tokens`; empty if no field is to blame.
        request_id: under which the service's log has the call.
        retry_after_s: when the service asked to come back, seconds; None if it did not.
        reason: class of the error in honed; empty if it came from elsewhere, such as a broken connection.
    """

    def __init__(
        self,
        code: str,
        message: str,
        field: str = "",
        request_id: str = "",
        *,
        retry_after_s: float | None = None,
        reason: str = "",
        advice: str | None = None,
    ) -> None:
        """See the attributes; `advice` replaces what the code alone would advise."""
        super().__init__(code, message, field, request_id)
        self.code, self.message, self.field, self.request_id = code, message, field, request_id
        self.retry_after_s, self.reason, self._advice = retry_after_s, reason, advice

    def __str__(self) -> str:
        """Message and advice in one line."""
        return "; ".join(part for part in (f"{self.code}: {self.message}", self.advice) if part)

    def at(self, place: str) -> RequestError:
        """The same error, told of a place in what a person handed in, such as a line of a file."""
        return self.retold(f"{place}: {self.message}")

    def retold(self, message: str | None = None, *, advice: str | None = None) -> RequestError:
        """The same error in other words, or with other advice."""
        return RequestError(
            self.code,
            self.message if message is None else message,
            self.field,
            self.request_id,
            retry_after_s=self.retry_after_s,
            reason=self.reason,
            advice=self._advice if advice is None else advice,
        )

    @property
    def advice(self) -> str:
        """What to do about it; empty where the message itself says it."""
        if self._advice is not None:
            return self._advice
        if self.code == "RESOURCE_EXHAUSTED" and self.retry_after_s is not None:
            return f"the service asks to come back in {self.retry_after_s:g} s"
        return _ADVICE.get(self.code, "")


def request_error(error: grpc.RpcError, service: str, address: str, request_id: str) -> RequestError:
    """Reads a failed call.

    Args:
        error: as the stub raised it: it is the call, too.
        service: name of the service, for the message.
        address: where the call went.
        request_id: what the call was sent with.
    """
    code = error.code().name
    said = error.details() or "no reason given"
    details: Details = read_details(error.trailing_metadata())
    if not details.reason and code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        # gRPC's own words; they do not tell which service it was.
        said = f"the {service} service at {address} did not answer ({said})"
    return RequestError(
        code,
        said,
        details.field,
        details.request_id or request_id,
        retry_after_s=details.retry_after_s,
        reason=details.reason,
    )
