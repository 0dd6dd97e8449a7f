"""What the client is made of: its imports, the details of failed calls, values."""

from __future__ import annotations

import subprocess
import sys

import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from honed._client.details import Details, read_details
from honed._client.endpoints import Endpoints
from honed._client.judgements import judgement
from honed._client.values import Sample, sampling_params
from honed.client import RequestError

ONLY_GRPC_AND_PROTOBUF = """
import sys

class Refuse:
    allowed = {"honed", "grpc", "google", "typing_extensions"}

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if name == "google" or name.startswith(("google.protobuf", "google._upb")):
            return None
        if top in sys.stdlib_module_names or (top in self.allowed and top != "google"):
            return None
        raise ImportError(f"the client imports {name}")

sys.meta_path.insert(0, Refuse())
import honed
assert "grpc" not in sys.modules, "import honed must not load gRPC"
with honed.Client("127.0.0.1:1", token="t") as client:
    try:
        client.generate("x", timeout=5)
    except honed.client.RequestError as error:
        assert error.code == "UNAVAILABLE", error
        print("refused as it should be")
"""


def test_the_client_needs_grpc_and_protobuf_and_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONLY_GRPC_AND_PROTOBUF],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_environment(),
    )
    assert (done.returncode, done.stdout) == (0, "refused as it should be\n"), done.stderr


def _environment() -> dict[str, str]:
    import os
    from pathlib import Path

    import honed

    return {**os.environ, "PYTHONPATH": str(Path(honed.__file__).parents[1])}


def packed(*details) -> bytes:
    status = status_pb2.Status(code=8, message="m")
    for detail in details:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        status.details.append(wrapped)
    return status.SerializeToString()


def test_details_are_read_as_google_writes_them() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="n", description="too many")
    raw = packed(
        error_details_pb2.RequestInfo(request_id="r-1"),
        error_details_pb2.ErrorInfo(reason="Overloaded", domain="honed.v1"),
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000)),
        error_details_pb2.Help(),
    )
    assert read_details([("x", "y"), ("grpc-status-details-bin", raw)]) == Details("n", 2.5, "r-1", "Overloaded")


@pytest.mark.parametrize("trailer", [None, [], [("grpc-status-details-bin", b"\xff\xff")]])
def test_missing_or_broken_details_leave_the_defaults(trailer) -> None:
    assert read_details(trailer) == Details()


def test_an_error_tells_what_to_do() -> None:
    assert "honed up" in str(RequestError("UNAVAILABLE", "gone"))
    assert str(RequestError("INVALID_ARGUMENT", "n: too many", "n")) == "INVALID_ARGUMENT: n: too many"
    moved = RequestError("INVALID_ARGUMENT", "bad", "n", "r-1", reason="InvalidArgument").at("line 3")
    assert (str(moved), moved.field, moved.request_id) == ("INVALID_ARGUMENT: line 3: bad", "n", "r-1")


def test_a_stop_given_as_one_text_is_one_stop() -> None:
    assert list(sampling_params({"stop": "END"}).stop) == ["END"]
    assert not sampling_params({}).HasField("temperature")
    assert sampling_params({"temperature": 0.0}).HasField("temperature")


def test_samples_of_different_prompts_make_no_judgement() -> None:
    one, other = (Sample("t", (1,), (), (), "stop", prompt=prompt) for prompt in "ab")
    with pytest.raises(ValueError, match="different prompts"):
        judgement([one, other], "u", {})


def test_a_prompt_that_was_given_replaces_the_samples_and_its_tokens() -> None:
    sample = Sample("t", (1,), (), (), "stop", prompt="a", prompt_token_ids=(7,))
    said = judgement([sample], "u", {"prompt": "b", "source": "console"})
    assert (said.prompt, list(said.prompt_token_ids), said.source) == ("b", [], "console")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_endpoints_file_says_to_start_the_run_again(tmp_path, content: str) -> None:
    (tmp_path / "endpoints.json").write_text(content)
    with pytest.raises(ValueError, match="start the run again"):
        Endpoints.read(tmp_path)


def test_a_conversation_becomes_messages_and_a_wrong_part_is_named() -> None:
    from honed._client.values import prompt_message

    message = prompt_message([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}])
    assert [(m.role, m.content) for m in message.messages.messages] == [("system", "be brief"), ("user", "hello")]
    assert list(prompt_message([5, 6]).token_ids.ids) == [5, 6]
    with pytest.raises(TypeError, match="`role` and `content`"):
        prompt_message([{"role": "user", "text": "hello"}])  # type: ignore[typeddict-item, typeddict-unknown-key]
