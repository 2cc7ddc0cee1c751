"""The report as one HTML file that needs nothing else: no script, no request, no font.

- everything that comes from the run goes through the template, which escapes it; drawings get numbers only
- the page forbids itself to load or to run anything (Content-Security-Policy), should something slip through
"""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from stages.reporting.charts import BOX_HEIGHT, BOX_WIDTH, HEIGHT, LEFT, WIDTH

TEMPLATE = Path(__file__).with_name("report.html")
ABSURD = 10**18  # of bytes or weights; beyond it numbers are not told exactly
COLORS = 10  # of curves; then they begin anew, dashed


def render(content: dict[str, Any]) -> bytes:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "number": number, "millions": millions, "duration": duration}
    sizes = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "box_width": BOX_WIDTH, "box_height": BOX_HEIGHT}
    template = environment.from_string(TEMPLATE.read_text())
    # The name of the run's folder need not be UTF-8.
    return template.render(**content, **sizes, colors=COLORS).encode(errors="replace")


def picture(content: bytes) -> str:
    """A PNG for `src`."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def size(count: int) -> str:
    """Bytes, for people."""
    value = float(min(count, ABSURD))
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def number(value: float | int | None, digits: int = 4) -> str:
    """A number with separators, or with so many digits behind the point."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def millions(count: int) -> str:
    """Weights, for people; absurd numbers too, which a manifest may hold and a float not."""
    return f"{max(-ABSURD, min(count, ABSURD)) / 1e6:,.2f} M"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
