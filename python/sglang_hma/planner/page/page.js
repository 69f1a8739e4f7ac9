"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("charts");
  const even = read("data").break_even;
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  /* Draws a chart in the page's own colours, which are not the same in the light and in the dark. */
  function draw(id) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const layout = structuredClone(charts[id].layout);
    layout.font.color = color("--text");
    layout.hoverlabel = { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--text") } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("--quiet"), activecolor: color("--text") };
    for (const axis of [layout.xaxis, layout.yaxis]) {
      axis.gridcolor = color("--grid");
      axis.linecolor = color("--line");
    }
    for (const shape of layout.shapes || []) {
      shape.line.color = color(shape.name === "price" ? "--text" : "--quiet");
    }
    for (const trace of charts[id].data) {
      if (trace.error_x) trace.error_x.color = color("--text");
    }
    return Plotly.react(id, charts[id].data, layout, config);
  }

  const significant = (value) => {
    const decimals = value ? Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)))) : 0;
    return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  };
  const usd = (value) => "$" + Math.round(value).toLocaleString("en-US");
  const priced = (ratio) => `${ratio.toFixed(3)} (${usd(ratio * even.hbm_usd)})`;
  const set = (id, text) => { document.getElementById(id).textContent = text; };

  /* Shows the state that the sliders stand at. All of its numbers are in the data. */
  function choose() {
    const at = (id) => Number(document.getElementById(id).value);
    const index = at("ratio");
    const ratio = even.ratios[index];
    const efficiency = even.efficiencies[at("efficiency")];
    const link = even.links[at("link")];
    const state = even.states[at("efficiency")][at("link")];
    for (const [id, text] of [["ratio", priced(ratio)], ["efficiency", efficiency.label], ["link", link.label]]) {
      set(`${id}-value`, text);
      document.getElementById(id).setAttribute("aria-valuetext", text);
    }
    set("basis", `${efficiency.name}: ${efficiency.kind}, ${efficiency.source}`);
    set("mix", state.mixes.length
      ? `${state.mixes[index]} for ${usd(state.usd[index])}, ${significant(state.rates[index])} requests/s`
      : "none of ours keeps the objectives");
    const line = (baseline, basis) => state.lines.find((each) => each.baseline === baseline && each.basis === basis);
    for (const row of document.querySelectorAll("#break-even-table tbody tr")) {
      for (const cell of row.querySelectorAll("td")) {
        const [basis, what] = cell.dataset.cell.split(" ");
        const found = line(row.dataset.baseline, basis);
        if (!found) cell.textContent = "–";
        else if (what === "over") cell.textContent = found.over[index].toFixed(2);
        else cell.textContent = found.crossing > 0 ? priced(found.crossing) : "at no price";
      }
    }
    const chart = charts["break-even"];
    const shown = (each) => each >= even.ratios[0] && each <= even.ratios.at(-1);
    for (const trace of chart.data) {
      if (trace.meta === "crossings") {
        trace.x = state.lines.map((each) => each.crossing).filter(shown);
        trace.y = trace.x.map(() => 1);
      } else {
        const found = line(...trace.meta.split(" "));
        trace.y = found ? found.over : [];
      }
    }
    const price = chart.layout.shapes.find((shape) => shape.name === "price");
    price.x0 = price.x1 = ratio;
    return draw("break-even");
  }

  const all = () => Promise.all(Object.keys(charts).map(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  if (even) {
    for (const input of document.querySelectorAll(".sliders input")) {
      input.disabled = false;
      input.addEventListener("input", choose);
    }
    choose();
  }
  /* A link to what an answer rests on opens it. */
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", open);
  open();
  all().then(() => { document.documentElement.dataset.drawn = "all"; });
})();
