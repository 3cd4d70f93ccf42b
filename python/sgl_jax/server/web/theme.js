// Light or dark: the system's, unless the user chose.
import { keep, kept } from "./kept.js";

const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
let chosen = kept("theme");

export const theme = () => chosen ?? system();

export function applyTheme() {
  document.documentElement.dataset.theme = chosen ?? "";
}

// Chooses the other one. Where that is the system's, the page follows the system again.
export function toggleTheme() {
  const other = theme() === "dark" ? "light" : "dark";
  chosen = other === system() ? null : other;
  applyTheme();
  keep("theme", chosen);
}
