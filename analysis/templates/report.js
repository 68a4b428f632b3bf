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
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

report.element = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

report.table = (columns, rows) => {
  const cell = (tag, value) => report.element(tag, tag === "th" ? { scope: "col" } : {}, value === null ? "–" : String(value));
  const table = report.element("table", {},
    report.element("thead", {}, report.element("tr", {}, ...columns.map((name) => cell("th", name)))),
    report.element("tbody", {}, ...rows.map((row) => report.element("tr", {}, ...row.map((value) => cell("td", value))))));
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
    Object.assign(axis, { gridcolor: rule, linecolor: rule, zerolinecolor: report.variable("--faint"), fixedrange: true, tickfont: { color: soft, size: 12 } });
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

const draw = (key) => {
  const place = document.getElementById(`plot-${key}`);
  const { data, layout } = themed(report.figures[key]);
  return Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
};
const drawAll = () => Promise.all([...document.querySelectorAll("[data-figure]")].map((place) => draw(place.dataset.figure)));

const fillTable = (details) => {
  if (details.querySelector(".scroll")) return;
  const { columns, rows } = report.tables[details.dataset.table];
  details.append(report.table(columns, rows));
};
for (const details of document.querySelectorAll("[data-table]")) details.addEventListener("toggle", () => details.open && fillTable(details));

/* --- transitions --- */

const transitions = { kind: "layers", place: 0, bytes: null };

transitions.show = () => {
  const { num_experts: experts, layers, tokens } = report.transitions;
  const shown = transitions.kind === "layers" ? layers : tokens;
  const slider = document.getElementById("transition-layer");
  slider.max = Math.max(0, shown.length - 1);
  transitions.place = Math.min(Math.max(0, transitions.place), Number(slider.max));
  slider.value = transitions.place;
  const layer = shown[transitions.place];
  const spec = report.figures.transitions;
  const [trace] = spec.data;
  const name = document.getElementById("transition-name");
  if (layer === undefined) { name.textContent = "one layer only"; return draw("transitions"); }
  const size = experts * experts;
  const first = (transitions.kind === "layers" ? 0 : layers.length * size) + transitions.place * size;
  const values = transitions.bytes.subarray(first, first + size);
  trace.z = Array.from({ length: experts }, (_, row) => Array.from(values.subarray(row * experts, (row + 1) * experts),
    (value) => (value === 65535 ? null : (100 * value) / 65534)));
  trace.zmax = Math.max(...trace.z.flat().map((value) => value ?? 0), 1e-9);
  const next = transitions.kind === "layers";
  name.textContent = next ? `layer ${layer} → ${layer + 1}` : `layer ${layer}`;
  spec.layout.yaxis.title.text = next ? `chosen at layer ${layer}` : "chosen for the previous token";
  spec.layout.xaxis.title.text = next ? `share of selections at layer ${layer + 1}, by expert` : `share of selections for the token, by expert`;
  report.tables.transitions = {
    columns: [next ? `expert at layer ${layer}` : "expert before", ...trace.z.map((_, expert) => `${expert}, %`)],
    rows: trace.z.map((row, expert) => [expert, ...row.map((value) => (value === null ? null : value.toFixed(2)))]),
  };
  const details = document.querySelector('[data-table="transitions"]');
  details.querySelector(".scroll")?.remove();
  if (details.open) fillTable(details);
  return draw("transitions");
};

transitions.start = async () => {
  const bytes = await report.unpack(report.transitions.packed);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  transitions.bytes = Uint16Array.from({ length: bytes.byteLength / 2 }, (_, place) => view.getUint16(2 * place, true));
  const step = (by) => { transitions.place += by; transitions.show(); };
  document.getElementById("transition-kind").addEventListener("change", (event) => { transitions.kind = event.target.value; transitions.show(); });
  document.getElementById("transition-layer").addEventListener("input", (event) => { transitions.place = Number(event.target.value); transitions.show(); });
  document.getElementById("transition-back").addEventListener("click", () => step(-1));
  document.getElementById("transition-on").addEventListener("click", () => step(1));
  await transitions.show();
};

/* --- the page as a whole --- */

report.redraw = () => { drawAll(); report.journeysChanged?.(); };
report.dark.addEventListener("change", report.redraw);
window.addEventListener("beforeprint", () => { report.printing = true; report.redraw(); });
window.addEventListener("afterprint", () => { report.printing = false; report.redraw(); });

const links = [...document.querySelectorAll("nav.contents a")];
const markSection = () => {
  const above = links.filter((link) => document.querySelector(link.getAttribute("href")).getBoundingClientRect().top < window.innerHeight * 0.35);
  for (const link of links) {
    if (link === above.at(-1)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
};
window.addEventListener("scroll", markSection, { passive: true });

report.ready = (async () => { markSection(); await transitions.start(); await drawAll(); })();
