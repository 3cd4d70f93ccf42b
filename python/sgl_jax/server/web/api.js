// Calls of the server: the key, errors in plain words, retries while it starts, streams of events.
import { BROWSER, TAB, keep, kept } from "./kept.js";

let held = ""; // the key, where the browser keeps nothing
export const key = {
  get: () => kept("key", TAB) ?? kept("key") ?? held,
  isRemembered: () => kept("key") !== null,
  set(value, remember) {
    held = value;
    for (const store of [TAB, BROWSER]) keep("key", null, store);
    if (value) keep("key", value, remember ? BROWSER : TAB);
  },
};
export const KEY_FIELD = { type: "password", pattern: "[\\x20-\\x7e\\xa0-\\xff]*", title: "A key has only Latin letters and signs." };
export const WRONG_KEY = "The server does not take this key.";

// An error's `status` is that of the answer, 0 where none came.
const failure = (message, status = 0, wait = 2) => Object.assign(new Error(message), { status, wait });
const lost = () => failure("The connection to the server was lost.");

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", reject);
});

export const withKey = (value = key.get()) => (value ? { Authorization: `Bearer ${value}` } : {});

async function attempt(path, body, signal, sent) {
  const headers = withKey(sent);
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) })
    .catch(() => { throw failure("No connection to the server."); });
  if (answer.ok) return answer;
  const text = await answer.text();
  let message = text.slice(0, 500);
  try { message = JSON.parse(text).error.message; } catch { /* a proxy's page, shown as it is */ }
  throw failure(message || `The server answered ${answer.status}.`, answer.status, Number(answer.headers.get("Retry-After")) || 1);
}

// Calls a path. After a 401 `on.key(wrong)` is awaited, which says whether there is another key. While the server starts, and
// with `patient` also while nothing answers, `on.waiting(text)` is told, and the call is tried again.
export async function call(path, { body, signal, on, patient }) {
  for (;;) {
    const sent = key.get();
    try {
      const answer = await attempt(path, body, signal, sent);
      on.waiting("");
      return answer;
    } catch (error) {
      if (error.status === 401 && (key.get() !== sent || (await on.key(sent ? WRONG_KEY : "")))) continue;
      if (signal?.aborted || (error.status !== 503 && !(patient && !error.status))) throw error;
      on.waiting(`${error.message} Trying again…`);
      await pause(error.wait, signal);
    }
  }
}

// Yields the events of a stream. Throws where one is an error, or the stream breaks off.
export async function* events(path, options) {
  const reader = (await call(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read().catch(() => { throw lost(); });
    if (done) throw lost();
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: ")) continue; // a comment, which keeps the connection open
      const event = JSON.parse(part.slice(6));
      if (event.error) throw failure(event.error.message);
      yield event;
    }
  }
}
