// The run at one look: speed and loss over wall-clock time, and below them one bar per worker, by node.
"use strict";

const STATE_COLOURS = ["starting", "waiting", "training", "reforming", "draining", "silent", "paused", "aside"];
const STATE_WORDS = ["starting", "waiting", "training", "re-forming", "draining", "silent", "paused", "set aside"];
const ENDS = {
  died: ["✖", "bad", "died"], evicted: ["◼", "bad", "removed: silent or stuck"], left: ["▼", "warn", "left as planned"],
  "cut off": ["│", "dim", "the run was ended"],
};
const MARKS = { lost: "bad", left: "warn", joined: "good", resumed: "accent" };
const MAX_MARKS = 80; // lines through all plots; more would hide the curves

function story(run, box) {
  const { lanes } = run;
  const rows = lanes.nodes.reduce((sum, node) => sum + node.rows, 0);
  const height = rows > 120 ? 6 : rows > 48 ? 9 : rows > 24 ? 13 : 18;
  const top = { speed: 28, loss: 146, lanes: 288 };
  const lanesHeight = Math.max(rows * height, 30);
  const total = top.lanes + lanesHeight + 66;
  box.append(storyLegend(run));
  const left = narrow() ? 46 : 70, right = narrow() ? 10 : 16;
  const end = Math.max(run.figures.up_s, ...run.lanes.bars.map((bar) => bar.parts.at(-1)?.[1] || 0));
  const grids = [[top.speed, 84], [top.loss, 110], [top.lanes, lanesHeight]].map(([y, high]) => ({ left, right, top: y, height: high, outerBoundsMode: "none" }));
  const time = (index) => axis({
    type: "value", gridIndex: index, min: 0, max: end, splitLine: { show: index < 2, lineStyle: { color: style("grid") } },
    axisLabel: { show: index === 2, showMaxLabel: false, formatter: (value) => duration(value) }, axisPointer: { label: { show: false } },
  });
  const made = chart(box, total, storyLabel(run), common({
    grid: grids,
    xAxis: [0, 1, 2].map(time),
    yAxis: [
      axis({ type: "value", gridIndex: 0, name: "tokens/s", nameLocation: "end", nameGap: 11, splitNumber: 2, axisLabel: { formatter: (value) => short(value) } }),
      axis({ type: "value", gridIndex: 1, name: "loss", nameGap: 11, scale: true, splitNumber: 3, axisLabel: { formatter: (value) => short(value) } }),
      laneAxis(lanes, rows),
    ],
    axisPointer: { link: [{ xAxisIndex: "all" }], lineStyle: { color: style("dim"), type: "dashed" } },
    dataZoom: [
      { type: "slider", xAxisIndex: [0, 1, 2], bottom: 8, height: 18, left, right, showDetail: false, brushSelect: false, borderColor: style("line"), fillerColor: "rgba(125,140,160,.18)", dataBackground: { lineStyle: { opacity: 0 }, areaStyle: { opacity: 0 } }, selectedDataBackground: { lineStyle: { opacity: 0 }, areaStyle: { opacity: 0 } } },
      { type: "inside", xAxisIndex: [0, 1, 2], zoomOnMouseWheel: "ctrl", moveOnMouseMove: false, moveOnMouseWheel: false, preventDefaultMouseMove: false },
    ],
    tooltip: tooltip({ trigger: "axis", formatter: (items) => storyTip(run, Array.isArray(items) ? items : [items]) }),
    series: [...storyCurves(run), ...laneSeries(run, height)],
  }));
  niceTimes(made, [0, 1, 2], end);
  return made;
}

function storyLabel(run) {
  const bars = run.lanes.bars;
  const ended = (kind) => bars.filter((bar) => bar.end === kind).length;
  return `Timeline of ${bars.length} workers on ${count(run.lanes.nodes.length, "node")}: ${ended("died")} died, ` +
    `${ended("evicted")} were removed, ${ended("left")} left as planned`;
}

function storyLegend(run) {
  const bars = run.lanes.bars;
  const least = run.figures.up_s / 4000; // shorter stretches are not to be seen
  const present = new Set(bars.flatMap((bar) => bar.parts.filter(([begin, end]) => end - begin > least).map((part) => part[2])));
  const legend = el("div.legend", { "aria-label": "legend" });
  STATE_WORDS.forEach((word, state) => {
    if (present.has(state)) legend.append(el("span", {}, swatch(style(`s-${STATE_COLOURS[state]}`)), word));
  });
  for (const [end, [sign, colour, word]] of Object.entries(ENDS)) {
    const ended = bars.filter((bar) => bar.end === end).length;
    if (ended) legend.append(el("span", {}, el("i.sign", { style: `color:var(--${colour});font-style:normal` }, sign), `${word} (${ended})`));
  }
  const kinds = new Set(run.marks.map((mark) => mark[1]));
  for (const [kind, colour] of Object.entries(MARKS)) {
    if (kinds.has(kind)) legend.append(el("span", {}, el("i", { style: `border-left:2px dashed var(--${colour});height:13px` }), `workers ${kind}`));
  }
  return legend;
}

function storyCurves(run) {
  const marks = run.marks.slice(0, MAX_MARKS).map(([at, kind]) => ({
    xAxis: at, lineStyle: { color: style(MARKS[kind]), type: "dashed", width: 1, opacity: 0.75 },
  }));
  const pauses = run.marks.filter((mark) => mark[3] > 0).slice(0, MAX_MARKS)
    .map(([at, , , pause]) => [{ xAxis: at }, { xAxis: at + pause }]);
  const marked = {
    markLine: { silent: true, symbol: "none", label: { show: false }, data: marks },
    markArea: { silent: true, itemStyle: { color: style("bad"), opacity: 0.12 }, data: pauses },
  };
  const { x, y } = run.curves;
  const points = (values) => x.time.map((at, i) => [at, values[i]]);
  const loss = y.loss ? points(y.loss.mean) : [];
  const line = (more) => ({ type: "line", symbol: "none", lineStyle: { width: 1.6 }, ...marked, ...more });
  return [
    line({ name: "tokens/s", xAxisIndex: 0, yAxisIndex: 0, step: false, color: style("speed"), areaStyle: { opacity: 0.14 }, data: run.speed[0].map((at, i) => [at, run.speed[1][i]]) }),
    line({ name: "loss", xAxisIndex: 1, yAxisIndex: 1, color: style("loss"), data: loss }),
    ...run.abandoned.map((old) => ({
      type: "line", name: "gone back", xAxisIndex: 1, yAxisIndex: 1, symbol: "none", color: style("other"),
      lineStyle: { width: 1.2, type: "dashed" }, data: old.x.time.map((at, i) => [at, old.loss[i]]),
    })),
  ];
}

function laneAxis(lanes, rows) {
  const labels = [];
  for (const node of lanes.nodes) {
    for (let row = 0; row < node.rows; row++) labels.push(row === 0 ? `${narrow() ? "n" : "node "}${node.number}` : "");
  }
  return axis({ type: "category", gridIndex: 2, inverse: true, data: labels, name: "workers, by node", nameLocation: "start", nameGap: 10,
    nameTextStyle: { color: style("dim"), align: "left", padding: [0, 0, 0, narrow() ? -30 : -54] },
    axisLabel: { interval: 0, hideOverlap: false, formatter: (text, index) => (rows > 120 && index % 4 ? "" : text) }, splitLine: { show: false }, axisPointer: { show: false } });
}

function laneSeries(run, height) {
  const { lanes } = run;
  const first = {};
  let rows = 0;
  for (const node of lanes.nodes) { first[node.id] = rows; rows += node.rows; }
  const parts = [], ends = [];
  lanes.bars.forEach((bar, index) => {
    const row = first[bar.node] + bar.row;
    for (const [begin, end, state] of bar.parts) parts.push([begin, end, row, state, index]);
    if (ENDS[bar.end]) ends.push([bar.parts.at(-1)[1], row, index]);
  });
  const colours = STATE_COLOURS.map((name) => style(`s-${name}`));
  const shades = lanes.nodes.filter((_, number) => number % 2 === 0).map((node) => [0, first[node.id], node.rows]);
  const thick = Math.max(height - (height > 8 ? 5 : 2), 3);
  return [
    { type: "custom", name: "nodes", silent: true, xAxisIndex: 2, yAxisIndex: 2, data: shades, tooltip: { show: false }, z: 0, clip: true,
      encode: { x: -1, y: -1 },
      renderItem: (params, api) => {
        const box = params.coordSys;
        return { type: "rect", shape: { x: box.x, y: box.y + api.value(1) * (box.height / Math.max(rows, 1)), width: box.width, height: api.value(2) * (box.height / Math.max(rows, 1)) }, style: { fill: style("soft"), opacity: 0.55 } };
      } },
    { type: "custom", name: "workers", xAxisIndex: 2, yAxisIndex: 2, data: parts, clip: true, encode: { x: [0, 1], y: 2 }, tooltip: { trigger: "item" },
      renderItem: (params, api) => {
        const [from, y] = api.coord([api.value(0), api.value(2)]);
        const to = api.coord([api.value(1), api.value(2)])[0];
        const shape = echarts.graphic.clipRectByRect({ x: from, y: y - thick / 2, width: Math.max(to - from, 1), height: thick },
          { x: params.coordSys.x, y: params.coordSys.y, width: params.coordSys.width, height: params.coordSys.height });
        return shape && { type: "rect", shape, style: { fill: colours[api.value(3)] } };
      } },
    { type: "custom", name: "ends", xAxisIndex: 2, yAxisIndex: 2, data: ends, clip: false, encode: { x: 0, y: 1 }, z: 5, tooltip: { trigger: "item" },
      renderItem: (params, api) => {
        const [x, y] = api.coord([api.value(0), api.value(1)]);
        const box = params.coordSys;
        if (x < box.x - 1 || x > box.x + box.width + 1) return null;
        const [sign, colour] = ENDS[lanes.bars[api.value(2)].end];
        return { type: "text", x, y, style: { text: sign, fill: style(colour), stroke: style("card"), lineWidth: 3, font: `bold ${Math.min(height + 1, 16)}px sans-serif`, textAlign: "center", textVerticalAlign: "middle" } };
      } },
  ];
}

function storyTip(run, items) {
  const one = items[0];
  if (!one) return "";
  if (one.seriesName === "workers" || one.seriesName === "ends") {
    const bar = run.lanes.bars[one.value.at(-1)];
    const node = run.lanes.nodes.find((each) => each.id === bar.node);
    const part = one.seriesName === "workers" ? `${STATE_WORDS[one.value[3]]} for ${duration(one.value[1] - one.value[0])}, from ${duration(one.value[0])} to ${duration(one.value[1])}<br>` : "";
    const end = bar.end ? `${(ENDS[bar.end] || ["", "", bar.end])[2]} at ${duration(bar.parts.at(-1)[1])}${bar.reason ? `: ${escaped(bar.reason)}` : ""}` : "lives";
    return `<b>worker ${escaped(brief(bar.worker))}</b>, process ${bar.pid}, node ${node.number} (${escaped(brief(bar.node))})<br>${part}${end}`;
  }
  const at = one.axisValue;
  const lines = items.filter((item) => item.value && item.value[1] !== null && ["tokens/s", "loss"].includes(item.seriesName))
    .map((item) => `${item.marker}${item.seriesName} ${short(item.value[1], 4)}`);
  const step = between(run.curves.x.time, run.curves.x.step, at);
  const size = [...run.workers].reverse().find(([begin]) => begin <= at);
  return [`<b>${duration(at)}</b> (${escaped(clock(wall(run, at)))})`, step === null ? "" : `step ${Math.round(step)}`, size ? count(size[1], "worker") : "", ...lines].filter(Boolean).join("<br>");
}
