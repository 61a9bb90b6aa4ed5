"""Writes ``docs/settings.md`` from the schemas: ``python tests/settings_page.py > docs/settings.md``."""

from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.schemas.arguments import Argument, arguments_of
from deltacache.schemas.configs import HeadConfig, TokenizerConfig, WorldConfig
from deltacache.schemas.foresight import ForesightEvaluation, ForesightHeadConfig
from deltacache.schemas.jobs import ExtractionSettings
from deltacache.schemas.prediction import PredictionSettings

KINDS = {
    "extract-features, tokenize": ExtractionSettings,
    "train-tokenizer": TokenizerConfig,
    "train-world": WorldConfig,
    "train-head": HeadConfig,
    "train-foresight-head": ForesightHeadConfig,
    "evaluate": BenchmarkEvaluation,
    "evaluate-foresight": ForesightEvaluation,
    "predict": PredictionSettings,
}


def page() -> str:
    """The page, which a test compares with the one that is there."""
    lines = [
        "# Settings",
        "",
        "Made from the schemas by `python tests/settings_page.py`. Each setting is a flag of the command (`views`:",
        "`--views`), a keyword of the function ([python.md](python.md)) and a key in YAML. `deltacache show-config",
        "COMMAND …` prints what a command would use; `--set KEY=VALUE` of the trainers changes any key of a preset.",
    ]
    for title, kind in KINDS.items():
        lines += ["", f"## {title}", "", "| setting | key in YAML | default | |", "|---|---|---|---|"]
        lines += [_row(each, presets="train" in title) for each in arguments_of(kind).values()]
    return "\n".join(lines) + "\n"


def _row(argument: Argument, *, presets: bool) -> str:
    keys = ", ".join(f"`{'.'.join(path)}`" for path in argument.paths)
    own = "" if argument.default is None else argument.default
    default = argument.flag.default or ("the preset's" if presets else own)
    bounds = [f"at least {argument.least:g}"] if argument.least is not None else []
    bounds += [f"at most {argument.most:g}"] if argument.most is not None else []
    text = argument.help + (f" ({', '.join(bounds)})" if bounds else "")
    return f"| `{argument.name}` | {keys} | {default} | {text} |".replace("()", "")


if __name__ == "__main__":
    print(page(), end="")
