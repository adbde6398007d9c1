"""Write the tables of settings into docs/*.md, from the docstrings and defaults of the dataclasses: `make docs`.

With --check nothing is written; the exit code is 1 if a table is not current.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent))  # the project, so that `training` is found

from training.config import Config  # noqa: E402
from training.evaluation.config import EvalConfig  # noqa: E402

TABLES: dict[str, Any] = {"training.md": Config, "evaluation.md": EvalConfig}


def table(settings: Any) -> str:
    """One line per field: name, type and default, meaning."""
    meanings = field_meanings(settings.__doc__)
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            default = shown(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = shown(field.default_factory())
        else:
            default = "required"
        lines.append(f"| `{field.name}` | {default} | {meanings[field.name]} |")
    return "\n".join(lines)


def shown(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, (list, tuple)):
        return f"`{','.join(map(str, default))}`"
    return f"`{default}`"


def field_meanings(docstring: str) -> dict[str, str]:
    """{name: meaning} from the section "Args:" of a docstring, each meaning on one line."""
    args = docstring.split("Args:\n")[1]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", args, re.M)
    return {name: " ".join(text.split()).replace("|", "\\|") for name, text in entries}


def main() -> int:
    stale = []
    for name, settings in TABLES.items():
        path = DOCS / name
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- begin settings[^\n]*-->\n).*?(<!-- end settings -->)", re.S)
        new, count = pattern.subn(lambda match: f"{match[1]}\n{table(settings)}\n\n{match[2]}", text)  # noqa: B023
        if count != 1:
            raise ValueError(f"{path} has {count} places for the table of settings: it needs one")
        if new != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(("not current: " if "--check" in sys.argv else "written: ") + ", ".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
