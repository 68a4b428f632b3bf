/* The paths of the chosen tokens: layers from left to right, experts from top to bottom. Each path has its colour, its
   dashes and its letter at the end, so that none of them is needed to tell paths apart. */
"use strict";

journeys.paths = { LEAST: 640, PAPER: 680, DASHES: ["", "9 4", "2 4", "12 4 2 4", "5 3", "16 5"] };

journeys.paths.chips = () => {
  const { state, sequence, find } = journeys, make = report.element;
  find("chips").replaceChildren(...state.chosen.map((token, place) => {
    const button = make("button", { type: "button", "aria-label": `Remove the path ${journeys.letter(place)} of token ${token} ${sequence.tokens[token]}` }, journeys.swatch(journeys.pathColour(place)),
      make("b", {}, journeys.letter(place)), make("span", { class: "name", dir: "ltr" }, `${token} ${sequence.tokens[token]}`), make("span", { class: "close", "aria-hidden": "true" }, "×"));
    button.addEventListener("click", () => { journeys.toggle(token); (find("chips").querySelectorAll("button")[place] ?? find("chips").querySelector("button") ?? find("tokens").querySelector('[tabindex="0"]')).focus(); });
    return button;
  }));
};

journeys.paths.note = () => {
  const { ordered } = report.journeys, { state, weights } = journeys;
  if (!state.chosen.length) return "Click tokens in the text or the grid to draw their paths.";
  return (ordered ? "Lines join each layer's first choice; dots are all its experts"
    : "The run does not say which expert came first: lines join, of each layer's experts, the one that this text uses most there; dots are all its experts") +
    (weights ? ", larger with more weight" : "") + (state.view === "right" ? "; hollow dots are those the predictor missed." : ".");
};

journeys.paths.draw = () => {
  const { num_layers: layers, num_experts: experts, ordered, weight_scale: scale } = report.journeys;
  const { state, weights, find } = journeys;
  journeys.paths.chips();
  find("paths-note").textContent = journeys.paths.note();
  const svg = find("paths"), node = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const total = journeys.paths.width = report.printing ? journeys.paths.PAPER : Math.max(journeys.paths.LEAST, svg.parentElement.clientWidth);
  const left = 58, right = 76, row = Math.max(2.2, Math.min(26, 340 / experts)), top = 22, bottom = top + experts * row;
  const step = (total - left - right) / Math.max(1, layers - 1);
  svg.setAttribute("width", total);
  svg.setAttribute("height", bottom + 38);
  const x = (layer) => left + layer * step, y = (expert, shift) => top + (expert + 0.5) * row + shift;
  const parts = [], every = [1, 2, 4, 8, 16, 32, 64].find((each) => each * row >= 13) ?? 128, layerEvery = Math.max(1, Math.ceil(24 / step));
  for (let expert = 0; expert < experts; expert += every) {
    parts.push(node("line", { class: "line", x1: left - 12, x2: total - right + 8, y1: y(expert, 0), y2: y(expert, 0) }));
    parts.push(node("text", { x: left - 30, y: y(expert, 4), "text-anchor": "end" }, expert));
  }
  for (let layer = 0; layer < layers; layer += layerEvery) parts.push(node("text", { x: x(layer), y: bottom + 18, "text-anchor": "middle" }, layer));
  parts.push(node("text", { x: total - right, y: bottom + 34, "text-anchor": "end" }, "layer"), node("text", { x: 0, y: 12 }, "expert"));
  state.chosen.forEach((token, place) => {
    const colour = journeys.pathColour(place), shift = (place - (state.chosen.length - 1) / 2) * Math.min(3.6, row / 6);
    const curve = (layer, from, to) => {
      const middle = (x(layer) + x(layer + 1)) / 2;
      return `M${x(layer)} ${y(from, shift)}C${middle} ${y(from, shift)} ${middle} ${y(to, shift)} ${x(layer + 1)} ${y(to, shift)}`;
    };
    const lead = (layer) => journeys.own(token, layer)[journeys.leads[token * layers + layer]];
    let path = "";
    for (let layer = 0; layer + 1 < layers; layer++) path += curve(layer, lead(layer), lead(layer + 1));
    parts.push(node("path", { d: path, fill: "none", stroke: colour, "stroke-width": 2.2, "stroke-opacity": 0.9, "stroke-dasharray": journeys.paths.DASHES[place % 6] }));
    for (let layer = 0; layer < layers; layer++) {
      const guess = journeys.guess(token, layer);
      journeys.own(token, layer).forEach((expert, rank) => {
        const share = weights ? journeys.weight(token, layer, rank) / scale : ordered ? (rank ? 0.35 : 1) : 0.4;
        const missed = state.view === "right" && !guess.includes(expert);
        const dot = node("circle", { cx: x(layer), cy: y(expert, shift), r: (1.4 + Math.max(1.2, Math.min(row / 3.2, 5.5)) * Math.sqrt(share)).toFixed(2),
          fill: missed ? "var(--paper)" : colour, stroke: missed ? colour : "var(--paper)", "stroke-width": missed ? 1.6 : 0.8, "data-token": token, "data-layer": layer });
        parts.push(dot);
      });
    }
    parts.push(node("text", { class: "end", style: `fill: ${colour}`, x: total - right + 16 + 10 * place, y: y(lead(layers - 1), shift + 4), "text-anchor": "middle" }, journeys.letter(place)));
  });
  svg.replaceChildren(...parts);
};

/* The words of a dot are made when the pointer reaches it: there may be thousands of dots. */
journeys.paths.explain = (event) => {
  const { token, layer } = event.target.dataset;
  if (token === undefined || event.target.firstChild) return;
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = journeys.describe(Number(token), Number(layer));
  event.target.append(title);
};
