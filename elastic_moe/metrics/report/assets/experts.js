// The experts of one MoE layer over the run: load, the worker of each home, and copies. One row per expert.
"use strict";

function expertsPanel(run, view, redraw) {
  const { experts } = run;
  view.layer = Math.min(view.layer, experts.layers - 1);
  const choose = el("select", { "aria-label": "MoE layer", onchange: (event) => { view.layer = Number(event.target.value); redraw(); } });
  for (let layer = 0; layer < experts.layers; layer++) {
    choose.append(el("option", { value: layer, selected: layer === view.layer }, `MoE layer ${layer}: ${count(experts.moved[layer], "home")} moved`));
  }
  const maps = el("div.thirds");
  const load = el("div", {}, el("h3", {}, "Load over the layer's mean"), loadLegend());
  const home = el("div", {}, el("h3", {}, "Home, a colour per worker"), el("div.legend", {}, el("span", {}, "the workers are listed below")));
  const copies = el("div", {}, el("h3", {}, "Copies"), copiesLegend(experts, view.layer));
  maps.append(load, home, copies);
  const panel = section("experts", "Experts", "One row per expert, steps from left to right. A home that keeps its colour stayed on its worker, whatever the worker's rank. " +
    "“elastic-moe explain RUN --layer L --expert E” says why an expert moved.",
  el("div.bar", {}, el("label", {}, "show ", choose)), maps, workerLegend(run, view, redraw));
  const height = Math.min(Math.max(experts.experts * 5, 200), 520);
  return [panel, () => { loadMap(run, view, load, height); homeMap(run, view, home, height); copiesMap(run, view, copies, height); }];
}

/** Colour of a load: blue below the mean, red above it, by octaves. */
function loadColour(share) {
  const octaves = Math.max(-2, Math.min(2, Math.log2(Math.max(share, 1e-3))));
  const strength = Math.abs(octaves) / 2;
  const middle = isDark() ? 17 : 96, far = isDark() ? 56 : 44;
  return `hsl(${octaves < 0 ? 212 : 14} ${Math.round(15 + 65 * strength)}% ${Math.round(middle + (far - middle) * strength)}%)`;
}

function loadLegend() {
  const stops = [0.25, 0.5, 1, 2, 4].map(loadColour);
  return el("div.legend", {}, el("span", {}, "¼ ", el("i.scale", { style: `background:linear-gradient(90deg,${stops.join(",")})` }), " 4 times the mean"));
}

function copyColour(number, most) {
  const share = most > 1 ? (number - 1) / (most - 1) : 0;
  return isDark() ? `hsl(150 45% ${Math.round(13 + 45 * share)}%)` : `hsl(150 45% ${Math.round(95 - 58 * share)}%)`;
}

function mostCopies(experts, layer) {
  let most = 1;
  for (const row of experts.copies[layer]) for (let i = 1; i < row.length; i += 2) most = Math.max(most, row[i]);
  return most;
}

function copiesLegend(experts, layer) {
  const most = mostCopies(experts, layer);
  const legend = el("div.legend");
  const numbers = most <= 6 ? Array.from({ length: most }, (_, i) => i + 1) : [1, Math.ceil((1 + most) / 2), most];
  for (const number of numbers) legend.append(el("span", {}, swatch(copyColour(number, most)), number === 1 ? "one" : String(number)));
  return legend;
}

function workerName(run, index) {
  const [worker, node] = run.experts.workers[index];
  const known = run.lanes.nodes.find((each) => each.id === node);
  return `worker ${brief(worker)} on node ${known ? known.number : brief(node)}`;
}

/** One entry per worker that ever had a home; a click shows only its homes. */
function workerLegend(run, view, redraw) {
  const { experts } = run;
  const now = new Map();
  for (const row of experts.home[view.layer]) {
    for (let i = 1; i < row.length; i += 2) if (!now.has(row[i])) now.set(row[i], 0);
    now.set(row.at(-1), now.get(row.at(-1)) + 1);
  }
  const legend = el("div.legend", { role: "group", "aria-label": "homes by worker: choose one to see its experts only" });
  for (const [index, homes] of [...now].sort((a, b) => a[0] - b[0])) {
    const on = view.worker === index;
    legend.append(el(`button${on ? ".on" : ""}`, { type: "button", "aria-pressed": "true", onclick: () => { view.worker = on ? null : index; redraw(); } },
      swatch(hue(index)), `${workerName(run, index).replace("worker ", "")}: ${count(homes, "home")} now`));
  }
  return legend;
}

/** The axes of a map. */
function mapAxes(experts) {
  const steps = experts.steps.map(String);
  return {
    grid: { left: 34, right: 8, top: 6, bottom: 38 },
    xAxis: axis({ type: "category", data: steps, name: "steps", nameLocation: "middle", nameGap: 22, axisLabel: { interval: Math.max(Math.ceil(steps.length / 5) - 1, 0) } }),
    yAxis: axis({ type: "category", inverse: true, data: Array.from({ length: experts.experts }, (_, e) => String(e)), axisLabel: { interval: Math.max(Math.ceil(experts.experts / 8) - 1, 0) } }),
  };
}

/** A rectangle of a map, from the column `value[0]` up to `value[1]`, in the row `value[2]`. */
function cell(api, columns, rows, box, fill) {
  const wide = box.width / columns, high = box.height / rows;
  const x = Math.round(box.x + api.value(0) * wide), y = Math.round(box.y + api.value(2) * high);
  return { type: "rect", shape: { x, y, width: Math.round(box.x + api.value(1) * wide) - x, height: Math.round(box.y + (api.value(2) + 1) * high) - y }, style: { fill } };
}

function map(run, box, height, label, data, fill, tip) {
  const { experts } = run;
  chart(box, height, label, common({
    ...mapAxes(experts),
    tooltip: tooltip({ trigger: "item", formatter: (item) => tip(item.value) }),
    series: [{ type: "custom", data, encode: { x: 0, y: 2 }, progressive: 4000, clip: false,
      renderItem: (params, api) => cell(api, experts.steps.length, experts.experts, params.coordSys, fill(api)) }],
  }));
}

/** Stretches of equal values: [begin, end, expert, value]. */
function stretches(rows, columns) {
  return rows.flatMap((row, expert) => {
    const found = [];
    for (let i = 0; i < row.length; i += 2) found.push([row[i], i + 2 < row.length ? row[i + 2] : columns, expert, row[i + 1]]);
    return found;
  });
}

function stepsOf(experts, begin, end) {
  const from = begin ? experts.steps[begin - 1] : 0;
  return `steps ${from.toLocaleString()} to ${experts.steps[end - 1].toLocaleString()}`;
}

function valueAt(row, column) {
  let value = row[1];
  for (let i = 0; i < row.length && row[i] <= column; i += 2) value = row[i + 1];
  return value;
}

function loadMap(run, view, box, height) {
  const { experts } = run;
  const codes = Uint8Array.from(atob(experts.load[view.layer]), (sign) => sign.charCodeAt(0));
  const columns = experts.steps.length, data = [];
  for (let e = 0; e < experts.experts; e++) {
    for (let c = 0; c < columns; c++) {
      const code = codes[e * columns + c];
      if (code !== 255) data.push([c, c + 1, e, 2 ** (code / experts.octave) - 1]);
    }
  }
  map(run, box, height, `Load of ${experts.experts} experts of MoE layer ${view.layer} over the steps`, data, (api) => loadColour(api.value(3)), ([c, , e, share]) =>
    `expert ${e}, ${stepsOf(experts, c, c + 1)}<br>load <b>${short(share)}</b> times the mean<br>home: ${escaped(workerName(run, valueAt(experts.home[view.layer][e], c)))}<br>${count(valueAt(experts.copies[view.layer][e], c), "copy").replace("copys", "copies")}`);
}

function homeMap(run, view, box, height) {
  const { experts } = run;
  const faded = style("soft");
  map(run, box, height, `Home of ${experts.experts} experts of MoE layer ${view.layer} over the steps, by worker`, stretches(experts.home[view.layer], experts.steps.length),
    (api) => (view.worker === null || view.worker === api.value(3) ? hue(api.value(3)) : faded),
    ([begin, end, e, worker]) => `expert ${e}<br>home: <b>${escaped(workerName(run, worker))}</b><br>${stepsOf(experts, begin, end)}`);
}

function copiesMap(run, view, box, height) {
  const { experts } = run;
  const most = mostCopies(experts, view.layer);
  map(run, box, height, `Copies of ${experts.experts} experts of MoE layer ${view.layer} over the steps`, stretches(experts.copies[view.layer], experts.steps.length),
    (api) => copyColour(api.value(3), most),
    ([begin, end, e, number]) => `expert ${e}<br><b>${number}</b> ${number === 1 ? "copy: its home" : "copies, the home's among them"}<br>${stepsOf(experts, begin, end)}`);
}
