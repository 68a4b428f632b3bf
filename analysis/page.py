"""The page: sections poured into one HTML file that opens anywhere without a network.

The file carries its own content security policy: only the scripts written here may run, by their hashes, and nothing
may be loaded, so that even text which slipped past the escaping could neither run nor call home.

plotly is most of a small report, figures and their tables most of a large one: both go in as base64 of gzip, which the
page unpacks. plotly's script is then put into the page as an element with text, which the policy lets run by its hash.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.figures import Section, grouped, pack
from analysis.palette import expert_colours
from analysis.tokens import readable

TEMPLATES = Path(__file__).parent / "templates"
LOOSE = re.compile(r"(?<=\d) (?=%)|(?<=\b[pq]) (?=[<=] \d)|(?<=\b[pq] [<=]) (?=\d)")  # blanks at which no line may end
SCRIPTS = (
    "report.js",
    "matrices.js",
    "journeys.js",
    "journeys_text.js",
    "journeys_grid.js",
    "journeys_paths.js",
    "journeys_compare.js",
    "journeys_search.js",
    "journeys_control.js",
)


def page_data(sections: Sequence[Section], num_experts: int) -> dict[str, Any]:
    """Return what the page's scripts need at once: every section's own data, and the colours."""
    data: dict[str, Any] = {"colours": {mode: expert_colours(num_experts, mode) for mode in ("light", "dark")}}
    for section in sections:
        data |= section.data
    return data


def figure_data(sections: Sequence[Section]) -> dict[str, Any]:
    """Return what the figures are drawn from, and the tables behind them, by key."""
    figures = [figure for section in sections for figure in section.figures]
    return {
        "figures": {figure.key: figure.spec for figure in figures},
        "tables": {figure.key: {"columns": figure.columns, "rows": figure.rows} for figure in figures},
    }


def numbers(sections: Sequence[Section]) -> dict[str, Any]:
    """Return every number that the page shows, ready for JSON."""
    found: dict[str, Any] = {
        "sections": {
            section.key: {
                "title": section.title,
                "lead": section.lead,
                "figures": [figure.key for figure in section.figures],
                "notices": [notice.text for notice in section.notices],
            }
            for section in sections
        },
        "figures": {
            figure.key: {
                "title": figure.title,
                "sentence": figure.sentence,
                "columns": figure.columns,
                "rows": figure.rows,
            }
            for section in sections
            for figure in section.figures
        },
    }
    for section in sections:
        found |= section.numbers
    return found


def render(sections: Sequence[Section], run: Mapping[str, Any], template: str = "report.html.j2") -> str:
    """Fill the page's template; `run` describes the traces, as the overview's numbers do.

    The data of the scripts goes in as JSON in which every `<` is written `\\u003c`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = lambda value: readable(str(value))
    environment.filters["grouped"] = grouped
    environment.filters["tied"] = tied
    plotly, *scripts = [get_plotlyjs(), *((TEMPLATES / name).read_text("utf-8") for name in SCRIPTS)]
    scripts = [script.replace("\r\n", "\n").replace("</script", "<\\/script") for script in scripts]
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in (plotly, *scripts)
    ]
    return environment.get_template(template).render(
        sections=sections,
        run=run,
        scripts=[Markup(script) for script in scripts],  # our own files, never data
        plotly=pack(plotly.encode()),
        figures=pack(embedded_json(figure_data(sections)).encode()),
        script_policy=" ".join(f"'sha256-{digest}'" for digest in digests),
        style=Markup((TEMPLATES / "report.css").read_text("utf-8")),
        data=Markup(embedded_json(page_data(sections, run["num_experts"]))),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def tied(sentence: str) -> str:
    """Return a sentence in which no line ends between a number and its `%`, nor within `q < 0.05`."""
    return LOOSE.sub("\N{NO-BREAK SPACE}", sentence)


def embedded_json(data: Any) -> str:
    """Return JSON that no HTML parser can leave: `<`, `>` and `&` are written as escapes; NaN is refused."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
