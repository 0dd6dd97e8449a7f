"""What is shown again and again, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from honed.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType


def show_live(
    look: Callable[[], dict[str, Any]],
    render: Callable[[dict[str, Any]], RenderableType],
    every_s: float,
    *,
    json: bool,
    sleep: Callable[[float], object] = time.sleep,
) -> NoReturn:
    """Shows what is found as a picture, or one JSON object a look.

    Once something was found, whoever goes away is waited for: a screen that a person leaves open outlives an outage.

    Args:
        look: Finds what to show.
        render: Makes a picture of it.
        every_s: Seconds between two looks.
        json: Print JSON.
        sleep: Waits so many seconds.

    Raises:
        HonedError: as `look` does, the first time.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from honed._client.errors import RequestError
    from honed.kit.errors import HonedError

    shown: dict[str, Any] | None = None
    with nullcontext() if json else Live(console=output.console(), auto_refresh=False, screen=False) as live:
        while True:
            away = ""
            try:
                shown = look()
            except (HonedError, RequestError, OSError, ValueError) as error:
                if shown is None:
                    raise
                away = f"{time.strftime('%H:%M:%S')} nobody answers, trying on: {error}"
            if live is None:
                output.show_json({"error": away} if away else shown)
            else:
                picture = render(shown)
                live.update(Group(Text(away, style="bold"), picture) if away else picture, refresh=True)
            sleep(every_s)
