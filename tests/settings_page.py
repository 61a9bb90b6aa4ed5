"""Writes ``docs/settings.md`` from the commands' schemas: ``python tests/settings_page.py > docs/settings.md``."""

from deltacache.cli import app
from deltacache.cli_options import SettingOption, settings_of


def page() -> str:
    """The page, which a test compares with the one that is there."""
    lines = [
        "# Settings",
        "",
        "Made from the schemas by `python tests/settings_page.py`. Each setting is a flag of the command, a keyword of",
        "the function ([python.md](python.md)) and a key in YAML, named behind the keyword where it is another.",
        "`deltacache show-config COMMAND …` prints what a command would use, without running it; `--set KEY=VALUE`",
        "changes any key of a preset.",
    ]
    for command, settings in settings_of(app).items():
        lines += [
            "",
            f"## {command}",
            "",
            "| flag | keyword, or key in YAML | default | |",
            "|---|---|---|---|",
        ]
        lines += [_row(each) for each in settings.values()]
    return "\n".join(lines) + "\n"


def _row(shown: SettingOption) -> str:
    argument = shown.argument
    keys = ", ".join(f"`{'.'.join(path)}`" for path in argument.paths)
    names = keys if keys == f"`{argument.name}`" else f"`{argument.name}`; {keys}"
    bounds = [f"at least {argument.least:g}"] if argument.least is not None else []
    bounds += [f"at most {argument.most:g}"] if argument.most is not None else []
    text = argument.help + (f" ({', '.join(bounds)})" if bounds else "")
    return f"| `{shown.option}` | {names} | {shown.default} | {text} |".replace("|  |", "| |")


if __name__ == "__main__":
    print(page(), end="")
