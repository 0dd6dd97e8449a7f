"""Two runs of one name are told apart."""

import pytest

from honed.kit.errors import FailedPrecondition
from honed.queue.identity import RunIdentity

pytestmark = pytest.mark.redis


async def test_the_first_says_what_the_run_is_and_another_base_version_is_refused(link, keys):
    identity = RunIdentity(link, keys)
    await identity.check("sha-a")
    await identity.check("sha-a")
    with pytest.raises(FailedPrecondition, match=r"base version sha-b, the run there sha-a.*another `run`"):
        await RunIdentity(link, keys).check("sha-b")


async def test_a_redis_that_lost_everything_is_told_anew(link, keys):
    await RunIdentity(link, keys).check("sha-a")
    await link.command("DEL", keys.identity())
    await RunIdentity(link, keys).check("sha-a")
    with pytest.raises(FailedPrecondition):
        await RunIdentity(link, keys).check("sha-b")
