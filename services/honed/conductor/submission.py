"""SubmitPrompts: prompts that come in while the run is up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from honed.conductor.settings import PromptMixSettings
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.models.prompts import PromptEncoder
from honed.queue.inbox import PromptInbox
from honed.v1 import conductor_pb2, generation_pb2


async def submit_prompts(
    request: conductor_pb2.SubmitPromptsRequest, inbox: PromptInbox, encoder: PromptEncoder, mix: PromptMixSettings
) -> conductor_pb2.SubmitPromptsResponse:
    """Checks and tokenises every prompt, and adds all of them or none.

    Raises:
        InvalidArgument: a prompt cannot be used; names it.
        FailedPrecondition: the run trains on no submitted prompts.
        Overloaded: too many wait.
        Conflict: the idempotency key was used for other prompts.
    """
    if mix.submitted == 0:
        raise FailedPrecondition("conductor.prompt_mix.submitted is 0: this run trains on no submitted prompts")
    prompts = await asyncio.to_thread(_encoded, encoder, request.prompts)
    waiting = await inbox.submit(prompts, limit=mix.submitted_limit, key=request.idempotency_key)
    return conductor_pb2.SubmitPromptsResponse(waiting=waiting)


def _encoded(encoder: PromptEncoder, prompts: Iterable[generation_pb2.Prompt]) -> list[generation_pb2.Prompt]:
    encoded = []
    for number, prompt in enumerate(prompts):
        try:
            ids = encoder.prompt(prompt)
        except InvalidArgument as error:
            raise InvalidArgument(f"prompts[{number}].{error.field}", error.reason) from error
        encoded.append(generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=ids), reference=prompt.reference))
    return encoded
