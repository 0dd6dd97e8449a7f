"""`honed init`: writes a commented run file from a few flags."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output

if TYPE_CHECKING:
    from honed.models.facts import ModelFacts

_FORMATS = ("honed", "trl", "hh", "summarize")
_LONGEST = 2048
_LARGE = 100_000_000


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed init --model ./qwen --prompts asked.jsonl --judgements pairs.jsonl:trl")(init)


def init(
    prompts: Annotated[Path, typer.Option(help="JSON lines with `text`, `token_ids` or `messages`: what is trained on.")],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model directory to start from. Unset: pretrain a small one on --texts.")
    ] = None,
    judgements: Annotated[
        list[str] | None, typer.Option(help="FILE, or FILE:FORMAT of honed, trl, hh or summarize; may be repeated.")
    ] = None,
    texts: Annotated[list[Path] | None, typer.Option(help="JSON lines with `text`, to pretrain on; may be repeated.")] = None,
    evaluation_judgements: Annotated[str | None, typer.Option(help="Held-out judgements, FILE or FILE:FORMAT.")] = None,
    evaluation_prompts: Annotated[Path | None, typer.Option(help="Held-out prompts, continued before and after.")] = None,
    reward: Annotated[
        str, typer.Option(help="trained: by the judgements. function:NAME: a Python function. Otherwise a model directory.")
    ] = "trained",
    steps: Annotated[int | None, typer.Option(min=1, help="Updates to train. Unset: until it is stopped.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. Unset: the run file's name.")] = None,
    out: Annotated[Path, typer.Option("--output", "-o", help="The run file to write.")] = Path("run.yaml"),
) -> None:
    """Write a commented run file for your own model and data. Look at it, then `honed check` it, then `honed up` it."""
    from honed.settings_file import load_settings

    if out.exists():
        raise ValueError(f"{out} exists already: choose another name with -o, or remove it")
    if model is None and not texts:
        raise ValueError("neither --model nor --texts is given: a run starts from a model, or pretrains one on texts")
    sources = [_judgements(text) for text in judgements or ()]
    facts = _Facts.of(model)
    text = _run_file(
        run=name or _run_name(out),
        model=model,
        prompts=prompts,
        texts=texts or [],
        judgements=sources,
        held_out=_judgements(evaluation_judgements) if evaluation_judgements else None,
        evaluation_prompts=evaluation_prompts,
        reward=reward,
        steps=steps,
        facts=facts,
    )
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    try:
        load_settings(partial)
    except ValueError:
        partial.unlink()
        raise
    partial.rename(out)
    output.note(f"{out} is written; look at it, then: honed check {out}, honed up {out}")


@dataclass(frozen=True)
class _Facts:
    """What the settings are derived from."""

    longest: int
    parameters: int
    ends: bool
    family: str

    @classmethod
    def of(cls, model: Path | None) -> _Facts:
        if model is None:
            return cls(256, 0, False, "")
        from honed.artifacts.tensors import read_tensor_entries
        from honed.models.facts import ModelFacts

        facts: ModelFacts = ModelFacts.read(model)
        entries = (entry for file in sorted(model.glob("*.safetensors")) for entry in read_tensor_entries(file, str(file)))
        parameters = sum(math.prod(entry.shape) for entry in entries)
        longest = min(facts.longest_sequence or _LONGEST, _LONGEST)
        return cls(longest, parameters, bool(facts.end_token_ids), facts.model_type)


def _run_file(
    *,
    run: str,
    model: Path | None,
    prompts: Path,
    texts: list[Path],
    judgements: list[tuple[Path, str]],
    held_out: tuple[Path, str] | None,
    evaluation_prompts: Path | None,
    reward: str,
    steps: int | None,
    facts: _Facts,
) -> str:
    longest = facts.longest
    response = max(1, min(256, longest // 4))
    prompt = longest - response
    large = facts.parameters > _LARGE
    lines = [
        f"# The run file of {run}. `honed config show --run-file FILE` lists every setting with its value;",
        "# `honed check FILE` looks at all of it before anything starts; `honed up FILE` runs it.",
        f"run: {run}",
        f"directory: {_quoted(f'out/{run}')}       # everything that the run writes",
        "conductor:",
    ]
    if model is not None:
        size = f"{facts.parameters / 1e6:.1f}M parameters" if facts.parameters else "no safetensors yet"
        lines.append(f"  start_from: {_quoted(str(model))}   # {facts.family}, {size}")
    lines += [
        f"  response_tokens: {response}        # the most tokens of a training response",
        "  temperature: 1.0",
        "  samples_per_prompt: 1",
        "data:",
    ]
    if texts:
        lines.append(f"  texts: [{', '.join(_quoted(str(path)) for path in texts)}]   # to pretrain on")
    lines.append(f"  prompts: {_quoted(str(prompts))}   # `text`, `token_ids` or `messages` (the model's chat template)")
    if judgements:
        lines.append("  judgements:                  # imported at each start; what is stored already is not doubled")
        lines += [f"    - {_source(*source)}" for source in judgements]
    else:
        lines.append("  # judgements: [{file: pairs.jsonl, format: trl, source: people}]   # or: honed judge import")
    if held_out or evaluation_prompts:
        lines.append("  evaluation:                  # nothing trains on these; the report shows them")
        lines += [f"    judgements: {_source(*held_out)}"] if held_out else []
        lines += [f"    prompts: {_quoted(str(evaluation_prompts))}"] if evaluation_prompts else []
    lines += [
        "generation:",
        f"  max_model_tokens: {longest}       # prompt and response together"
        + (f"; the model's own limit or {_LONGEST}" if model else ""),
        f"  max_prompt_tokens: {prompt}",
        f"  max_tokens: {max(response, longest // 2)}             # the most that an application may ask for",
        f"  default_max_tokens: {response}",
        f"  dtype: {'bfloat16' if large else 'float32'}              # of the engine",
        f"  weights_dtype: {'bfloat16' if large else 'float32'}      # of published versions",
        "  replicas: 1                  # more: honed up --replicas generation=2, or honed scale generation=2",
        f"  kv_cache_gib: {2.0 if large else 0.5}            # on a machine without a GPU",
        "reward:",
        "  scorers:",
        f"    - {_scorer(reward)}",
        "learner:",
        f"  batch: {64 if large else 128}                   # rollouts of one update",
        f"  steps: {steps if steps is not None else 'null'}                  # updates; null trains until it is stopped",
        f"  learning_rate: {1.0e-6 if large else 1.0e-5:.1e}",
        f"  checkpoint_every: {4 if large else 1}          # updates; a checkpoint is about 12 bytes a parameter",
        "  max_staleness: 2             # versions; older rollouts are dropped",
        "  kl: {controller: adaptive, coefficient: 0.05, target: 6.0}   # nats a response from the model above",
    ]
    if reward == "trained":
        lines += ["reward_training:", f"  learning_rate: {1.0e-5 if large else 5.0e-5:.1e}"]
    if model is None:
        lines += ["pretrain:", "  tokens: 20_000_000           # of the texts, again and again if they are fewer"]
    return "\n".join(lines) + "\n"


def _scorer(reward: str) -> str:
    if reward == "trained":
        return "{name: people, kind: reward_model, source: trained}   # trained by this run on the judgements"
    if reward.startswith("function:"):
        source = reward.removeprefix("function:")
        return _flow({"name": "function", "kind": "function", "source": source}) + "   # of the entry points honed.scorers"
    return _flow({"name": "model", "kind": "reward_model", "source": reward})


def _source(path: Path, form: str) -> str:
    return _flow({"file": str(path), "format": form, "source": path.stem[:128]})


def _flow(tree: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_quoted(str(value))}" for key, value in tree.items()) + "}"


def _quoted(text: str) -> str:
    """A text as a YAML scalar; JSON strings are."""
    plain = text.replace("/", "").replace("-", "").replace("_", "").replace(".", "")
    return text if plain.isalnum() and plain[0].isalpha() and text.isascii() else json.dumps(text, ensure_ascii=False)


def _judgements(text: str) -> tuple[Path, str]:
    """Reads FILE or FILE:FORMAT."""
    path, _, form = text.rpartition(":")
    if form in _FORMATS and path:
        return Path(path), form
    if path and not Path(text).exists() and "/" not in form and "." not in form:
        raise ValueError(f"{text}: no format {form!r}; there are {', '.join(_FORMATS)}")
    return Path(text), "honed"


def _run_name(out: Path) -> str:
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in out.stem.lower()).strip("-")
    return name[:64] or "run"
