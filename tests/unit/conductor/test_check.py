"""Claims about `honed check`: everything that is wrong at once, each with its place and what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.run import run_tree, settings_of
from typer.testing import CliRunner

from honed.check.bills import checkpoint_gib, memory_needed
from honed.check.findings import Report
from honed.check.machine import check_machine, disk_needed
from honed.check.memory import check_memory
from honed.check.model import BaseModel
from honed.check.run import check_run
from honed.check.scorers import check_scorers
from honed.check.surroundings import check_surroundings
from honed.cli.init import _judgements, _quoted
from honed.cli.main import app
from honed.conductor.prompt_file import PromptFile, check_prompts
from honed.config import RunSettings
from honed.models.prompts import PromptEncoder
from honed.topology import SERVICES


def texts_of(report: Report) -> list[str]:
    return [f"{finding.severity} {finding.where}: {finding.text}" for finding in report.findings]


def jsonl(path: Path, *rows: Mapping[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return run_tree(tmp_path)


def test_a_run_that_is_all_right_has_no_finding_and_figures(tree: dict[str, Any]) -> None:
    report = check_run(settings_of(tree))
    assert texts_of(report) == []
    assert report.figures["parameters"] > 100_000
    assert report.figures["memory_gib"]["needed"] > report.figures["memory_gib"]["learner: weights, gradients, optimizer"]


def test_every_bad_line_is_named_with_its_file_and_number(tree: dict[str, Any], tmp_path: Path) -> None:
    jsonl(
        tmp_path / "prompts.jsonl",
        {"text": "fine"},
        '{"text": "cut',
        {"question": "why"},
        {"token_ids": [999_999]},
        {"text": "x" * 500},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"text": "fine"},
    )
    pairs = jsonl(
        tmp_path / "pairs.jsonl",
        {"prompt": "", "chosen": "good", "rejected": "bad"},
        {"chosen": "no rejected"},
        {"prompt": "", "chosen": "good", "rejected": "bad"},
    )
    tree["data"] = {**tree["data"], "judgements": [{"file": str(pairs), "format": "trl"}]}
    found = texts_of(check_run(settings_of(tree)))
    prompts = tmp_path / "prompts.jsonl"
    for number, words in ((2, "not JSON"), (3, "needs `text`"), (4, "token id"), (5, "500 tokens"), (6, "no chat template")):
        assert any(line.startswith(f"error data.prompts: {prompts}, line {number}: ") and words in line for line in found), (
            number
        )
    assert any("1 of 2 prompts are duplicates" in line for line in found)
    assert any(line.startswith(f"error data.judgements.0: {pairs}, line 2: ") for line in found)
    assert any("1 of 2 judgements are of responses judged before" in line for line in found)


def with_chat_template(model: Path) -> None:
    """Each message between brackets, and a tokenizer that puts a special token in front of every text."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, "chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    token = {"id": "[X]", "ids": [0], "tokens": ["[X]"]}
    single = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"[X]": token}}
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": template}))


@pytest.mark.parametrize("fast", [False, True])
def test_the_check_takes_the_prompts_that_the_run_takes_and_counts_as_the_run_counts(
    tree: dict[str, Any], tmp_path: Path, fast: bool
) -> None:
    with_chat_template(tmp_path / "model")
    talk = [{"role": "user", "content": "hello", "name": "eve", "weight": 1.0}]
    rows = [{"text": "x", "messages": None}, {"messages": talk, "text": None}, {"text": None, "token_ids": [5, 6]}]
    path = jsonl(tmp_path / "prompts.jsonl", *rows)
    settings = settings_of(tree)
    report = check_run(settings, fast=fast)
    assert texts_of(report) == []
    with PromptFile(path, PromptEncoder.of_model(tmp_path / "model", longest=settings.longest_prompt)) as file:
        lengths = [len(file[number].token_ids) for number in range(3)]
    assert lengths == [2, 7, 2], "a special token before a text, none before a conversation"
    if not fast:
        assert report.figures[f"prompts {path}"]["longest_tokens"] == 7
    jsonl(path, {"text": "a", "messages": talk})
    assert any("line 1: " in line and "one of them" in line for line in texts_of(check_run(settings, fast=fast)))
    with pytest.raises(ValueError, match="one of them"):
        check_prompts(path)


def test_a_damaged_tokenizer_is_a_finding(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    (finding,) = texts_of(check_run(settings_of(tree)))
    assert finding.startswith(f"error conductor.start_from: {tmp_path / 'model' / 'tokenizer.json'} cannot be read")


def test_many_bad_lines_are_a_number_not_a_flood(tree: dict[str, Any], tmp_path: Path) -> None:
    jsonl(tmp_path / "prompts.jsonl", *[{"nothing": i} for i in range(50)])
    found = texts_of(check_run(settings_of(tree)))
    assert len(found) < 15
    assert "error data.prompts: 40 more lines are wrong" in found


def test_held_out_judgements_that_are_trained_on_are_noticed(tree: dict[str, Any], tmp_path: Path) -> None:
    pair = {"prompt": "", "chosen": "good", "rejected": "bad"}
    for name in ("pairs", "held"):
        jsonl(tmp_path / f"{name}.jsonl", pair)
    tree["data"] = {
        **tree["data"],
        "judgements": [{"file": str(tmp_path / "pairs.jsonl"), "format": "trl"}],
        "evaluation": {"judgements": {"file": str(tmp_path / "held.jsonl"), "format": "trl"}},
    }
    assert any("1 of 1 judgements are also trained on" in line for line in texts_of(check_run(settings_of(tree))))


def test_weights_that_nobody_has_are_noticed(tree: dict[str, Any], tmp_path: Path) -> None:
    jsonl(tmp_path / "pairs.jsonl", {"prompt": "", "chosen": "good", "rejected": "bad"})
    tree["data"]["judgements"] = [{"file": str(tmp_path / "pairs.jsonl"), "format": "trl", "annotator": "ann"}]
    tree["reward"] = {"scorers": [{"name": "people", "kind": "reward_model", "source": "trained"}]}
    tree["reward_training"] = {"annotator_weights": {"ann": 0, "bob": 1}}
    found = texts_of(check_run(settings_of(tree)))
    assert any(line.startswith("error reward_training.annotator_weights: with source_weights, leave no") for line in found)
    assert any(line.startswith("warning reward_training.annotator_weights: bob: nothing") for line in found)
    tree["reward_training"] = {"annotator_weights": {"ann": 0.5}}
    assert not any("weights" in line for line in texts_of(check_run(settings_of(tree))))


def test_the_body_of_a_reward_model_is_checked_as_the_policy_is(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["reward"] = {"scorers": [{"name": "people", "kind": "reward_model", "source": "trained"}]}
    tree["reward_training"] = {"start_from": str(tmp_path / "nowhere"), "train": "head"}
    assert any(
        line.startswith("error reward_training.start_from: there is no") for line in texts_of(check_run(settings_of(tree)))
    )
    tree["reward_training"] = {"start_from": str(tmp_path / "model"), "read_layers": [1, 9]}
    found = [line for line in texts_of(check_run(settings_of(tree))) if "reward_training" in line]
    assert len(found) == 1
    assert found[0].startswith("error reward_training.read_layers: 9 is more than the ")
    tree["reward_training"] = {"layers": 7}
    assert any(line.startswith("error reward_training.layers: 7 is more") for line in texts_of(check_run(settings_of(tree))))


def test_a_model_whose_layers_cannot_be_computed_again_is_refused_before_the_start(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    tree["learner"] = {**tree.get("learner", {}), "gradient_checkpointing": True}
    assert texts_of(check_run(settings_of(tree))) == []
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=256))
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
    tree["conductor"]["start_from"] = str(tmp_path / "old")
    found = texts_of(check_run(settings_of(tree)))
    assert any(
        line.startswith("error learner.gradient_checkpointing: OpenAIGPTLMHeadModel has no layers that can be computed again")
        for line in found
    )


def test_all_that_is_wrong_with_a_run_is_found_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        tree["preference"] = {"port": port}
        tree["conductor"]["start_from"] = str(tmp_path / "nowhere")
        tree["queue"] = {"url": "redis://127.0.0.1:1/0"}
        unknown = {"name": "a", "kind": "function", "source": "no_such_function"}
        wrong = {"name": "b", "kind": "function", "source": "length", "options": {"unit": "lines"}}
        tree["reward"] = {"scorers": [unknown, wrong]}
        tree["data"] = {"prompts": str(tmp_path / "none.jsonl")}
        found = texts_of(check_run(settings_of(tree), fast=True))
    places = ("conductor.start_from", "data.prompts", "preference.port", "queue.url", "reward.scorers.0.source")
    for where in (*places, "reward.scorers.b.options"):
        assert any(line.startswith(f"error {where}: ") for line in found), (where, found)


def test_a_remote_scorer_that_is_not_there_yet_is_a_warning_and_a_missing_token_an_error(tmp_path: Path) -> None:
    options = {"token_file": str(tmp_path / "none")}
    scorers = [
        {"name": "a", "kind": "remote", "source": "127.0.0.1:1"},
        {"name": "b", "kind": "remote", "source": "127.0.0.1:1", "options": options},
        {"name": "c", "kind": "remote", "source": "127.0.0.1:1", "options": {"deadline_s": 60}},
    ]
    report = Report()
    check_scorers(RunSettings.model_validate({"reward": {"scorers": scorers}}), report)
    found = texts_of(report)
    assert any(
        line.startswith("warning reward.scorers.0.source: 127.0.0.1:1 does not list its scorers: UNAV") for line in found
    )
    assert any(line.startswith("error reward.scorers.b.options: ") and "does not exist" in line for line in found)
    assert any("together they may take 120 s (a 30 s, b 30 s, c 60 s)" in line for line in found)


def test_of_services_that_run_elsewhere_this_machine_is_asked_neither_memory_nor_ports() -> None:
    ports = {name: {"host": "0.0.0.0", "port": 1, "address": f"{name}:1"} for name in SERVICES}
    tree = {**ports, "conductor": {**ports["conductor"], "launcher": "none"}, "learner": {"device": "cuda:7"}}

    def found() -> list[str]:
        report = Report()
        settings = RunSettings.model_validate(tree)
        check_machine(settings, report, BaseModel(70_000_000_000))
        check_surroundings(settings, report)
        return texts_of(report)

    assert any("learner.address is not set, and 127.0.0.1:0 leads nowhere" in line for line in found())
    tree["learner"] = {**ports["learner"], "device": "cuda:7"}
    assert [line for line in found() if "queue.url" not in line] == []


def test_a_model_that_does_not_fit_is_refused_with_the_bill() -> None:
    report = Report()
    check_machine(RunSettings.model_validate({"learner": {"device": "cpu"}}), report, BaseModel(70_000_000_000))
    memory = next(line for line in texts_of(report) if line.startswith("error memory: "))
    assert "optimizer 1043.1" in memory
    assert "take a smaller model" in memory


def test_a_reward_model_of_a_larger_body_is_billed_as_it_trains_and_as_it_scores() -> None:
    scorers = [{"name": "people", "kind": "reward_model", "source": "trained"}]
    tree: dict[str, Any] = {"learner": {"device": "cpu"}, "reward": {"scorers": scorers}}

    def bills(train: str) -> tuple[Report, list[str]]:
        report = Report()
        settings = RunSettings.model_validate({**tree, "reward_training": {"train": train}})
        check_memory(settings, report, 1 << 20, body=70 << 30)
        return report, [line for line in texts_of(report) if "error memory" in line]

    report, found = bills("all")
    assert report.figures["memory_gib"]["reward: 1 models, 1 times"] == pytest.approx(280.0)
    training = report.figures["memory_while_the_reward_model_trains_gib"]
    assert training["reward training: weights, gradients, optimizer"] == pytest.approx(1120.0)
    assert len(found) == 2
    assert "take a smaller reward_training.start_from, or train adapters or head" in found[1]
    report, _ = bills("adapters")
    assert report.figures["memory_while_the_reward_model_trains_gib"]["reward training: weights"] == pytest.approx(280.0)


def test_rollouts_that_no_checkpoint_lets_go_are_part_of_the_bill() -> None:
    rare = RunSettings.model_validate({"learner": {"device": "cpu", "checkpoint_every": 100_000}})
    report = Report()
    check_memory(rare, report, 1_000_000)
    assert report.figures["memory_gib"]["redis: rollouts since the last checkpoint"] == pytest.approx(72.7, abs=0.1)
    ends_soon = RunSettings.model_validate({"learner": {"device": "cpu", "checkpoint_every": 100_000, "steps": 10}})
    assert memory_needed(ends_soon, 1_000_000)["redis: rollouts since the last checkpoint"] < 0.01


def test_an_average_of_the_weights_is_billed_in_each_checkpoint() -> None:
    plain, averaged = (
        RunSettings.model_validate({"learner": {"device": "cpu", "steps": 9, **more}}) for more in ({}, {"ema_decay": 0.99})
    )
    assert checkpoint_gib(averaged, 1 << 30) == pytest.approx(16.0)
    assert checkpoint_gib(plain, 1 << 30) == pytest.approx(12.0)
    assert sum(disk_needed(averaged, 1 << 30).values()) > sum(disk_needed(plain, 1 << 30).values())


GPUS = "81559, 80994\n81559, 20480\n"


def with_gpus(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> None:
    """A machine whose `nvidia-smi` answers so."""

    def say() -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("honed.check.memory.has_gpu", lambda: True)
    monkeypatch.setattr("honed.check.memory._nvidia_smi", say)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def of_gpu(settings: RunSettings, parameters: int) -> tuple[list[str], Report]:
    report = Report()
    check_memory(settings, report, parameters)
    return [line for line in texts_of(report) if "GPU" in line], report


def test_a_learner_that_does_not_fit_beside_the_engine_is_refused_with_the_gpus_bill(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, GPUS)
    (found,), report = of_gpu(RunSettings(), 1_000_000_000)
    assert found.startswith(
        "error memory: the run needs about 86.3 GiB of GPU 0 (generation: gpu_memory_share 0.85, 1 times 67.7"
    )
    assert "79.1 of 79.6 GiB are free: take a smaller generation.gpu_memory_share" in found
    assert report.figures["memory_of_gpu_0_gib"]["needed"] == pytest.approx(86.3, abs=0.1)
    smaller = RunSettings.model_validate({"generation": {"gpu_memory_share": 0.7}})
    assert of_gpu(smaller, 1_000_000_000)[0] == []


def test_each_gpu_has_its_own_bill_and_one_in_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, GPUS)
    elsewhere = RunSettings.model_validate({"learner": {"device": "cuda:1"}})
    assert of_gpu(elsewhere, 1_000_000_000)[0] == []
    (found,), _ = of_gpu(elsewhere, 2_000_000_000)
    assert found.startswith("warning memory: the run needs about 37.3 GiB of GPU 1 (learner: weights")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (found,), _ = of_gpu(RunSettings.model_validate({"learner": {"device": "cpu"}}), 1_000_000)
    assert "20.0 of 79.6 GiB are free" in found


def test_a_reward_model_that_does_not_fit_a_gpu_as_it_trains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, GPUS)
    tree: dict[str, Any] = {"reward": {"scorers": [{"name": "people", "kind": "reward_model", "source": "trained"}]}}
    tree |= {"learner": {"device": "cpu"}, "reward_training": {"start_from": "large"}}
    tree["data"] = {"judgements": [{"file": "pairs.jsonl", "format": "trl"}]}

    def found(**training: Any) -> list[str]:
        report = Report()
        changed = RunSettings.model_validate({**tree, "reward_training": {**tree["reward_training"], **training}})
        check_memory(changed, report, 1_000_000, body=2_000_000_000)
        return [line for line in texts_of(report) if "while the reward model trains" in line]

    (line,) = found()
    assert line.startswith("error memory: the run needs about 97.5 GiB of GPU 0 while the reward model trains (generation")
    assert "reward training: weights, gradients, optimizer 29.8" in line
    assert "take a smaller generation.gpu_memory_share, or a smaller reward_training.start_from, or train adapters" in line
    (line,) = found(device="cuda:1")
    assert line.startswith(
        "warning memory: the run needs about 29.8 GiB of GPU 1 while the reward model trains (reward training"
    )
    assert found(device="cuda:1", train="adapters") == found(device="cpu") == []


def test_weights_that_do_not_fit_the_engines_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, GPUS)
    settings = RunSettings.model_validate({"generation": {"dtype": "bfloat16"}, "learner": {"device": "cpu"}})
    assert any(line.startswith("error generation.gpu_memory_share: ") for line in of_gpu(settings, 70_000_000_000)[0])


@pytest.mark.parametrize("section", ["learner", "sft", "reward_training"])
def test_a_device_that_this_machine_lacks_is_refused_by_its_name(section: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    report = Report()
    check_machine(RunSettings.model_validate({section: {"device": "cuda:3"}}), report, None)
    assert f"error {section}.device: is cuda:3, and this machine has no GPU that torch can use: set auto or cpu" in texts_of(
        report
    )


@pytest.mark.parametrize("answer", [FileNotFoundError("it is not installed"), "[N/A], [N/A]\n", ""])
def test_a_gpu_that_says_nothing_of_its_memory_is_said_to_be_unchecked(
    monkeypatch: pytest.MonkeyPatch, answer: str | Exception
) -> None:
    with_gpus(monkeypatch, answer)
    (found,), _ = of_gpu(RunSettings(), 1_000_000)
    assert found.startswith("warning memory: that of the GPU could not be checked")


def test_a_text_to_cut_at_that_is_several_tokens_is_refused_before_the_start(tree: dict[str, Any]) -> None:
    tree["reward"]["truncate"] = {"token_text": ".", "not_before": 3}
    assert texts_of(check_run(settings_of(tree), fast=True)) == []
    tree["reward"]["truncate"]["token_text"] = "the end"
    (finding,) = texts_of(check_run(settings_of(tree), fast=True))
    assert finding.startswith("error reward.truncate.token_text: 'the end' is 7 tokens of the model")


def test_files_and_functions_that_are_read_later_are_looked_for(tree: dict[str, Any], tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("authority", "certificate", "key")}
    tree["security"] = {"tls": files}
    tree["conductor"]["application_prompts"] = {"redact": "nobody-offers-this"}
    tree["generation"]["cuda_graphs"] = True
    tree["generation"]["engine"] = "auto"
    (tmp_path / "key").write_text("a key")
    found = texts_of(check_run(settings_of(tree), fast=True))
    for where in (
        "security.tls.authority", "security.tls.certificate", "conductor.application_prompts.redact", "generation.cuda_graphs",
    ):  # fmt: skip
        assert any(line.startswith(f"error {where}: ") for line in found), (where, found)
    assert len(found) == 4


def test_headers_for_a_collector_are_read_before_the_start(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("no header\n")
    tree["telemetry"] = {"otlp_endpoint": "http://collector:4317", "headers_file": str(tmp_path / "headers")}
    [text] = texts_of(check_run(settings_of(tree)))
    assert text.startswith("error telemetry: telemetry.headers_file ")
    assert text.endswith("line 1: is not of the form NAME: VALUE")


def test_each_replica_has_its_own_weights_and_cache() -> None:
    one, three = (
        memory_needed(RunSettings.model_validate({"generation": {"replicas": n, "kv_cache_gib": 2}}), 1 << 30) for n in (1, 3)
    )
    assert sum(three.values()) - sum(one.values()) == pytest.approx(2 * (8 + 2 + 0.5))


def test_the_command_ends_with_1_and_says_everything_as_json(tree: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    tree["data"] = {"prompts": str(tmp_path / "none.jsonl")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml"), "--json", "--fast"])
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["ok"]) == (1, False)
    assert [finding["where"] for finding in answer["findings"]] == ["data.prompts"]


def test_init_refuses_to_overwrite_and_a_run_without_a_beginning(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: mine\n")
    runner, prompts = CliRunner(), str(tmp_path / "prompts.jsonl")
    result = runner.invoke(app, ["init", "--prompts", prompts, "--texts", "t.jsonl", "-o", str(tmp_path / "run.yaml")])
    assert result.exit_code == 1
    assert (tmp_path / "run.yaml").read_text() == "run: mine\n"
    result = runner.invoke(app, ["init", "--prompts", prompts, "-o", str(tmp_path / "other.yaml")])
    assert result.exit_code == 1
    assert not (tmp_path / "other.yaml").exists()


def test_init_writes_a_run_file_that_loads_with_odd_paths(tmp_path: Path) -> None:
    from honed.settings_file import load_settings

    out = tmp_path / "my run.yaml"
    arguments = [
        "--prompts",
        "a: b #c.jsonl",
        "--texts",
        "café 'x'.jsonl",
        "--judgements",
        'we "say".jsonl:hh',
        "--reward",
        "function:length",
    ]
    result = CliRunner().invoke(app, ["init", *arguments, "-o", str(out)])
    assert result.exit_code == 0, result.output
    settings = load_settings(out, {})
    assert settings.run == "my-run"
    assert settings.data.prompts == Path("a: b #c.jsonl")
    assert settings.data.texts == (Path("café 'x'.jsonl"),)
    assert (settings.data.judgements[0].file, settings.data.judgements[0].format) == (Path('we "say".jsonl'), "hh")
    assert settings.learner.steps is None
    assert settings.reward.scorers[0].kind == "function"


def test_a_format_that_does_not_exist_is_named() -> None:
    assert _judgements("a.jsonl") == (Path("a.jsonl"), "honed")
    assert _judgements("a.jsonl:trl") == (Path("a.jsonl"), "trl")
    with pytest.raises(ValueError, match="no format 'tlr'"):
        _judgements("a.jsonl:tlr")
    assert _quoted("out/run-1.yaml") == "out/run-1.yaml"
    assert _quoted("1.5") == '"1.5"'


def test_demonstrations_are_read_line_by_line(tree: dict[str, Any], tmp_path: Path) -> None:
    shown = jsonl(
        tmp_path / "shown.jsonl",
        {"text": "is it good?", "response": "yes"},
        {"text": "is it good?"},
        {"response": "yes"},
        {"text": "is it good?", "response": 3},
    )
    tree["data"] = {**tree["data"], "demonstrations": [str(shown), str(tmp_path / "none.jsonl")]}
    found = texts_of(check_run(settings_of(tree)))
    for number, words in ((2, "response: must be a string"), (3, "needs `text`"), (4, "response: must be a string")):
        assert any(line.startswith(f"error data.demonstrations: {shown}, line {number}: ") and words in line for line in found)
    assert any("none.jsonl" in line for line in found)


def test_a_demonstrations_prompt_may_be_as_long_as_fine_tuning_takes_it(tree: dict[str, Any], tmp_path: Path) -> None:
    """Longer than prompts of rollouts may be."""
    rows = ({"token_ids": [5] * length, "response": "yes"} for length in (100, 127, 128))
    shown = jsonl(tmp_path / "shown.jsonl", *rows)
    tree["data"] = {**tree["data"], "demonstrations": [str(shown)]}
    found = [line for line in texts_of(check_run(settings_of(tree))) if "demonstrations" in line]
    assert len(found) == 1
    assert "line 3" in found[0]


def test_what_learns_from_judgements_needs_neither_prompts_nor_scorers(tree: dict[str, Any]) -> None:
    tree["learner"]["algorithm"] = "dpo"
    tree["data"] = {}
    tree["reward"] = {"scorers": []}
    [warning] = texts_of(check_run(settings_of(tree)))
    assert warning.startswith("warning data.judgements: learner.algorithm dpo learns from them")
    without_online = {**tree, "learner": {}, "phases": ["pretrain"], "conductor": {"response_tokens": 4}}
    found = texts_of(check_run(settings_of(without_online)))
    assert not any("scorers" in line or "data.prompts" in line for line in found)
    tree["learner"]["algorithm"] = "ppo"
    found = texts_of(check_run(settings_of(tree)))
    assert any(line.startswith("error data.prompts: is not set") for line in found)
    assert any(line.startswith("error reward.scorers: names none") for line in found)


@pytest.mark.parametrize("fast", [False, True])
def test_references_are_checked_and_prompts_without_one_among_others_are_a_warning(
    tree: dict[str, Any], tmp_path: Path, fast: bool
) -> None:
    path = jsonl(
        tmp_path / "prompts.jsonl", {"text": "a", "reference": 4}, {"text": "b", "reference": "x" * 65_537}, {"text": "c"}
    )
    found = texts_of(check_run(settings_of(tree), fast=fast))
    assert any("line 2: reference: has 65537 bytes" in line for line in found), found
    assert any(f"{path}: 1 of 2 prompts have no `reference`" in line for line in found), found


def test_prompts_without_the_reference_that_a_scorer_needs_are_an_error(tree: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "prompts.jsonl", {"text": "a", "reference": "b"}, {"text": "c"})

    def found(**options: object) -> list[str]:
        tree["reward"] = {"scorers": [{"name": "rule", "kind": "function", "source": "matches", "options": options}]}
        return [line for line in texts_of(check_run(settings_of(tree))) if "`reference`" in line]

    [wrong] = found()
    assert wrong.startswith(f"error data.prompts: {path}: 1 of 2 prompts have no `reference`, and the scorers rule need one")
    for options in ({"missing": 0.0}, {"pattern": "x"}):
        assert [line.partition(" ")[0] for line in found(**options)] == ["warning"]
    jsonl(path, {"text": "a"})
    assert found(pattern="x") == []
