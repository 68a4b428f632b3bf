/* Token journeys: what their parts share (data, state, words). Each part is a file of its own: journeys_text, _grid,
   _paths, _compare and _search; journeys_control comes last. Arrays are [token][layer][k], flat. */
"use strict";

const journeys = {
  state: { place: 0, token: 0, layer: 0, chosen: [], predictor: 0, view: "experts", expert: null, cell: 14, pinned: null, pinnedByReader: false },
  find: (id) => document.getElementById(`journey-${id}`),
  pathColour: (place) => report.journeys.path_colours[report.mode()][place % 6],
  letter: (place) => "abcdef"[place % 6],
};

/* --- data --- */

/* Makes the sequence at `place` the current one. Resolves to false where another was asked for meanwhile. */
journeys.read = async (place) => {
  const { num_layers: layers, num_experts: experts, top_k: k, predictors, has_weights: weighed } = report.journeys;
  const sequence = report.journeys.sequences[place];
  journeys.wanted = place;
  const bytes = await report.unpack(sequence.packed);
  if (place !== journeys.wanted) return false;
  journeys.state.place = place;
  const tokens = sequence.tokens.length, size = tokens * layers * k, idBytes = experts <= 256 ? 1 : 2;
  let at = 0;
  const takeIds = () => {
    const part = bytes.subarray(at, (at += size * idBytes));
    return idBytes === 1 ? part : Uint16Array.from({ length: size }, (_, i) => part[2 * i] + 256 * part[2 * i + 1]);
  };
  const ids = takeIds(), weights = weighed ? bytes.subarray(at, (at += size)) : null;
  Object.assign(journeys, { sequence, tokens, ids, weights, guesses: predictors.map(takeIds) });
  journeys.leads = journeys.findLeads();
  return true;
};

journeys.slot = (token, layer) => (token * report.journeys.num_layers + layer) * report.journeys.top_k;
journeys.own = (token, layer) => Array.from(journeys.ids.subarray(journeys.slot(token, layer), journeys.slot(token, layer) + report.journeys.top_k));
journeys.weight = (token, layer, rank) => (journeys.weights ? (journeys.weights[journeys.slot(token, layer) + rank] / 255) * report.journeys.weight_scale : null);
journeys.guess = (token, layer) => {
  if (!journeys.guesses.length) return [];
  return Array.from(journeys.guesses[journeys.state.predictor].subarray(journeys.slot(token, layer), journeys.slot(token, layer) + report.journeys.top_k));
};

/* The rank of the expert that gives each cell its colour: the first choice, or where the order is unknown the one of
   them that this sequence uses most at the layer, so that runs of one expert show. */
journeys.findLeads = () => {
  const { num_layers: layers, num_experts: experts, top_k: k, ordered } = report.journeys;
  const { ids, tokens } = journeys, leads = new Uint8Array(tokens * layers);
  if (ordered) return leads;
  const usage = new Uint32Array(layers * experts);
  ids.forEach((expert, i) => { usage[(Math.floor(i / k) % layers) * experts + expert]++; });
  for (let cell = 0; cell < leads.length; cell++) {
    const row = (cell % layers) * experts;
    for (let rank = 1; rank < k; rank++) if (usage[row + ids[cell * k + rank]] > usage[row + ids[cell * k + leads[cell]]]) leads[cell] = rank;
  }
  return leads;
};

/* --- what the colours answer --- */

/* Of each cell's k experts, how many the predictor named, or the pinned token chose too; null where colours are experts. */
journeys.countAnswers = () => {
  const { num_layers: layers, num_experts: experts, top_k: k } = report.journeys;
  const { state, ids, tokens } = journeys;
  journeys.answers = null;
  if (state.view === "experts") return;
  const answers = new Uint8Array(tokens * layers);
  if (state.view === "right") {
    const guesses = journeys.guesses[state.predictor];
    for (let cell = 0; cell < answers.length; cell++) {
      const first = cell * k;
      for (let i = first; i < first + k; i++) for (let j = first; j < first + k; j++) if (ids[i] === guesses[j]) { answers[cell]++; break; }
    }
  } else {
    const member = new Uint8Array(layers * experts);
    state.pinned.ids.forEach((expert, i) => { member[Math.floor(i / k) * experts + expert] = 1; });
    for (let i = 0; i < ids.length; i++) answers[Math.floor(i / k)] += member[(Math.floor(i / k) % layers) * experts + ids[i]];
  }
  journeys.answers = answers;
};

journeys.answerShare = (token) => {
  const { num_layers: layers, top_k: k } = report.journeys;
  let count = 0;
  for (let cell = token * layers; cell < (token + 1) * layers; cell++) count += journeys.answers[cell];
  return count / (layers * k);
};

/* Orange at none, pale at a little, blue at all. */
journeys.answerColour = (share) => (share < 0.2 ? `color-mix(in srgb, var(--wrong) ${Math.round(100 - 400 * share)}%, var(--part))`
  : `color-mix(in srgb, var(--right) ${Math.round((100 * (share - 0.2)) / 0.8)}%, var(--part))`);

/* --- words --- */

journeys.name = (token) => `“${journeys.sequence.tokens[token].trim() || journeys.sequence.tokens[token] || "∅"}”`;

journeys.describe = (token, layer) => {
  const own = journeys.own(token, layer), guess = journeys.guess(token, layer);
  const named = own.map((expert, rank) => `${expert}${journeys.weights ? ` (${journeys.weight(token, layer, rank).toFixed(2)})` : ""}`);
  const right = own.filter((expert) => guess.includes(expert)).length;
  return `Token ${token} ${journeys.name(token)}, layer ${layer}: ${own.length > 1 ? "experts" : "expert"} ${named.join(", ")}` +
    (guess.length ? `. ${report.journeys.predictors[journeys.state.predictor]} guessed ${guess.join(", ")}: ${right} of ${own.length} right` : "");
};

/* [0, 1, 2, 5] as "0–2, 5". */
journeys.ranges = (numbers, most = 6) => {
  const runs = [];
  for (const number of numbers) {
    if (runs.length && runs.at(-1)[1] === number - 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  const shown = runs.slice(0, most).map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
  return runs.length > most ? `${shown} and ${runs.length - most} more stretches` : shown;
};

journeys.swatch = (colour) => {
  const box = report.element("span", { class: "swatch" });
  box.style.background = colour;
  return box;
};
