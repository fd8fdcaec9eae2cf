"""What a campaign found, as tables and sentences for reports and terminals, from the content of its JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.tuning.statuses import STATUSES
from pipelines.tuning.wording import UNDEFINED, counted, duration, four_digits, in_words

GAIN_COLUMNS = ["category", "common setting", "own setting", "gain", "own trial"]

TOP = 5
"""Settings in tables."""


def section(title: str, content: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, Any]:
    """Return what a report shows of a campaign.

    Args:
        title: its heading.
        content: of the campaign's JSON.
        figures: titles by name of the PNG file beside the section.
    """
    tables = [
        ("Best settings", *setting_table(content)),
        ("Importance of the options", ["option", "R² lost", "sd"], importance_table(content)),
        ("Gain of a setting for each category", GAIN_COLUMNS, gain_table(content)),
        ("Trials without a result", ["trial", "error"], [[row["trial"], row["error"]] for row in content["errors"]]),
    ]
    return {
        "title": title,
        "text": [searched_in_words(content), *left_undone(content)],
        "tables": [{"title": name, "columns": columns, "rows": rows} for name, columns, rows in tables if rows],
        "figures": [{"title": words, "file": file} for file, words in figures.items()],
    }


def setting_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the default and the best settings.

    They stand side by side, since options are many and names long.
    """
    best = content.get("best")
    settings = [best] if best else []
    settings += [setting for setting in content.get("top") or () if not best or not _same(setting, best)]
    settings = settings[:TOP]
    default = content.get("default")
    names = ["best" if number == 0 else str(number + 1) for number in range(len(settings))]
    if default:
        names, settings = ["default", *names], [default, *settings]
    rows = [
        ["trial", *(str(setting.get("trial") or UNDEFINED) for setting in settings)],
        ["objective", *(four_digits(setting["objective"]) for setting in settings)],
    ]
    confirmed = (best or {}).get("confirmed")
    if confirmed is not None:
        value = confirmed.get("objective") if isinstance(confirmed, Mapping) else confirmed
        rows.append(["confirmed", *(four_digits(value) if name == "best" else "" for name in names)])
    for metric in content["objective"]["metrics"]:
        measured = [(setting.get("metrics") or {}).get(metric) for setting in settings]
        if any(value is not None for value in measured):
            rows.append([metric, *map(four_digits, measured)])
    for option in dict.fromkeys(option for setting in settings for option in setting["values"]):
        every = [setting["values"] for setting in settings]
        rows.append([option, *(in_words(own[option]) if option in own else UNDEFINED for own in every)])
    return ["", *names], rows if settings else []


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first.get(key) == second.get(key) for key in ("trial", "values"))


def importance_table(content: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of the importance of options."""
    return [[row["option"], f"{row['importance']:.3f}", f"{row['sd']:.3f}"] for row in content["importance"]]


def gain_table(content: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of `GAIN_COLUMNS`."""
    return [
        [
            row["category"],
            four_digits(row["common"]),
            four_digits(row["own"]),
            f"{row['gain']:+.4f}",
            "" if row["category"] == "mean" else str(row.get("trial") or UNDEFINED),
        ]
        for row in content["category_gain"]
    ]


def searched_in_words(content: Mapping[str, Any]) -> str:
    """Return what was searched for, and how, in words."""
    counts, objective = content["counts"], content["objective"]
    metrics = objective["metrics"]
    weighted = [name if set(metrics.values()) == {1} else f"{weight:g} · {name}" for name, weight in metrics.items()]
    return (
        f"{counted(counts['settings'], 'setting')} of {content['method']} in {counted(counts['trials'], 'trial')} "
        f"({_named(content['search'])}), {duration(content['seconds'])}. Objective: {' + '.join(weighted)} on "
        f"{objective['validation']}."
    )


def _named(search: Any) -> str:
    if isinstance(search, Mapping):
        return ", ".join(f"{key} {in_words(value)}" for key, value in search.items())
    return in_words(search)


def left_undone(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of trial without a full result."""
    counts = content["counts"]
    missing = counts["trials"] - sum(counts.get(status, 0) for status in STATUSES)
    kinds = {
        "stopped early, as others were better at the same progress": counts.get("stopped", 0),
        "failed, so their settings are not among these": counts.get("failed", 0),
        "lost to a crash": counts.get("crashed", 0),
        "not run; the same command continues": missing,
    }
    found = [f"{counted(number, 'trial')} {words}." for words, number in kinds.items() if number > 0]
    gain = content.get("gain")
    if gain:
        low, high = gain["interval"]
        words = (
            f"The best setting has {gain['objective']:+.4f} over the options as given (95 %: {low:+.4f} to {high:+.4f})"
        )
        advice = "." if gain["beyond_chance"] else ", which is not beyond chance: rather keep the options as given."
        found.append(words + advice)
    if not content.get("best"):
        found.append("No setting was measured, so there is no best one.")
    return found
