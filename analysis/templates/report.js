/* Draws the figures in the colours of the page, fills tables when they are opened, and steps through the transitions. */
"use strict";

window.addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
window.addEventListener("unhandledrejection", (event) => { document.documentElement.dataset.error = String(event.reason); });

const report = JSON.parse(document.getElementById("report-data").textContent);
report.dark = window.matchMedia("(prefers-color-scheme: dark)");
report.printing = false;
report.mode = () => (report.dark.matches && !report.printing ? "dark" : "light");
report.variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* Bytes of a base64 string of gzip data. */
report.unpack = async (packed) => {
  const text = atob(packed), bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

report.unpackText = async (id) => {
  const place = document.getElementById(id), packed = place.textContent;
  place.remove();
  return new TextDecoder().decode(await report.unpack(packed));
};

report.element = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

/* How many decimals a column of numbers needs, so that its points stand below each other; -1 leaves them as they are. */
report.decimals = (rows, column) => {
  const texts = rows.map((row) => row[column]).filter((value) => typeof value === "number").map(String);
  return texts.some((text) => text.includes("e")) ? -1 : Math.max(-1, ...texts.map((text) => text.split(".")[1]?.length ?? 0));
};

report.table = (columns, rows) => {
  const decimals = columns.map((_, column) => report.decimals(rows, column));
  const written = (value, column) => (value === null ? "–" : typeof value === "number" && decimals[column] >= 0 ? value.toFixed(decimals[column]) : String(value));
  const table = report.element("table", {},
    report.element("thead", {}, report.element("tr", {}, ...columns.map((name) => report.element("th", { scope: "col" }, name)))),
    report.element("tbody", {}, ...rows.map((row) => report.element("tr", {}, ...row.map((value, column) => report.element("td", {}, written(value, column)))))));
  return report.element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers" }, table);
};

/* --- figures --- */

const setPath = (object, path, value) => {
  const names = path.split(".");
  const last = names.pop();
  for (const name of names) object = object[name] ??= {};
  object[last] = value;
};

const themed = (spec) => {
  const { data, layout } = structuredClone(spec);
  const ink = report.variable("--ink"), soft = report.variable("--soft"), rule = report.variable("--rule");
  if (report.mode() === "dark") {
    for (const part of [...data, layout]) for (const [path, value] of Object.entries(part.meta?.dark ?? {})) setPath(part, path, value);
  }
  const bar = { thickness: 10, outlinewidth: 0, tickfont: { color: soft, size: 12 }, xpad: 14, ...(layout.coloraxis?.colorbar ?? {}) };
  if (layout.coloraxis) layout.coloraxis.colorbar = bar;
  for (const trace of data) {
    if (trace.type === "heatmap" && !trace.coloraxis) trace.colorbar = { ...bar, ...(trace.colorbar ?? {}) };
    if (trace.texttemplate) trace.textfont = { size: 12 };
  }
  for (const [name, axis] of Object.entries(layout)) {
    if (!/^[xy]axis/.test(name)) continue;
    Object.assign(axis, { automargin: axis.automargin ?? name === "yaxis", gridcolor: rule, linecolor: rule, zerolinecolor: report.variable("--faint"), fixedrange: true, tickfont: { color: soft, size: 12 } });
    axis.title = { standoff: 8, ...axis.title, font: { color: soft, size: 13 } };
  }
  for (const note of layout.annotations ?? []) note.font = { color: ink, size: 13 };
  layout.legend = { font: { color: ink, size: 13 }, bgcolor: "rgba(0,0,0,0)", itemclick: "toggle", ...(layout.legend ?? {}) };
  return {
    data,
    layout: {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: { family: report.variable("--sans"), color: ink, size: 13 },
      hoverlabel: { bgcolor: report.variable("--raised"), bordercolor: rule, font: { family: report.variable("--sans"), color: ink, size: 13 } },
    },
  };
};

/* Figures are drawn when they come near the window, so that the page opens at once however many there are; `draw` brings
   one up to date that has been drawn. On paper all of them are. */
report.drawn = new Set();

const PAPER_WIDTH = 680; // px, of A4 and of Letter without their margins
const PAPER_HEIGHT = 620; // px, that leave room for a section's heading and a figure's sentence on the same page
const BAR_WIDTH = 85; // px, of a colour bar with its labels
const LETTER = 7.3, LEGEND_MARK = 50, LEGEND_ROW = 19; // px, roughly
const SMALLEST_TEXT = 36; // px of a heat map's cell that has room for its number

/* What depends on the width: no more numbers on an axis than have room, titles of panels that end where the next begins,
   and height for every row of the legend. */
const fitTo = (width, { data, layout }) => {
  const names = (layout.yaxis?.type === "category" ? data.flatMap((trace) => trace.y) : []).map((name) => String(name).length);
  const bar = layout.coloraxis || data.some((trace) => trace.type === "heatmap" && trace.showscale !== false);
  const inner = width - Math.max(layout.margin.l, 7 * Math.max(0, ...names)) - layout.margin.r - (bar ? BAR_WIDTH : 0);
  const share = ({ domain = [0, 1] } = {}) => inner * (domain[1] - domain[0]);
  for (const [name, axis] of Object.entries(layout)) {
    if (!/^xaxis/.test(name) || axis.ticktext || !(axis.tickvals?.length > 4)) continue;
    const room = share(axis) / (LETTER * String(axis.tickvals.at(-1)).length + 5);
    const every = [1, 2, 4, 8, 16, 32, 64].find((each) => axis.tickvals.length / each <= room) ?? 128;
    axis.tickvals = axis.tickvals.filter((_, place) => place % every === 0);
  }
  for (const note of layout.annotations ?? []) note.width = share(layout.xaxis);
  const entries = data.filter((trace) => trace.name && (trace.showlegend ?? true)).map((trace) => trace.name.length * LETTER + LEGEND_MARK);
  if (layout.showlegend === false || entries.length < 2 || entries.reduce((sum, each) => sum + each) <= inner) return;
  layout.height += LEGEND_ROW * (Math.ceil(entries.length / Math.max(1, Math.floor(inner / Math.max(...entries)))) - 1);
};

const drawNow = (key) => {
  report.drawn.add(key);
  if (!window.Plotly) return undefined; // still being unpacked
  const place = document.getElementById(`plot-${key}`), { data, layout } = themed(report.figures[key]);
  if (report.printing) {
    layout.width = Math.min(PAPER_WIDTH, parseFloat(place.style.maxWidth) || PAPER_WIDTH);
    if (layout.height > PAPER_HEIGHT) {
      layout.height = PAPER_HEIGHT;
      for (const [name, axis] of Object.entries(layout)) if (/^xaxis/.test(name) && !axis.title.text) axis.showticklabels = false; // rows of panels move together
    }
  }
  fitTo(layout.width ?? place.clientWidth, { data, layout });
  for (const trace of data) {
    if (trace.type === "heatmap" && trace.texttemplate && ((layout.width ?? place.clientWidth) - 110) / trace.z[0].length < SMALLEST_TEXT) delete trace.texttemplate;
  }
  return Plotly.react(place, data, layout, { displayModeBar: false, responsive: true }).then(() => {
    // the place itself is the image, with its name; plotly measures text in the tester, out of sight
    for (const part of [...place.children, document.getElementById("js-plotly-tester")]) part?.setAttribute("aria-hidden", "true");
  });
};
report.draw = (key) => (report.drawn.has(key) ? drawNow(key) : undefined);

const places = [...document.querySelectorAll("[data-figure]")];
const nearby = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    nearby.unobserve(target);
    drawNow(target.dataset.figure);
  }
}, { rootMargin: "600px 0px" });
const startFigures = () => {
  for (const place of places) {
    place.style.minHeight = `${report.figures[place.dataset.figure].layout.height ?? 450}px`; // 450 px is plotly's own
    nearby.observe(place);
  }
};

report.fillTable = (details) => {
  if (details.querySelector(".scroll")) return;
  const { columns, rows } = report.tables[details.dataset.table];
  details.append(report.table(columns, rows));
};
for (const details of document.querySelectorAll("[data-table]")) details.addEventListener("toggle", () => details.open && report.fillTable(details));

/* --- the page as a whole --- */

report.redraw = () => { report.drawn.forEach(drawNow); report.journeysChanged?.(); };
report.dark.addEventListener("change", report.redraw);
let drawnWidth = window.innerWidth, resized = 0;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    if (window.innerWidth === drawnWidth || report.printing) return; // plotly has scaled what it drew; its labels are another matter
    drawnWidth = window.innerWidth;
    report.drawn.forEach(drawNow);
  }, 200);
});
window.addEventListener("beforeprint", () => {
  report.printing = true;
  document.documentElement.dataset.printing = "true"; // the colours of paper, which no media query gives scripts yet
  for (const place of places) report.drawn.add(place.dataset.figure);
  report.redraw();
});
window.addEventListener("afterprint", () => {
  report.printing = false;
  delete document.documentElement.dataset.printing;
  report.redraw();
});

const links = [...document.querySelectorAll("nav.contents a")];
const markSection = () => {
  const above = links.filter((link) => document.querySelector(link.getAttribute("href")).getBoundingClientRect().top < window.innerHeight * 0.35);
  for (const link of links) {
    if (link === above.at(-1)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
};
window.addEventListener("scroll", markSection, { passive: true });

/* plotly is put into the page as a script with text, which the page's policy knows by its hash. */
const startPlotly = async () => document.head.append(report.element("script", {}, await report.unpackText("report-plotly")));

/* Scripts of single sections add what has to run before the first drawing. */
report.starting = [];
report.ready = new Promise((go) => document.addEventListener("DOMContentLoaded", go, { once: true })).then(async () => {
  markSection();
  const plotly = startPlotly();
  Object.assign(report, JSON.parse(await report.unpackText("report-figures")));
  await Promise.all(report.starting.map((start) => start()));
  await plotly;
  startFigures();
});
