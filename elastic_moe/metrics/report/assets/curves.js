// The curves of one run, or of several, over steps, tokens, time or cost.
"use strict";

const AXES = [["step", "steps"], ["tokens", "tokens"], ["time", "time"], ["cost", "cost"]];
const CURVES = [ // key, title, colour, logarithmic by choice, high
  ["loss", "Loss", "loss", true, true],
  ["tokens_per_s", "Throughput", "speed", false, false],
  ["lr", "Learning rate", "lr", false, false],
  ["grad_norm", "Gradient norm", "norm", true, false],
  ["world_size", "Workers that train", "other", false, false],
  ["balance", "Balance of the experts: mean over slowest rank", "good", false, false],
  ["cross_node_rows", "Rows sent to experts on other nodes", "other", false, false],
  ["mtp_loss", "Loss of multi-token prediction", "loss", true, false],
  ["index_loss", "Loss of the indexers", "loss", true, false],
  ["gain_forward", "Forward gain of the residual streams", "other", true, false],
  ["gain_backward", "Largest backward gain of the residual streams", "other", true, false],
  ["gain_backward_min", "Smallest backward gain of the residual streams", "other", true, false],
];
const MAX_SMOOTHING = 60; // points over which the weight of a point halves

/** An exponential mean in which a point weighs half as much after `half` further points. */
function smoothed(values, half) {
  if (!half) return values;
  const keep = 0.5 ** (1 / half);
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function axisName(kind, runs) {
  if (kind === "cost") {
    const units = new Set(runs.map((run) => run.units.cost));
    return [...units].join(", ");
  }
  return { step: "steps", tokens: "tokens", time: "time in which the run was up" }[kind];
}

/** The panel: its controls, and one chart per key that some run has. */
function curvesPanel(runs, view, redraw) {
  const colour = (index, key) => (runs.length > 1 ? hue(index) : style(CURVES.find((each) => each[0] === key)[2]));
  const axes = AXES.filter(([kind]) => runs.some((run) => run.curves.x[kind]));
  const change = (more) => { Object.assign(view, more); redraw(); };
  const slider = el("input", { type: "range", min: 0, max: MAX_SMOOTHING, value: view.smoothing, "aria-label": "smoothing of the curves",
    onchange: (event) => change({ smoothing: Number(event.target.value) }) });
  const controls = el("div.bar", {},
    choice("horizontal axis", axes, view.axis, (kind) => change({ axis: kind })),
    el("label", {}, "smoothing ", slider, ` ${view.smoothing || "off"}`),
    choice("vertical axis", [["linear", "linear"], ["log", "log"]], view.log ? "log" : "linear", (kind) => change({ log: kind === "log" })));
  const legend = runs.length > 1 ? runsLegend(runs, view, redraw) : null;
  const grid = el("div.grid");
  const drawn = CURVES.filter(([key]) => runs.some((run) => telling(run, key)));
  const boxes = drawn.map(([key, title, , , high]) => {
    const unit = runs[0].units[key];
    const box = el(`div${high ? ".wide" : ""}`, {}, el("h3", {}, title + (unit ? ` (${unit})` : "")));
    if (key === "loss" && runs.length === 1) box.append(lossLegend(runs[0]));
    grid.append(box);
    return box;
  });
  const per = Math.max(...runs.map((run) => run.curves.per));
  const sub = per > 1 ? `A point stands for ${runs.length > 1 ? "up to " : ""}${short(per)} steps: their mean, ${runs.length > 1 ? "and under the pointer" : "and as a band"} their lowest and highest value.` : "";
  const panel = section("curves", "Curves", sub, controls, legend, grid);
  return [panel, () => drawn.forEach(([key, title, , , high], index) => curveChart(boxes[index], runs, key, title, high ? 300 : 210, view, colour))];
}

/** Whether a curve of this key says more than that nothing happened. */
function telling(run, key) {
  const values = run.curves.y[key];
  return values && (key !== "cross_node_rows" || values.mean.some((value) => value > 0));
}

function lossLegend(run) {
  const legend = el("div.legend", {}, el("span", {}, swatch(style("loss"), "line"), "training"));
  if (run.evaluated.length) legend.append(el("span", {}, swatch(style("val")), "validation"));
  if (run.abandoned.length) legend.append(el("span", {}, swatch(style("other"), "line"), "steps that the run went back behind"));
  return legend;
}

function runsLegend(runs, view, redraw) {
  return el("div.legend", { role: "group", "aria-label": "runs" }, runs.map((run, index) => {
    const shown = !view.hidden.has(index);
    return el("button", { type: "button", "aria-pressed": String(shown), onclick: () => { view.hidden[shown ? "add" : "delete"](index); redraw(); } }, swatch(hue(index), "line"), run.name);
  }));
}

function curveChart(box, runs, key, title, height, view, colour) {
  const kind = view.axis;
  const series = [];
  const log = view.log && CURVES.find((each) => each[0] === key)[3];
  runs.forEach((run, index) => {
    const values = run.curves.y[key], xs = run.curves.x[kind];
    if (!values || !xs || view.hidden.has(index)) return;
    series.push(...curveSeries(run, key, values, xs, colour(index, key), view, runs.length > 1));
  });
  const formatter = (value) => (kind === "time" ? duration(value) : short(value));
  const made = chart(box, height, `${title} over ${axisName(kind, runs)}, of ${count(runs.length, "run")}`, common({
    grid: { left: 52, right: 12, top: 14, bottom: 40 },
    xAxis: axis({ type: "value", min: "dataMin", max: "dataMax", name: axisName(kind, runs), nameLocation: "middle", nameGap: 24, splitLine: { show: false }, axisLabel: { formatter, showMinLabel: true } }),
    yAxis: axis({ type: log ? "log" : "value", scale: !["tokens_per_s", "world_size", "cross_node_rows"].includes(key), splitNumber: 4, axisLabel: { formatter: (value) => short(value) }, minInterval: key === "world_size" ? 1 : 0 }),
    dataZoom: [{ type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseMove: false, moveOnMouseWheel: false, preventDefaultMouseMove: false }],
    tooltip: tooltip({ trigger: "axis", formatter: (items) => curveTip(items, kind, runs, key) }),
    series,
  }));
  made.group = "curves";
  return made;
}

function curveSeries(run, key, values, xs, colour, view, several) {
  const points = (ys) => xs.map((x, i) => [x, ys[i]]);
  const smooth = key === "world_size" ? values.mean : smoothed(values.mean, view.smoothing);
  const step = key === "world_size" ? "end" : false;
  const series = [{
    type: "line", name: run.name, symbol: "none", color: colour, step, lineStyle: { width: 1.8 }, data: points(smooth), z: 4,
    sampling: undefined, info: { low: values.low, high: values.high, raw: values.mean, curve: true },
  }];
  if (values.low && !several && key !== "world_size") series.push(band(xs, values, colour));
  else if (smooth !== values.mean && !several) {
    series.push({ type: "line", name: "raw", symbol: "none", color: colour, lineStyle: { width: 1, opacity: 0.3 }, silent: true, data: points(values.mean), z: 2 });
  }
  if (key === "loss" && run.evaluated.length) {
    const at = run.evaluated.map(([step, value]) => [between(run.curves.x.step, xs, step), value]);
    series.push({ type: "line", name: several ? `${run.name}, validation` : "validation", color: several ? colour : style("val"), symbol: "circle", symbolSize: at.length > 60 ? 3 : 6, lineStyle: { width: 1, type: "dotted" }, data: at, z: 6 });
  }
  if (key === "loss" && !several) {
    for (const old of run.abandoned) {
      const xs = old.x[view.axis];
      if (xs) series.push({ type: "line", name: "went back", symbol: "none", color: style("other"), lineStyle: { width: 1.2, type: "dashed" }, data: xs.map((x, i) => [x, old.loss[i]]), z: 1 });
    }
  }
  return series;
}

/** The area between the lowest and the highest value of each point. */
function band(xs, values, colour) {
  return {
    type: "custom", name: "range", silent: true, clip: true, z: 2, tooltip: { show: false }, encode: { x: 0, y: [1, 2] },
    data: xs.map((x, i) => [x, values.low[i], values.high[i]]),
    renderItem: (params, api) => {
      if (params.dataIndexInside > 0) return null;
      const upper = [], lower = [];
      xs.forEach((x, i) => {
        if (values.low[i] === null) return;
        upper.push(api.coord([x, values.high[i]]));
        lower.push(api.coord([x, values.low[i]]));
      });
      return { type: "polygon", shape: { points: upper.concat(lower.reverse()) }, style: { fill: colour, opacity: 0.22 } };
    },
  };
}

function curveTip(items, kind, runs, key) {
  const shown = items.filter((item) => item.seriesType === "line" && item.value[1] !== null && item.seriesName !== "raw");
  if (!shown.length) return "";
  const x = items[0].axisValue;
  const head = kind === "time" ? duration(x) : `${kind === "step" ? "step " : ""}${kind === "step" ? Math.round(x).toLocaleString() : short(x, 4)} ${kind === "step" ? "" : axisName(kind, runs)}`;
  const lines = shown.slice(0, 14).map((item) => {
    const run = runs.find((each) => each.name === item.seriesName);
    const values = run && run.curves.y[key];
    const range = values && values.low && values.low[item.dataIndex] !== null ? ` (${short(values.low[item.dataIndex], 4)} to ${short(values.high[item.dataIndex], 4)})` : "";
    const name = runs.length === 1 && run ? (key === "loss" ? "training" : "") : item.seriesName;
    return `${item.marker}${escaped(name)} <b>${short(item.value[1], 5)}</b>${range}`;
  });
  return [head, ...lines].join("<br>");
}
