"""The generation process: the engine on the newest version, both gRPC services, and the rollout worker."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import shutil
from pathlib import Path

from honed.artifacts.store import PolicyStore
from honed.config import GenerationSettings, RunSettings
from honed.generation.control import GenerationControlService
from honed.generation.engine import CommitSettings, GenerationEngine, InitialVersion
from honed.generation.sampler import Caps, Sampler
from honed.generation.service import GenerationService
from honed.generation.worker import RolloutWorker
from honed.kit.errors import FailedPrecondition, Unavailable
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.kit.wiring import consumer_name, redis_url, server_options
from honed.queue.connection import Link, Outage
from honed.queue.keys import PROMPTS, RunKeys
from honed.queue.stream import QueueSettings, WorkQueue
from honed.v1 import generation_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

PUBLIC = "honed.v1.GenerationService"
CONTROL = "honed.v1.GenerationControlService"


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        FailedPrecondition: the policy store holds no version.
        Unavailable: the engine died, or Redis is gone for good.
    """
    mine = settings.generation
    store = PolicyStore(settings.policy_url, settings.run)
    versions = _fresh(Workspace(settings.directory).versions)
    initial = await _newest(store, versions)
    engine = make_engine(mine, initial)
    sampler = Sampler(engine, caps(mine), settings.run)
    control = GenerationControlService(sampler, store, versions)
    server = Server(
        [
            Listener(
                mine.host,
                mine.port,
                [Servicer(PUBLIC, generation_pb2_grpc.add_GenerationServiceServicer_to_server, GenerationService(sampler))],
            ),
            Listener(
                mine.host,
                mine.control_port,
                [Servicer(CONTROL, generation_pb2_grpc.add_GenerationControlServiceServicer_to_server, control)],
            ),
        ],
        server_options(settings, mine),
    )

    async def work(stopping: asyncio.Event) -> None:
        link = Link(redis_url(settings), outage=Outage(settings.queue.outage_s))
        leases = QueueSettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries)
        queue = WorkQueue(link, RunKeys(settings.run), PROMPTS, consumer_name("generation"), leases)
        worker = RolloutWorker(sampler, queue, mine.rollout_concurrency)
        try:
            await engine.start()
            await catch_up(control, store, engine)
            # What lives by now lives to the end. A full collection over it would hold up everything for a third of a second.
            gc.collect()
            gc.freeze()
            await server.ready()
            logger.info("serving", extra={"version": engine.version.label, "engine": engine.description})
            async with asyncio.TaskGroup() as group:
                dead = group.create_task(_fail_when_dead(engine))
                await worker.run(stopping)
                dead.cancel()
        finally:
            await engine.close()
            await link.close()

    await serve_until_signalled(server, work)


def caps(mine: GenerationSettings) -> Caps:
    """What one request may ask for."""
    return Caps(
        max_samples=mine.max_samples,
        max_tokens=mine.max_tokens,
        default_max_tokens=mine.default_max_tokens,
        max_prompt_tokens=mine.max_prompt_tokens,
        max_in_flight=mine.max_queued,
    )


def make_engine(mine: GenerationSettings, initial: InitialVersion) -> GenerationEngine:
    """The engine that the settings name; `auto` takes vLLM where it is installed."""
    commit = CommitSettings(mine.canary_tolerance, mine.call_timeout_s, mine.commit_timeout_s)
    kind = mine.engine
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        from honed.generation.vllm.engine import VLLMEngine, VLLMSettings

        return VLLMEngine(
            initial,
            VLLMSettings(
                dtype=mine.dtype,
                max_model_len=mine.max_model_tokens,
                max_num_seqs=mine.max_num_seqs,
                max_batched_tokens=mine.max_batched_tokens,
                kv_cache_gib=mine.kv_cache_gib,
                gpu_memory_share=mine.gpu_memory_share,
                cuda_graphs=mine.cuda_graphs,
                tensor_parallel=mine.tensor_parallel,
                staged_load=mine.staged_load,
                threads=mine.threads,
            ),
            commit,
            max_in_flight=mine.max_queued,
        )
    from honed.generation.hf.engine import TransformersEngine, TransformersSettings

    return TransformersEngine(
        initial,
        TransformersSettings(
            dtype=mine.dtype, max_model_len=mine.max_model_tokens, max_batch=mine.max_num_seqs, staged_load=mine.staged_load
        ),
        commit,
    )


async def catch_up(control: GenerationControlService, store: PolicyStore, engine: GenerationEngine) -> None:
    """Takes in what was published while the engine started."""
    latest = await asyncio.to_thread(store.latest)
    if latest is not None and latest > engine.version:
        await control.change(latest, "")


async def _newest(store: PolicyStore, directory: Path) -> InitialVersion:
    version = await asyncio.to_thread(store.latest)
    if version is None:
        raise FailedPrecondition(
            f"the policy store holds no version of run {store.run!r}: "
            "run the pretraining phase, or set conductor.start_from to a model"
        )
    return InitialVersion(version, await asyncio.to_thread(store.fetch, version, directory))


async def _fail_when_dead(engine: GenerationEngine) -> None:
    raise Unavailable(f"the engine died: {await engine.wait_dead()}")


def _fresh(directory: Path) -> Path:
    """Versions fetched by an earlier process are of no use: nobody knows that they are whole."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
