"""What an entry says of its trace and of itself, to spans and to log lines."""

from __future__ import annotations

from honed.kit import tracing
from honed.queue.messages import Delivery, Message
from honed.queue.spans import about, admitted, listed, work_span

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def delivery(stage: str, traceparent: str = "") -> Delivery:
    return Delivery("1718000000000-0", Message("r-1/0", b"", traceparent), 2, "me", stage)


def test_a_line_about_an_entry_names_prompt_or_rollout_and_its_trace() -> None:
    traced = about(delivery("rollouts", f"00-{TRACE}-{SPAN}-00"))
    assert traced == {"entry": "1718000000000-0", "rollout": "r-1/0", "trace_id": TRACE, "span_id": SPAN}
    assert about(delivery("prompts")) == {"entry": "1718000000000-0", "prompt": "r-1/0"}
    assert about(delivery("scored", "00-nonsense")) == {"entry": "1718000000000-0", "rollout": "r-1/0"}


def test_off_an_entrys_trace_is_handed_on_as_it_came_and_prompts_get_none() -> None:
    came = f"00-{TRACE}-{SPAN}-01"
    assert work_span("score", delivery("rollouts", came)).traceparent == came
    assert work_span("score", delivery("rollouts")) is tracing.NOTHING
    prompts = [Message("r-1", b"\xff not even a prompt")]
    with admitted(prompts) as carrying:
        assert carrying is prompts


def test_an_attribute_lists_each_value_once_and_not_without_end() -> None:
    assert listed(["1.1", "1.1", "1.2"]) == ["1.1", "1.2"]
    assert len(listed([str(i) for i in range(256)])) == 16
