// The head of the page, and the panels with figures: time by cause, decisions, checkpoints, events, configuration.
"use strict";

const CAUSE_COLOURS = { training: "s-training", imbalance: "norm", stragglers: "s-draining", checkpoint: "loss", evaluation: "speed", start: "s-starting", waiting: "s-paused", recovering: "s-silent", redone: "val" };
const CAUSE_WORDS = { redone: "made again", start: "starting", checkpoint: "held by a checkpoint", recovering: "recovering", waiting: "waiting for workers", stragglers: "stragglers" };
const causeColour = (cause) => style(CAUSE_COLOURS[cause] || "other");

function status(run) {
  if (run.goes_on) return el("span.badge.live", {}, "goes on");
  if (!run.end) return el("span.badge.bad", {}, `no sign since ${clock(run.last_s)}; its end was not recorded`);
  const whole = /all steps/.test(run.end.reason) || !run.end.reason;
  return el(`span.badge${run.end.event === "failed" ? ".bad" : whole ? ".good" : ""}`, {}, run.end.event === "failed" ? `failed: ${run.end.reason}` : whole ? "finished" : `stopped: ${run.end.reason}`);
}

function tile(value, text, title = "") {
  return el("div.tile", { title }, el("b", {}, value), el("span", {}, text));
}

function tiles(run) {
  const { figures, goodput } = run;
  const planned = run.config.changed["run.steps"]?.[1];
  const made = [
    tile(figures.step.toLocaleString(), planned && planned > figures.step ? `of ${planned.toLocaleString()} steps` : "steps committed"),
    tile(figures.loss === null ? "not finite" : short(figures.loss, 4), figures.val_loss === null ? "loss" : `loss; validation ${short(figures.val_loss, 4)}`),
    tile(short(figures.tokens), `tokens, ${short(figures.tokens / figures.up_s)} a second`),
    tile(duration(figures.up_s), "up", "wall-clock time from the first membership to the last step, without the time between two starts"),
    tile(String(figures.workers), `workers at the end; ${count(figures.died, "worker")} lost`),
    tile(figures.lost_steps ? String(figures.lost_steps) : "none", "committed steps lost"),
  ];
  if (figures.reform_s !== null) made.push(tile(duration(figures.reform_s), `to re-form, median of ${figures.views - 1}`));
  if (goodput) {
    made.push(tile(percent(goodput.now.goodput), "goodput: time of workers in training", "the share of all workers' seconds that made steps for the first time"));
    if (goodput.now.cost !== null && goodput.now.cost !== undefined) made.push(tile(short(goodput.now.cost, 4), "cost, by price per hour"));
  }
  return el("div.tiles", {}, made);
}

function goodputPanel(run) {
  const { now, time, worker_s: byCause } = run.goodput;
  const causes = Object.entries(now.worker_s).filter(([, seconds]) => seconds > 0).sort((a, b) => b[1] - a[1]);
  const total = now.total_s || causes.reduce((sum, [, seconds]) => sum + seconds, 0);
  const word = (cause) => CAUSE_WORDS[cause] || cause;
  const stack = el("div.stack", { role: "img", "aria-label": causes.map(([cause, s]) => `${word(cause)} ${percent(s / total)}`).join(", ") },
    causes.map(([cause, seconds]) => el("i", { style: `width:${(100 * seconds) / total}%;background:${causeColour(cause)}`, title: `${word(cause)}: ${percent(seconds / total)}` })));
  const rows = causes.map(([cause, seconds]) => [el("td", {}, swatch(causeColour(cause)), ` ${word(cause)}`), duration(seconds), percent(seconds / total)]);
  for (const key of rows) key[0].querySelector("i").style.cssText += ";display:inline-block;margin-right:6px";
  const facts = [
    `Effective training time ratio ${percent(now.ettr)}`, `${count(now.failures, "failure")}`,
    now.mttr_s ? `mean time to recover ${duration(now.mttr_s)}` : "", now.mtbf_s ? `mean time between failures ${duration(now.mtbf_s)}` : "",
  ].filter(Boolean).join(" · ");
  const left = el("div", {}, table(["cause", "workers' time", "share"], rows, "time of workers by cause"));
  const right = el("div", {}, el("h3", {}, "Share of each stretch of time"));
  const panel = section("time", "Where the time went", `Every second of every worker, from its placement to its end, by cause. ${facts}.`, stack, el("div.grid", {}, left, right));
  return [panel, () => time.length > 2 ? shareChart(run, right, causes.map(([cause]) => cause), time, byCause, word) : right.remove()];
}

function shareChart(run, box, causes, time, byCause, word) {
  const start = run.clock.start;
  const elapsed = time.map((at) => at - start - run.clock.cuts.reduce((cut, [b, e]) => cut + Math.max(Math.min(at, e) - b, 0), 0));
  const grown = time.slice(1).map((_, i) => causes.reduce((sum, cause) => sum + Math.max(byCause[cause][i + 1] - byCause[cause][i], 0), 0));
  chart(box, 240, "Share of the workers' time by cause over the run", common({
    grid: { left: 46, right: 12, top: 10, bottom: 30 },
    xAxis: axis({ type: "value", min: "dataMin", max: "dataMax", splitLine: { show: false }, axisLabel: { formatter: (value) => duration(value) } }),
    yAxis: axis({ type: "value", max: 100, axisLabel: { formatter: (value) => `${value} %` } }),
    tooltip: tooltip({ trigger: "axis", order: "valueDesc", formatter: (items) => [duration(items[0].axisValue), ...items.filter((item) => item.value[1] > 0.05).map((item) => `${item.marker}${item.seriesName} ${fixed(item.value[1], 3)} %`)].join("<br>") }),
    series: causes.map((cause) => ({
      type: "line", name: word(cause), stack: "all", step: "end", symbol: "none", color: causeColour(cause), lineStyle: { width: 0 }, areaStyle: { opacity: 0.9 },
      data: grown.map((sum, i) => [elapsed[i + 1], sum ? (100 * Math.max(byCause[cause][i + 1] - byCause[cause][i], 0)) / sum : null]),
    })),
  }));
}

const PHASES = [["compute", "loss"], ["reduce", "val"], ["mirror", "speed"], ["vote", "bad"], ["apply", "norm"], ["publish", "lr"]];

/** Mean of the values that are known. */
function meanOf(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 0;
}

function phasesPanel(run) {
  const phases = PHASES.filter(([phase]) => run.curves.y[`${phase}_s`]);
  if (!phases.length) return null;
  const means = phases.map(([phase]) => meanOf(run.curves.y[`${phase}_s`].mean));
  const whole = means.reduce((sum, mean) => sum + mean, 0);
  const box = el("div");
  const legend = el("div.legend", {}, phases.map(([phase, colour], i) => el("span", {}, swatch(style(colour)), `${phase} ${duration(means[i])}, ${percent(means[i] / whole)}`)));
  const panel = section("phases", "Step time by phase", `On the rank that reports: ${duration(whole)} on average. Waiting for slower ranks counts where it happens: in “compute” at the exchanges with the experts, else in the exchange that follows.`, legend, box);
  return [panel, () => chart(box, 230, `Step time by phase over the steps: ${phases.map(([phase], i) => `${phase} ${percent(means[i] / whole)}`).join(", ")}`, common({
    grid: { left: 58, right: 12, top: 12, bottom: 40 },
    xAxis: axis({ type: "value", min: "dataMin", max: "dataMax", name: "steps", nameLocation: "middle", nameGap: 24, splitLine: { show: false }, axisLabel: { formatter: (value) => short(value) } }),
    yAxis: axis({ type: "value", splitNumber: 4, axisLabel: { formatter: (value) => duration(value) } }),
    tooltip: tooltip({ trigger: "axis", formatter: (items) => [`step ${Math.round(items[0].axisValue).toLocaleString()}`, ...[...items].reverse().map((item) => `${item.marker}${item.seriesName} ${duration(item.value[1])}`)].join("<br>") }),
    series: phases.map(([phase, colour]) => ({
      type: "line", name: phase, stack: "all", symbol: "none", color: style(colour), lineStyle: { width: 0 }, areaStyle: { opacity: 0.85 },
      data: run.curves.x.step.map((step, i) => [step, run.curves.y[`${phase}_s`].mean[i]]),
    })),
  }))];
}

function decisionsPanel(run) {
  const { count: number, rows } = run.decisions;
  const box = el("div");
  const mean = (key) => rows.reduce((sum, row) => sum + row[key], 0) / rows.length;
  const list = table(["step", "expected ms a step", "measured ms a step", "expected cost ms", "took ms", "MiB moved", "steps measured"],
    [...rows].reverse().map((row) => [row.step.toLocaleString(), short(row.expected_ms), short(row.measured_ms), short(row.cost_ms), short(row.took_ms), short(row.mib), row.steps.toLocaleString()]), "changes of placement");
  const panel = section("decisions", "Placement decisions", `${count(number, "change")} of placement for the load${number > rows.length ? `, the last ${rows.length} shown` : ""}. Expected of each: ${short(mean("expected_ms"))} ms a step on average; measured: ${short(mean("measured_ms"))} ms.`,
    el("div.legend", {}, el("span", {}, swatch(style("loss")), "expected gain"), el("span", {}, swatch(style("good")), "measured gain")), box, el("details", {}, el("summary", {}, "all values"), list));
  return [panel, () => {
    const bars = (name, key, colour) => ({ type: "bar", name, color: style(colour), barGap: "10%", barMaxWidth: 14, data: rows.map((row) => row[key]) });
    chart(box, 210, "Expected and measured gain of the changes of placement", common({
      grid: { left: 52, right: 12, top: 14, bottom: 40 },
      xAxis: axis({ type: "category", data: rows.map((row) => row.step.toLocaleString()), name: "step of the change", nameLocation: "middle", nameGap: 24 }),
      yAxis: axis({ type: "value", name: "ms a step", nameLocation: "end", nameGap: 4, splitNumber: 4, nameTextStyle: { color: style("dim"), align: "left" } }),
      tooltip: tooltip({ trigger: "axis", axisPointer: { type: "shadow" }, formatter: (items) => `step ${items[0].name}<br>` + items.map((item) => `${item.marker}${item.seriesName} ${short(item.value)} ms a step`).join("<br>") }),
      series: [bars("expected", "expected_ms", "loss"), bars("measured", "measured_ms", "good")],
    }));
  }];
}

function checkpointsPanel(run) {
  const { count: number, rows, trouble } = run.checkpoints;
  const troubles = Object.entries(trouble).map(([kind, times]) => `${kind.replaceAll("_", " ")}: ${times}`).join(", ");
  const sub = `${count(number, "checkpoint")} complete${number > rows.length ? `, the last ${rows.length} listed` : ""}. ${troubles || "None failed."}`;
  return [section("checkpoints", "Checkpoints", sub, rows.length ? table(["step", "at", "size MiB", "files", "complete after"],
    [...rows].reverse().map((row) => [row.step.toLocaleString(), duration(row.at), short(row.mib), row.shards, row.took_s === null ? "–" : duration(row.took_s)]), "checkpoints") : null), () => {}];
}

function eventsPanel(run) {
  const { count: number, rows } = run.told;
  return [section("events", "Events", number > rows.length ? `The last ${rows.length} of ${number.toLocaleString()}.` : "",
    table(["at", "event"], [...rows].reverse().map(([at, wallClock, level, line]) => [el("td", { title: clock(wallClock) }, duration(at)), el(`td.text.level-${level}`, {}, line)]), "events")), () => {}];
}

const shown = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));

function setupPanel(run) {
  const { config, start } = run;
  const parts = [];
  if (start.command) parts.push(el("h3", {}, "Command"), el("pre.wrap", {}, el("code", {}, start.command.map(quoted).join(" "))));
  const versions = Object.entries(start.versions || {});
  if (versions.length) parts.push(el("h3", { style: "margin-top:14px" }, "Versions"), el("p.sub", {}, [...versions.map(([name, version]) => `${name} ${version}`), start.machine || ""].filter(Boolean).join(" · ")));
  const changed = Object.entries(config.changed).sort();
  if (changed.length) {
    parts.push(el("h3", { style: "margin-top:14px" }, "Keys that are not at their default"),
      table(["key", "value", "default"], changed.map(([key, [usual, value]]) => [el("td", {}, el("code", {}, key)), el("td.text", {}, shown(value)), el("td.text", {}, shown(usual))]), "configuration"));
  }
  if (config.text) parts.push(el("details", {}, el("summary", {}, "the whole configuration"), el("pre", { tabIndex: 0 }, el("code", {}, config.text))));
  return [section("setup", "Configuration, versions, command", parts.length ? "" : "Not recorded.", parts), () => {}];
}

const quoted = (part) => (/^[\w@%+=:,./-]+$/.test(part) ? part : `'${part.replaceAll("'", "'\\''")}'`);
