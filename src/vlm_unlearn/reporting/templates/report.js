"use strict";
const figures = JSON.parse(document.getElementById("data").textContent);
const ink = getComputedStyle(document.body).color;
for (const [name, figure] of Object.entries(figures)) {
  const layout = Object.assign({}, figure.layout, { font: { color: ink } });
  Plotly.newPlot(document.getElementById("figure-" + name), figure.data, layout, { responsive: true, displaylogo: false });
}
