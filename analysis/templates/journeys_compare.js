/* Two tokens side by side: A is pinned and stays, also when another sequence is read; B is the current token. */
"use strict";

journeys.compare = { CLOSEST: 6 };

/* Keeps what a later comparison needs of a token, so that A may come from another sequence. */
journeys.compare.pin = (token, byReader) => {
  const { num_layers: layers, top_k: k } = report.journeys, { state, ids, weights, sequence } = journeys;
  const part = [journeys.slot(token, 0), journeys.slot(token, 0) + layers * k];
  state.pinned = { place: state.place, token, ids: ids.slice(...part), weights: weights?.slice(...part) ?? null, name: journeys.name(token), dataset: sequence.dataset };
  state.pinnedByReader = byReader;
};

/* Something telling to begin with: the first word that comes twice, else two neighbours. */
journeys.compare.suggest = () => {
  const { sequence, tokens } = journeys, seen = new Map();
  for (let token = 0; token < tokens; token++) {
    const word = sequence.tokens[token].trim().toLowerCase();
    if (!/^\p{L}{2,}$/u.test(word)) continue;
    if (seen.has(word) && token - seen.get(word) > 1) return [seen.get(word), token];
    if (!seen.has(word)) seen.set(word, token);
  }
  return [4, 5].every((token) => token < tokens) ? [4, 5] : [0, tokens - 1];
};

journeys.compare.experts = (layer) => {
  const { top_k: k } = report.journeys, { state } = journeys;
  const a = Array.from(state.pinned.ids.subarray(layer * k, (layer + 1) * k)), b = journeys.own(state.token, layer);
  const shared = a.filter((expert) => b.includes(expert));
  return { shared, a: [...shared, ...a.filter((expert) => !shared.includes(expert))], b: [...shared, ...b.filter((expert) => !shared.includes(expert))] };
};

journeys.compare.sentence = (counts) => {
  const { num_layers: layers, num_experts: experts, top_k: k } = report.journeys, { state } = journeys;
  const total = counts.reduce((sum, count) => sum + count, 0), chance = `two unrelated choices would share ${((100 * k) / experts).toFixed(1)} %`;
  if (state.pinned.place === state.place && state.pinned.token === state.token) return "A is the current token itself: step to another one to compare.";
  const other = state.pinned.place === state.place ? "" : ` of another sequence (${state.pinned.dataset})`;
  const where = (wanted) => journeys.ranges(counts.flatMap((count, layer) => (count === wanted ? [layer] : [])));
  const parts = counts.findIndex((count) => count < k), alike = where(k), apart = where(0);
  return `A, ${state.pinned.name} at ${state.pinned.token}${other}, and B, ${journeys.name(state.token)} at ${state.token}, share ${total} of ${layers * k} experts (${((100 * total) / (layers * k)).toFixed(1)} %; ${chance}). ` +
    (parts < 0 ? "They never part." : parts === 0 ? "They part at once, at layer 0." : `They part first at layer ${parts}.`) +
    (alike && parts >= 0 ? ` All the same in layers ${alike}.` : "") + (apart ? ` Nothing shared in layers ${apart}.` : "");
};

journeys.compare.draw = () => {
  const { num_layers: layers, num_experts: experts, top_k: k } = report.journeys;
  const { state, find } = journeys, make = report.element, palette = report.colours[report.mode()];
  const sets = Array.from({ length: layers }, (_, layer) => journeys.compare.experts(layer)), counts = sets.map(({ shared }) => shared.length);
  find("compare-note").textContent = journeys.compare.sentence(counts);
  const chip = (expert, shared) => {
    const span = make("span", { class: shared ? "expert shared" : "expert" }, String(expert));
    span.style.borderBottomColor = palette[expert];
    return span;
  };
  const row = (who, text, side) => make("tr", {}, make("th", { scope: "row" }, make("b", {}, who), " ", make("span", { class: "name", dir: "ltr" }, text)),
    ...sets.map((set) => make("td", {}, ...set[side].map((expert) => chip(expert, set.shared.includes(expert))))));
  const agreement = make("tr", { class: "agreement" }, make("th", { scope: "row" }, `shared, of ${k}`), ...counts.map((count) => {
    const bar = make("i", { "aria-hidden": "true" });
    bar.style.height = `${(24 * count) / k}px`;
    return make("td", {}, bar, make("span", {}, String(count)));
  }));
  find("compare").replaceChildren(
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), ...counts.map((_, layer) => make("th", { scope: "col" }, String(layer))))),
    make("tbody", {}, row("A", `${state.pinned.token} ${state.pinned.name}`, "a"), row("B", `${state.token} ${journeys.name(state.token)}`, "b"), agreement));
  find("compare").classList.toggle("wide", experts > 99);
};

/* The tokens of this sequence that share most experts with A, best first, as buttons that step to them. */
journeys.compare.closest = () => {
  const { num_layers: layers, num_experts: experts, top_k: k } = report.journeys, { state, tokens, ids, find, sequence } = journeys;
  const member = new Uint8Array(layers * experts), make = report.element;
  state.pinned.ids.forEach((expert, i) => { member[Math.floor(i / k) * experts + expert] = 1; });
  const counts = new Uint32Array(tokens), size = layers * k;
  for (let i = 0; i < ids.length; i++) counts[Math.floor(i / size)] += member[Math.floor((i % size) / k) * experts + ids[i]];
  const order = Array.from(counts.keys()).filter((token) => !(state.pinned.place === state.place && token === state.pinned.token)).sort((a, b) => counts[b] - counts[a] || a - b);
  find("closest").replaceChildren(make("span", {}, "Closest to A in this text:"), ...order.slice(0, journeys.compare.CLOSEST).map((token) => {
    const share = `${((100 * counts[token]) / size).toFixed(0)} %`;
    const button = make("button", { type: "button", "aria-label": `Compare with token ${token} ${sequence.tokens[token]}, ${share} shared` }, make("span", { class: "name", dir: "ltr" }, `${token} ${sequence.tokens[token]}`), make("span", { class: "share" }, share));
    button.addEventListener("click", () => journeys.moveTo(token, state.layer));
    return button;
  }));
};
