"""Where traces go: what the settings and OpenTelemetry's variables say, and what is refused at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from honed.config import RunSettings
from honed.settings import TelemetrySettings
from honed.settings_file import SettingsError, load_settings
from honed.telemetry import collector_endpoint, read_headers

COLLECTOR = "http://collector:4317"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("collector:4317", "must be http://HOST:PORT"),
        ("grpc://collector:4317", "must be http://HOST:PORT"),
        ("http://:4317", "must be http://HOST:PORT"),
        ("http://collector", "has no port"),
        ("http://collector:4318/v1/traces", "which has no path"),
        ("http://collector:high", "is no URL"),
        ("https://me:hush@collector:4317", "must hold no user and no password"),
    ],
)
def test_a_collector_that_cannot_be_one_is_refused_with_its_key(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=rf"telemetry\.otlp_endpoint: .*{reason}") as caught:
        load_settings(None, {"HONED_TELEMETRY__OTLP_ENDPOINT": url})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("ratio", ["-0.1", "1.1", ".nan"])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"telemetry: {{sample_ratio: {ratio}}}")
    with pytest.raises(SettingsError, match=r"telemetry\.sample_ratio: "):
        load_settings(tmp_path / "run.yaml", {})


@pytest.mark.parametrize("url", [COLLECTOR, "https://collector.example.com:443/", "http://[::1]:4317"])
def test_a_collector_is_taken(url: str) -> None:
    settings = load_settings(None, {"HONED_TELEMETRY__OTLP_ENDPOINT": url})
    assert collector_endpoint(settings.telemetry, {}) == url


def test_nothing_is_traced_unless_somebody_asks() -> None:
    assert collector_endpoint(RunSettings().telemetry, {}) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR}, COLLECTOR),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4317", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": COLLECTOR}, COLLECTOR),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, COLLECTOR),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ""}, COLLECTOR),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": ""}, COLLECTOR),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_TRACES_EXPORTER": ""}, COLLECTOR),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_SDK_DISABLED": ""}, COLLECTOR),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR,
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            COLLECTOR,
        ),
    ],
)
def test_the_environments_own_variables_count_where_the_settings_say_nothing(
    environment: dict[str, str], expected: str | None
) -> None:
    assert collector_endpoint(TelemetrySettings(), environment) == expected


def test_the_settings_come_before_the_variables_and_the_switch_of_the_sdk_before_both() -> None:
    settings = TelemetrySettings(otlp_endpoint=COLLECTOR)
    other = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://other:4318/v1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    assert collector_endpoint(settings, other) == COLLECTOR
    assert collector_endpoint(settings, {"OTEL_SDK_DISABLED": "true"}) is None


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/v1/traces"},
            "^OTEL_EXPORTER_OTLP_ENDPOINT must end with the port",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, and honed speaks OTLP over gRPC alone",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR,
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            },
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/json, and honed speaks OTLP over gRPC alone",
        ),
    ],
)
def test_an_environment_that_would_fail_is_refused_and_says_how_to_go_on(more: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        collector_endpoint(TelemetrySettings(), more)
    assert "telemetry.otlp_endpoint" in str(caught.value)


def test_headers_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("# of the tenant\nAuthorization: Bearer a:b c \n\nx-scope-orgid:honed\n")
    assert read_headers(tmp_path / "headers") == (("authorization", "Bearer a:b c"), ("x-scope-orgid", "honed"))


@pytest.mark.parametrize("line", ["hush", ": hush", "a b: hush", "name:", "name: ", "name: hüsh"])
def test_a_line_that_is_no_header_is_named_and_not_shown(line: str, tmp_path: Path) -> None:
    (tmp_path / "headers").write_text(f"x-one: 1\n{line}\n")
    with pytest.raises(ValueError, match="line 2: is not of the form NAME: VALUE") as caught:
        read_headers(tmp_path / "headers")
    assert "hush" not in str(caught.value)


def test_headers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.headers_file .*nowhere cannot be read: No such file"):
        read_headers(tmp_path / "nowhere")


def test_without_the_packages_a_service_that_is_to_trace_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"directory: {tmp_path}/run\ntelemetry: {{otlp_endpoint: '{COLLECTOR}'}}")
    without = "import sys; sys.modules['opentelemetry'] = None; from honed.cli.entry import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "serve", "preference", "--run-file", str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("is not installed: install honed[tracing], or unset telemetry.otlp_endpoint")
