"""Write the tables of settings into docs/*.md, from the docstrings and defaults of the dataclasses: `make docs`.

With --check nothing is written, and the exit code is 1 if a table is not current.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from docstring_parser import parse

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent))  # the project, so that `training` is found

from training.calibration.config import CalibrationConfig  # noqa: E402
from training.config import Config  # noqa: E402
from training.evaluation.config import EvalConfig  # noqa: E402

AnyConfig = type[Config | EvalConfig | CalibrationConfig]
TABLES: dict[str, AnyConfig] = {
    "training.md": Config, "evaluation.md": EvalConfig, "few-steps.md": CalibrationConfig,
}  # fmt: skip
TABLE = re.compile(r"(<!-- begin settings[^\n]*-->\n).*?(<!-- end settings -->)", re.S)


def table(cls: AnyConfig) -> str:
    """One line per field: name, default, meaning."""
    descriptions = {param.arg_name: param.description or "" for param in parse(cls.__doc__ or "").params}
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else formatted(field.default)
        meaning = " ".join(descriptions[field.name].split()).replace("|", "\\|")
        lines.append(f"| `{field.name}` | {default} | {meaning} |")
    return "\n".join(lines)


def formatted(default: Any) -> str:
    if default in (None, ()):
        return ""
    return f"`{','.join(map(str, default))}`" if isinstance(default, tuple) else f"`{default}`"


def main() -> int:
    check = "--check" in sys.argv
    stale = []
    for name, cls in TABLES.items():
        path = DOCS / name
        text = path.read_text(encoding="utf-8")
        parts = TABLE.split(text)  # text, begin, end, text
        if len(parts) != 4:
            raise ValueError(f"{path} has {len(parts) // 3} tables from `begin settings` to `end settings`: give one")
        before, begin, end, after = parts
        current = f"{before}{begin}\n{table(cls)}\n\n{end}{after}"
        if current != text:
            stale.append(name)
            if not check:
                path.write_text(current, encoding="utf-8")
    if stale:
        print(("not current: " if check else "written: ") + ", ".join(stale))
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
