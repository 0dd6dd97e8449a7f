"""The client and the command line against the real generation service on a real engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.client import served
from tests.support.tiny import make_tiny_model, publish_version
from typer.testing import CliRunner

from honed.cli.main import app
from honed.client import Client, RequestError, Version


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from honed.artifacts.store import PolicyStore
    from honed.artifacts.version import VersionId
    from honed.config import RunSettings
    from honed.generation.best_of import BestOf
    from honed.generation.engine import InitialVersion
    from honed.generation.frontend import RequestLimits, SamplingFrontend
    from honed.generation.gate import RequestGate
    from honed.generation.hf.engine import TransformersEngine
    from honed.generation.scoring import CandidateScoring
    from honed.generation.service import GenerationService
    from honed.kit.server import Servicer
    from honed.v1 import generation_pb2_grpc

    root = tmp_path_factory.mktemp("live")
    store = PolicyStore(str(root / "policy"), "demo")
    version = VersionId(1, 0)
    publish_version(store, make_tiny_model(root / "model", seed=1), version)
    loop = served.Loop()
    gate = RequestGate(window=16, queue_limit=17, application_share=0.75)
    engine = TransformersEngine(InitialVersion(version, store.fetch(version, root / "versions")), gate=gate)
    try:
        loop.run(engine.start())
        limits = RequestLimits(max_samples=4, max_tokens=32, default_max_tokens=8, max_prompt_tokens=64)
        add = generation_pb2_grpc.add_GenerationServiceServicer_to_server
        frontend = SamplingFrontend(engine, gate, limits, "demo")
        best_of = BestOf(frontend, CandidateScoring(RunSettings()))
        service = Servicer("honed.v1.GenerationService", add, GenerationService(frontend, best_of))
        served.announce(root, generation=loop.serve(service, served.make_tokens(root)))
        yield root
    finally:
        loop.run(engine.close())
        loop.close()


def test_a_seed_gives_the_same_samples_whole_and_streamed(directory: Path) -> None:
    with Client.from_run(directory) as client:
        whole = client.generate("the film", n=2, seed=5, max_tokens=12, logprobs=True)
        stream = client.stream("the film", n=2, seed=5, max_tokens=12, logprobs=True)
        deltas = list(stream)
    assert [s.token_ids for s in stream.samples] == [s.token_ids for s in whole]
    assert [s.text for s in stream.samples] == [s.text for s in whole]
    assert len(deltas) > 2
    for sample in whole:
        assert sample.version == Version("demo", 1, 0)
        assert len(sample.logprobs) == len(sample.token_ids)
        assert sample.prompt_token_ids


def test_token_ids_are_continued_as_they_are(directory: Path) -> None:
    with Client.from_run(directory) as client:
        text = client.generate("film", seed=1)[0]
        ids = client.generate(text.prompt_token_ids, seed=1)[0]
    assert ids.token_ids == text.token_ids


def test_an_oversized_prompt_is_refused_with_the_servers_cap(directory: Path) -> None:
    with Client.from_run(directory) as client, pytest.raises(RequestError, match="64 at most") as caught:
        client.generate("x" * 65)
    assert caught.value.field == "prompt.text"


def test_the_command_shows_the_version(directory: Path) -> None:
    arguments = ["generate", "the film", "--seed", "5", "--max-tokens", "4", "--run", str(directory)]
    outcomes = [CliRunner().invoke(app, arguments) for _ in itertools.repeat(None, 2)]
    assert outcomes[0].stdout == outcomes[1].stdout
    assert "version 1.0, " in outcomes[0].stderr
