// What the browser keeps for this server: others may be under other paths. Its stores may be full or switched off.
const HOME = `sgl_jax:${new URL(".", location.href).pathname}:`;
export const TAB = "sessionStorage", BROWSER = "localStorage";

const attempt = (run, otherwise) => { try { return run(); } catch { return otherwise; } };

export const kept = (name, store = BROWSER) => attempt(() => window[store].getItem(HOME + name), null);

// Keeps a text, or forgets it where that is null. Says whether it could.
export const keep = (name, text, store = BROWSER) => attempt(() => {
  if (text === null) window[store].removeItem(HOME + name);
  else window[store].setItem(HOME + name, text);
  return true;
}, false);

export const names = () => attempt(() => Object.keys(localStorage), [])
  .filter((name) => name.startsWith(HOME)).map((name) => name.slice(HOME.length));

export const parsed = (text) => attempt(() => JSON.parse(text), null);
