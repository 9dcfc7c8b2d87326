// Sorting, filtering and the theme. The page is complete without this script; tables are then in their first order.
"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const paint = (name) => {
    root.dataset.theme = name;
    theme.textContent = name === "dark" ? "Light" : "Dark";
  };
  paint(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  addEventListener("beforeprint", () => {
    for (const closed of document.querySelectorAll("details")) closed.open = true;
  });
  theme.addEventListener("click", () => paint(root.dataset.theme === "dark" ? "light" : "dark"));

  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v ?? cell.textContent.trim();
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  };
  const sort = (head) => {
    const table = head.closest("table");
    const column = head.cellIndex;
    const falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort((a, b) => (falling ? compare(b[0], a[0]) : compare(a[0], b[0])));
    const first = Number(table.dataset.first ?? rows.length);
    rows.forEach(([, row], place) => {
      row.classList.toggle("rest", place >= first);
      body.append(row);
    });
  };
  for (const head of document.querySelectorAll("table.sortable thead th"))
    head.querySelector("button").addEventListener("click", () => sort(head));

  for (const input of document.querySelectorAll("input[type=search]")) {
    const table = document.getElementById(input.dataset.table);
    const count = document.querySelector(`output[data-count="${input.dataset.table}"]`);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      table.classList.toggle("filtered", words.length > 0);
      let found = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        const keep = words.every((word) => text.includes(word));
        row.classList.toggle("out", !keep);
        found += keep;
      }
      count.textContent = words.length ? `${found} found` : "";
    });
  }
  for (const button of document.querySelectorAll("button.more"))
    button.addEventListener("click", () => {
      const all = document.getElementById(button.dataset.table).classList.toggle("all");
      button.textContent = all ? "Show fewer" : button.dataset.text;
    });
  for (const button of document.querySelectorAll("button.more")) button.dataset.text = button.textContent;
})();
