"""The A/B report as a page: one file, nothing loaded from elsewhere, readable on a phone and in the dark."""

import html

from .report import FORMS, HEADINGS, TITLES, cells, differences, notes

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #595959; --line: #c8c8c8; --mark: #0b57a8;
        --band: #5b93cf }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #161616; --soft: #b4b4b4; --line: #4a4a4a; --mark: #8cc0ff; --band: #4a7fbc } }
* { box-sizing: border-box }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
       margin: 0 auto; padding: 1rem }
h1 { font-size: 1.4rem; line-height: 1.25 } h2 { font-size: 1.1rem; margin: 1.75rem 0 .5rem }
.says { font-size: 1.1rem; border-left: 4px solid var(--mark); padding-left: .75rem }
.soft { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .25rem; border-bottom: 1px solid var(--line); text-align: right }
td { overflow-wrap: break-word; max-width: 8rem } @media (max-width: 30rem) { table { font-size: .9rem } }
th:first-child { text-align: left; font-weight: 400; color: var(--soft) } thead th { font-weight: 600 }
dl { margin: 0 } dt { font-weight: 600; margin-top: .75rem } dd { margin: 0 }
svg { display: block; width: 100%; height: 28px } ul { padding-left: 1.2rem }
"""

ARM_NAMES = {"fine_tuned": "adapter", "ab_test_base": "test: base", "ab_test_fine_tuned": "test: adapter"}


def as_html(report: dict) -> str:
    """Return the report as a whole HTML page; arms are columns, so that it fits a screen of 390 pixels."""
    text, names = html.escape, list(report["arms"])
    columns = [[arm, *cells(report["arms"][arm])] for arm in names]
    rows = [
        f"<tr><th scope='row'>{text(HEADINGS[at])}</th>" + "".join(f"<td>{text(c[at])}</td>" for c in columns) + "</tr>"
        for at in range(1, len(HEADINGS))
    ]
    heads = "".join(f"<th scope='col'>{text(ARM_NAMES.get(name, name))}</th>" for name in names)
    period = f"the last {report['days']:g} days" if report["days"] else "all jobs"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>Adapter and base in service</title><style>{STYLE}</style></head><body><main>",
        f'<h1>Adapter and base in service</h1><p class="says">{text(report["sentence"])}</p>',
    ]
    if report["test"]:
        parts.append(f"<h2>Adapter minus base</h2><p class='soft'>{_about(report['test'])}</p><dl>")
        for name, (title, words) in zip(TITLES, differences(report), strict=True):
            bar = _bar(name, report["test"]["differences"][name])
            parts.append(f"<dt>{text(title)}</dt><dd>{text(words)}{bar}</dd>")
        parts.append("</dl>")
    if names:
        parts.append(f"<h2>Figures of {text(period)}</h2><table><thead><tr><td></td>{heads}</tr></thead><tbody>")
        parts.append("\n".join(rows) + "</tbody></table>")
    parts.append("<ul>" + "".join(f"<li>{text(line)}</li>" for line in notes(report)) + "</ul></main></body></html>")
    return "\n".join(parts)


def _about(test: dict) -> str:
    share = f"; {test['share']:.0%} of jobs go to the adapter now" if test["share"] is not None else ""
    versions = f" ({', '.join(test['versions'])})" if test["versions"] else ""
    return html.escape(f"{test['jobs']:,} jobs since {test['since'] or 'the beginning'}{versions}{share}.")


def _bar(name: str, found: dict) -> str:
    """Return a drawing of an interval beside zero; nothing where there is no interval."""
    if found["low"] is None:
        return ""
    reach = max(abs(found["low"]), abs(found["high"])) * 1.15

    def at(value: float) -> float:
        return 150 + 150 * value / reach

    low, high, value = (at(found[key]) for key in ("low", "high", "value"))
    words = f"{TITLES[name]}: {FORMS[name].format(found['low'])} to {FORMS[name].format(found['high'])}, and zero"
    return (
        f'<svg viewBox="0 0 300 28" preserveAspectRatio="none" role="img" aria-label="{html.escape(words)}">'
        f'<rect x="{low:.1f}" y="9" width="{max(high - low, 1):.1f}" height="10" fill="var(--band)"/>'
        f'<rect x="149.5" y="2" width="1" height="24" fill="var(--ink)"/>'
        f'<rect x="{value - 1.5:.1f}" y="6" width="3" height="16" fill="var(--ink)"/></svg>'
    )
