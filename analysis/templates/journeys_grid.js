/* The grid of layers x tokens. One canvas holds the cells of the visible part, scaled up from a picture of one pixel a
   cell; a second above it holds the marks, so that a step redraws only those. */
"use strict";

journeys.grid = {
  picture: document.createElement("canvas"), asked: false,
  BAND: { cell: 11, tokens: 60 }, // px, and tokens in one band of the printed grid: as wide as a page
  channels: (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)),
};

journeys.grid.start = () => {
  const { grid, find } = journeys, { num_layers: layers } = report.journeys;
  const [axis, cells, marks] = find("grid").querySelectorAll("canvas");
  Object.assign(grid, { axis, cells, marks, view: find("grid").querySelector(".window"), width: find("grid").querySelector(".width"),
    sheet: find("grid").querySelector(".sheet"), tip: find("grid").querySelector(".tip"), height: Math.max(9, Math.min(28, Math.round(440 / layers))) });
};

journeys.grid.top = () => (journeys.state.cell >= 11 ? 74 : 10);

/* A canvas of the given size in CSS pixels, cleared, at the resolution of the screen or sharper in print. */
journeys.grid.sized = (canvas, width, height) => {
  const ratio = report.printing ? 3 : window.devicePixelRatio || 1;
  const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.globalAlpha = 1;
  context.clearRect(0, 0, width, height);
  return context;
};

/* Colours every cell of the sequence: one pixel each, and per cell the expert whose number it may show, or -1. */
journeys.grid.colour = () => {
  const { num_layers: layers, top_k: k, weight_scale: scale } = report.journeys;
  const { state, grid, ids, weights, tokens, leads, answers, find } = journeys;
  const palette = report.colours[report.mode()].map(grid.channels), paper = grid.channels(report.variable("--paper"));
  const probe = getComputedStyle(find("legend")), before = find("legend").style.color;
  const answerRgb = Array.from({ length: k + 1 }, (_, count) => {
    find("legend").style.color = journeys.answerColour(count / k);
    const parts = probe.color.match(/[\d.]+/g).slice(0, 3).map(Number);
    return probe.color.startsWith("color(") ? parts.map((part) => 255 * part) : parts;
  });
  find("legend").style.color = before;
  const image = new ImageData(tokens, layers), numbers = new Int16Array(tokens * layers);
  for (let cell = 0; cell < tokens * layers; cell++) {
    const first = cell * k, pixel = 4 * ((cell % layers) * tokens + Math.floor(cell / layers));
    let rank = leads[cell], faded = false;
    if (state.expert !== null) {
      const place = ids.subarray(first, first + k).indexOf(state.expert);
      faded = place < 0;
      if (!faded) rank = place;
    }
    const expert = ids[first + rank], rgb = answers ? answerRgb[answers[cell]] : palette[expert];
    const strength = faded ? 0.08 : answers ? 1 : 0.3 + 0.7 * (weights ? weights[first + rank] / 255 : 0.8);
    for (let i = 0; i < 3; i++) image.data[pixel + i] = strength * rgb[i] + (1 - strength) * paper[i];
    image.data[pixel + 3] = 255;
    numbers[cell] = answers || faded ? -1 : expert;
  }
  grid.picture.width = tokens;
  grid.picture.height = layers;
  grid.picture.getContext("2d").putImageData(image, 0, 0);
  Object.assign(grid, { image, numbers });
};

/* Paints tokens first..last with their labels, token `first` beginning at x. */
journeys.grid.paint = (context, { first, last, x, cell, height, top }) => {
  const { num_layers: layers } = report.journeys;
  const { grid, sequence, tokens } = journeys, count = last - first;
  const sans = report.variable("--sans"), mono = report.variable("--mono");
  context.imageSmoothingEnabled = false;
  context.drawImage(grid.picture, first, 0, count, layers, x, top, count * cell, layers * height);
  context.fillStyle = report.variable("--paper");
  for (let layer = 0; layer < layers; layer++) context.fillRect(x, top + (layer + 1) * height - 1, count * cell, 1);
  if (cell >= 6) for (let token = 0; token < count; token++) context.fillRect(x + (token + 1) * cell - 1, top, 1, layers * height);
  context.textBaseline = "middle";
  if (cell >= 18 && height >= 12) {
    context.font = `10.5px ${sans}`;
    context.textAlign = "center";
    for (let token = first; token < last; token++) {
      for (let layer = 0; layer < layers; layer++) {
        const number = grid.numbers[token * layers + layer];
        if (number < 0) continue;
        const pixel = 4 * (layer * tokens + token), { data } = grid.image;
        context.fillStyle = 0.299 * data[pixel] + 0.587 * data[pixel + 1] + 0.114 * data[pixel + 2] > 140 ? "#111" : "#fff";
        context.fillText(number, x + (token - first) * cell + (cell - 1) / 2, top + (layer + 0.5) * height);
      }
    }
  }
  if (top < 20) return;
  context.font = `11px ${mono}`;
  context.fillStyle = report.variable("--soft");
  context.textAlign = "left";
  for (let token = first; token < last; token++) grid.label(context, sequence.tokens[token], x + (token - first + 0.5) * cell, top - 10);
};

journeys.grid.label = (context, text, x, y) => {
  const letters = [...text.trim()];
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.fillText(letters.length > 9 ? `${letters.slice(0, 8).join("")}…` : letters.join(""), 0, 0);
  context.restore();
};

journeys.grid.paintAxis = (context, { x, height, top }) => {
  const { num_layers: layers } = report.journeys, step = Math.max(1, Math.ceil(15 / height));
  context.font = `12px ${report.variable("--sans")}`;
  context.fillStyle = report.variable("--soft");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let layer = 0; layer < layers; layer += step) context.fillText(layer, x, top + (layer + 0.5) * height);
  if (top > 20) context.fillText("layer", x, top - 10);
};

journeys.grid.shown = () => Math.min(journeys.grid.view.clientWidth, Math.max(journeys.tokens * journeys.state.cell + 2, 60));

journeys.grid.draw = () => {
  const { num_layers: layers } = report.journeys;
  const { grid, state, tokens } = journeys, { cell } = state, { height, view } = grid, top = grid.top(), shown = grid.shown();
  grid.width.style.width = `${Math.max(tokens * cell, 1)}px`;
  grid.paintAxis(grid.sized(grid.axis, 46, top + layers * height), { x: 38, height, top });
  const left = view.scrollLeft, first = Math.max(0, Math.floor(left / cell)), last = Math.min(tokens, Math.ceil((left + shown) / cell));
  grid.paint(grid.sized(grid.cells, shown, top + layers * height + 2), { first, last, x: first * cell - left, cell, height, top });
  grid.mark();
};

/* The marks: chosen, pinned and found tokens above their columns, the current cell and column framed. */
journeys.grid.mark = () => {
  const { num_layers: layers } = report.journeys;
  const { grid, state, sequence } = journeys, { cell } = state, { height } = grid, top = grid.top(), left = grid.view.scrollLeft;
  const context = grid.sized(grid.marks, grid.shown(), top + layers * height + 2), wide = Math.max(cell - 1, 2);
  state.chosen.forEach((token, place) => {
    context.fillStyle = journeys.pathColour(place);
    context.fillRect(token * cell - left, top - 6, wide, 4);
  });
  context.fillStyle = report.variable("--accent");
  for (const token of journeys.search.inSequence().keys()) context.fillRect(token * cell - left, top - 8, wide, 2);
  const x = state.token * cell - left;
  if (top > 20) {
    context.fillStyle = report.variable("--paper");
    context.fillRect(x, 0, cell, top - 8);
    context.font = `700 11px ${report.variable("--mono")}`;
    context.fillStyle = report.variable("--ink");
    context.textAlign = "left";
    context.textBaseline = "middle";
    grid.label(context, sequence.tokens[state.token], x + cell / 2, top - 10);
  }
  context.strokeStyle = report.variable("--mark");
  context.lineWidth = 2;
  context.strokeRect(x, top + state.layer * height - 0.5, wide, height);
  context.lineWidth = 1;
  context.globalAlpha = 0.45;
  context.strokeRect(x - 0.5, top - 0.5, Math.max(cell, 2), layers * height);
};

journeys.grid.askToDraw = () => {
  if (journeys.grid.asked) return;
  journeys.grid.asked = true;
  requestAnimationFrame(() => { journeys.grid.asked = false; journeys.grid.draw(); });
};

/* Scrolls sideways so that the current token is seen; says whether it had to. */
journeys.grid.reveal = () => {
  const { view } = journeys.grid, { cell, token } = journeys.state, x = token * cell;
  if (x >= view.scrollLeft && x + cell <= view.scrollLeft + view.clientWidth) return false;
  view.scrollLeft = x - view.clientWidth / 2;
  return true;
};

journeys.grid.cellAt = (event) => {
  const { grid, state, tokens } = journeys, box = grid.cells.getBoundingClientRect();
  const token = Math.floor((event.clientX - box.left + grid.view.scrollLeft) / state.cell);
  const layer = Math.floor((event.clientY - box.top - grid.top()) / grid.height);
  return token >= 0 && token < tokens && layer < report.journeys.num_layers ? { token, layer: Math.max(0, layer) } : null;
};

/* --- one cell, beside the pointer --- */

journeys.grid.showTip = (token, layer) => {
  const { weight_scale: scale, predictors, top_k: k } = report.journeys;
  const { grid, state, sequence } = journeys, { tip } = grid, make = report.element;
  const own = journeys.own(token, layer), guess = journeys.guess(token, layer), palette = report.colours[report.mode()];
  const rows = own.map((expert, rank) => {
    const value = journeys.weight(token, layer, rank), fill = make("i");
    fill.style.width = `${value === null ? 0 : (100 * value) / scale}%`;
    fill.style.background = palette[expert];
    return make("div", { class: "row" }, journeys.swatch(palette[expert]), `expert ${expert}`, value === null ? "" : make("span", { class: "bar" }, fill), value === null ? "" : value.toFixed(2));
  });
  tip.replaceChildren(make("div", { class: "what", dir: "ltr" }, sequence.tokens[token] || "∅"), make("div", { class: "where" }, `token ${token}, layer ${layer}`), ...rows);
  if (guess.length) {
    const right = guess.filter((expert) => own.includes(expert)).length;
    tip.append(make("div", { class: "guess" }, make("div", { class: "where" }, `${predictors[state.predictor]} guessed: ${right} of ${k} right`),
      ...guess.map((expert) => make("div", { class: "row guessed" }, journeys.swatch(palette[expert]), make("span", {}, `expert ${expert}`), make("span", { class: "answer" }, own.includes(expert) ? "✓ right" : "✗ not chosen")))));
  }
  tip.hidden = false;
  const x = 46 + (token + 1) * state.cell - grid.view.scrollLeft + 10, room = journeys.find("grid").clientWidth;
  const left = x + tip.offsetWidth + 4 > room ? x - state.cell - tip.offsetWidth - 24 : x;
  tip.style.left = `${Math.max(0, Math.min(left, room - tip.offsetWidth))}px`;
  const below = grid.top() + (layer + 1) * grid.height - 20, edge = journeys.find("grid").getBoundingClientRect().top;
  tip.style.top = `${Math.max(8 - edge, Math.min(below, window.innerHeight - edge - tip.offsetHeight - 8))}px`;
};

/* --- legend --- */

journeys.grid.legend = () => {
  const { num_layers: layers, num_experts: experts, top_k: k, ordered } = report.journeys;
  const { state, answers, weights, find } = journeys, legend = find("legend"), make = report.element;
  if (answers) {
    const item = (count) => make("span", { class: "item" }, journeys.swatch(journeys.answerColour(count / k)), count === 0 ? "none" : count === k ? (k > 1 ? `all ${k}` : "it") : String(count));
    const right = state.view === "right", total = answers.reduce((sum, count) => sum + count, 0) / (answers.length * k);
    legend.replaceChildren(make("span", {}, right ? `Of a cell's experts ${report.journeys.predictors[state.predictor]} named:` : `Of a cell's experts the pinned token A, ${state.pinned.name}, chose too:`),
      ...Array.from({ length: k + 1 }, (_, count) => item(count)),
      make("strong", {}, `${(100 * total).toFixed(1)} % of this sequence's experts ${right ? "were named" : `are A's; chance gives ${((100 * k) / experts).toFixed(1)} %`}`));
    return;
  }
  const what = !ordered ? `of each cell's ${k}, whose order is not known, the one this sequence uses most at the layer` : weights ? "first choice, stronger with its weight" : "first choice";
  const only = (expert) => { state.expert = expert; journeys.recolour(); };
  if (experts > 64) {
    const input = make("input", { type: "number", min: 0, max: experts - 1, value: state.expert ?? "", placeholder: "all", id: "journey-expert" });
    input.addEventListener("change", () => { only(input.value === "" ? null : Math.max(0, Math.min(experts - 1, Math.round(Number(input.value))))); find("expert").focus(); });
    legend.replaceChildren(make("span", { class: "whole" }, `Colour: expert (${what}); point at a cell to read its experts`), make("label", {}, "Show expert only ", input));
    return;
  }
  const buttons = report.colours[report.mode()].map((colour, expert) => {
    const button = make("button", { type: "button", "aria-pressed": String(state.expert === expert), "aria-label": `Show expert ${expert} only` }, journeys.swatch(colour), String(expert));
    button.addEventListener("click", () => { only(state.expert === expert ? null : expert); legend.querySelectorAll("button")[expert].focus(); });
    return button;
  });
  legend.replaceChildren(make("span", { class: experts > 16 ? "whole" : "" }, `Expert (${what}):`), ...buttons);
};

/* --- on paper: the whole grid in bands as wide as a page --- */

journeys.grid.print = (on) => {
  const { num_layers: layers } = report.journeys, { tokens, grid, find } = journeys;
  const height = Math.max(3, Math.min(12, Math.round(230 / layers))), top = 74, bands = [];
  for (let first = 0; on && first < tokens; first += grid.BAND.tokens) {
    const last = Math.min(tokens, first + grid.BAND.tokens), canvas = report.element("canvas", { role: "img", "aria-label": `Tokens ${first} to ${last - 1}` });
    const context = grid.sized(canvas, 46 + grid.BAND.tokens * grid.BAND.cell, top + layers * height + 2);
    grid.paintAxis(context, { x: 38, height, top });
    grid.paint(context, { first, last, x: 46, cell: grid.BAND.cell, height, top });
    bands.push(canvas);
  }
  find("print").replaceChildren(...bands);
};
