// Elements, numbers, colours and charts: what all panels of the report use.
"use strict";

/** An element. `what` is a tag with classes ("div.bar"); properties are set, children appended. */
function el(what, properties = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "style") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const fixed = (value, digits) => Number(value.toPrecision(digits)).toString();

/** A number in few characters: 1234567 -> 1.23M. */
function short(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [limit, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= 0.9995 * limit) return fixed(value / (sign === "k" ? 1e3 : limit), digits) + sign;
  }
  if (size !== 0 && size < 1e-3) return String(Number(value.toPrecision(digits)).toExponential()).replace("e+", "e");
  return fixed(value, size >= 1000 ? 4 : digits);
}

/** Seconds in their two largest units. */
function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${fixed(seconds, 2)} s`;
  const whole = Math.round(seconds);
  for (const [size, name, smaller, small] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole >= size) {
      const rest = Math.floor((whole % size) / smaller);
      return `${Math.floor(whole / size)} ${name}` + (rest ? ` ${rest} ${small}` : "");
    }
  }
  return `${whole} s`;
}

const percent = (share, digits = 3) => (Number.isFinite(share) ? `${fixed(100 * share, digits)} %` : "–");
const count = (number, noun) => `${number || "no"} ${noun}${number === 1 ? "" : "s"}`;
const clock = (seconds) => new Date(1000 * seconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
const brief = (id) => (id || "").slice(0, 8);
const escaped = (text) => String(text).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);

/** Wall clock at a time of the page, which leaves out the time between two starts of a run. */
function wall(run, elapsed) {
  let at = run.clock.start + elapsed;
  for (const [begin, end] of run.clock.cuts) if (at > begin) at += end - begin;
  return at;
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The colour of the n-th of several things that have no order, such as workers or runs. */
function hue(index, dark = isDark()) {
  const base = [212, 28, 145, 275, 350, 185, 48, 320, 95, 235, 12, 165];
  const round = Math.floor(index / base.length);
  const light = (dark ? 62 : 46) + [0, 14, -12][round % 3];
  return `hsl(${(base[index % base.length] + 17 * Math.floor(round / 3)) % 360} ${round % 2 ? 45 : 62}% ${light}%)`;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const charts = new Map(); // element -> chart

/** A chart in a new element of this height, which a screen reader knows by `label`. */
function chart(parent, height, label, option) {
  const place = el("div.chart", { role: "img", "aria-label": label, style: `height:${height}px` });
  parent.append(place);
  const made = echarts.init(place, null, { renderer: "canvas" });
  made.setOption(option);
  charts.set(place, made);
  return made;
}

function forgetCharts() {
  for (const made of charts.values()) made.dispose();
  charts.clear();
}

addEventListener("resize", () => charts.forEach((made) => made.resize()));

const narrow = () => innerWidth < 600;

/** What all charts have in common. */
function common(more) {
  return {
    animation: false,
    backgroundColor: "transparent",
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: style("text") },
    ...more,
  };
}

function tooltip(more) {
  return {
    confine: true,
    backgroundColor: style("card"),
    borderColor: style("line"),
    textStyle: { color: style("text"), fontSize: 13 },
    extraCssText: "max-width:min(340px,86vw);white-space:normal;box-shadow:0 2px 10px rgba(0,0,0,.18)",
    ...more,
  };
}

function axis(more) {
  return {
    axisLine: { lineStyle: { color: style("line") } },
    axisTick: { show: false },
    splitLine: { lineStyle: { color: style("grid") } },
    axisLabel: { color: style("dim"), fontSize: 12, hideOverlap: true, ...(more.axisLabel || {}) },
    nameTextStyle: { color: style("dim") },
    ...Object.fromEntries(Object.entries(more).filter(([name]) => name !== "axisLabel")),
  };
}

/** A line's swatch, an area's, or a sign, for a legend. */
function swatch(colour, kind = "") {
  return el(`i.key${kind ? `.${kind}` : ""}`, { style: `background:${colour}` });
}

const STEPS_OF_TIME = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];

/** Round times on the axes of a chart, whatever part of it is shown. */
function niceTimes(made, indices, end) {
  const set = (from, to) => {
    const rough = (to - from) / (narrow() ? 4 : 9);
    const interval = rough < 1 ? undefined : STEPS_OF_TIME.find((step) => step >= rough) || 604800 * Math.ceil(rough / 604800);
    made.setOption({ xAxis: indices.map(() => ({ interval })) });
  };
  set(0, end);
  made.on("datazoom", () => {
    const { start, end: stop } = made.getOption().dataZoom[0];
    set((start * end) / 100, (stop * end) / 100);
  });
}

/** Buttons of which one is chosen. */
function choice(label, options, chosen, act) {
  const group = el("div.choice", { role: "group", "aria-label": label });
  for (const [value, text] of options) {
    group.append(el("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => act(value) }, text));
  }
  return group;
}

/** A table that scrolls inside its frame. Cells are texts, or elements. */
function table(head, rows, label) {
  const cell = (value) => (value instanceof Node ? value : el("td", {}, String(value)));
  return el("div.scroll", { tabIndex: 0, role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell))))));
}

function section(id, title, sub, ...children) {
  return el("section", { id }, el("h2", {}, title), sub ? el("p.sub", {}, sub) : null, ...children);
}

/** Value of `ys` at `x`, between the points of a growing `xs`; null outside or next to a gap. */
function between(xs, ys, x) {
  if (!xs.length || x < xs[0]) return xs.length ? ys[0] : null;
  let low = 0, high = xs.length - 1;
  if (x >= xs[high]) return ys[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  if (ys[low] === null || ys[high] === null) return null;
  return ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / (xs[high] - xs[low] || 1);
}
