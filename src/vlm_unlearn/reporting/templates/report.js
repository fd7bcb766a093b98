"use strict";
// A menu shows one chart of its section.
for (const choice of document.querySelectorAll(".choice")) {
  const choose = (id) => choice.querySelectorAll(".chart").forEach((chart) => { chart.hidden = chart.id !== id; });
  const select = choice.querySelector("select");
  select.addEventListener("change", () => choose(select.value));
  choose(select.value);
}

const table = document.getElementById("rates");
const body = table.tBodies[0];
const rows = [...body.rows];
const headings = [...table.tHead.rows[0].cells];

function compareRows(first, second, column) {
  if (column === 0) return first.cells[0].textContent.localeCompare(second.cells[0].textContent, undefined, { numeric: true });
  return Number(first.cells[column].dataset.value) - Number(second.cells[column].dataset.value);
}

// Cycles through ascending, descending and the report's order. Rows without a value come last.
function sort(column) {
  const next = { none: "ascending", ascending: "descending", descending: "none" }[headings[column].getAttribute("aria-sort") ?? "none"];
  headings.forEach((heading) => heading.removeAttribute("aria-sort"));
  if (next !== "none") headings[column].setAttribute("aria-sort", next);
  const missing = (row) => column > 0 && !row.cells[column].dataset.value;
  const sign = next === "descending" ? -1 : 1;
  const sorted = next === "none" ? rows : [...rows].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * compareRows(a, b, column)));
  body.append(...sorted);
}
headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => sort(column)));

const filter = document.getElementById("filter");
filter?.addEventListener("input", () => {
  const text = filter.value.trim().toLowerCase();
  for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
  const count = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = text ? `${count} of ${rows.length} ${table.dataset.items ?? "models"}` : "";
  document.querySelector(".no-match").hidden = count > 0;
});

for (const box of document.querySelectorAll("[data-column]")) {
  box.addEventListener("change", () => {
    for (const row of [table.tHead.rows[0], ...rows]) row.cells[box.dataset.column].hidden = !box.checked;
  });
  box.checked = true;
}
document.addEventListener("keydown", (event) => {
  const menu = document.querySelector(".menu[open]");
  if (event.key === "Escape" && menu) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
document.addEventListener("click", (event) => {
  const menu = document.querySelector(".menu[open]");
  if (menu && !menu.contains(event.target)) menu.open = false;
});
