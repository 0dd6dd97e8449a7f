"""A service of a run on a cluster, as a synchronous client sees it: the same calls, over a forwarded port."""

from __future__ import annotations

from typing import Final

import grpc

from honed._client.errors import RequestError
from honed._client.peer import Peer
from honed.cluster.forward import Forward
from honed.kit.tls import ChannelTls

_REFUSED: Final = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_UNANSWERED: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


class ForwardedPeer(Peer):
    """A channel to one service of a cluster. Closing it closes the port as well."""

    def __init__(self, service: str, forward: Forward, token: str | None, source: str, tls: ChannelTls | None) -> None:
        """Opens a channel; the first call connects.

        Args:
            service: name of the service, for errors.
            forward: leads to its Pods.
            token: bearer token, None for none.
            source: where the token came from, for errors.
            tls: certificates; None for plain text.
        """
        super().__init__(service, forward.address, token, tls)
        self._forward, self._source = forward, source

    def close(self) -> None:
        """Closes the channel and the port; calls under way are cancelled."""
        super().close()
        self._forward.close()

    def _failed(self, error: grpc.RpcError, request_id: str) -> RequestError:
        failure, forward = super()._failed(error, request_id), self._forward
        if failure.code in _REFUSED:
            return failure.retold(advice=f"the token was that of {self._source}")
        if failure.reason or failure.code not in _UNANSWERED:
            return failure
        late = " in time" if failure.code == "DEADLINE_EXCEEDED" else ""
        said = f"the {self.service} service in {forward.cluster.name} did not answer{late}: {forward.reason()}"
        return failure.retold(said, advice=f"a retry is safe; `{forward.cluster.kubectl} get pods` shows how the Pods are")
