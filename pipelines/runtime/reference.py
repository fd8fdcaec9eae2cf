"""The page of a job in Markdown, made from its docstring and its options: what `--help-all` prints, with links."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from pipelines.runtime.help import Group, Option, of_choice, option_groups, summary

METHOD_PAGE = "train"
"""Job whose page has the options of the methods, which are the same in all."""

SHARED = 10
"""Options from which on those that some choices of a job have in common are told once."""


def reference_page(options: type | Mapping[str, type], name: str, docstring: str) -> str:
    """Return the page of a job.

    Args:
        options: its options class, or several by its first argument.
        name: of the job.
        docstring: of its file: one line, then paragraphs and commands.
    """
    first, _, rest = docstring.strip().partition("\n")
    lines = [f"# {name}", "", first, "", *_paragraphs(rest)]
    lines += ["[What options all jobs take, and how they are written](README.md)", ""]
    if isinstance(options, type):
        return _joined([*lines, "## Options", "", *_sections(option_groups(options))])
    groups = {choice: list(option_groups(cls)) for choice, cls in sorted(options.items())}
    links = ", ".join(f"[`{choice}`](#{choice})" for choice in groups)
    lines += [f"The first argument is one of {links}.", ""]
    elsewhere = (
        set() if name == METHOD_PAGE else {choice for choice, own in groups.items() if any(map(_of_method, own))}
    )
    for choice in elsewhere:
        groups[choice] = [group for group in groups[choice] if not _of_method(group)]
    told: dict[str, set[Option]] = {choice: set() for choice in groups}
    for choices, shared in _shared(groups).items():
        lines += [f"## Options of {'all' if len(choices) == len(groups) else ', '.join(choices)}", ""]
        lines += _sections(_only(groups[choices[0]], shared))
        for choice in choices:
            told[choice] |= shared
    for choice, own in groups.items():
        lines += [f"## {choice}", "", summary(of_choice(options[choice])), ""]
        if choice in elsewhere:
            lines += [f"`--method.…`: as of [{METHOD_PAGE}]({METHOD_PAGE}.md#{choice}).", ""]
        own_options = {option for group in own for option in group.options}
        lines += _sections(_only(own, own_options - told[choice]))
    return _joined(lines)


def _of_method(group: Group) -> bool:
    return group.name.partition(".")[0] == "method"


def _shared(groups: Mapping[str, Sequence[Group]]) -> dict[tuple[str, ...], set[Option]]:
    """Return the options that several choices have in common, with the same text and default, by these choices; only
    where they are `SHARED` and more."""
    of: dict[Option, list[str]] = {}
    for choice, own in groups.items():
        for group in own:
            for option in group.options:
                of.setdefault(option, []).append(choice)
    found: dict[tuple[str, ...], set[Option]] = {}
    for option, choices in of.items():
        found.setdefault(tuple(choices), set()).add(option)
    common = {choices: own for choices, own in found.items() if len(choices) > 1 and len(own) >= SHARED}
    return dict(sorted(common.items(), key=lambda item: -len(item[0])))


def _only(groups: Iterable[Group], kept: Set[Option]) -> list[Group]:
    return [group._replace(options=[option for option in group.options if option in kept]) for group in groups]


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _paragraphs(text: str) -> list[str]:
    """Return paragraphs as they are, and those of commands as blocks of code."""
    lines: list[str] = []
    for paragraph in filter(None, (part.strip("\n") for part in text.split("\n\n"))):
        command = paragraph.startswith(("python ", "unianom ", "ray "))
        lines += ["```", paragraph, "```", ""] if command else [paragraph, ""]
    return lines


def _sections(groups: Iterable[Group]) -> list[str]:
    """Return a table for each group that has options, below its name and what it is."""
    lines: list[str] = []
    for group in groups:
        if not group.options:
            continue
        if group.name:
            lines += [f"### {group.name}", ""]
            lines += [_cell(group.text), ""] if group.text else []
        lines += ["| option | values | default | |", "|---|---|---|---|"]
        lines += [
            f"| `--{option.name}` | {_cell(option.takes)} | {_default(option)} | {_cell(option.text)} |"
            for option in sorted(group.options, key=lambda option: option.default is not None)
        ]
        lines.append("")
    return lines


def _default(option: Option) -> str:
    if option.default is None:
        return "**required**"
    return f"`{_cell(option.default)}`" if option.default else "by the preset or other options"


def _cell(text: str) -> str:
    """Return text that is not taken for Markdown or HTML within a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
