"""Where things lie on a cluster, and what leads to one machine instead.

What the Pods mount, and where, is what the manifests under deploy/ say: `/data` holds the run's files, `/etc/honed` what comes
from Secrets and ConfigMaps, `/var/lib/honed` what the services write. Everything else of their file system is the image's and
read-only.
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from honed.check.findings import Report
from honed.kit.server import is_loopback

DATA: Final = "/data"
CONFIGURATION: Final = "/etc/honed"
STATE: Final = "/var/lib/honed"
STORE: Final = f"{STATE}/policy"


def check_mounted(key: str, path: Path | None, usual: str, what: str, report: Report) -> None:
    """A file of a Secret: at the directory that the manifests mount, or at another that an overlay may mount."""
    if path is None or under(path, usual):
        return
    if under(path, CONFIGURATION):
        report.warning(key, f"is {path}, and the manifests mount {usual}: name {what} there, or mount yours")
    else:
        report.error(key, elsewhere(path, usual, what))


def elsewhere(path: Any, root: str, what: str) -> str:
    """What is wrong with a path of this machine, and what to do."""
    return f"is {path}, a path of this machine that no Pod has: name {what} under {root}"


def under(path: Any, root: str) -> bool:
    """Whether a path lies in a directory, or is it."""
    return Path(os.path.normpath(path)).is_relative_to(root)


def leads_here(address: str) -> bool:
    """Whether a gRPC target, or one of several in it, is the Pod itself."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        address = rest.rpartition("/")[2]
    try:
        return any(is_here(urlsplit(f"//{part}").hostname or "") for part in address.split(","))
    except ValueError:
        return False  # no address at all, which gRPC tells


def is_here(host: str) -> bool:
    """Whether a host is whoever asks for it."""
    return is_loopback(host) or host in ("0.0.0.0", "::")  # noqa: S104  # whoever calls these reaches itself


def public_url(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":…@") if parts.password else url
