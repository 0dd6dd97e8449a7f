"""Backup and restore of the store by the commands of the CronJobs themselves, over directories; and the steps of the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.contract.artifacts.stores import make_source
from tests.deploy.manifests import DEPLOY, named, overlay

from honed.artifacts.draft import VersionDraft
from honed.artifacts.marks import Mark
from honed.artifacts.mirror import main
from honed.artifacts.promotions import Promoted, PromotionRecord, PromotionState
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId

RUN, BASE, FIRST, SECOND = "honed", VersionId(0, 0), VersionId(1, 1), VersionId(1, 2)


class Jobs:
    """The CronJobs of the production overlay, with directories in place of the bucket and the claim."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.store, self.backup = folder / "store", folder / "backups" / "store"

    def run(self, name: str) -> int:
        """Its exit code."""
        tree = named(overlay("production"), "CronJob", name)
        [container] = tree["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        python, option, module, *arguments = container["command"]
        assert (python, option, module) == ("python3", "-m", "honed.artifacts.mirror")
        known = {"$(HONED_STORE)": str(self.store), "$(HONED_RUN)": RUN, "/backups/store": str(self.backup)}
        self._monkeypatch.setattr(sys, "argv", ["mirror", *(known.get(each, each) for each in arguments)])
        self._monkeypatch.setattr("honed.artifacts.mirror.configure_logging", lambda *_: None)  # pytest's own stays
        return main()

    def publish(self, version: VersionId, value: float) -> None:
        source = make_source(self.folder / f"{version}-{value}", value)
        PolicyStore(self.store, RUN).publish(source, VersionDraft(version, ()))


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    jobs = Jobs(tmp_path, monkeypatch)
    for number, version in enumerate((BASE, FIRST, SECOND)):
        jobs.publish(version, float(number))
    PromotionRecord(jobs.store, RUN).write(PromotionState(1, {"people": Promoted("artifact:trained/0.1", "d", "trained")}))
    return jobs


def test_a_store_that_begins_anew_costs_no_backup_and_comes_back(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.run("honed-backup-store") == 0
    jobs.store.rename(jobs.folder / "lost")
    jobs.publish(BASE, 9.0)
    assert jobs.run("honed-backup-store") == 1
    assert "move" in capsys.readouterr().err
    assert PolicyStore(jobs.backup, RUN).versions() == [BASE, FIRST, SECOND]
    assert jobs.run("honed-restore-store") == 1, "over another run it is refused"
    (jobs.store / RUN).rename(jobs.folder / "anew")
    assert jobs.run("honed-restore-store") == 0
    assert PolicyStore(jobs.store, RUN).versions() == [BASE, FIRST, SECOND]
    assert jobs.run("honed-backup-store") == 0


def test_the_nightly_backup_follows_retention(jobs: Jobs) -> None:
    assert jobs.run("honed-backup-store") == 0
    PolicyStore(jobs.store, RUN).retain(1, {BASE})
    assert jobs.run("honed-backup-store") == 0
    assert PolicyStore(jobs.backup, RUN).versions() == [BASE, SECOND]


def test_a_restore_leaves_what_the_live_run_decided_since(jobs: Jobs) -> None:
    assert jobs.run("honed-backup-store") == 0
    live = PolicyStore(jobs.store, RUN)
    live.retain(1, {BASE})
    live.marks.add(SECOND, "promoted", Mark("release", "later"))
    now = PromotionState(2, {"people": Promoted("artifact:trained/0.2", "d", "trained")})
    PromotionRecord(jobs.store, RUN).write(now)
    assert jobs.run("honed-restore-store") == 0
    assert live.versions() == [BASE, FIRST, SECOND]
    assert PromotionRecord(jobs.store, RUN).read() == now
    assert live.marks.all("promoted") == {SECOND: Mark("release", "later")}


def test_a_restored_database_is_migrated_before_the_service_starts() -> None:
    """The service waits for the schema of its build, and the Job that makes it is gone minutes after an upgrade."""
    migration = named(overlay("production"), "Job", "honed-migrate")
    assert migration["spec"]["ttlSecondsAfterFinished"] < 3600
    page = (DEPLOY / "README.md").read_text().partition("## Backup and restore")[2]
    steps = [
        "job/restore-1\n", "delete job/honed-migrate --ignore-not-found && kubectl apply -k OVERLAY",
        "deployment/honed-preference --replicas=2",
    ]  # fmt: skip
    positions = [page.index(step) for step in steps]
    assert positions == sorted(positions)
