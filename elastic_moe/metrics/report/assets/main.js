// Puts the page together, draws it again when something is chosen, and follows a run that goes on.
"use strict";

const view = { axis: "step", smoothing: 0, log: false, layer: 0, worker: null, hidden: new Set() };
let page = JSON.parse(document.getElementById("data").textContent);

function onePanels(run) {
  const box = el("div");
  const panels = [[section("timeline", "The run at one look", "One bar per worker, in the rows of its node. Dashed lines: the membership changed; red areas: from a loss to the next committed step.", box), () => story(run, box)]];
  if (run.goodput) panels.push(goodputPanel(run));
  panels.push(curvesPanel([run], view, draw));
  const phases = phasesPanel(run);
  if (phases) panels.push(phases);
  if (run.experts) panels.push(expertsPanel(run, view, draw));
  if (run.decisions.count) panels.push(decisionsPanel(run));
  panels.push(checkpointsPanel(run));
  if (run.told.count) panels.push(eventsPanel(run));
  panels.push(setupPanel(run));
  return panels;
}

function severalPanels(runs) {
  return [comparePanel(runs), curvesPanel(runs, view, draw), ...runs.map((run) => {
    const box = el("div");
    return [section(`timeline-${runs.indexOf(run)}`, run.name, "", box), () => story(run, box)];
  }), differencesPanel(runs)];
}

function draw() {
  const at = scrollY, focused = focusPath();
  forgetCharts();
  const { runs } = page;
  const panels = runs.length === 1 ? onePanels(runs[0]) : severalPanels(runs);
  const links = panels.map(([panel]) => el("a", { href: `#${panel.id}` }, panel.querySelector("h2").textContent));
  const head = el("header", {}, el("h1", {}, runs.length === 1 ? runs[0].name : `${runs.length} runs`), runs.length === 1 ? status(runs[0]) : "",
    el("span.badge", { id: "fresh", hidden: !page.live, role: "status" }, page.live ? "live" : ""),
    el("button.plain", { id: "theme", type: "button", style: "margin-left:auto", onclick: changeTheme, "aria-label": "light or dark" }, isDark() ? "light" : "dark"));
  document.querySelector("main").replaceChildren(head, el("nav", { "aria-label": "panels" }, links), runs.length === 1 ? tiles(runs[0]) : "", ...panels.map(([panel]) => panel), footer());
  for (const [, fill] of panels) fill();
  echarts.connect("curves");
  scrollTo(0, at);
  focused?.();
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
}

/** How to find the focused control again after the page was drawn anew: it is the n-th of its panel. */
function focusPath() {
  const panel = document.activeElement?.closest?.("section, header");
  if (!panel) return null;
  const all = "button, select, input, summary, [tabindex]";
  const index = [...panel.querySelectorAll(all)].indexOf(document.activeElement);
  return () => (panel.id ? document.getElementById(panel.id) : document.querySelector("header"))?.querySelectorAll(all)[index]?.focus({ preventScroll: true });
}

function changeTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  draw();
}

function footer() {
  const made = Math.max(...page.runs.map((run) => run.made_s));
  return el("footer", {}, `Made by elastic_moe ${page.version}, ${clock(made)}. Charts: Apache ECharts ${echarts.version} (Apache-2.0).`);
}

/** Ask for the newest state now and then; the server says when nothing has changed. */
async function follow() {
  const badge = () => document.getElementById("fresh");
  try {
    const answer = await fetch(page.live.url, { cache: "no-cache", headers: page.live.tag ? { "If-None-Match": page.live.tag } : {} });
    if (answer.status === 200) {
      const tag = answer.headers.get("ETag");
      page = { ...(await answer.json()), live: { ...page.live, tag } };
      draw();
    } else if (answer.status !== 304) throw new Error(`status ${answer.status}`);
    badge().textContent = `live, ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    badge().textContent = `the server does not answer (${error.message}); trying again`;
  }
  setTimeout(follow, 1000 * page.live.every_s);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let width = innerWidth;
addEventListener("resize", () => { if ((innerWidth < 600) !== (width < 600)) { width = innerWidth; draw(); } });
draw();
if (page.live) setTimeout(follow, 1000 * page.live.every_s);
