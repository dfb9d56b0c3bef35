"""The picture as one self-contained HTML page."""

from __future__ import annotations

import html
import string

from freedave.picture.colour import MASKED, PROMPT_INK, SCALE, hex_of, ink_on, shade
from freedave.picture.content import DISCREET, LEGEND, Picture, Trace, cost, headline, label, plural, spoken

_PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { margin: 2rem auto; padding: 0 1.5rem; max-width: 78rem; background: #fff; color: #1a1a1a;
       font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .3rem; }
.about { color: #555; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
.grid { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.replay { display: flex; gap: .8rem; align-items: center; margin: 0 0 1.2rem; }
.replay[hidden] { display: none; }
.replay input { flex: 1; max-width: 30rem; accent-color: #33638d; }
.replay output { min-width: 12rem; font-variant-numeric: tabular-nums; }
.traces { display: flex; flex-wrap: wrap; gap: 2rem 2.5rem; }
figure { margin: 0; flex: 1 1 30rem; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin-bottom: .4rem; }
.grid { display: flex; flex-wrap: wrap; gap: 2px .5rem; }
.block { display: flex; flex-wrap: wrap; gap: 2px; }
.cell { position: relative; box-sizing: border-box; min-width: 1.85rem; height: 2.05rem; padding: .1rem .35rem 0;
        border-radius: 2px; text-align: center; font-size: 1rem; line-height: 1.15rem; white-space: pre;
        cursor: default; }
.cell small { display: block; font: .6rem/.7rem system-ui, "DejaVu Sans", sans-serif; opacity: .85; }
.cell .quiet { opacity: .55; }
.cell.prompt { background: $masked; color: $prompt_ink; }
.cell.masked { background: $masked !important; color: transparent !important; }
.cell[data-tip]:hover { outline: 2px solid #111; z-index: 1; }
.cell[data-tip]:hover::after { content: attr(data-tip); position: absolute; left: 50%; bottom: calc(100% + 5px);
        transform: translateX(-50%); padding: .2rem .5rem; border-radius: 4px; background: #111; color: #fff;
        font: .8rem/1.3 system-ui, "DejaVu Sans", sans-serif; z-index: 2; }
.bars { display: block; width: 100%; max-width: 40rem; height: auto; margin-top: 1rem;
        font: 11px system-ui, "DejaVu Sans", sans-serif; }
.bars rect:hover { stroke: #111; stroke-width: 1.5; }
.scale { display: flex; gap: .6rem; align-items: center; margin: 1.4rem 0; color: #333; font-size: .9rem; }
.scale i { flex: 1; max-width: 30rem; height: .8rem; border-radius: 2px;
           background: linear-gradient(to right, $gradient); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .1rem .9rem .1rem 0; text-align: left; }
th { border-bottom: 1px solid #999; }
</style>
</head>
<body>
<main>
<h1>$headline</h1>
<p class="about">$about</p>
<div class="replay" hidden>
<button type="button">Replay</button>
<input type="range" min="0" max="$last" value="$last" aria-label="show the text after this many forwards">
<output></output>
</div>
<div class="traces">
$figures
</div>
<div class="scale"><span>$legend</span><span>1</span><i></i><span>$last</span></div>
<details><summary>The same as a table</summary>
$table
</details>
</main>
<script>
const replay = document.querySelector(".replay"), slider = replay.querySelector("input");
const button = replay.querySelector("button"), output = replay.querySelector("output");
const parts = document.querySelectorAll("[data-forward]");
let timer = null;
function show() {
  const count = Number(slider.value);
  for (const part of parts) {
    const hide = Number(part.dataset.forward) > count;
    if (part.classList.contains("cell")) part.classList.toggle("masked", hide);
    else part.style.visibility = hide ? "hidden" : "visible";
  }
  output.textContent = "after " + count + (count === 1 ? " forward" : " forwards");
}
function stop() { clearInterval(timer); timer = null; button.textContent = "Replay"; }
slider.addEventListener("input", () => { stop(); show(); });
button.addEventListener("click", () => {
  if (timer) return stop();
  if (slider.value === slider.max) slider.value = 0;
  button.textContent = "Pause";
  show();
  timer = setInterval(() => { slider.stepUp(); show(); if (slider.value === slider.max) stop(); }, 120);
});
replay.hidden = false;
show();
</script>
</body>
</html>
""")


def html_page(picture: Picture) -> str:
    return _PAGE.substitute(
        title=html.escape(picture.title or "decode order"),
        headline=html.escape(headline(picture.traces)),
        about=html.escape(picture.about),
        legend=LEGEND,
        masked=MASKED,
        prompt_ink=PROMPT_INK,
        last=picture.last_forward + 1,
        gradient=", ".join(SCALE),
        figures="\n".join(_html_figure(picture, trace) for trace in picture.traces),
        table=_html_table(picture),
    )


def _html_figure(picture: Picture, trace: Trace) -> str:
    cells = "\n".join(
        '<div class="block">' + "".join(_html_cell(picture, trace, position) for position in block) + "</div>"
        for block in picture.blocks()
    )
    name = html.escape(trace.name)
    bars = _html_bars(trace, picture.last_forward + 1, picture.most_accepted)
    return (
        f'<figure aria-label="decode order, {name}">\n'
        f"<figcaption><b>{name}</b> <span>{cost(trace)}</span></figcaption>\n"
        f'<div class="grid">\n{cells}\n</div>\n{bars}\n</figure>'
    )


def _html_cell(picture: Picture, trace: Trace, position: int) -> str:
    token = picture.token(trace, position)
    text = html.escape(label(token))
    if position < 0:
        return f'<span class="cell prompt" data-tip="{html.escape(spoken(token))} · prompt">{text}</span>'
    forward = trace.forwards[position]
    if forward < 0:
        return '<span class="cell masked"></span>'
    if set(label(token)) <= DISCREET:
        text = f'<span class="quiet">{text}</span>'
    colour = shade(forward, picture.last_forward)
    step = trace.steps[position]
    tip = f"{spoken(token)} · position {position + 1} · forward {forward + 1} · static step {step + 1}"
    return (
        f'<span class="cell" style="background:{hex_of(colour)};color:{ink_on(colour)}" data-forward="{forward + 1}" '
        f'data-tip="{html.escape(tip)}">{text}<small>{forward + 1}</small></span>'
    )


def _html_bars(trace: Trace, last: int, tallest: int) -> str:
    """Steps accepted by each forward, as inline SVG; a title on every bar is its tooltip."""
    left, top, plot_width, plot_height = 28, 22, 560, 90
    pitch = plot_width / last
    scale = plot_height / tallest
    bottom = top + plot_height
    bars = "".join(
        f'<rect x="{left + i * pitch:.1f}" y="{bottom - count * scale:.1f}" width="{max(pitch * 0.86, 0.8):.1f}" '
        f'height="{count * scale:.1f}" fill="{hex_of(shade(i, last - 1))}" data-forward="{i + 1}">'
        f"<title>forward {i + 1}: {plural(count, 'static step')}</title></rect>"
        for i, count in enumerate(trace.accepted)
    )
    ticks = "".join(
        f'<text x="{left - 6}" y="{bottom - value * scale + 4:.1f}" text-anchor="end">{value}</text>'
        for value in sorted({0, (tallest + 1) // 2, tallest})
    )
    if trace.num_forwards < 0.7 * last:
        ticks += (
            f'<text x="{left + (trace.num_forwards + 1) * pitch:.1f}" y="{top + plot_height / 2}">'
            f"finished after {plural(trace.num_forwards, 'forward')}</text>"
        )
    ticks += "".join(
        f'<text x="{left + (number - 0.57) * pitch:.1f}" y="{bottom + 14}" text-anchor="middle">{number}</text>'
        for number in sorted({1, last} | ({trace.num_forwards} if 0.05 < trace.num_forwards / last < 0.95 else set()))
    )
    return (
        f'<svg class="bars" viewBox="0 0 {left + plot_width + 8} {bottom + 32}" role="img" '
        f'aria-label="static steps accepted by each of {trace.num_forwards} forwards">'
        f'<text x="{left}" y="12" fill="#333">static steps accepted by each forward</text>'
        f'<path d="M{left - 2} {top}V{bottom}H{left + plot_width}" fill="none" stroke="#999"/>'
        f'<g fill="#333">{ticks}'
        f'<text x="{left + plot_width / 2}" y="{bottom + 28}" text-anchor="middle">forward</text></g>'
        f"{bars}</svg>"
    )


def _html_table(picture: Picture) -> str:
    names = [html.escape(trace.name) for trace in picture.traces]
    head = "".join(f"<th>{name}: token</th><th>step</th><th>forward</th>" for name in names)
    rows = "\n".join(
        f"<tr><td>{position + 1}</td>{''.join(_html_entry(trace, position) for trace in picture.traces)}</tr>"
        for block in picture.blocks()
        for position in block
        if position >= 0
    )
    return f"<table><thead><tr><th>position</th>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _html_entry(trace: Trace, position: int) -> str:
    if trace.steps[position] < 0:
        return "<td>-</td>" * 3
    token = html.escape(spoken(trace.tokens[position]))
    return f"<td>{token}</td><td>{trace.steps[position] + 1}</td><td>{trace.forwards[position] + 1}</td>"
