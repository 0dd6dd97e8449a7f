"""Keys, scripts and names: what can be said without a server."""

import pytest

from honed.kit.errors import InvalidArgument
from honed.queue.connection import RedisLink, without_password
from honed.queue.keys import STAGES, RunKeys
from honed.queue.scripts import operations
from honed.queue.stream import DeliverySettings, WorkQueue


def test_all_keys_of_a_run_share_one_hash_tag():
    keys = RunKeys("demo")
    names = [keys.cursor(), keys.lease("learner"), keys.fence("learner"), keys.answers("prompts", "host:1{x}")]
    names += [keys.inbox("submitted"), keys.inbox("application"), keys.submission("ab"), keys.progress(), keys.identity()]
    for stage in STAGES:
        names += [keys.stream(stage), keys.dead(stage), keys.tally(stage), keys.failures(stage), keys.replayed(stage)]
    assert all(name.startswith("honed:{demo}:") for name in names)
    assert len(set(names)) == len(names)


def test_the_streams_have_the_names_that_the_scaler_and_the_operator_know():
    keys = RunKeys("demo")
    assert keys.stream("prompts") == "honed:{demo}:prompts"
    assert keys.dead("scored") == "honed:{demo}:dead:scored"


@pytest.mark.parametrize("run", ["", "Demo", "a{b}", "a:b", "-a", "a" * 65, "a\n"])
def test_a_name_that_could_break_a_key_is_refused(run):
    with pytest.raises(InvalidArgument, match="run"):
        RunKeys(run)


@pytest.mark.parametrize("file", ["hop.lua", "dead.lua", "run.lua"])
def test_each_lua_operation_carries_its_files_shared_head(file):
    found = operations(file)
    assert found
    assert len({text.split("-- @operation")[0][:40] for text in found.values()}) == 1
    assert all("-- @operation" not in text for text in found.values())


def test_no_script_bounds_a_work_stream():
    for file in ("hop.lua", "dead.lua", "run.lua"):
        assert "MAXLEN" not in "".join(operations(file).values()).upper()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://me:secret@host:1/2?ssl_ca_certs=x", "rediss://me@host:1/2"),
        ("redis://host", "redis://host"),
        ("unix://:secret@/run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown


async def test_a_url_that_is_none_is_refused_without_its_password():
    with pytest.raises(InvalidArgument, match=r"queue\.url") as caught:
        RedisLink("http://:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("consumer", ["", "a b", "(released)", "a\n"])
async def test_a_consumer_name_that_scripts_would_misread_is_refused(consumer):
    with pytest.raises(InvalidArgument, match="consumer"):
        WorkQueue(RedisLink("redis://localhost:1"), RunKeys("r"), "prompts", consumer)


@pytest.mark.parametrize("field", ["lease_ms", "max_deliveries", "sweep_ms"])
def test_a_senseless_queue_setting_is_refused_by_name(field):
    with pytest.raises(InvalidArgument, match=field):
        DeliverySettings(**{field: 0})
