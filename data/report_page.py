"""What the project's HTML reports share: Jinja2 settings, the style (data/report_style.css) and number formats.

A page is self-contained and opens from disk, without network access.
"""

import math
from pathlib import Path

import jinja2


def page_environment(folder: Path) -> jinja2.Environment:
    """Jinja2 with the templates of `folder`; expressions are escaped, and a missing variable is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": readable_number, "percent": readable_percent}
    return environment


def readable_number(value: str | float | int | None, sign: bool = False) -> str:
    """Floats with three decimals, integers with thousands separators, "–" for None and NaN, text unchanged."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    formatted = f"{value:{'+' if sign else ''},.3f}" if isinstance(value, float) else f"{value:{'+' if sign else ''},}"
    return formatted.replace("-", "−")


def readable_percent(share: float) -> str:
    """A share between 0 and 1 in percent; one that only rounds to zero is "< 0.1 %"."""
    if share < 0.0005:
        return "< 0.1 %" if share else "0 %"
    return f"{100 * share:.1f} %"
