// Light or dark: the system's, unless the user chose. Pages share the choice.
const KEY = "sgl_jax:theme";
const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

export const theme = () => localStorage.getItem(KEY) ?? system();

export function applyTheme() {
  document.documentElement.dataset.theme = localStorage.getItem(KEY) ?? "";
}

// Chooses the other one. Where that is the system's, the page follows the system again.
export function toggleTheme() {
  const other = theme() === "dark" ? "light" : "dark";
  if (other === system()) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, other);
  applyTheme();
}
