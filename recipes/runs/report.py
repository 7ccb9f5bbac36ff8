"""`write_report`: a run directory as one HTML page without external resources: results, plots, samples, config."""

import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lockstep.engine.files import write_whole
from lockstep.engine.speculation.config import MAX_DRAFT_TOKENS
from lockstep.recipes.runs.metrics import (
    METRICS,
    TIME_PREFIX,
    format_value,
    in_order,
    is_part_of_step,
    known_name,
    title_of,
)
from lockstep.recipes.runs.report_cards import summary_cards
from lockstep.recipes.runs.report_page import PAGE
from lockstep.recipes.runs.run_directory import read_config, read_metrics, read_rollouts, rollout_steps

PLOTTED = (
    "reward",
    "accuracy",
    "pass@k",
    "loss",
    "response_length",
    "turns",
    "entropy",
    "grad_norm",
    "kl",
    "staleness",
    "tokens_per_step",
    "acceptance_0",
    "logprob_diff_max",
)
# Metrics that one plot compares: its title, and their names in the legend.
COMPARED: Mapping[str, Mapping[str, str]] = {
    "tokens per decoding step, held-out": {
        "draft/held_out_learned": "learned draft",
        "draft/held_out_frozen": "frozen draft",
        "draft/held_out_ngram": "n-gram",
    },
    "tokens per verify step, rollouts": {"draft/tokens_per_verify_step": "draft that serves"},
    "accepted drafts by place, rollouts": {
        f"draft/accepted_at_{place}": f"token {place}" for place in range(1, MAX_DRAFT_TOKENS + 1)
    },
}
MOST_REWARDS_SHOWN = 16
FIGURE_INCHES = (4.2, 2.5)  # about a phone's width, at which the text is as large as that of the page
COLOURS = ("#2f6fed", "#e07a1f", "#2a9d63", "#b04ac4", "#c2a200", "#5a6b7b")
PLOT_STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, sharp and searchable
    "svg.hashsalt": "lockstep",  # the same run gives the same bytes
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": "#55606c",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf0",
    "xtick.color": "#77828d",
    "ytick.color": "#77828d",
}

Record = Mapping[str, Any]


def write_report(
    run_dir: str | Path,
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
    earlier_runs: Iterable[str | Path] = (),
    samples_per_step: int = 8,
) -> Path:
    """Write run_dir/report.html from what the run has recorded so far, and return its path.

    Args:
        decode: a tokenizer's decode, to show prompts and single tokens as text; without it they are shown as ids.
        earlier_runs: run directories whose metrics come first in the plots (the fine-tuning that the run began with).
        samples_per_step: samples shown of each of the first, the middle and the last step.
    Raises:
        ValueError: run_dir holds no run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").exists():
        raise ValueError(f"{run_dir} is not a run directory: it has no config.yaml")
    records = read_metrics(run_dir)
    plotted = [record for earlier in earlier_runs for record in read_metrics(earlier)] + records
    hash_file = run_dir / "weights.sha256"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE).render(
        name=run_dir.resolve().name,
        stages=" + ".join(dict.fromkeys(str(record["stage"]) for record in plotted)) or "no records yet",
        has_trace=(run_dir / "trace.json").exists(),
        cards=summary_cards(records, hash_file.read_text().strip() if hash_file.exists() else None),
        plots=_plots(plotted),
        sampled_steps=[
            (step, _sample_views(read_rollouts(run_dir, step), decode, samples_per_step))
            for step in _first_middle_last(rollout_steps(run_dir))
        ],
        last_metrics=_last_values(records),
        config=yaml.safe_dump(read_config(run_dir), sort_keys=False, allow_unicode=True),
    )
    target = run_dir / "report.html"
    write_whole(target, page)
    return target


def _plots(records: Sequence[Record]) -> list[str]:
    """An SVG for each plotted metric of each stage that has it, and one of where the time went."""
    by_stage: dict[str, list[Record]] = {}
    for record in records:
        by_stage.setdefault(record["stage"], []).append(record)
    with matplotlib.rc_context(PLOT_STYLE):
        plots = [
            _plot_metric(name, stage, points)
            for name in _plotted_names(records)
            for stage, of_stage in by_stage.items()
            if (points := [(record["step"], record[name]) for record in of_stage if name in record])
        ]
        for stage, of_stage in by_stage.items():
            plots += [
                _plot_compared(title, lines, stage, of_stage)
                for title, lines in COMPARED.items()
                if any(name in record for record in of_stage for name in lines)
            ]
            if timed := [record for record in of_stage if any(map(is_part_of_step, record))]:
                plots.append(_plot_time(stage, timed))
    return plots


def _plotted_names(records: Sequence[Record]) -> list[str]:
    """In the order of PLOTTED."""
    names = in_order({name for record in records for name in record})
    return sorted((n for n in names if known_name(n) in PLOTTED), key=lambda n: PLOTTED.index(known_name(n)))


def _plot_metric(name: str, stage: str, points: Sequence[tuple[int, float]]) -> str:
    figure, axes = _new_plot(f"{title_of(name)}  ·  {stage}")
    steps, values = zip(*points, strict=True)
    few = len(points) <= 30
    axes.plot(
        steps,
        values,
        color=COLOURS[0],
        linewidth=1.6,
        marker="o" if few else None,
        markersize=3.5,
        alpha=1.0 if few else 0.35,
    )
    if not few:
        axes.plot(steps, _smoothed(values), color=COLOURS[0], linewidth=2.0)
    known = known_name(name)
    if known is not None and METRICS[known].format.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if name == "logprob_diff_max" and max(values) == 0.0:
        axes.set_ylim(-1e-7, 1e-7)
        axes.set_yticks([0.0], ["0 (exact)"])
    return _svg(figure)


def _plot_compared(title: str, lines: Mapping[str, str], stage: str, records: Sequence[Record]) -> str:
    figure, axes = _new_plot(f"{title}  ·  {stage}")
    named = [(name, label) for name, label in lines.items() if any(name in record for record in records)]
    for index, (name, label) in enumerate(named):
        steps, values = zip(*((r["step"], float(r[name])) for r in records if name in r), strict=True)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=label)
    axes.legend(frameon=False, fontsize=8.5, ncols=3, handlelength=1.0, columnspacing=1.2)
    return _svg(figure)


def _plot_time(stage: str, records: Sequence[Record]) -> str:
    figure, axes = _new_plot(f"seconds per step  ·  {stage}")
    names = in_order({name for record in records for name in record if is_part_of_step(name)})
    steps = [record["step"] for record in records]
    parts = [[float(record.get(name, 0.0)) for record in records] for name in names]
    bottoms = [0.0] * len(steps)
    width = min((b - a for a, b in itertools.pairwise(steps) if b > a), default=1)
    for index, (name, seconds) in enumerate(zip(names, parts, strict=True)):
        axes.bar(steps, seconds, width, bottom=bottoms, label=title_of(name), color=COLOURS[index % len(COLOURS)])
        bottoms = [bottom + second for bottom, second in zip(bottoms, seconds, strict=True)]
    axes.set_ylim(0, max(bottoms) * 1.25 or 1.0)
    axes.legend(loc="upper left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.0, columnspacing=1.2)
    return _svg(figure)


def _new_plot(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a tenth of the values, centred, so that it does not lag; what is no number is left out."""
    reach = max(2, len(values) // 20)
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    finite = ([value for value in window if math.isfinite(value)] for window in windows)
    return [statistics.fmean(window) if window else math.nan for window in finite]


def _first_middle_last(steps: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]])) if steps else []


def _first_samples(rows: Iterable[Record], count: int) -> list[Record]:
    """Samples of as many prompts as possible: the first of each prompt, then the second of each, and so on."""
    return sorted(rows, key=lambda row: (row.get("sample_index", 0), row.get("prompt_index", 0)))[:count]


def _sample_views(
    rows: Sequence[Record], decode: Callable[[Sequence[int]], str] | None, count: int
) -> list[dict[str, Any]]:
    """The step's first samples, each with the rewards of its group: the samples of its prompt."""
    groups: dict[Any, list[Record]] = {}
    for row in rows:
        groups.setdefault(row.get("prompt_index"), []).append(row)
    return [_sample_view(row, groups[row.get("prompt_index")], decode) for row in _first_samples(rows, count)]


def _sample_view(row: Record, group: Sequence[Record], decode: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    """One sample as the page shows it."""
    versions = row.get("weight_versions") or [None] * len(row["response_ids"])
    written = row.get("response_mask") or [True] * len(row["response_ids"])
    tokens = [
        {
            "text": decode([token_id]) if decode else str(token_id),
            **(_drawn(position, token_id, logprob, version) if drawn else _given(position, token_id)),
        }
        for position, (token_id, logprob, version, drawn) in enumerate(
            zip(row["response_ids"], row["logprobs"], versions, written, strict=True)
        )
    ]
    total = sum(float(logprob) for logprob, drawn in zip(row["logprobs"], written, strict=True) if drawn)
    return {
        "prompt": decode(row["prompt_ids"]) if decode else " ".join(map(str, row["prompt_ids"])),
        "text": row.get("text", ""),
        "tokens": tokens,
        "as_ids": decode is None,
        "reward": f"{float(row['reward']):.3g}",
        "good": float(row["reward"]) > 0,
        "reference": row.get("reference") or None,
        "advantage": None if row.get("advantage") is None else f"{float(row['advantage']):+.3g}",
        "facts": {
            "group": _group_facts(row, group),
            "problem": row.get("problem_id"),
            "tokens": sum(written),
            "rewards of the turns": ", ".join(f"{reward:.3g}" for reward in row.get("turn_rewards") or []) or None,
            "log-prob": f"{total:.3f}",
            "ended by": row.get("finish_reason"),
            "seed": row.get("seed"),
        },
    }


def _group_facts(row: Record, group: Sequence[Record]) -> str:
    """Which sample of which prompt it is, and how its group did."""
    rewards = [float(other["reward"]) for other in sorted(group, key=lambda other: other.get("sample_index", 0))]
    shown = ", ".join(f"{reward:.3g}" for reward in rewards[:MOST_REWARDS_SHOWN])
    more = ", ..." if len(rewards) > MOST_REWARDS_SHOWN else ""
    which = f"{row.get('prompt_index')}, sample {row.get('sample_index')} of {len(group)}"
    return f"{which}; rewards of the group {shown}{more} (mean {statistics.fmean(rewards):.3g})"


def _drawn(position: int, token_id: int, logprob: float, version: int | None) -> dict[str, Any]:
    """What is said of a token that the policy drew: its log-prob, and how improbable it was (0 to 1)."""
    probability = math.exp(min(0.0, float(logprob)))
    hint = f"token {position}: id {token_id}\nlog-prob {float(logprob):.6f} (p = {probability:.2%})"
    return {
        "hint": hint if version is None else f"{hint}\nweight version {version}",
        "surprise": f"{1 - probability:.3f}",
    }


def _given(position: int, token_id: int) -> dict[str, Any]:
    return {"hint": f"token {position}: id {token_id}\nnot written by the policy", "surprise": None}


def _last_values(records: Sequence[Record]) -> list[tuple[str, str, str, int]]:
    """(stage, title, value, step) of the last record of every metric."""
    last: dict[tuple[str, str], tuple[Any, int]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "stage"):
                last[record["stage"], name] = (value, record["step"])
    rows = []
    for stage in dict.fromkeys(stage for stage, _ in last):
        for name in in_order(name for owner, name in last if owner == stage):
            value, step = last[stage, name]
            shown = format_value(name, value) if isinstance(value, int | float) else str(value)
            part = "time: " if name.startswith(TIME_PREFIX) else ""
            rows.append((stage, part + title_of(name), shown, step))
    return rows
