/* The current sequence as text: one span a token. Stepping touches only the spans that change. */
"use strict";

journeys.text = { spans: [], marked: new Set() };

journeys.text.write = () => {
  const { sequence, tokens, text, find } = journeys;
  text.spans = sequence.tokens.map((token, place) => report.element("span",
    { class: "token", role: "option", "aria-selected": "false", "data-token": place, tabindex: "-1", dir: "ltr" }, token || "∅"));
  text.marked.clear();
  find("tokens").replaceChildren(...text.spans.flatMap((span) => (span.textContent.includes("↵") ? [span, document.createElement("br")] : [span])));
  find("tokens").scrollTop = 0;
  const left = sequence.num_tokens - tokens;
  find("note").textContent = [
    `Sequence ${sequence.sequence_id} of ${sequence.dataset}, key ${sequence.sequence_key}, ${sequence.split.replace("_", ", ")} split: ` +
      (left > 0 ? `the first ${tokens} of its ${sequence.num_tokens} tokens.` : `${tokens} tokens.`),
    journeys.guesses.length && sequence.split !== "test" ? "Predictors may have been fitted on this split: judge them by test sequences." : "",
  ].join(" ");
};

/* Brings current, chosen, pinned and found tokens up to date. */
journeys.text.mark = () => {
  const { state, text } = journeys, found = journeys.search.inSequence();
  const pinned = state.pinned?.place === state.place ? [state.pinned.token] : [];
  const now = new Set([state.token, ...state.chosen, ...pinned, ...found.keys()]);
  for (const token of new Set([...text.marked, ...now])) {
    const span = text.spans[token], place = state.chosen.indexOf(token);
    span.classList.toggle("current", token === state.token);
    span.classList.toggle("chosen", place >= 0);
    span.classList.toggle("pinned", pinned.includes(token));
    span.classList.toggle("found", found.has(token));
    span.classList.toggle("match", found.get(token) === true);
    span.setAttribute("aria-selected", String(place >= 0));
    span.tabIndex = token === state.token ? 0 : -1;
    span.style.background = place >= 0 ? journeys.pathColour(place) : "";
  }
  text.marked = now;
};

/* Underlines each token with the share of its experts that the predictor named, or that the pinned token shares. */
journeys.text.colour = () => {
  journeys.text.spans.forEach((span, token) => {
    span.style.borderBottomColor = journeys.answers ? journeys.answerColour(journeys.answerShare(token)) : "";
  });
};

/* Scrolls the text so that the current token is seen, the page itself staying where it is. */
journeys.text.reveal = () => {
  const box = journeys.find("tokens"), span = journeys.text.spans[journeys.state.token];
  const top = span.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + 30 > box.scrollTop + box.clientHeight) box.scrollTop = top - 60;
};
