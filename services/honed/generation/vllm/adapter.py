"""Every call of the serving process into vLLM, in honed's own terms.

vLLM's interfaces move between releases: what depends on a release is here, in `outputs` and
`errors`, and in the modules that run inside vLLM's processes (`plugin`, `scheduler`, `weights`,
`staging`). Errors of vLLM leave as honed's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from honed.generation.requests import EngineLimits, EngineRequest
from honed.generation.vllm.errors import translated
from honed.generation.vllm.outputs import Sampled
from honed.generation.vllm.plugin import CANARY_PREFIX
from honed.generation.vllm.settings import VLLMSettings, disable_compiler, engine_arguments, set_environment, vllm_version
from honed.kit.errors import InvalidArgument, Unavailable
from honed.models.facts import ModelFacts


class VLLM:
    """An `AsyncLLM` and what honed does with it. Calls have no deadline of their own: callers give them one."""

    def __init__(self, llm: Any, version: str, settings: VLLMSettings) -> None:
        """Use `create`, then `open`."""
        self._llm = llm
        self._settings = settings
        self.version = version
        self.unstaged_because = "the engine is not open yet"
        config = llm.vllm_config.model_config
        self.limits = EngineLimits(max_model_len=config.max_model_len, vocab_size=config.get_vocab_size())
        self.tokenizer = llm.get_tokenizer()
        # vLLM knows the tokenizer's one end of sequence; the ends of turns stand in the generation configuration, which it is
        # told not to read.
        self._ends = sorted(ModelFacts.read(Path(config.model)).end_token_ids)

    @classmethod
    def create(cls, settings: VLLMSettings, directory: Path) -> VLLM:
        """Starts the engine on the model at `directory`. Blocks for half a minute.

        Raises:
            Unavailable: If vLLM is missing or cannot be started.
        """
        version = vllm_version()
        set_environment(settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**engine_arguments(settings, directory, cpu=current_platform.is_cpu()))
        if arguments.enforce_eager:
            disable_compiler()
        with translated():
            config = arguments.create_engine_config()
            name = "AsyncCanariesFirst" if config.scheduler_config.async_scheduling else "CanariesFirst"
            config.scheduler_config.scheduler_cls = f"honed.generation.vllm.scheduler.{name}"
            return cls(AsyncLLM.from_vllm_config(config, disable_log_stats=True), version, settings)

    async def submit(self, request: EngineRequest, cache_salt: str, on_end: Callable[[], None], *, stream: bool) -> Sampled:
        """Hands a request to the engine. `on_end` is called once the engine has ended it, whoever reads what it sampled."""
        if request.request_id.startswith(CANARY_PREFIX):
            # The scheduler runs such requests on weights that nobody has verified yet.
            raise InvalidArgument(
                "request_id", f"{request.request_id!r} begins with {CANARY_PREFIX!r}, which is the engine's own"
            )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        with translated():
            queue = await self._llm.add_request(
                request.request_id,
                {"type": "token", "prompt_token_ids": list(request.prompt_token_ids), "cache_salt": cache_salt},
                SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=sampling.seed,
                    stop=list(sampling.stop),
                    stop_token_ids=[*sampling.stop_token_ids, *(() if sampling.fixed_length else self._ends)],
                    ignore_eos=sampling.fixed_length,
                    logprobs=0 if request.want_logprobs else None,  # 0: the sampled token's alone
                    flat_logprobs=True,
                    detokenize=request.want_text or bool(sampling.stop),
                    output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,
                ),
            )
        return Sampled(self._llm, queue, request.want_logprobs, on_end)

    async def prompt_logprobs(self, request_id: str, token_ids: Sequence[int], cache_salt: str) -> list[float]:
        """Log-probabilities of `token_ids[1:]`, each given all before it, at temperature 1."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True
        )
        prompt = {"type": "token", "prompt_token_ids": list(token_ids), "cache_salt": cache_salt}
        with translated():
            queue = await self._llm.add_request(request_id, prompt, parameters)
            try:
                output = await queue.get()
            except asyncio.CancelledError:
                await self._llm.abort(queue.request_id, internal=True)
                raise
        positions = output.prompt_logprobs[1:]
        return [position[token].logprob for position, token in zip(positions, token_ids[1:], strict=True)]

    async def pause(self) -> None:
        """Freezes what is in flight and returns when the device is idle."""
        with translated():
            # AsyncLLM.pause_generation does the same and then sleeps 20 ms, for outputs to be seen before it returns.
            await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        """Ends a pause."""
        with translated():
            await self._llm.resume_generation()

    async def open(self) -> None:
        """Makes the workers ready for changes of weights. Once, before the first of them."""
        with translated():
            reasons = await self._llm.collective_rpc("honed_open", args=(self._settings.staged_load,))
        self.unstaged_because = next(filter(None, reasons), "")

    async def stage(self, ticket: int, directory: Path, files: Sequence[str]) -> None:
        """Reads complete weights beside those that serve, and returns when they are ready. The engine goes on stepping.

        Raises:
            Unavailable: If they cannot be loaded; nothing of them is left.
        """
        with translated():
            await self._llm.collective_rpc("honed_stage", args=(ticket, str(directory), list(files)))
            while True:
                outcomes = await self._llm.collective_rpc("honed_stage_outcome", args=(ticket,))
                if all(outcome == "" for outcome in outcomes):
                    return
                failure = next(filter(None, outcomes), None)
                if failure is not None:
                    raise Unavailable(f"the weights in {directory} cannot be loaded: {failure}")
                await asyncio.sleep(self._settings.poll_s)

    async def unstage(self) -> None:
        """Frees what `stage` had read, or what an exchange left."""
        with translated():
            await self._llm.collective_rpc("honed_unstage")

    async def exchange(self, ticket: int, label: str) -> None:
        """Serves the staged weights; those that served take their place. Like `load` otherwise."""
        await self._replace(label, "honed_exchange", ticket)

    async def load(self, directory: Path, files: Sequence[str], label: str) -> None:
        """Replaces all weights, sets the label of what they sample, and drops every cached key and value.

        Requests in flight compute their prefix anew. Only while paused. On failure weights and
        label are undefined.
        """
        await self._replace(label, "honed_load", str(directory), list(files))

    async def relabel(self, label: str) -> None:
        """Sets the label of what the weights sample, and drops every cached key and value. Only while paused."""
        await self._replace(label)

    async def _replace(self, label: str, method: str | None = None, *arguments: Any) -> None:
        with translated():
            # Sent at once: the engine takes calls in the order of sending, and each round trip would lengthen the pause.
            results = await asyncio.gather(
                *([] if method is None else [self._llm.collective_rpc(method, args=arguments)]),
                self._llm.update_weight_version(label),
                self._llm.reset_prefix_cache(reset_running_requests=True),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result  # the first is the cause, the others its consequences
            if results[-1] is not True:
                raise Unavailable("vLLM refused to reset its prefix cache")

    @property
    def tokens_in_flight(self) -> int:
        """Tokens that the requests in flight have so far. Counted anew: ask seldom."""
        states = self._llm.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)

    @property
    def dead(self) -> bool:
        """Whether the engine process is gone."""
        return bool(self._llm.errored)

    async def wait_dead(self) -> None:
        """Returns when the engine process is gone."""
        while not self.dead:
            handler = self._llm.output_handler
            if handler is None or handler.done():
                await asyncio.sleep(1.0)
            else:
                await asyncio.wait([handler], timeout=1.0)

    def fail_all(self) -> None:
        """Ends every request in flight with Unavailable."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm.errored:
            return  # vLLM has told them itself
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # or it logs the shutdown as an error
        self._llm.output_processor.propagate_error(EngineDeadError())

    def shutdown(self, timeout_s: float) -> None:
        """Stops the engine process. Blocks for at most about `timeout_s`. Idempotent; nothing works afterwards."""
        llm, self._llm = self._llm, _Gone()
        if isinstance(llm, _Gone):
            return
        llm.shutdown(timeout=timeout_s)
        llm.engine_core.resources.ctx.destroy(linger=0)  # vLLM leaves it open


class _Gone:
    """Stands where an engine was. Dropping the engine lets it be collected now and not at the interpreter's exit."""

    errored = True

    def __getattr__(self, name: str) -> Any:
        raise Unavailable("the engine is closed")
