"""`llm_judge`: a language model behind an OpenAI-compatible API rates each response.

Generated text goes into the judge's prompt, so a policy can learn to write what the judge obeys: read `prompt` about that.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, model_validator

from honed.kit.errors import FailedPrecondition, InvalidArgument, Unavailable
from honed.kit.from_files import FromFiles
from honed.reward.function_scorer import Sample
from honed.reward.judge.endpoint import ChatEndpoint, Refused
from honed.reward.judge.prompt import SYSTEM, TEMPLATE, digest, fill, places
from honed.reward.judge.reading import Unparsable, expected_value, json_field, last_number
from honed.reward.judge.together import together
from honed.settings import Section

_KEPT: Final = 4096
_ALTERNATIVES: Final = 20  # what OpenAI and vLLM give at most
_OWN: Final = ("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs", "n", "stream")


class LlmJudge(Section):
    """Asks for one rating a response, several at once.

    A batch ends after `deadline_s`. What has no rating by then fails as an outage, which is tried again later; ratings are
    remembered, so that each try gets further. An answer without a rating fails its rollout, which is tried again and becomes a
    dead letter in the end, with the answer; `unparsable` gives it a score instead.
    """

    base_url: str = Field(description="What /chat/completions is appended to, for example https://api.openai.com/v1.")
    model: str = Field(min_length=1, description="As the endpoint calls it.")
    api_key_env: str | None = Field(None, description="Environment variable of the reward service with the key.")
    api_key_file: Path | None = Field(None, description="File with the key; read again when it is replaced.")
    template: str = Field(
        TEMPLATE, description="The question, with {response} and, if wanted, {prompt} {reference} {low} {high}."
    )
    system: str = Field(SYSTEM, description="System message; empty: none.")
    read: Literal["last_number", "json", "logprobs"] = Field(
        "last_number",
        description="The last number in the range; a field of a JSON object; or the mean over the digits that the judge could "
        "have said, by their probabilities.",
    )
    field: str = Field("score", min_length=1, description="Which one, for read: json.")
    low: float = Field(1.0, description="The least rating.")
    high: float = Field(10.0, description="The highest.")
    normalise: bool = Field(True, description="Score from 0 to 1. Otherwise the rating itself.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(0.0, description="null: the endpoint's own.")
    max_tokens: Annotated[int, Field(gt=0)] | None = Field(256, description="Of an answer; null: the endpoint's own.")
    extra: dict[str, Any] = Field({}, description="What else goes into each request, such as response_format.")
    concurrency: int = Field(8, ge=1, le=256, description="Requests at once.")
    timeout_s: float = Field(30.0, gt=0, le=90, description="Seconds of one try.")
    tries: int = Field(4, ge=1, le=20, description="Of one request: pauses grow, or are what Retry-After says.")
    deadline_s: float = Field(60.0, gt=0, le=90, description="Seconds for a batch.")
    unparsable: float | None = Field(None, description="Score of a response whose rating cannot be read. Unset: it fails.")
    missing: float | None = Field(None, description="With {reference}: score where there is none. Unset: it is refused.")

    _endpoint: ChatEndpoint = PrivateAttr()
    _known: OrderedDict[str, float] = PrivateAttr(default_factory=OrderedDict)

    @model_validator(mode="after")
    def _consistent(self) -> LlmJudge:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError("base_url: must be http://HOST/PATH or https://HOST/PATH")
        if url.username or url.password:
            raise ValueError("base_url: must hold no user and no password: name a key by api_key_env or api_key_file")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env: and api_key_file name a key each: leave one of them out")
        if "response" not in places(self.template):
            raise ValueError("template: must hold {response}")
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} must be below high = {self.high:g}")
        if self.read == "logprobs" and not (
            self.low.is_integer() and self.high.is_integer() and 0 <= self.low < self.high <= 9
        ):
            raise ValueError(
                "read: logprobs reads one token, and only a digit is one in every vocabulary: take low and high in 0 to 9"
            )
        if self.missing is not None and "reference" not in places(self.template):
            raise ValueError("missing: says nothing without {reference} in the template")
        if own := sorted(set(self.extra) & set(_OWN)):
            raise ValueError(f"extra: {', '.join(own)} is set by the judge itself, or cannot be read")
        return self

    @model_validator(mode="after")
    def _with_its_endpoint(self) -> LlmJudge:
        """Finds the key, after what is wrong with the options has been told."""
        self._endpoint = ChatEndpoint(
            self.base_url, self._key(), timeout_s=self.timeout_s, tries=self.tries, connections=self.concurrency
        )
        return self

    @property
    def longest_s(self) -> float:
        """Seconds after which a batch is given up."""
        return self.deadline_s

    @property
    def needs_reference(self) -> bool:
        """Whether a sample without a reference is refused."""
        return "reference" in places(self.template) and self.missing is None

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Scores a batch.

        Raises:
            InvalidArgument: A sample has no reference, and the template wants it.
            Unavailable: The endpoint did not answer for some of them in time.
            FailedPrecondition: The endpoint refuses one of the requests.
            Unparsable: The first answer that holds no rating.
        """
        if self.needs_reference and not all(sample.reference for sample in samples):
            raise InvalidArgument("reference", "is empty: give the prompt a `reference`, or set the option `missing`")
        wanted = {digest(sample): sample for sample in samples if not self._is_missing(sample)}
        self._rate({key: sample for key, sample in wanted.items() if key not in self._known})
        scores = [self.missing or 0.0 if self._is_missing(sample) else self._known[digest(sample)] for sample in samples]
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return scores

    def _is_missing(self, sample: Sample) -> bool:
        return self.missing is not None and not sample.reference

    def _rate(self, fresh: dict[str, Sample]) -> None:
        """Asks for all ratings; keeps those that come, then raises what went wrong."""
        end, failed = time.monotonic() + self.deadline_s, list[Exception]()

        def rate(key: str) -> None:
            if any(isinstance(error, Refused) for error in failed):
                return
            try:
                self._known[key] = self._rating(fresh[key], end)
            except Exception as error:  # told below; a thread has nobody to tell
                failed.append(error)

        together(rate, fresh, self.concurrency)
        if failed:  # an outage comes before what a single sample is to blame for
            raise next((error for error in failed if isinstance(error, Unavailable)), failed[0])

    def _rating(self, sample: Sample, end: float) -> float:
        choice = self._endpoint.ask(self._request(sample), end)
        try:
            rating = self._read(choice)
        except Unparsable as error:
            if self.unparsable is not None:
                return self.unparsable
            said = str(choice["message"].get("content"))[-200:]
            raise Unparsable(f"the judge's answer has {error}: {said!r}") from error
        return (rating - self.low) / (self.high - self.low) if self.normalise else rating

    def _request(self, sample: Sample) -> dict[str, Any]:
        question = {"role": "user", "content": fill(self.template, sample, self.low, self.high)}
        messages = [{"role": "system", "content": self.system}, question] if self.system else [question]
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body |= {} if self.temperature is None else {"temperature": self.temperature}
        body |= {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        body |= {"logprobs": True, "top_logprobs": _ALTERNATIVES} if self.read == "logprobs" else {}
        return body | self.extra

    def _read(self, choice: Any) -> float:
        if self.read == "logprobs":
            try:
                return expected_value(choice, int(self.low), int(self.high))
            except (LookupError, TypeError, AttributeError) as error:
                raise FailedPrecondition(f"{self.base_url} gives no log-probabilities: take another `read`") from error
        text = choice["message"].get("content") or ""
        if choice.get("finish_reason") == "length":
            raise Unparsable("no end: it was cut at max_tokens")
        if self.read == "json":
            return json_field(text, self.field, self.low, self.high)
        return last_number(text, self.low, self.high)

    def _key(self) -> Callable[[], str] | None:
        if self.api_key_env is not None:
            value = os.environ.get(self.api_key_env, "").strip()
            if not value:
                raise FailedPrecondition(f"api_key_env: the environment variable {self.api_key_env} is not set")
            return lambda: value
        if self.api_key_file is None:
            return None
        try:
            return FromFiles([self.api_key_file], self._read_key).get
        except ValueError as error:
            raise FailedPrecondition(f"api_key_file: {error}") from error

    def _read_key(self) -> str:
        assert self.api_key_file is not None
        try:
            key = self.api_key_file.read_text().strip()
        except OSError as error:
            raise ValueError(f"{self.api_key_file} cannot be read: {error.strerror}") from error
        if not key:
            raise ValueError(f"{self.api_key_file} is empty")
        return key
