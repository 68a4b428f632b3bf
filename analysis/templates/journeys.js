/* Token journeys: a sequence's tokens as text, the grid of layers x tokens on a canvas that draws only what is visible,
   and the paths of chosen tokens. Arrays are [token][layer][k], flat. */
"use strict";

const startJourneys = async () => {
  const info = report.journeys;
  const find = (id) => document.getElementById(`journey-${id}`);
  const section = document.getElementById("journeys");
  if (!find("grid")) return;
  const { num_layers: layers, num_experts: experts, top_k: k } = info;
  const [axis, canvas] = find("grid").querySelectorAll("canvas");
  const view = find("grid").querySelector(".window"), width = find("grid").querySelector(".width"), tip = find("grid").querySelector(".tip");
  const PATH_COLOURS = { light: ["#0b5c9e", "#b8470b", "#00785a", "#93447f", "#6b5d00", "#504ea8"], dark: ["#3d93d8", "#d9692b", "#189f7c", "#b9669f", "#9c8a1a", "#7f7cd8"] };
  const cellHeight = Math.max(9, Math.min(28, Math.round(420 / layers)));
  const state = { place: 0, token: 0, layer: 0, chosen: [], predictor: 0, right: false, cell: 14, expert: null };
  let sequence, tokens, ids, weights, guesses, usage;

  /* --- data --- */

  const load = async (place) => {
    state.place = place;
    sequence = info.sequences[place];
    tokens = sequence.tokens.length;
    const bytes = await report.unpack(sequence.packed);
    if (place !== state.place) return;
    const size = tokens * layers * k, idBytes = experts <= 256 ? 1 : 2;
    let at = 0;
    const takeIds = () => {
      const part = bytes.slice(at, (at += size * idBytes));
      return idBytes === 1 ? part : Uint16Array.from({ length: size }, (_, i) => part[2 * i] + 256 * part[2 * i + 1]);
    };
    ids = takeIds();
    weights = info.has_weights ? bytes.slice(at, (at += size)) : null;
    guesses = info.predictors.map(takeIds);
    usage = new Uint32Array(layers * experts);
    ids.forEach((expert, i) => { usage[(Math.floor(i / k) % layers) * experts + expert]++; });
    state.token = Math.min(state.token, tokens - 1);
    state.chosen = [4, 5].filter((token) => token < tokens);
    if (!state.chosen.length) state.chosen = [0];
    state.token = state.chosen[0];
    const room = view.clientWidth / tokens;
    state.cell = Math.round(Math.max(11, Math.min(28, room)));
    find("zoom").value = state.cell;
    view.scrollLeft = 0;
    find("sequence").value = place;
    find("note").textContent = guesses.length && sequence.split !== "test"
      ? `This sequence is of the ${sequence.split.replace("_", ", ")} split, on which predictors may have been fitted: judge them by test sequences.` : "";
    writeTokens();
    all();
  };

  const slot = (token, layer) => (token * layers + layer) * k;
  const chosenExperts = (token, layer) => Array.from(ids.subarray(slot(token, layer), slot(token, layer) + k));
  const guessed = (token, layer) => (guesses.length ? Array.from(guesses[state.predictor].subarray(slot(token, layer), slot(token, layer) + k)) : []);
  const weight = (token, layer, place) => (weights ? (weights[slot(token, layer) + place] / 255) * info.weight_scale : null);
  /* The expert that gives a cell its colour: the first choice, or where the order is unknown the one of them that this
     sequence uses most at the layer, so that runs of one expert show. */
  const lead = (token, layer, own) => {
    if (info.ordered) return own[0];
    const use = own.map((expert) => usage[layer * experts + expert]);
    return own[use.indexOf(Math.max(...use))];
  };
  const hits = (token, layer) => {
    const first = slot(token, layer), guess = guesses[state.predictor];
    let count = 0;
    for (let i = first; i < first + k; i++) for (let j = first; j < first + k; j++) if (ids[i] === guess[j]) count++;
    return count;
  };
  const hitShare = (token) => {
    let count = 0;
    for (let layer = 0; layer < layers; layer++) count += hits(token, layer);
    return count / (layers * k);
  };
  /* Orange where nothing was named, pale at a little, blue where everything was. */
  const answerColour = (share) => (share < 0.2 ? `color-mix(in srgb, var(--wrong) ${Math.round(100 - 400 * share)}%, var(--part))`
    : `color-mix(in srgb, var(--right) ${Math.round((100 * (share - 0.2)) / 0.8)}%, var(--part))`);
  const showsRight = () => state.right && guesses.length > 0;
  const colours = () => report.colours[report.mode()];
  const pathColour = (place) => PATH_COLOURS[report.mode()][place % 6];

  /* --- the text --- */

  const writeTokens = () => {
    const box = find("tokens");
    box.replaceChildren(...sequence.tokens.flatMap((text, token) => {
      const span = report.element("span", { class: "token", role: "option", "data-token": token, tabindex: "-1", dir: "ltr" }, text || "∅");
      return text.includes("↵") ? [span, document.createElement("br")] : [span];
    }));
    if (sequence.num_tokens > tokens) box.append(` … and ${sequence.num_tokens - tokens} more tokens`);
    box.scrollTop = 0;
  };

  const markTokens = () => {
    for (const span of find("tokens").querySelectorAll(".token")) {
      const token = Number(span.dataset.token), place = state.chosen.indexOf(token);
      span.classList.toggle("current", token === state.token);
      span.classList.toggle("chosen", place >= 0);
      span.setAttribute("aria-selected", String(place >= 0));
      span.tabIndex = token === state.token ? 0 : -1;
      span.style.background = place >= 0 ? pathColour(place) : "";
      span.style.borderBottomColor = showsRight() ? answerColour(hitShare(token)) : "";
    }
  };

  /* --- the grid --- */

  const labelHeight = () => (state.cell >= 11 ? 74 : 10);
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  const prepare = (target, cssWidth, cssHeight) => {
    const ratio = window.devicePixelRatio || 1;
    target.width = Math.round(cssWidth * ratio);
    target.height = Math.round(cssHeight * ratio);
    target.style.width = `${cssWidth}px`;
    target.style.height = `${cssHeight}px`;
    const context = target.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, cssWidth, cssHeight);
    return context;
  };

  const drawAxis = () => {
    const top = labelHeight();
    const context = prepare(axis, 46, top + layers * cellHeight);
    context.font = `12px ${report.variable("--sans")}`;
    context.fillStyle = report.variable("--soft");
    context.textAlign = "right";
    context.textBaseline = "middle";
    const step = Math.max(1, Math.ceil(16 / cellHeight));
    for (let layer = 0; layer < layers; layer += step) context.fillText(layer, 38, top + (layer + 0.5) * cellHeight);
    if (top > 20) context.fillText("layer", 38, top - 10);
  };

  const drawGrid = () => {
    const { cell } = state, top = labelHeight();
    width.style.width = `${Math.max(tokens * cell, 1)}px`;
    const shown = Math.min(view.clientWidth, Math.max(tokens * cell + 2, 60));
    const context = prepare(canvas, shown, top + layers * cellHeight + 2);
    const left = view.scrollLeft;
    const first = Math.max(0, Math.floor(left / cell)), last = Math.min(tokens, Math.ceil((left + shown) / cell));
    const palette = colours(), rgbs = palette.map(rgb), paper = rgb(report.variable("--paper"));
    const gap = cell >= 6 ? 1 : 0, numbers = cell >= 18 && cellHeight >= 14;
    const probe = getComputedStyle(find("legend")), before = find("legend").style.color;
    const answer = Array.from({ length: k + 1 }, (_, right) => { find("legend").style.color = answerColour(right / k); return probe.color; });
    find("legend").style.color = before;
    context.textBaseline = "middle";
    for (let token = first; token < last; token++) {
      const x = token * cell - left;
      for (let layer = 0; layer < layers; layer++) {
        const y = top + layer * cellHeight;
        const own = chosenExperts(token, layer);
        const faded = state.expert !== null && !own.includes(state.expert);
        if (showsRight()) {
          const right = hits(token, layer);
          context.globalAlpha = faded ? 0.1 : 1;
          context.fillStyle = answer[right];
          context.fillRect(x, y, cell - gap, cellHeight - 1);
        } else {
          const expert = state.expert !== null && !faded ? state.expert : lead(token, layer, own);
          const share = weights ? weight(token, layer, own.indexOf(expert)) / info.weight_scale : 0.8;
          const alpha = faded ? 0.07 : 0.3 + 0.7 * share;
          context.globalAlpha = alpha;
          context.fillStyle = palette[expert];
          context.fillRect(x, y, cell - gap, cellHeight - 1);
          if (numbers && !faded) {
            const shade = rgbs[expert].map((channel, i) => alpha * channel + (1 - alpha) * paper[i]);
            context.globalAlpha = 0.85;
            context.fillStyle = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 140 ? "#111" : "#fff";
            context.font = `10.5px ${report.variable("--sans")}`;
            context.textAlign = "center";
            context.fillText(expert, x + (cell - gap) / 2, y + cellHeight / 2);
          }
        }
      }
      context.globalAlpha = 1;
      const place = state.chosen.indexOf(token);
      if (place >= 0) {
        context.fillStyle = pathColour(place);
        context.fillRect(x, top - 6, cell - gap, 4);
      }
      if (top > 20) {
        context.save();
        context.translate(x + cell / 2, top - 10);
        context.rotate(-Math.PI / 2);
        context.font = `${token === state.token ? "600 " : ""}11px ${report.variable("--mono")}`;
        context.fillStyle = report.variable(token === state.token ? "--ink" : "--soft");
        context.textAlign = "left";
        const letters = [...sequence.tokens[token].trim()];
        context.fillText(letters.length > 9 ? `${letters.slice(0, 8).join("")}…` : letters.join(""), 0, 0);
        context.restore();
      }
    }
    context.strokeStyle = report.variable("--mark");
    context.lineWidth = 2;
    context.strokeRect(state.token * cell - left, top + state.layer * cellHeight - 0.5, Math.max(cell - gap, 2), cellHeight);
    context.lineWidth = 1;
    context.globalAlpha = 0.45;
    context.strokeRect(state.token * cell - left - 0.5, top - 0.5, Math.max(cell, 2), layers * cellHeight);
  };

  /* --- one cell in words --- */

  const describe = (token, layer) => {
    const own = chosenExperts(token, layer), guess = guessed(token, layer);
    const named = own.map((expert, place) => `expert ${expert}${weights ? ` ${weight(token, layer, place).toFixed(2)}` : ""}`);
    const right = own.filter((expert) => guess.includes(expert)).length;
    return `Token ${token} ${sequence.tokens[token]}, layer ${layer}: ${named.join(", ")}` +
      (guess.length ? `. ${info.predictors[state.predictor]} guessed ${guess.join(", ")}: ${right} of ${k} right` : "");
  };

  const showTip = (token, layer) => {
    const own = chosenExperts(token, layer), guess = guessed(token, layer), palette = colours();
    const make = report.element;
    const swatch = (expert) => { const box = make("span", { class: "swatch" }); box.style.background = palette[expert]; return box; };
    const rows = own.map((expert, place) => {
      const value = weight(token, layer, place), fill = make("i");
      fill.style.width = `${value === null ? 0 : (100 * value) / info.weight_scale}%`;
      fill.style.background = palette[expert];
      return make("div", { class: "row" }, swatch(expert), `expert ${expert}`, value === null ? "" : make("span", { class: "bar" }, fill), value === null ? "" : value.toFixed(2));
    });
    tip.replaceChildren(make("div", { class: "what", dir: "ltr" }, sequence.tokens[token] || "∅"), make("div", { class: "where" }, `token ${token}, layer ${layer}`), ...rows);
    if (guess.length) {
      const right = guess.filter((expert) => own.includes(expert)).length;
      tip.append(make("div", { class: "guess" }, make("div", { class: "where" }, `${info.predictors[state.predictor]} guessed: ${right} of ${k} right`),
        ...guess.map((expert) => make("div", { class: "row guessed" }, swatch(expert), make("span", {}, `expert ${expert}`), make("span", { class: "answer" }, own.includes(expert) ? "✓ right" : "✗ not chosen")))));
    }
    tip.hidden = false;
    const x = 46 + (token + 1) * state.cell - view.scrollLeft + 10, y = labelHeight() + (layer + 1) * cellHeight;
    const room = find("grid").clientWidth;
    tip.style.left = `${Math.max(0, x + 240 > room ? x - state.cell - 260 : x)}px`;
    tip.style.top = `${Math.max(0, y - 20)}px`;
  };

  /* --- legend, paths, numbers --- */

  const drawLegend = () => {
    const legend = find("legend"), make = report.element;
    const item = (colour, text) => { const box = make("span", { class: "swatch" }); box.style.background = colour; return make("span", { class: "item" }, box, text); };
    if (showsRight()) {
      let count = 0;
      for (let token = 0; token < tokens; token++) count += hitShare(token);
      legend.replaceChildren(make("span", {}, "Of a cell's experts the predictor named:"),
        ...Array.from({ length: k + 1 }, (_, right) => item(answerColour(right / k), right === 0 ? "none" : right === k ? (k > 1 ? `all ${k}` : "it") : String(right))), make("strong", {}, `${((100 * count) / tokens).toFixed(1)} % of this sequence's experts were named`));
      return;
    }
    const what = !info.ordered ? `of each cell's ${k}, whose order is not known, the one this sequence uses most at the layer`
      : weights ? "first choice, stronger with its weight" : "first choice";
    const buttons = experts > 64 ? [make("span", { class: "item" }, "point at a cell to read its experts")] : colours().map((colour, expert) => {
      const box = make("span", { class: "swatch" });
      box.style.background = colour;
      const button = make("button", { type: "button", "aria-pressed": String(state.expert === expert), "aria-label": `Show expert ${expert} only` }, box, String(expert));
      button.addEventListener("click", () => { state.expert = state.expert === expert ? null : expert; all(); find("legend").querySelectorAll("button")[expert]?.focus(); });
      return button;
    });
    legend.replaceChildren(make("span", { class: experts > 16 ? "whole" : "" }, `Expert (${what}):`), ...buttons);
  };

  const drawPaths = () => {
    const make = report.element;
    find("chips").replaceChildren(...state.chosen.map((token, place) => {
      const box = make("span", { class: "swatch" });
      box.style.background = pathColour(place);
      const button = make("button", { type: "button", "aria-label": `Remove the path of token ${token}` }, box,
        make("span", { class: "name", dir: "ltr" }, `${token} ${sequence.tokens[token]}`), make("span", { class: "close" }, "×"));
      button.addEventListener("click", () => toggle(token));
      return button;
    }));
    find("paths-note").textContent = !state.chosen.length ? "Click tokens in the text or the grid to draw their paths."
      : (info.ordered ? "Lines join each layer's first choice; dots are all its experts" : "The run does not say which expert came first, so lines join all experts of a layer to all of the next; dots are the experts") +
        (weights ? ", larger with more weight" : "") + (showsRight() ? "; hollow dots are those the predictor missed." : ".");
    const svg = find("paths"), space = "http://www.w3.org/2000/svg";
    const node = (tag, attributes, text) => {
      const element = document.createElementNS(space, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (text !== undefined) element.textContent = text;
      return element;
    };
    const total = 1080, left = 46, row = Math.max(7, Math.min(26, 340 / experts)), top = 22, bottom = top + experts * row;
    const step = (total - left - 24) / Math.max(1, layers - 1);
    svg.setAttribute("viewBox", `0 0 ${total} ${bottom + 38}`);
    const x = (layer) => left + 8 + layer * step, y = (expert, shift) => top + (expert + 0.5) * row + shift;
    const parts = [], every = Math.max(1, Math.ceil(14 / row)), layerEvery = Math.max(1, Math.ceil(22 / step));
    for (let expert = 0; expert < experts; expert += every) {
      parts.push(node("line", { class: "line", x1: left, x2: total - 8, y1: y(expert, 0), y2: y(expert, 0) }));
      parts.push(node("text", { x: left - 10, y: y(expert, 4), "text-anchor": "end" }, expert));
    }
    for (let layer = 0; layer < layers; layer += layerEvery) parts.push(node("text", { x: x(layer), y: bottom + 18, "text-anchor": "middle" }, layer));
    parts.push(node("text", { x: total - 8, y: bottom + 34, "text-anchor": "end" }, "layer"), node("text", { x: left - 10, y: 12, "text-anchor": "end" }, "expert"));
    state.chosen.forEach((token, place) => {
      const colour = pathColour(place), shift = (place - (state.chosen.length - 1) / 2) * Math.min(3.2, row / 7);
      const curve = (layer, from, to) => {
        const middle = (x(layer) + x(layer + 1)) / 2;
        return `M${x(layer)} ${y(from, shift)}C${middle} ${y(from, shift)} ${middle} ${y(to, shift)} ${x(layer + 1)} ${y(to, shift)}`;
      };
      const joined = info.ordered ? 1 : k;
      let path = "";
      for (let layer = 0; layer + 1 < layers; layer++) {
        const here = chosenExperts(token, layer).slice(0, joined), next = chosenExperts(token, layer + 1).slice(0, joined);
        for (const from of here) for (const to of next) path += curve(layer, from, to);
      }
      parts.push(node("path", { d: path, fill: "none", stroke: colour, "stroke-width": info.ordered ? 2.2 : 1, "stroke-opacity": info.ordered ? 0.85 : 0.13 }));
      for (let layer = 0; layer < layers; layer++) {
        const guess = guessed(token, layer);
        chosenExperts(token, layer).forEach((expert, rank) => {
          const share = weights ? weight(token, layer, rank) / info.weight_scale : info.ordered ? (rank ? 0.35 : 1) : 0.4;
          const missed = showsRight() && !guess.includes(expert);
          const dot = node("circle", { cx: x(layer), cy: y(expert, shift), r: (1.6 + Math.min(row / 3.2, 5.5) * Math.sqrt(share)).toFixed(2),
            fill: missed ? "var(--paper)" : colour, stroke: missed ? colour : "var(--paper)", "stroke-width": missed ? 1.6 : 0.8 });
          dot.append(node("title", {}, describe(token, layer)));
          parts.push(dot);
        });
      }
    });
    svg.replaceChildren(...parts);
  };

  const fillNumbers = () => {
    const details = find("numbers");
    details.querySelector(".scroll")?.remove();
    if (!details.open) return;
    const rows = Array.from({ length: layers }, (_, layer) => {
      const own = chosenExperts(state.token, layer), guess = guessed(state.token, layer);
      return [layer, own.join(", "), weights ? own.map((_, place) => weight(state.token, layer, place).toFixed(2)).join(", ") : null,
        guess.length ? guess.join(", ") : null, guess.length ? `${own.filter((expert) => guess.includes(expert)).length} of ${k}` : null];
    });
    details.append(report.table([`layer (token ${state.token} ${sequence.tokens[state.token]})`, "experts", "weights", "guess", "right"], rows));
  };

  /* --- what the reader does --- */

  const all = () => { markTokens(); drawAxis(); drawGrid(); drawLegend(); drawPaths(); fillNumbers(); };

  const toggle = (token) => {
    const place = state.chosen.indexOf(token);
    if (place >= 0) state.chosen.splice(place, 1);
    else state.chosen = [...state.chosen, token].slice(-6);
    markTokens(); drawGrid(); drawPaths();
  };

  const moveTo = (token, layer) => {
    state.token = Math.max(0, Math.min(tokens - 1, token));
    state.layer = Math.max(0, Math.min(layers - 1, layer));
    const x = state.token * state.cell;
    if (x < view.scrollLeft || x + state.cell > view.scrollLeft + view.clientWidth) view.scrollLeft = x - view.clientWidth / 2;
    const box = find("tokens"), span = box.querySelector(`[data-token="${state.token}"]`);
    if (span.offsetTop - box.offsetTop < box.scrollTop || span.offsetTop - box.offsetTop + 30 > box.scrollTop + box.clientHeight) box.scrollTop = span.offsetTop - box.offsetTop - 60;
    if (box.contains(document.activeElement)) span.focus({ preventScroll: true });
    markTokens(); drawGrid(); fillNumbers();
  };

  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const token = Math.floor((event.clientX - box.left + view.scrollLeft) / state.cell);
    const layer = Math.floor((event.clientY - box.top - labelHeight()) / cellHeight);
    return token >= 0 && token < tokens && layer < layers ? { token, layer: Math.max(0, layer) } : null;
  };

  canvas.addEventListener("pointermove", (event) => { const at = cellAt(event); if (at) showTip(at.token, at.layer); else tip.hidden = true; });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => { const at = cellAt(event); if (at) { moveTo(at.token, at.layer); toggle(at.token); showTip(at.token, at.layer); } });
  canvas.addEventListener("blur", () => { tip.hidden = true; });
  view.addEventListener("scroll", () => { tip.hidden = true; requestAnimationFrame(drawGrid); });
  find("tokens").addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (!span) return;
    moveTo(Number(span.dataset.token), state.layer);
    toggle(state.token);
    span.focus({ preventScroll: true });
  });
  section.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, button, summary, .scroll") || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-tokens, 0], End: [tokens, 0] };
    if (event.key in moves) moveTo(state.token + moves[event.key][0], state.layer + moves[event.key][1]);
    else if (event.key === "Enter" || event.key === " ") toggle(state.token);
    else if (event.key === "Escape") { tip.hidden = true; return; }
    else return;
    event.preventDefault();
    showTip(state.token, state.layer);
    find("status").textContent = describe(state.token, state.layer);
  });
  find("sequence").addEventListener("change", (event) => load(Number(event.target.value)));
  find("back").addEventListener("click", () => load((state.place + info.sequences.length - 1) % info.sequences.length));
  find("on").addEventListener("click", () => load((state.place + 1) % info.sequences.length));
  find("zoom").addEventListener("input", (event) => {
    const middle = (view.scrollLeft + view.clientWidth / 2) / state.cell;
    state.cell = Number(event.target.value);
    drawAxis(); drawGrid();
    view.scrollLeft = middle * state.cell - view.clientWidth / 2;
  });
  find("predictor")?.addEventListener("change", (event) => { state.predictor = Number(event.target.value); all(); });
  find("right")?.addEventListener("change", (event) => { state.right = event.target.checked; all(); });
  find("numbers").addEventListener("toggle", fillNumbers);
  new ResizeObserver(() => { if (ids) drawGrid(); }).observe(view);
  report.journeysChanged = () => { if (ids) all(); };

  const groups = new Map();
  info.sequences.forEach((each, place) => {
    if (!groups.has(each.dataset)) groups.set(each.dataset, report.element("optgroup", { label: each.dataset }));
    const start = each.tokens.slice(0, 14).join("").trim().slice(0, 42);
    groups.get(each.dataset).append(report.element("option", { value: place, dir: "ltr" },
      `${each.sequence_id} · ${each.num_tokens} tokens · ${each.split.replace("_", ", ")} · ${start}`));
  });
  find("sequence").append(...groups.values());
  await load(Math.max(0, info.sequences.findIndex((each) => each.split === "test")));
};

report.ready.then(startJourneys).then(() => { document.documentElement.dataset.ready = "true"; });
