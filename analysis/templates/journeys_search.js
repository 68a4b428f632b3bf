/* Search in the text of all journeys: matches may run over several tokens; upper and lower case are the same, and line
   ends and tabs count as blanks. */
"use strict";

journeys.search = { matches: [], at: -1, texts: null };

journeys.search.plain = (text) => text.replace(/[↵⇥␍]/g, " ").toLowerCase();

/* Per sequence its text, and the token at which each character stands. Made at the first search. */
journeys.search.prepare = () => {
  journeys.search.texts ??= report.journeys.sequences.map(({ tokens }) => {
    const parts = tokens.map(journeys.search.plain), owner = new Uint32Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    parts.forEach((part, token) => { owner.fill(token, at, (at += part.length)); });
    return { text: parts.join(""), owner };
  });
};

journeys.search.run = () => {
  const { search, state, find } = journeys, wanted = search.plain(find("search").value);
  const begins = wanted.length - wanted.trimStart().length, ends = wanted.trimEnd().length - 1; // blanks are matched, not marked
  search.prepare();
  search.matches = !wanted.trim() ? [] : search.texts.flatMap(({ text, owner }, place) => {
    const found = [];
    for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) found.push({ place, first: owner[at + begins], last: owner[at + ends] });
    return found;
  });
  const from = search.matches.findIndex(({ place, first }) => place > state.place || (place === state.place && first >= state.token));
  search.at = search.matches.length ? Math.max(0, from) : -1;
  return search.go();
};

/* Goes to the current match, in its sequence. */
journeys.search.go = async () => {
  const { search, state } = journeys;
  if (search.at < 0) { search.say(); journeys.text.mark(); journeys.grid.mark(); return; }
  const { place, first } = search.matches[search.at];
  if (place !== state.place && !(await journeys.load(place, first))) return;
  search.say();
  journeys.moveTo(first, state.layer);
};

journeys.search.step = (by) => {
  const { search } = journeys;
  if (!search.matches.length) return undefined;
  search.at = (search.at + by + search.matches.length) % search.matches.length;
  return search.go();
};

journeys.search.say = () => {
  const { search, find } = journeys, sequences = new Set(search.matches.map(({ place }) => place)).size;
  find("matches").textContent = !find("search").value.trim() ? "" : search.at < 0 ? "no match"
    : `${search.at + 1} of ${search.matches.length} ${search.matches.length === 1 ? "match" : "matches"} in ${sequences} ${sequences === 1 ? "sequence" : "sequences"}`;
};

/* The found tokens of the current sequence; true at those of the current match. */
journeys.search.inSequence = () => {
  const found = new Map();
  journeys.search.matches.forEach(({ place, first, last }, number) => {
    if (place !== journeys.state.place) return;
    for (let token = first; token <= last; token++) found.set(token, found.get(token) || number === journeys.search.at);
  });
  return found;
};
