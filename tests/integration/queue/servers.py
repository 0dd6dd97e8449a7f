"""A redis-server that a test can kill, and a wire before it that can lose a reply."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from honed.queue.embedded import embedded_redis_command, embedded_redis_url, free_port, wait_ready


class Server:
    """A redis-server as a process supervisor runs it: the command line, again after each death."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._command = [*embedded_redis_command(directory, free_port()), *options]
        self.url = embedded_redis_url(directory)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with asyncio.Runner() as runner:
            runner.run(wait_ready(self.url, 20))

    def kill(self) -> None:
        """SIGKILL: what Redis has written to its append-only file stays, all else is gone.

        With `appendfsync everysec` that may lack acknowledged writes: a write waits while a slow fsync is under way.
        """
        self._process.kill()
        self._process.wait(20)


class LossyWire:
    """A TCP proxy before Redis that can swallow a reply and drop the connection: Redis did the work, nobody heard."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._lose_reply_to: bytes | None = None
        self.lost = 0

    def lose_reply_to(self, word: bytes) -> None:
        """Loses the reply to the next request that contains `word`."""
        self._lose_reply_to = word

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"redis://:{self._to.password}@127.0.0.1:{port}/0"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward_reader, onward_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
        except ConnectionError:
            writer.close()
            return
        losing = False

        async def requests() -> None:
            nonlocal losing
            with contextlib.suppress(ConnectionError):
                while request := await reader.read(1 << 20):
                    losing = losing or (self._lose_reply_to is not None and self._lose_reply_to in request)
                    onward_writer.write(request)
            onward_writer.close()

        async def replies() -> None:
            nonlocal losing
            with contextlib.suppress(ConnectionError):
                while reply := await onward_reader.read(1 << 20):
                    if losing and not reply.startswith(b"-NOSCRIPT"):
                        self._lose_reply_to = None
                        self.lost += 1
                        break
                    losing = False
                    writer.write(reply)
            writer.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(requests())
            group.create_task(replies())
