"""The texts of the page, in English and Chinese, from texts.json: TEXTS[language][key]."""

import json
from collections.abc import Mapping
from pathlib import Path

TEXTS: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))


def language_of(headers: Mapping[str, str]) -> str:
    """The language of a visitor: what the browser asks for first, if it is one of ours, else English."""
    return "zh" if headers.get("accept-language", "").lower().startswith("zh") else "en"
