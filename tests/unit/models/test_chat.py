"""Chat templates in the styles of three families, against texts written by hand and against transformers' own rendering."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.tiny import BOS, EOS, make_tokenizer
from tokenizers import Tokenizer, processors

from honed.artifacts.draft import VersionDraft
from honed.artifacts.store import PolicyStore
from honed.artifacts.tokenizer import fetch_tokenizer
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, InvalidArgument
from honed.models.chat import ChatMessage, ChatTemplate
from honed.models.prompts import PromptEncoder
from honed.models.tokenizer import load_tokenizer, render_chat

CHATML = """{%- for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

TALK = (ChatMessage("user", "Hi there "), ChatMessage("assistant", "Hello."), ChatMessage("user", "Naïve 🎬?"))
GOLDENS = {
    "chatml": (
        CHATML,
        "<|im_start|>user\nHi there <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nNaïve 🎬?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama": (
        LLAMA,
        f"{BOS}<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nNaïve 🎬?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        GEMMA,
        f"{BOS}<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nNaïve 🎬?<end_of_turn>\n<start_of_turn>model\n",
    ),
}


def model_with(directory: Path, template: object, *, own_file: bool = False) -> Path:
    """A model directory whose tokenizer has the template, in its configuration or in a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer(directory)
    if own_file:
        (directory / "chat_template.jinja").write_text(str(template), encoding="utf-8")
    elif template is not None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return directory


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("style", GOLDENS)
def test_a_conversation_becomes_the_text_that_the_model_was_trained_on(style: str, own_file: bool, tmp_path: Path) -> None:
    template, golden = GOLDENS[style]
    tokenizer = load_tokenizer(model_with(tmp_path, template, own_file=own_file))
    ids = render_chat(tokenizer, TALK)
    assert tokenizer._tokenizer.decode(ids) == golden
    rows = [{"role": message.role, "content": message.content} for message in TALK]
    assert ids == tokenizer._tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
    if golden.startswith(BOS):
        assert ids[:2] == [1, *tokenizer.encode(golden[len(BOS) :], special_tokens=False)[:1]], "one beginning of text, not two"


def begins_by_itself(directory: Path) -> Path:
    """Has the tokenizer put a beginning of text before every text, as those of Llama 3 and Gemma do."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_a_tokenizer_that_begins_every_text_itself_does_not_begin_a_conversation_twice(style: str, tmp_path: Path) -> None:
    directory = begins_by_itself(model_with(tmp_path, GOLDENS[style][0]))
    tokenizer, encoder = load_tokenizer(directory), PromptEncoder.of_model(directory, longest=1000)
    assert tokenizer.encode("Hi", special_tokens=True)[0] == encoder({"text": "Hi"})[0] == 1
    ids = render_chat(tokenizer, TALK)
    assert ids.count(1) == 1
    assert ids[0] == 1
    rows = [{"role": message.role, "content": message.content} for message in TALK]
    assert encoder({"messages": rows}) == ids, "the conductor's prompts and the service's are the same tokens"


@pytest.mark.parametrize(
    ("style", "golden"),
    [
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama",
            f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_a_system_message_stands_before_the_first_turn(style: str, golden: str) -> None:
    template = ChatTemplate(GOLDENS[style][0], {"bos_token": BOS})
    assert template.render([ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")]) == golden


def test_a_conversation_that_ends_with_an_answer_is_followed_by_another_answers_beginning() -> None:
    talk = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello.")]
    text = ChatTemplate(CHATML, {}).render(talk)
    assert text.endswith("<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("style", GOLDENS)
def test_a_version_carries_its_template_in_files_and_manifest(style: str, own_file: bool, tmp_path: Path) -> None:
    template, golden = GOLDENS[style]
    source = model_with(tmp_path / "source", template, own_file=own_file)
    (source / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, source / "model.safetensors")
    store = PolicyStore(tmp_path / "store", "r")
    manifest = store.publish(source, VersionDraft(VersionId(0, 0), ()))
    assert manifest.chat_template == template
    fetched = ChatTemplate.read(fetch_tokenizer(store, tmp_path / "fetched"))
    assert fetched is not None
    for found in (fetched, ChatTemplate(manifest.chat_template, {"bos_token": BOS})):
        assert found.render(TALK) == golden


def test_a_version_that_an_earlier_build_published_without_its_template_is_still_the_same(tmp_path: Path) -> None:
    source = model_with(tmp_path / "source", CHATML)
    (source / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, source / "model.safetensors")
    store, draft = PolicyStore(tmp_path / "store", "r"), VersionDraft(VersionId(0, 0), ())
    earlier = dataclasses.replace(store.publish(source, draft), chat_template="")
    (tmp_path / "store" / "r" / "0.0" / "manifest.json").write_bytes(earlier.to_bytes())
    assert store.publish(source, draft) == earlier


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    directory = model_with(tmp_path, None)
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(DataLoss, match=r"chat_template\.jinja cannot be read as text"):
        ChatTemplate.read(directory)


def test_of_several_templates_the_default_one_is_meant(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    template = ChatTemplate.read(model_with(tmp_path, named))
    assert template is not None
    assert template.render(TALK) == GOLDENS["chatml"][1]


def test_what_templates_may_call_is_there() -> None:
    source = (
        "{{ strftime_now('%d %b %Y') }} {{ {'b': '<é>'} | tojson }} {% for m in messages %}{% if m.role == 'x' %}{% continue %}"
        "{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    template = ChatTemplate(source, {"eos_token": EOS}, now=lambda: datetime(2026, 1, 2))
    assert template.render([ChatMessage("user", "yes")]) == '02 Jan 2026 {"b": "<é>"} yes<eos>'


def test_a_model_without_a_template_is_named_with_the_field(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_with(tmp_path, None))
    assert tokenizer.template is None
    with pytest.raises(InvalidArgument, match=r"prompt\.messages: this model has no chat template") as caught:
        render_chat(tokenizer, TALK, field="prompt.messages")
    assert caught.value.field == "prompt.messages"


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        (GEMMA, [ChatMessage("system", "x"), ChatMessage("user", "y")], r"^messages: .*roles: system, user.*System role not"),
        (GEMMA, [ChatMessage("user", "x"), ChatMessage("user", "y")], "must alternate"),
        (CHATML, [], "^messages: is empty"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
         [ChatMessage("user", "x"), ChatMessage("critic", "y")], r"^messages\[1\]\.role: .* leaves this message out.*'critic'"),
        ("{{ messages[0].content.nothing.at_all }}", [ChatMessage("user", "x")], "refuses them"),
    ],
)  # fmt: skip
def test_messages_that_the_template_does_not_take_are_the_callers_mistake(
    template: str, messages: list[ChatMessage], complaint: str
) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        ChatTemplate(template, {}).render(messages)


def test_a_template_reaches_nothing_outside_its_sandbox() -> None:
    for attack in ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(InvalidArgument, match="refuses them"):
            ChatTemplate(attack, {}).render([ChatMessage("user", "x")])


def test_a_damaged_template_is_named_when_the_tokenizer_loads(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match=r"chat_template\.jinja: the chat template is damaged"):
        load_tokenizer(model_with(tmp_path, "{% for %}", own_file=True))
