// Light or dark: the system's, unless the user chose one. Pages share the choice.
const KEY = "sgl_jax:theme";

export function applyTheme() {
  const chosen = localStorage.getItem(KEY);
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
}

export function isDark() {
  const chosen = localStorage.getItem(KEY);
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Chooses the other one; where that is the system's, the page follows the system again.
export function toggleTheme() {
  const dark = !isDark();
  if (dark === matchMedia("(prefers-color-scheme: dark)").matches) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, dark ? "dark" : "light");
  applyTheme();
}
