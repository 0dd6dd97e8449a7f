"""Runs checkov on every rendered overlay.

A check that is left out has its reason beside it, in deploy/checkov.yaml or on the object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "deploy" / "overlays"
RENDERED = ROOT / "build" / "deploy"
CHECKOV = ROOT / "build" / "checkov" / "bin" / "checkov"
TIMEOUT_S = 600


def main() -> int:
    """Prints each finding, and one line an overlay."""
    RENDERED.mkdir(parents=True, exist_ok=True)
    # Its command line asks its vendor's service for policies unless it is told not to.
    environment = os.environ | {"BC_SKIP_MAPPING": "TRUE", "CHECKOV_RUN_SCA_PACKAGE_SCAN_V2": "false"}
    kubectl, failed = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"), 0
    for overlay in sorted(path for path in OVERLAYS.iterdir() if path.is_dir()):
        file = RENDERED / f"{overlay.name}.yaml"
        file.write_text(subprocess.check_output([kubectl or "kubectl", "kustomize", overlay], text=True, timeout=TIMEOUT_S))
        command = [CHECKOV, "--config-file", ROOT / "deploy" / "checkov.yaml", "--file", file, "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
        if not done.stdout.strip():
            print(done.stderr, file=sys.stderr)
            return 1
        report = json.loads(done.stdout)
        results, summary = report["results"], report["summary"]
        for finding in results["failed_checks"]:
            print(f"{overlay.name}: {finding['resource']}: {finding['check_id']} {finding['check_name']}")
        unexplained = [s for s in results["skipped_checks"] if not s["check_result"].get("suppress_comment")]
        for finding in unexplained:
            print(f"{overlay.name}: {finding['resource']}: {finding['check_id']} is left out without a reason")
        failed += summary["failed"] + len(unexplained) + summary["parsing_errors"]
        print(f"{overlay.name}: {summary['passed']} passed, {summary['failed']} failed, {summary['skipped']} skipped")
        if not summary["passed"]:
            print(f"{overlay.name}: nothing was checked", file=sys.stderr)
            return 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
