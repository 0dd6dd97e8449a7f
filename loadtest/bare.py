"""The engine's own `AsyncLLM`, without honed around it: the limit that the served side is held against."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from honed.generation.vllm.engine import VLLMEngine
from loadtest.closed_loop import Round, run_closed_loop
from loadtest.work import Work


class BareEngine:
    """Calls `AsyncLLM.generate` with the very parameters that honed gives it."""

    def __init__(self, engine: VLLMEngine) -> None:
        """`engine` must have started."""
        self._llm: Any = engine._vllm._llm  # what honed keeps to itself is exactly what is compared here
        self._prompt: dict[str, Any] = {}
        self._parameters: Any = None
        self._rounds = 0

    async def copy_from(self, serve: Callable[[], Awaitable[None]]) -> str:
        """Notes the prompt and the `SamplingParams` that reach `AsyncLLM` while `serve` makes one call of the service.

        Returns:
            The parameters, for the record.
        """
        llm = self._llm
        add_request = llm.add_request

        async def note(request_id: str, prompt: Any, params: Any, **more: Any) -> Any:
            self._prompt, self._parameters = dict(prompt), params
            return await add_request(request_id, prompt, params, **more)

        llm.add_request = note
        try:
            await serve()
        finally:
            del llm.add_request
        return repr(self._parameters)

    async def run(self, work: Sequence[Work], concurrency: int) -> Round:
        """One closed loop. Prompts and parameters are made before the clock starts, which honed cannot do."""
        self._rounds += 1
        prompts = [{**self._prompt, "prompt_token_ids": list(each.prompt)} for each in work]
        parameters = []
        for each in work:
            own = self._parameters.clone()
            own.max_tokens = each.tokens
            parameters.append(own)

        async def call(number: int) -> int:
            tokens = 0
            name = f"bare-{self._rounds}-{number}"
            async for output in self._llm.generate(prompts[number], parameters[number], name):
                tokens += len(output.outputs[0].token_ids)
            return tokens

        return await run_closed_loop(len(work), concurrency, call)
