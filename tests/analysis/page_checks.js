/* What the browser tests ask of a page as a whole; each function returns what is wrong. */

/* Text nodes whose contrast with what is behind them is below `wanted`, or below 3 where they are large, and how many
   were looked at. Numbers in the cells of plotly's heat maps are left to `cellColours`. */
const faintText = (wanted) => {
  const sample = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    sample.clearRect(0, 0, 1, 1);
    sample.fillStyle = colour;
    sample.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = sample.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (front, back) => front.slice(0, 3).map((channel, i) => front[3] * channel + (1 - front[3]) * back[i]);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at && layers.at(-1)?.[3] !== 1; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((back, front) => over(front, back), [255, 255, 255]);
  };
  const linear = (channel) => (channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => rgb.reduce((sum, channel, i) => sum + linear(channel / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const faint = new Map(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim(), style = getComputedStyle(element);
    if (!text || element.closest("script, style, .heatmaplayer, .heatmap-label")) continue;
    if (!element.getClientRects().length || style.visibility === "hidden") continue;
    const back = behind(element), front = over(rgba(element.ownerSVGElement ? style.fill : style.color), back);
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b), contrast = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    seen++;
    if (contrast < (large ? 3 : wanted)) faint.set(`${element.tagName} ${element.getAttribute("class")} ${contrast.toFixed(2)}`, text.slice(0, 40));
  }
  return [seen, [...faint].map((each) => each.join(": "))];
};

const structure = () => {
  const wrong = [], all = (selector) => [...document.querySelectorAll(selector)];
  const ids = all("[id]").map((element) => element.id);
  wrong.push(...ids.filter((id, place) => ids.indexOf(id) !== place).map((id) => `id ${id} twice`));
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const element of all(`[${attribute}]`)) {
      for (const id of element.getAttribute(attribute).split(" ")) if (!document.getElementById(id)) wrong.push(`${attribute} ${id} leads nowhere`);
    }
  }
  for (const link of all("a")) if (!document.querySelector(link.getAttribute("href"))) wrong.push(`link ${link.getAttribute("href")} leads nowhere`);
  let before = 0;
  for (const heading of all("h1, h2, h3, h4, h5, h6")) {
    const level = Number(heading.tagName[1]);
    if (level > before + 1) wrong.push(`${heading.tagName} ${heading.textContent} after h${before}`);
    before = level;
  }
  for (const one of ["h1", "main", "nav"]) if (all(one).length !== 1) wrong.push(`${all(one).length} of ${one}`);
  for (const table of all("table")) if (!table.querySelector("th[scope]")) wrong.push(`table without headers in ${table.closest("section").id}`);
  for (const element of all("[tabindex]")) if (element.tabIndex > 0) wrong.push(`tabindex ${element.tabIndex}`);
  if (document.documentElement.lang !== "en") wrong.push("no language");
  return wrong;
};

/* Marks the focused element as the next one walked, and says whether its focus can be seen. */
const walk = () => {
  const at = document.activeElement, style = getComputedStyle(at);
  window.walked = (window.walked ?? 0) + 1;
  at.dataset.walked ??= String(window.walked);
  const seen = (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 1) || style.boxShadow !== "none";
  return seen ? null : at.outerHTML.slice(0, 120);
};
const walkedInOrder = () => [...document.querySelectorAll("[data-walked]")].map((element) => Number(element.dataset.walked));
const unreached = () => [...document.querySelectorAll("a, button, select, input, summary, [tabindex='0']")]
  .filter((element) => element.getClientRects().length && !element.dataset.walked).map((element) => element.outerHTML.slice(0, 120));

/* What sticks out to the right of a window, without standing in a box that scrolls. */
const stickingOut = () => [...document.querySelectorAll("main *")]
  .filter((element) => element.getBoundingClientRect().right > window.innerWidth + 1 && !element.closest(".sideways, .open, .scroll, .window"))
  .map((element) => element.outerHTML.slice(0, 120));

/* Tag names of everything outside figures, without those whose number depends on the text: line ends and table rows. */
const elements = () => [...document.querySelectorAll("body *:not(.plot *):not(#journey-paths *):not(br):not(td):not(tr)")].map((element) => element.tagName);
/* Numbers along the axes, and titles of panels, that reach into the next one of their line. */
const overlapping = () => [...document.querySelectorAll(".plot")].flatMap((plot) => {
  const lines = [...[...plot.querySelectorAll("[class*='xtick']")].map((tick) => tick.parentElement), plot.querySelector(".infolayer")].filter(Boolean);
  return [...new Set(lines)].flatMap((line) => {
    const clip = (element) => element.closest(".annotation-text-g")?.querySelector("clipPath rect, rect.bg");
    const boxes = [...line.querySelectorAll("[class*='xtick'] text, .annotation-text-g")].map((text) => {
      const { left, top, height } = text.getBoundingClientRect();
      const width = (clip(text) ?? text).getBoundingClientRect().width;
      return { left, right: left + width, row: Math.round(top + height / 2), text: text.textContent };
    }).sort((a, b) => a.row - b.row || a.left - b.left);
    return boxes.filter((box, place) => place && boxes[place - 1].row === box.row && boxes[place - 1].right > box.left + 1)
      .map((box) => `${plot.dataset.figure}: ${box.text}`);
  });
});
const cellColours = () => [...new Set([...document.querySelectorAll(".heatmap-label text")].map((text) => getComputedStyle(text).fill))].sort();
const tallPlots = (most) => [...document.querySelectorAll(".main-svg")].filter((plot) => plot.getBoundingClientRect().height > most).length;
const widePlots = (most) => [...document.querySelectorAll(".main-svg")].filter((plot) => plot.getBoundingClientRect().width > most).length;
