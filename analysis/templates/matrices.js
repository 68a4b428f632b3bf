/* Steps through expert-by-expert matrices, layer by layer: the transitions, and the pairs used together. */
"use strict";

const NEVER = 65535;

const startMatrices = async (prefix) => {
  const info = report[prefix];
  const find = (name) => document.getElementById(`${prefix}-${name}`);
  const bytes = await report.unpack(info.packed);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const numbers = Uint16Array.from({ length: bytes.byteLength / 2 }, (_, place) => view.getUint16(2 * place, true));
  const experts = info.num_experts, size = experts * experts;
  const firstOf = info.kinds.map((_, kind) => info.kinds.slice(0, kind).reduce((sum, each) => sum + each.names.length, 0));
  const state = { kind: 0, place: 0 };

  const show = () => {
    const kind = info.kinds[state.kind];
    const last = Math.max(0, kind.names.length - 1);
    state.place = Math.min(Math.max(0, state.place), last);
    find("layer").max = last;
    find("layer").value = state.place;
    find("layer").setAttribute("aria-valuetext", kind.names[state.place] ?? "");
    if (!kind.names.length) { find("name").textContent = "one layer only"; return report.draw(info.figure); }
    const first = (firstOf[state.kind] + state.place) * size;
    const z = Array.from({ length: experts }, (_, row) => Array.from(numbers.subarray(first + row * experts, first + (row + 1) * experts),
      (value) => (value === NEVER ? null : info.low + info.unit * value)));
    const spec = report.figures[info.figure], [trace] = spec.data;
    const most = z.flat().reduce((so_far, value) => Math.max(so_far, Math.abs(value ?? 0)), 1e-9);
    trace.z = z;
    trace.zmax = info.lifts ? Math.max(1, most) : most;
    trace.zmin = info.lifts ? -trace.zmax : 0;
    const table = info.lifts ? z.map((row) => row.map((value) => (value === null ? null : 2 ** value))) : z;
    if (info.lifts) trace.customdata = table;
    if (trace.text) trace.text = table.map((row) => row.map((value) => (value === null ? "" : value.toFixed(info.lifts ? 1 : 0))));
    spec.layout.yaxis.title.text = kind.row_titles[state.place];
    spec.layout.xaxis.title.text = kind.column_titles[state.place];
    find("name").textContent = kind.names[state.place];
    report.tables[info.figure] = {
      columns: ["expert", ...table.map((_, expert) => String(expert) + (info.lifts ? "" : ", %"))],
      rows: table.map((row, expert) => [expert, ...row.map((value) => (value === null ? null : value.toFixed(2)))]),
    };
    const details = document.querySelector(`[data-table="${info.figure}"]`);
    details.querySelector(".scroll")?.remove();
    if (details.open) report.fillTable(details);
    return report.draw(info.figure);
  };
  const step = (by) => { state.place += by; show(); };
  find("kind").replaceChildren(...info.kinds.map((kind, place) => report.element("option", { value: place }, kind.label)));
  find("kind").addEventListener("change", (event) => { state.kind = Number(event.target.value); show(); });
  find("layer").addEventListener("input", (event) => { state.place = Number(event.target.value); show(); });
  find("back").addEventListener("click", () => step(-1));
  find("on").addEventListener("click", () => step(1));
  await show();
};

for (const controls of document.querySelectorAll("[data-matrices]")) report.starting.push(() => startMatrices(controls.dataset.matrices));
