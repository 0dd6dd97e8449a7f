"""`honed.Client` against real servers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from tests.integration.client.conftest import Run
from tests.integration.client.served import full

import honed
from honed._client.peer import Environment
from honed.client import Client, RequestError, Span, Version
from honed.kit.errors import Unavailable
from honed.v1 import preference_pb2

V4, V5 = Version("demo", 1, 4), Version("demo", 1, 5)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def environment(self) -> Environment:
        names = count(1)
        return Environment(lambda: self.now, self.sleep, lambda: f"id-{next(names)}", lambda: 0.0)


@pytest.fixture
def client(run: Run):
    with honed.Client.from_run(run.directory) as client:
        yield client


@pytest.fixture
def timed(run: Run):
    clock = Clock()
    token = run.application_token
    with Client(run.addresses["generation"], token_file=token, timeout=10, environment=clock.environment()) as client:
        yield client, clock


def stored(run: Run) -> list[preference_pb2.Judgement]:
    from honed._client.peer import Peer
    from honed.kit.tokens import read_token
    from honed.v1 import preference_pb2_grpc

    with Peer("preference", run.addresses["preference"], read_token(run.directory / "tokens" / "operator.token")) as peer:
        stub = preference_pb2_grpc.PreferenceServiceStub(peer.channel)
        answers = peer.stream(stub.ExportJudgements, preference_pb2.ExportJudgementsRequest(), 10)
        return [answer.judgement for answer in answers]


def test_samples_come_with_tokens_versions_and_the_reason_of_their_end(client: Client) -> None:
    first, second = client.generate("the film was", n=2, logprobs=True, seed=7)
    assert (first.text, first.token_ids, first.logprobs) == ("a fine film", (10, 11, 12), (-0.5, -0.5, -0.5))
    assert first.versions == (Span(V4, 0, 2), Span(V5, 2, 3))
    assert (first.finish_reason, first.prompt_token_ids, second.index) == ("length", (1, 2), 1)
    assert second.sampling is not None
    assert second.sampling.seed == 8
    assert first.version is None


def test_options_reach_the_service_as_given(client: Client, run: Run) -> None:
    client.generate([5, 6], max_tokens=2, temperature=0.0, top_p=0.5, top_k=3, stop="\n", stop_token_ids=[2])
    request = run.generation.requests[0]
    assert list(request.prompt.token_ids.ids) == [5, 6]
    assert request.sampling.HasField("temperature")
    assert (request.sampling.top_k, list(request.sampling.stop), list(request.sampling.stop_token_ids)) == (3, ["\n"], [2])


def test_an_unknown_option_names_the_known_ones(client: Client) -> None:
    with pytest.raises(TypeError, match=r"'temprature'.*temperature"):
        client.generate("x", temprature=1)  # type: ignore[call-arg]


def test_a_stream_brings_tokens_and_remembers_whole_samples(client: Client) -> None:
    stream = client.stream("the film was", n=2)
    deltas = list(stream)
    assert "".join(d.text for d in deltas if d.index == 1) == "a fine film"
    assert [sample.text for sample in stream.samples] == ["a fine film"] * 2
    assert stream.samples[0].versions == (Span(V4, 0, 2), Span(V5, 2, 3))


def test_leaving_a_stream_early_aborts_it_in_the_service(client: Client, run: Run) -> None:
    run.generation.hanging = True
    with client.stream("the film was") as stream:
        assert next(stream).text == "a "
    assert run.generation.aborted.wait(10)


def test_a_full_service_is_asked_again_when_it_said(timed: tuple[Client, Clock], run: Run) -> None:
    client, clock = timed
    run.generation.failures = [full(retry_after_s=2), full(retry_after_s=3)]
    assert client.generate("x")[0].text == "a fine film"
    assert clock.slept == [2, 3]
    assert [m["x-request-id"] for m in run.generation.metadata] == ["id-1", "id-2", "id-3"]


def test_a_full_service_is_asked_again_for_a_stream_too(timed: tuple[Client, Clock], run: Run) -> None:
    client, clock = timed
    run.generation.failures = [full(retry_after_s=2)]
    assert len(list(client.stream("x"))) == 3
    assert clock.slept == [2]


def test_waiting_ends_at_the_deadline(timed: tuple[Client, Clock], run: Run) -> None:
    client, clock = timed
    run.generation.failures = [full(retry_after_s=6), full(retry_after_s=6)]
    with pytest.raises(RequestError, match="come back in 6 s") as caught:
        client.generate("x")
    assert (caught.value.code, caught.value.retry_after_s, clock.slept) == ("RESOURCE_EXHAUSTED", 6, [6])


def test_a_service_that_is_gone_for_a_moment_is_asked_again(client: Client, run: Run) -> None:
    run.generation.failures = [Unavailable("starting"), Unavailable("starting")]
    assert client.generate("x")[0].text == "a fine film"


def test_a_bad_field_is_named(client: Client) -> None:
    with pytest.raises(RequestError, match="cap of 128") as caught:
        client.generate("x", max_tokens=1000)
    error = caught.value
    assert (error.code, error.field, error.reason) == ("INVALID_ARGUMENT", "sampling.max_tokens", "InvalidArgument")
    assert error.request_id


def test_a_call_ends_at_its_deadline_and_says_who_did_not_answer(client: Client, run: Run) -> None:
    run.generation.hanging = True
    with pytest.raises(RequestError, match="longer timeout") as caught:
        client.generate("x", timeout=0.3)
    assert caught.value.code == "DEADLINE_EXCEEDED"


def test_an_address_where_nobody_listens_says_so() -> None:
    with (
        Client("127.0.0.1:1", timeout=20) as client,
        pytest.raises(RequestError, match=r"generation service at 127.0.0.1:1.*honed up"),
    ):
        client.generate("x")


@pytest.mark.parametrize("token", [None, "honed_wrong"])
def test_a_wrong_token_says_which_to_give(run: Run, token: str | None) -> None:
    with Client(run.addresses["generation"], token=token) as client, pytest.raises(RequestError, match=r"application\.token"):
        client.generate("x")


def test_a_client_without_the_address_says_what_to_pass(run: Run) -> None:
    with Client(run.addresses["generation"]) as client, pytest.raises(ValueError, match="reward='host:port'"):
        client.score(["x"])


def test_scores_come_in_order_with_each_scorers_part(client: Client) -> None:
    sample = client.generate("p")[0]
    short, pair, sampled = client.score(["ab", ("prompt", "abc"), sample])
    assert [short.reward, pair.reward, sampled.reward] == [4, 6, 6]
    assert (short.scores[0].scorer, short.scores[0].version, short.scores[0].value) == ("length", "v1", 2)


def test_feedback_on_a_sample_records_its_tokens_version_and_sampling(client: Client, run: Run) -> None:
    sample = client.generate("the film was", max_tokens=2, seed=3)[0]
    client.thumbs(sample, up=True, annotator="u-1", labels={"page": "home"})
    [judgement] = stored(run)
    response = judgement.responses[0]
    assert (judgement.prompt, list(judgement.prompt_token_ids), judgement.source) == ("the film was", [1, 2], "application")
    assert (response.text, list(response.token_ids), response.sampling.seed) == ("a fine ", [10, 11], 3)
    assert (response.version.fence, response.version.step, judgement.thumbs.up) == (1, 4, True)
    assert dict(judgement.labels) == {"page": "home"}


def test_a_sample_of_several_versions_is_recorded_under_none(client: Client, run: Run) -> None:
    client.thumbs(client.generate("p")[0], up=False, annotator="u-1")
    assert not stored(run)[0].responses[0].HasField("version")


def test_comparisons_and_edits_are_recorded_as_shown(client: Client, run: Run) -> None:
    client.compare("dull", "fine", preferred="fine", strength=2, annotator="u-1", prompt="the film was")
    client.compare("dull", "flat", preferred=None, annotator="u-1")
    client.edit("dull", "delightful", annotator="u-1", prompt="the film was")
    better, tie, edit = stored(run)
    assert (better.pairwise.preferred, better.pairwise.other, better.pairwise.strength) == (1, 0, 2)
    assert list(better.shown_order) == [0, 1]
    assert tie.pairwise.tie
    assert (edit.edit.text, edit.prompt) == ("delightful", "the film was")


def test_a_comparison_of_a_response_with_itself_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="two different"):
        client.compare("a", "a", preferred="a", annotator="u-1")


def test_the_same_key_stores_one_judgement(client: Client, run: Run) -> None:
    ids: set[int] = {client.thumbs("fine", up=True, annotator="u-1", key="click-1") for _ in range(2)}
    assert len(ids) == 1
    assert len(stored(run)) == 1


def test_each_call_has_a_key_of_its_own(client: Client, run: Run) -> None:
    say: Callable[[], int] = lambda: client.thumbs("fine", up=True, annotator="u-1")  # noqa: E731
    assert say() != say()


def test_a_directory_without_a_run_says_how_to_start_one(tmp_path) -> None:
    with pytest.raises(ValueError, match="honed up"):
        Client.from_run(tmp_path)


def test_the_best_of_several_come_first_with_what_they_are_worth(client: Client, run: Run) -> None:
    asked = {"n": 2, "best_of": 5, "scorer": "length", "reference": "42", "seed": 10}
    samples = client.generate("the film was", **asked)
    request = run.generation.requests[-1]
    assert (request.best_of.candidates, request.best_of.scorer, request.prompt.reference) == (5, "length", "42")
    assert [(sample.index, sample.reward) for sample in samples] == [(4, 2.0), (3, 1.5)]
    assert samples[0].scores == (honed.client.ScorerValue("length", "v1", 1.0, 2.0, 0),)
    assert samples[0].sampling is not None
    assert samples[0].sampling.seed == 14, "a candidate has the seed of its index"
    stream = client.stream("the film was", **asked)
    assert [delta.index for delta in stream] == [4, 3]
    assert [(sample.index, sample.reward, sample.scores) for sample in stream.samples] == [
        (sample.index, sample.reward, sample.scores) for sample in samples
    ]
    assert client.generate("the film was")[0].reward is None


def test_a_scorer_that_chooses_among_nothing_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="best_of"):
        client.generate("the film was", scorer="length")
