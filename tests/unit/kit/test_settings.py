"""The run file: what it accepts, how it refuses, and where each value came from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from honed.settings_file import SettingsError, explain_settings, load_settings, secret_environment, write_settings


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"learner\.bacth: unknown key; did you mean learner\.batch\?"):
        load_settings(written(tmp_path, "learner: {bacth: 3}"), {})


def test_an_unknown_environment_variable_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="HONED_LEARNER__BACH names no setting; did you mean HONED_LEARNER__BATCH"):
        load_settings(None, {"HONED_LEARNER__BACH": "3"})


def test_a_wrong_value_names_its_key_and_itself(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"learner\.batch: Input should be greater than 0 \(got -4\)"):
        load_settings(written(tmp_path, "learner: {batch: -4}"), {})


@pytest.mark.parametrize("text", ["[1, 2]", "learner: [", "just words"])
def test_a_file_that_is_no_tree_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"run\.yaml"):
        load_settings(written(tmp_path, text), {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml cannot be read"):
        load_settings(tmp_path / "nowhere.yaml", {})


def test_environment_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    path = written(tmp_path, "learner: {batch: 64, epochs: 2}")
    environment = {"HONED_LEARNER__BATCH": "128", "HONED_TOKEN": "ignored"}
    rows = {key: (value, source) for key, value, source in explain_settings(path, environment)}
    assert rows["learner.batch"] == (128, "environment")
    assert rows["learner.epochs"] == (2, "file")
    assert rows["learner.minibatches"] == (1, "default")


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"multiple of conductor\.samples_per_prompt"):
        load_settings(written(tmp_path, "learner: {batch: 10}\nconductor: {samples_per_prompt: 4}"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {batch: 4, minibatches: 5}", r"learner\.minibatches: 5 cannot be filled"),
        ("learner: {batch: 1}", r"learner\.batch: one rollout has no spread"),
        ("learner: {batch: 512, kl: {horizon: 102}}", r"learner\.kl\.horizon: with 102"),
        ("learner: {device: gpu}", r"learner\.device: 'gpu' is no device: take auto, cpu, cuda, or cuda:N"),
        (
            "reward: {scorers: [{name: a, kind: function, source: f}, {name: a, kind: function, source: g}]}",
            "2 have the name a",
        ),
        ("reward: {scorers: [{name: a, kind: function, source: f, weight: .nan}]}", r"weight: Input should be a finite number"),
        ("reward: {scorers: [{name: a, kind: function, source: f, weight: .inf}]}", r"weight: Input should be a finite number"),
        ("reward: {scorers: [{name: a, kind: function, source: f, weight: 0}]}", "every weight is 0"),
        ("reward: {scorers: [{name: a, kind: reward_model, source: trained, options: {b: 1}}]}", "which has no options"),
        ("reward: {scorers: [{name: a, kind: function}]}", "a has no source, and a function needs one"),
        ("reward: {scorers: [{name: a, kind: ensemble}]}", r"scorers\.a\.options\.members: Field required"),
        ("reward: {scorers: [{name: a, kind: ensemble, options: {members: [m]}}]}", r"options\.members: .* at least 2 items"),
        (
            "reward: {scorers: [{name: a, kind: ensemble, options: {members: [m, m]}}]}",
            r"scorers\.a\.options: .*members: m stands there 2 times",
        ),
        ("reward: {scorers: [{name: a, kind: ensemble, options: {members: [m, trained]}}]}", "name artifact:trained/0.1"),
        (
            "reward: {scorers: [{name: a, kind: ensemble, options: {members: [m, n], combine: minimum, k: 1}}]}",
            "k: says nothing where combine is minimum",
        ),
        (
            "reward: {scorers: [{name: a, kind: ensemble, source: m, options: {members: [m, n]}}]}",
            r"a is an ensemble: name m among its options\.members",
        ),
        ("reward: {scorers: [{name: a, kind: remote, source: there}]}", "a has the source there: write host:port"),
        ("reward: {scorers: [{name: a, kind: remote, source: 'http://there:1'}]}", "write host:port, without http"),
        (
            "reward: {scorers: [{name: a, kind: remote, source: 'there:1', options: {deadline_s: 600}}]}",
            r"scorers\.a\.options\.deadline_s: Input should be less than or equal to 100",
        ),
        ("reward: {port: 7, scorers: [{name: a, kind: remote, source: '127.0.0.1:7'}]}", "which is this reward service itself"),
        ("reward: {scorers: [{name: a, kind: remote, source: 'a:1', options: {tls: {key: k}}}]}", r"options\.tls\.authority"),
        (
            "reward_training: {train: head, learning_rate: 1.0e-3}",
            r"reward_training\.learning_rate: means nothing where train is head",
        ),
        ("reward_training: {train: head, seconds: 60}", r"reward_training\.seconds: means nothing"),
        ("reward_training: {ridge: 1.0}", r"reward_training\.ridge: means nothing where train is all, take weight_decay"),
        (
            "reward_training: {train: head, adapter_rank: 4}",
            r"reward_training\.adapter_rank: means nothing where train is head, there are no adapters",
        ),
        ("reward_training: {adapter_alpha: 4}", r"reward_training\.adapter_alpha: means nothing where train is all"),
        ("reward_training: {train: adapters, ridge: 1.0}", r"reward_training\.ridge: means nothing where train is adapters"),
        ("reward_training: {train: adapters, adapter_rank: 0}", r"adapter_rank: Input should be greater than 0"),
        ("reward_training: {layers: 2, read_layers: [1, 3]}", r"reward_training\.read_layers: layer 3"),
        (
            "learner: {algorithm: kto, options: {desirable_weight: 0, undesirable_weight: 0}}",
            r"learner\.options\.desirable_weight",
        ),
        (
            "learner: {algorithm: dpo, preferences: {rating_threshold: 0.6}}",
            r"rating_threshold: dpo learns from pairs",
        ),
        ("learner: {algorithm: kto, batch: 1}", r"learner\.batch: kto judges each response against others"),
        ("reward: {truncate: {token_text: '.', not_before: 256}}", r"truncate\.not_before: position 256 is behind every"),
        ("reward: {truncate: {token_text: ''}}", r"token_text: String should have at least 1 character"),
        ("generation: {max_queued: 19}", r"generation\.max_queued: 19 leave applications room for 15 samples .* at least 20"),
        ("generation: {application_share: 0, max_queued: 64}", r"generation\.max_queued: 64 leave applications room for 0"),
        ("generation: {replicas: 0}", r"generation\.replicas: Input should be greater than 0"),
        ("conductor: {samples_per_prompt: 8, max_in_flight: 4}", r"conductor\.max_in_flight must be at least"),
        ("conductor: {prompt_mix: {file: 0, submitted: 0, application: 0}}", r"conductor\.prompt_mix: every weight is 0"),
        ("conductor: {start_timeout_s: 0}", r"start_timeout_s: Input should be greater than 0"),
        ("learner: {push_timeout_s: .inf}", r"push_timeout_s: Input should be a finite number"),
        ("pretrain: {hidden_size: 100}", r"pretrain\.hidden_size: 100 is no multiple of pretrain\.head_size = 32"),
        ("queue: {lease_s: 0.01}", r"queue\.lease_s: 0\.01 s end before a renewal"),
        ("run: ''", r"run: String should match pattern"),
    ],
)
def test_settings_that_would_fail_or_mislead_later_are_refused_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(written(tmp_path, text), {})


@pytest.mark.parametrize(
    "text",
    [
        "learner: {max_staleness: 0, checkpoint_every: 100000, keep_checkpoints: 1}\npolicy: {keep: 1}",
        "generation: {application_share: 0}",
        "generation: {application_share: 1, max_num_seqs: 1, rollout_concurrency: 1}",
        "learner: {batch: 1, reward_normalisation: none}",
        "learner: {batch: 512, kl: {controller: fixed, horizon: 1}}",
        "reward_training: {train: head, ridge: 0, read: mean, read_layers: [2, 1], layers: 2, objective: best_of_k}",
        "reward_training: {train: adapters, adapter_rank: 1, adapter_alpha: 0.5, layers: 1, weight_decay: 0}",
        "learner: {batch: 4, minibatches: 4}",
    ],
)
def test_extremes_that_work_are_taken(tmp_path: Path, text: str) -> None:
    load_settings(written(tmp_path, text), {})


def test_a_written_run_file_reads_back_equal_and_holds_no_secret(tmp_path: Path) -> None:
    settings = load_settings(None, {"HONED_QUEUE__PASSWORD": "hush", "HONED_SEED": "7"})
    write_settings(settings, tmp_path / "effective.yaml")
    assert "hush" not in (tmp_path / "effective.yaml").read_text()
    again = load_settings(tmp_path / "effective.yaml", {"HONED_QUEUE__PASSWORD": "hush"})
    assert again == settings


SECRETS = {
    "HONED_QUEUE__URL": "redis://user:hush@redis:6379/0",
    "HONED_QUEUE__PASSWORD": "hush2",
    "HONED_POLICY__URL": "sftp://me:hush@store/policy",
    "HONED_PREFERENCE__DATABASE_URL": "postgresql://me:hush@db/honed",
}


def test_no_secret_is_written_and_all_of_them_come_back_by_the_environment(tmp_path: Path) -> None:
    settings = load_settings(None, SECRETS)
    write_settings(settings, tmp_path / "effective.yaml")
    text = (tmp_path / "effective.yaml").read_text()
    assert "hush" not in text
    assert "redis://user@redis:6379/0" in text
    assert secret_environment(settings) == SECRETS
    assert load_settings(tmp_path / "effective.yaml", secret_environment(settings)) == settings


def test_only_its_owner_can_read_a_written_run_file(tmp_path: Path) -> None:
    path = tmp_path / "effective.yaml"
    path.with_suffix(".partial").write_text("left by an earlier run")
    path.with_suffix(".partial").chmod(0o644)
    write_settings(load_settings(None, {}), path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "queue: {password: [hush]}",
        "queue: {password: {a: hush}}",
        "queue: {password: 77012345}",
        "queue: 'redis://:hush@host'",
        "queue: {port: 'redis://:hush@host'}",
        "queue: {password: hush, lease_s: -1}",
        'queue:\n  password: "hush\n  lease_s: 3',
        "preference: {database_url: 7.5hush, port: 'x'}",
    ],
)
def test_an_error_never_shows_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"queue|preference|line") as caught:
        load_settings(written(tmp_path, text), {})
    assert not {"hush", "77012345"} & set(re.findall(r"hush|\d{8}", str(caught.value)))


def test_reading_a_run_file_loads_the_sections_of_the_rooms_and_nothing_else_of_them() -> None:
    code = "import sys, honed.settings_file; print(*(name for name in sys.modules))"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "vllm", "redis", "sqlalchemy", "fsspec", "grpc"}
    inner = {name for name in loaded if name.startswith("honed.") and name.count(".") > 1}
    assert inner
    assert {name.rpartition(".")[2] for name in inner} == {"settings", "address"}
