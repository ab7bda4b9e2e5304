// Several runs beside each other: their figures, and the keys of the configuration in which they differ.
"use strict";

function comparePanel(runs) {
  const figures = [
    ["steps", (run) => run.figures.step.toLocaleString()],
    ["loss", (run) => (run.figures.loss === null ? "not finite" : short(run.figures.loss, 5))],
    ["validation loss", (run) => short(run.figures.val_loss, 5)],
    ["tokens", (run) => short(run.figures.tokens)],
    ["tokens/s", (run) => short(run.figures.tokens / run.figures.up_s)],
    ["up", (run) => duration(run.figures.up_s)],
    ["workers lost", (run) => run.figures.died],
    ["steps lost", (run) => run.figures.lost_steps],
    ["to re-form, median", (run) => duration(run.figures.reform_s)],
    ["goodput", (run) => (run.goodput ? percent(run.goodput.now.goodput) : "–")],
    ["cost", (run) => (run.goodput && run.goodput.now.cost !== null ? short(run.goodput.now.cost) : "–")],
  ];
  const rows = runs.map((run, index) => [el("td", {}, swatch(hue(index)), ` ${run.name}`), el("td", {}, status(run)), ...figures.map(([, value]) => value(run))]);
  for (const row of rows) row[0].querySelector("i").style.cssText += ";display:inline-block;margin-right:6px";
  return [section("figures", "Figures", "", table(["run", "state", ...figures.map(([name]) => name)], rows, "figures of the runs")), () => {}];
}

function differencesPanel(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config.changed)))].sort();
  const usual = (key) => runs.map((run) => run.config.changed[key]).find(Boolean)[0];
  const value = (run, key) => shown(run.config.changed[key] ? run.config.changed[key][1] : usual(key));
  const differing = keys.filter((key) => new Set(runs.map((run) => value(run, key))).size > 1);
  const list = table(["key", ...runs.map((run) => run.name)], differing.map((key) => [el("td", {}, el("code", {}, key)), ...runs.map((run) => value(run, key))]), "differences of the configurations");
  return [section("differences", "Differences of the configurations", differing.length ? "" : "None.", differing.length ? list : null), () => {}];
}
