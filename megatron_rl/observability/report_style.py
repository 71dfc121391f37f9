"""The report's style sheet and its one script (values under the pointer); both go into the page itself."""

CSS = """
:root { color-scheme: light dark; --ink: #16191d; --soft: #5b6470; --faint: #8a939e; --page: #f7f8fa; --card: #ffffff;
  --rule: #e3e6ea;
  --s1: #1f6fd1; --s2: #d2691e; --s3: #15866f; --s4: #8b4bd0; --s5: #b8336a; --s6: #7a6a00;
  --good: #15803d; --bad: #b42318; --goodbg: #e6f4ea; --badbg: #fdecea;
  --v0: #dbeafe; --v1: #fde8d3; --v2: #d5f0e6; --v3: #ece3fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a5adb8; --faint: #7b8491; --page: #111418;
  --card: #1a1e24;
  --rule: #2c323a; --s1: #6aa9f7; --s2: #f0975a; --s3: #4fc7a8; --s4: #b892f0; --s5: #f08ab4; --s6: #cdbb52;
  --good: #6fcf8e; --bad: #f28b82; --goodbg: #16301f; --badbg: #3a1c19;
  --v0: #1d3557; --v1: #4a2f17; --v2: #143d33; --v3: #372a52; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
.sub { color: var(--soft); margin: 0 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(196px, 1fr)); gap: 12px; }
.tile, .chart, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 13px 16px; }
.tile .label { color: var(--soft); font-size: 12.5px; }
.tile .value { font-size: 22px; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .value small { color: var(--faint); font-size: 15px; font-weight: 500; }
.tile .hint { font-size: 12.5px; color: var(--soft); }
.lesson { background: var(--card); border: 1px solid var(--rule); border-left: 4px solid var(--s1); border-radius: 10px;
  padding: 6px 20px; }
.lesson p { margin: 10px 0; max-width: 100ch; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.chart { margin: 0; padding: 14px 16px 8px; position: relative; }
.chart svg { width: 100%; height: auto; display: block; margin-top: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); min-height: 20px; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin: 0 6px 3px 0; }
i.s1 { background: var(--s1); } i.s2 { background: var(--s2); } i.s3 { background: var(--s3); }
i.s4 { background: var(--s4); } i.s5 { background: var(--s5); } i.s6 { background: var(--s6); }
.note { font-size: 12px; color: var(--faint); margin: 2px 0 6px; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick { fill: var(--faint); font-size: 10.5px;
  font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } .raw { stroke-width: 1; opacity: .38; }
path.s1 { stroke: var(--s1); } path.s2 { stroke: var(--s2); } path.s3 { stroke: var(--s3); }
path.s4 { stroke: var(--s4); } path.s5 { stroke: var(--s5); } path.s6 { stroke: var(--s6); }
circle.s1 { fill: var(--s1); } circle.s2 { fill: var(--s2); } circle.s3 { fill: var(--s3); }
circle.s4 { fill: var(--s4); } circle.s5 { fill: var(--s5); } circle.s6 { fill: var(--s6); }
.fill { stroke: none; opacity: .16; } path.fill.s1 { fill: var(--s1); } path.fill.s2 { fill: var(--s2); }
path.fill.s3 { fill: var(--s3); }
.cursor { stroke: var(--faint); stroke-dasharray: 3 3; }
.tip { position: absolute; pointer-events: none; background: var(--ink); color: var(--page); border-radius: 6px;
  padding: 4px 9px;
  font-size: 12px; line-height: 1.4; white-space: nowrap; font-variant-numeric: tabular-nums; z-index: 1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-variant-numeric: tabular-nums; }
.framed { border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
th, td { padding: 8px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 13px; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
.bar { display: inline-block; width: 110px; height: 8px; border-radius: 4px; background: var(--rule); position: relative;
  margin-left: 10px; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--s1); }
.up { color: var(--good); font-weight: 600; } .down { color: var(--bad); font-weight: 600; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 18px; }
.two > div > h3 { margin-bottom: 8px; }
.card { padding: 10px 14px; margin-bottom: 10px; }
.card .head { display: flex; gap: 10px; align-items: baseline; flex-wrap: wrap; font-size: 12.5px; color: var(--soft); }
.chip { border-radius: 5px; padding: 1px 8px; font-weight: 600; font-size: 12px; }
.chip.good { background: var(--goodbg); color: var(--good); } .chip.bad { background: var(--badbg); color: var(--bad); }
pre { margin: 7px 0 2px; font: 13px/1.7 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre .prompt { color: var(--soft); } .v { border-radius: 3px; padding: 1px 0; }
.v0 { background: var(--v0); } .v1 { background: var(--v1); } .v2 { background: var(--v2); } .v3 { background: var(--v3); }
.swatch { border-radius: 3px; padding: 0 5px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 44px; color: var(--faint); font-size: 13px; }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("[data-chart]")) {
  const { unit, series, x } = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const [left, right, width, bottom] = [__LEFT__, __RIGHT__, __WIDTH__, __BOTTOM__];
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  const line = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
  line.setAttribute("class", "cursor"); line.setAttribute("y1", 10); line.setAttribute("y2", bottom);
  line.style.display = "none";
  figure.append(tip);
  const show = v => v === null ? "–" : unit === "%" ? (v * 100).toPrecision(3) + " %" : Number(v.toPrecision(3)) + " " + unit;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    const wanted = x[0] + (at - left) / (width - left - right) * (x[1] - x[0]);
    const nearest = points => points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a);
    const step = nearest(series[0][1])[0];
    const place = left + (x[1] > x[0] ? (step - x[0]) / (x[1] - x[0]) : 0) * (width - left - right);
    line.setAttribute("x1", place); line.setAttribute("x2", place); line.style.display = ""; tip.hidden = false;
    tip.replaceChildren(...["step " + step, ...series.map(([name, points]) => name + ": " + show(nearest(points)[1]))]
      .map(text => Object.assign(document.createElement("div"), { textContent: text })));
    tip.style.left = Math.min(place / width * box.width + 26, figure.clientWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = svg.offsetTop + 4 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; line.style.display = "none"; });
}
"""
