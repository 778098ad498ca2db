"""The results as a page (Markdown) and as pictures (SVG). Formats what summary.py computed."""

import html
import os
import time

from . import summary
from .rounds import cost_unit


def section(workload, relays, runs, facts):
    """One workload as it is kept from run to run: its lines, and the ratios that pictures show."""
    ratios = {relay: summary.ratios(runs, relays[0], relay, summary.cost) for relay in relays[1:]}
    return {
        "title": workload.title,
        "facts": facts,
        "lines": [*table(workload, relays, runs), "", *thrown_out(runs)],
        "unit": workload.unit,
        "ratios": {relay: [r.least, r.median, r.most] for relay, r in ratios.items() if r},
    }


def special_section(title, lines, facts):
    """The same of a workload that is measured in a way of its own."""
    return {"title": title, "facts": facts, "lines": lines, "unit": None, "ratios": {}}


def markdown(sections, pictures):
    """bench/RESULTS.md: every workload with its table, when and where it was measured, and what was
    thrown out. `sections` by workload name, in the order in which they are to stand."""
    lines = ["# Measured next to other relays", ""]
    lines += [
        "`bench/compare` writes this page and renews the sections that it measures: run it again rather than",
        "editing it. The relays run on one core, load and backends on the other, taking turns within each round.",
        "CPU is the time of all of a relay's threads over the measured window. A ratio is taken within a round,",
        "ours over theirs: below 1 we are cheaper. Numbers in a cell are the median (least to most) of the kept",
        "runs.",
        "",
    ]
    lines += [f"![{title}]({path})" for title, path in pictures]
    for name, part in sections.items():
        lines += ["", f"## {part['title']}", "", f"`--workloads {name}`, {part['facts']}", "", *part["lines"]]
    return "\n".join(lines) + "\n"


def table(workload, relays, runs):
    """One workload as a Markdown table."""
    unit, divisor = cost_unit(workload)
    rate_name, rate_format = ("GB/s", "{:.2f}") if workload.unit == "GB" else ("requests/s", "{:.0f}")
    rows = [["relay", f"CPU {unit}", "ours / this", rate_name, "p50 us", "p99 us", "p99.9 us", "kept"]]
    if workload.beside:
        rows[0] += ["p99 alone us", "p99 / alone"]
    ours = relays[0]
    for relay in relays:
        cost = summary.of(runs, relay, summary.cost)
        ratio = summary.ratios(runs, ours, relay, summary.cost) if relay != ours else None
        total = sum(1 for run in runs if run.relay == relay)
        rows.append([
            relay,
            cell(cost, "{:.2f}", divisor),
            cell(ratio, "{:.2f}"),
            cell(summary.of(runs, relay, summary.rate), rate_format),
            *(short(summary.of(runs, relay, summary.latency(name))) for name in ("p50", "p99", "p99_9")),
            f"{len(summary.kept(runs, relay))} of {total}",
        ])
        if workload.beside:
            rows[-1] += [
                short(summary.of(runs, relay, summary.calm_p99)),
                cell(summary.of(runs, relay, summary.over_calm), "{:.2f}"),
            ]
    return [
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
        *("| " + " | ".join(row) + " |" for row in rows[1:]),
    ]


def cell(spread, form, divisor=1.0):
    if spread is None:
        return "-"
    least, median, most = (form.format(v / divisor) for v in (spread.least, spread.median, spread.most))
    return f"**{median}** ({least} to {most})"


def short(spread):
    return "-" if spread is None else f"{spread.median:.0f}"


def thrown_out(runs):
    lost = [run for run in runs if run.thrown_out]
    if not lost:
        return ["No run was thrown out."]
    reasons = [f"round {run.round} {run.relay}: {run.thrown_out}" for run in lost]
    return [f"Thrown out, {len(lost)} of {len(runs)} runs:", "", *(f"- {reason}" for reason in reasons)]


def ratio_picture(sections, unit):
    """Bars of ours / theirs per workload and peer, with the least and the most as whiskers."""
    bars = [
        (f"{name} / {relay}", ratio)
        for name, part in sections.items()
        if part["unit"] == unit
        for relay, ratio in part["ratios"].items()
    ]
    if not bars:
        return None
    return _bars(bars, "CPU of ours / theirs, same core, same round (below 1 is cheaper)")


def _bars(bars, title):
    left, width, step = 210, 420, 22
    longest = max(1.2, max(most for _, (_, _, most) in bars) * 1.05)
    x = lambda value: left + width * value / longest
    height = 50 + step * len(bars)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    for place, (name, (least, median, most)) in enumerate(bars):
        y = 34 + step * place
        colour = "#3a7d44" if median <= 1 else "#b5473c"
        out += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{x(median) - left:.1f}" height="{step - 8}" fill="{colour}"/>',
            f'<line x1="{x(least):.1f}" x2="{x(most):.1f}" y1="{y + 7}" y2="{y + 7}" stroke="black"/>',
            f'<text x="{x(most) + 6:.1f}" y="{y + 12}">{median:.2f}</text>',
        ]
    one = x(1.0)
    out += [
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="28" y2="{height - 10}" stroke="gray" stroke-dasharray="4 3"/>',
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def facts(versions, settings):
    """What the reader needs to judge or repeat the run, as one sentence."""
    model = "?"
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    told = [
        f"measured {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} on loopback",
        f"{model}, {os.cpu_count()} cores, Linux {os.uname().release}",
        *versions.values(),
        f"{settings.rounds} rounds, each run {settings.warmup} s of warm-up and {settings.duration} s measured",
        f"thrown out when others took more than {settings.others_max:.0%} or the host more than "
        f"{settings.steal_max:.0%} of either core",
    ]
    return "; ".join(told) + "."
