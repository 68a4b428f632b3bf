/* What the reader does with the journeys, and what is redrawn for it. */
"use strict";

/* --- what is redrawn --- */

/* Everything, as after a change of colours. */
journeys.all = () => {
  journeys.countAnswers();
  journeys.text.mark();
  journeys.text.colour();
  journeys.grid.colour();
  journeys.grid.legend();
  journeys.grid.draw();
  journeys.paths.draw();
  journeys.compare.draw();
  journeys.compare.closest();
  journeys.numbers();
};

/* After another choice of what the grid's colours mean. */
journeys.recolour = () => {
  journeys.countAnswers();
  journeys.text.colour();
  journeys.grid.colour();
  journeys.grid.legend();
  journeys.grid.draw();
  journeys.paths.draw();
  journeys.numbers();
};

journeys.toggle = (token) => {
  const { state } = journeys, place = state.chosen.indexOf(token);
  if (place >= 0) state.chosen.splice(place, 1);
  else state.chosen = [...state.chosen, token].slice(-6);
  journeys.text.mark();
  journeys.grid.mark();
  journeys.paths.draw();
};

/* Steps to a cell: only the marks, the comparison and the words of it change. */
journeys.moveTo = (token, layer) => {
  const { state, tokens, find } = journeys, hadFocus = find("tokens").contains(document.activeElement);
  state.token = Math.max(0, Math.min(tokens - 1, token));
  state.layer = Math.max(0, Math.min(report.journeys.num_layers - 1, layer));
  journeys.text.mark();
  journeys.text.reveal();
  if (hadFocus) journeys.text.spans[state.token].focus({ preventScroll: true });
  if (journeys.grid.reveal()) journeys.grid.askToDraw();
  journeys.grid.mark();
  journeys.compare.draw();
  journeys.numbers();
  find("status").textContent = journeys.describe(state.token, state.layer);
};

journeys.pin = () => {
  journeys.compare.pin(journeys.state.token, true);
  journeys.text.mark();
  journeys.compare.closest();
  journeys.compare.draw();
  if (journeys.state.view === "shared") journeys.recolour();
};

journeys.numbers = () => {
  const details = journeys.find("numbers"), { state, sequence, weights } = journeys;
  details.querySelector(".scroll")?.remove();
  if (!details.open) return;
  const rows = Array.from({ length: report.journeys.num_layers }, (_, layer) => {
    const own = journeys.own(state.token, layer), guess = journeys.guess(state.token, layer);
    return [layer, own.join(", "), weights ? own.map((_, rank) => journeys.weight(state.token, layer, rank).toFixed(2)).join(", ") : null,
      guess.length ? guess.join(", ") : null, guess.length ? `${own.filter((expert) => guess.includes(expert)).length} of ${own.length}` : null];
  });
  details.append(report.table([`layer (token ${state.token} ${sequence.tokens[state.token]})`, "experts", "weights", "guess", "right"], rows));
};

/* Reads another sequence and begins it at `token`, or at a pair worth comparing. Resolves to false if overtaken. */
journeys.load = async (place, token) => {
  if (!(await journeys.read(place))) return false;
  const { state, tokens, grid, find } = journeys, [first, second] = journeys.compare.suggest();
  state.chosen = [...new Set([first, second])];
  state.token = Math.min(tokens - 1, token ?? second);
  if (!state.pinnedByReader) journeys.compare.pin(first, false);
  state.cell = Math.round(Math.max(11, Math.min(28, grid.view.clientWidth / tokens)));
  find("zoom").value = state.cell;
  find("sequence").value = place;
  grid.view.scrollLeft = 0;
  journeys.text.write();
  journeys.all();
  find("status").textContent = journeys.describe(state.token, state.layer);
  return true;
};

journeys.nextSequence = (by) => {
  const count = report.journeys.sequences.length;
  return journeys.load((journeys.wanted + by + count) % count);
};

/* --- the keyboard --- */

journeys.KEYS = {
  ArrowLeft: () => journeys.moveTo(journeys.state.token - 1, journeys.state.layer),
  ArrowRight: () => journeys.moveTo(journeys.state.token + 1, journeys.state.layer),
  ArrowUp: () => journeys.moveTo(journeys.state.token, journeys.state.layer - 1),
  ArrowDown: () => journeys.moveTo(journeys.state.token, journeys.state.layer + 1),
  Home: () => journeys.moveTo(0, journeys.state.layer),
  End: () => journeys.moveTo(journeys.tokens - 1, journeys.state.layer),
  PageUp: () => journeys.nextSequence(-1),
  PageDown: () => journeys.nextSequence(1),
  Enter: () => journeys.toggle(journeys.state.token),
  " ": () => journeys.toggle(journeys.state.token),
  c: () => journeys.pin(),
  "/": () => journeys.find("search").focus(),
  n: () => journeys.search.step(1),
  N: () => journeys.search.step(-1),
  Escape: () => {},
};

/* In the text and the grid; the tip follows the steps in the grid, where it has room beside the cell. */
journeys.onKey = async (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(journeys.KEYS, event.key)) return;
  const inText = journeys.find("tokens").contains(document.activeElement);
  event.preventDefault();
  journeys.grid.tip.hidden = true;
  await journeys.KEYS[event.key]();
  if (inText && /^(Page|n$)/i.test(event.key)) journeys.text.spans[journeys.state.token].focus({ preventScroll: true });
  if (event.key.startsWith("Arrow") && !inText) journeys.grid.showTip(journeys.state.token, journeys.state.layer);
};

/* --- everything else --- */

journeys.listen = () => {
  const { grid, state, find } = journeys, on = (id, kind, act) => find(id)?.addEventListener(kind, act);
  const { cells, view, tip } = grid, hide = () => { tip.hidden = true; };
  const at = (event, act) => { const cell = grid.cellAt(event); if (cell) act(cell.token, cell.layer); else hide(); };
  cells.addEventListener("pointermove", (event) => at(event, grid.showTip));
  cells.addEventListener("pointerleave", hide);
  cells.addEventListener("blur", hide);
  cells.addEventListener("click", (event) => at(event, (token, layer) => { journeys.moveTo(token, layer); journeys.toggle(token); grid.showTip(token, layer); }));
  cells.addEventListener("keydown", journeys.onKey);
  view.addEventListener("scroll", () => { hide(); grid.askToDraw(); });
  on("tokens", "keydown", journeys.onKey);
  on("tokens", "click", (event) => {
    const span = event.target.closest(".token");
    if (!span) return;
    journeys.moveTo(Number(span.dataset.token), state.layer);
    journeys.toggle(state.token);
    span.focus({ preventScroll: true });
  });
  on("sequence", "change", (event) => journeys.load(Number(event.target.value)));
  on("back", "click", () => journeys.nextSequence(-1));
  on("on", "click", () => journeys.nextSequence(1));
  on("zoom", "input", (event) => {
    const middle = (view.scrollLeft + view.clientWidth / 2) / state.cell;
    state.cell = Number(event.target.value);
    grid.draw();
    view.scrollLeft = middle * state.cell - view.clientWidth / 2;
  });
  on("predictor", "change", (event) => { state.predictor = Number(event.target.value); journeys.recolour(); find("status").textContent = journeys.describe(state.token, state.layer); });
  on("view", "change", (event) => { state.view = event.target.value; journeys.recolour(); });
  on("pin", "click", journeys.pin);
  on("search", "input", journeys.search.run);
  on("search", "keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); journeys.search.step(event.shiftKey ? -1 : 1); }
    if (event.key === "Escape") { find("search").value = ""; journeys.search.run(); journeys.text.spans[state.token].focus({ preventScroll: true }); }
  });
  on("match-back", "click", () => journeys.search.step(-1));
  on("match-on", "click", () => journeys.search.step(1));
  on("paths", "pointerover", journeys.paths.explain);
  on("numbers", "toggle", journeys.numbers);
  new ResizeObserver(() => {
    grid.askToDraw();
    if (!report.printing && Math.max(journeys.paths.LEAST, view.parentElement.clientWidth) !== journeys.paths.width) journeys.paths.draw();
  }).observe(view);
};

journeys.start = async () => {
  if (!journeys.find("grid")) return;
  journeys.grid.start();
  const groups = new Map();
  report.journeys.sequences.forEach((each, place) => {
    if (!groups.has(each.dataset)) groups.set(each.dataset, report.element("optgroup", { label: each.dataset }));
    const start = each.tokens.slice(0, 14).join("").trim().slice(0, 42);
    groups.get(each.dataset).append(report.element("option", { value: place, dir: "ltr" }, `${each.sequence_id} · ${each.num_tokens} tokens · ${each.split.replace("_", ", ")} · ${start}`));
  });
  journeys.find("sequence").append(...groups.values());
  await journeys.load(Math.max(0, report.journeys.sequences.findIndex((each) => each.split === "test")));
  journeys.listen();
  report.journeysChanged = () => { journeys.all(); journeys.grid.print(report.printing); };
};

report.ready.then(journeys.start).then(() => { document.documentElement.dataset.ready = "true"; });
