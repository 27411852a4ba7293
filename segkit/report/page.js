"use strict";
// Light and dark: the system's choice until the button is pressed.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
// A legend dims the other series: while it is pointed at, or until it is pressed again.
let pinned = null;
function pick(series) {
  document.body.classList.toggle("picking", series !== null);
  for (const part of document.querySelectorAll("[data-series]")) part.classList.toggle("picked", part.dataset.series === series);
  for (const item of document.querySelectorAll("[data-legend]")) item.classList.toggle("pinned", pinned !== null && item.dataset.legend === pinned);
}
for (const item of document.querySelectorAll("[data-legend]")) {
  const series = item.dataset.legend;
  const press = () => { pinned = pinned === series ? null : series; pick(pinned); };
  item.addEventListener("mouseenter", () => pick(series));
  item.addEventListener("mouseleave", () => pick(pinned));
  item.addEventListener("click", press);
  item.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); press(); }
  });
}
