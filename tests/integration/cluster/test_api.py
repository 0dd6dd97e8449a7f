"""Claims about the conductor's calls of a cluster's API: what they return, and what each failure becomes."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from pathlib import Path

import certifi
import pytest
from cryptography import x509
from kubernetes.aio.config import incluster_config
from tests.support.authority import Authority
from tests.support.cluster import NAMESPACE, TOKEN, Cluster, Fault
from tests.support.cluster_run import api_of, section
from tests.support.job_controller import cron_job
from tests.support.run import until

from honed.conductor.cluster import api as module
from honed.conductor.cluster.api import CRON_JOBS, JOBS, LEASES, PODS, Api, ApiUnavailable, connected
from honed.conductor.settings import KubernetesSettings
from honed.kit.errors import Conflict, FailedPrecondition, HonedError, NotFound


def thing(name: str, **labels: str) -> dict[str, object]:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"a field of a newer cluster": 1}}


async def test_objects_pass_through_unchanged(cluster: Cluster, api: Api) -> None:
    made = await api.create(JOBS, thing("one", a="b"))
    assert made["spec"] == {"a field of a newer cluster": 1}
    await api.create(JOBS, thing("two", a="c"))
    assert [job["metadata"]["name"] for job in (await api.find(JOBS, labels={"a": "b"})).items] == ["one"]
    found = await api.find(JOBS, name="two")
    assert found.items == [cluster.object("jobs", "two")]
    assert (await api.find(JOBS, name="three")).items == []


async def test_of_two_who_change_the_same_version_one_is_refused(cluster: Cluster, api: Api) -> None:
    lease = await api.create(LEASES, thing("honed-conductor"))
    await api.replace(LEASES, {**lease, "spec": {"holderIdentity": "a"}})
    with pytest.raises(Conflict, match="has been modified"):
        await api.replace(LEASES, {**lease, "spec": {"holderIdentity": "b"}})
    with pytest.raises(Conflict, match="already exists"):
        await api.create(LEASES, thing("honed-conductor"))


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (400, FailedPrecondition, "refuses this: it hurts"),
        (401, ApiUnavailable, "does not let the conductor do this: it hurts"),
        (403, ApiUnavailable, "does not let the conductor do this: it hurts"),
        (404, NotFound, "it hurts"),
        (409, Conflict, "it hurts"),
        (410, ApiUnavailable, "it hurts"),
        (422, FailedPrecondition, "refuses this: it hurts"),
        (429, ApiUnavailable, "cannot serve this now: it hurts"),
        (500, ApiUnavailable, "cannot serve this now: it hurts"),
        (503, ApiUnavailable, "cannot serve this now: it hurts"),
    ],
)
async def test_each_status_becomes_an_error_that_a_caller_can_act_on(
    cluster: Cluster, api: Api, status: int, kind: type[HonedError], text: str
) -> None:
    cluster.faults = [Fault("refused", status, retry_after="7")]
    with pytest.raises(kind, match=text) as raised:
        await api.get(CRON_JOBS, "honed-pretrain")
    assert getattr(raised.value, "retry_after_s", None) == (7.0 if status in (410, 429, 500, 503) else None)


async def test_objects_of_a_kind_that_are_missing_are_an_outage_and_no_wait_is_longer_than_a_minute(
    cluster: Cluster, api: Api
) -> None:
    cluster.faults = [*(Fault("refused", 404) for _ in range(3)), Fault("refused", 503, retry_after="3600")]
    with pytest.raises(ApiUnavailable, match="does not know"):
        await api.find(JOBS)
    with pytest.raises(ApiUnavailable, match="does not know"):
        await api.create(JOBS, thing("one"))
    with pytest.raises(ApiUnavailable, match="does not know"):
        [_ async for _ in api.watch(JOBS, "one", "1", 1.0)]
    with pytest.raises(ApiUnavailable) as raised:
        await api.find(JOBS)
    assert raised.value.retry_after_s == 60.0


@pytest.mark.parametrize("kind", ["cut", "lost", "silent"])
async def test_a_call_without_an_answer_ends_in_time_done_or_not(cluster: Cluster, api: Api, kind: str) -> None:
    cluster.faults = [Fault(kind)]
    began = time.monotonic()
    with pytest.raises(ApiUnavailable, match="does not answer"):
        await api.create(JOBS, thing("one"))
    assert time.monotonic() - began < 5
    assert len((await api.find(JOBS)).items) == (kind == "lost")


async def test_a_server_that_is_away_does_not_answer(tmp_path: Path, cluster: Cluster) -> None:
    cluster.url = "http://127.0.0.1:1"
    async with api_of(tmp_path, cluster) as api:
        with pytest.raises(ApiUnavailable, match="does not answer"):
            await api.find(JOBS)


async def test_a_watch_tells_the_changes_of_one_object_since_a_version(cluster: Cluster, api: Api) -> None:
    await cluster.put("jobs", thing("one"))
    version = (await api.find(JOBS)).version
    await cluster.change("jobs", "one", failed=1)
    await cluster.put("jobs", thing("other"))

    async def later() -> None:
        await until(lambda: cluster.asked("watch", "jobs"), 60, "the watch")
        await cluster.delete("jobs", "one")

    async with asyncio.TaskGroup() as group:
        group.create_task(later())
        told = [(event.kind, event.object.get("status")) async for event in api.watch(JOBS, "one", version, 1)]
    assert told == [("MODIFIED", {"failed": 1}), ("DELETED", {"failed": 1})]


@pytest.mark.parametrize(
    ("kind", "text"), [("old", "too old resource version"), ("half-open", "broke off"), ("half-line", "broke off")]
)
async def test_a_watch_that_goes_wrong_says_so_in_time(cluster: Cluster, api: Api, kind: str, text: str) -> None:
    await cluster.put("jobs", thing("one"))
    version = (await api.find(JOBS)).version
    await cluster.change("jobs", "one", failed=1)
    cluster.faults = [Fault(kind)]
    began = time.monotonic()
    with pytest.raises(ApiUnavailable, match=text):
        [event async for event in api.watch(JOBS, "one", version, 0.3)]
    assert time.monotonic() - began < 5


async def test_what_was_forgotten_cannot_be_watched(cluster: Cluster, api: Api) -> None:
    version = (await api.find(JOBS)).version
    await cluster.put("jobs", thing("one"))
    await cluster.put("jobs", thing("two"))
    cluster.compact()
    with pytest.raises(ApiUnavailable, match="too old resource version"):
        [event async for event in api.watch(JOBS, "one", version, 0.3)]


async def test_the_end_of_a_log(cluster: Cluster, api: Api) -> None:
    await cluster.put("pods", thing("one"))
    cluster.logs["one"] = "".join(f"line {n}\n" for n in range(9))
    assert await api.log("one", "job", 2) == "line 7\nline 8\n"
    with pytest.raises(NotFound):
        await api.log("two", "job", 2)


async def test_what_its_role_does_not_list_is_refused(cluster: Cluster, api: Api) -> None:
    await cluster.put("cronjobs", cron_job())
    assert (await api.get(CRON_JOBS, "honed-pretrain"))["spec"]["suspend"]
    for call in (api.get(CRON_JOBS, "other"), api.get(JOBS, "one"), api.get(PODS, "one"), api.find(LEASES)):
        with pytest.raises(ApiUnavailable, match="cannot"):
            await call


async def test_the_namespace_is_the_contexts_unless_the_settings_name_one(tmp_path: Path, cluster: Cluster) -> None:
    async with api_of(tmp_path, cluster) as api:
        assert api.namespace == NAMESPACE
    async with api_of(tmp_path, cluster, namespace="other") as api:
        with pytest.raises(ApiUnavailable, match="cannot list"):
            await api.find(JOBS)


async def test_a_pod_finds_the_server_its_token_and_its_namespace_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Authority(tmp_path, "ours", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    files = ours.issue("server")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(files.certificate, files.key)
    account = tmp_path / "account"
    account.mkdir()
    for name, text in (("token", TOKEN), ("namespace", NAMESPACE), ("ca.crt", files.authority.read_text())):
        (account / name).write_text(text)
    monkeypatch.setattr(module, "SERVICE_ACCOUNT", account)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(account / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(account / "ca.crt"))
    cluster = Cluster()
    async with cluster.serving(tls):
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", cluster.url.rpartition(":")[2])
        async with connected(KubernetesSettings()) as api:
            assert api.namespace == NAMESPACE
            assert (await api.find(JOBS)).items == []
        (account / "ca.crt").write_text(Path(certifi.where()).read_text())
        async with connected(KubernetesSettings()) as api:
            with pytest.raises(ApiUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await api.find(JOBS)


async def test_without_a_way_to_a_cluster_it_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(FailedPrecondition, match=r"run in a pod .* or name a file by conductor\.kubernetes\.kubeconfig"):
        async with connected(KubernetesSettings()):
            pass
    with pytest.raises(FailedPrecondition, match="kubeconfig"):
        async with connected(KubernetesSettings(kubeconfig=tmp_path / "none")):
            pass
    cluster = Cluster()
    with pytest.raises(FailedPrecondition, match="there is no way to the cluster's API"):
        async with connected(section(tmp_path, cluster, context="elsewhere")):
            pass
