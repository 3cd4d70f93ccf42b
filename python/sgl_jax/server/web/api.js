// Calls of the server: the key, errors in plain words, retries while it starts, streams of events.
const KEY = "sgl_jax:key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  remembered: () => localStorage.getItem(KEY) !== null,
  set(value, remember) {
    localStorage.removeItem(KEY);
    sessionStorage.removeItem(KEY);
    if (value) (remember ? localStorage : sessionStorage).setItem(KEY, value);
  },
};

export class CallError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: the server gave no answer
  }
}

const LOST = "The connection to the server was lost.";

// Waits, unless the signal ends it.
const pause = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms);
  signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
});

async function attempt(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new CallError("No connection to the server.");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let message = text.slice(0, 500);
  try { message = JSON.parse(text).error.message; } catch { /* a proxy's page, shown as it is */ }
  const error = new CallError(message || `The server answered ${answer.status}.`, answer.status);
  error.wait = Number(answer.headers.get("Retry-After")) || 1;
  throw error;
}

// Calls a path. `on.key()` is awaited after a 401 and says whether there is another key; `on.waiting(text)` is told that
// the call will be tried again. With `patient` it is also tried again where nothing answers.
export async function call(path, { body, signal, on, patient }) {
  for (;;) {
    try {
      const answer = await attempt(path, body, signal);
      on.waiting("");
      return answer;
    } catch (error) {
      if (error.status === 401 && (await on.key())) continue;
      if (error.status !== 503 && !(patient && error.status === 0)) throw error;
      on.waiting(`${error.message} Trying again…`);
      await pause(1000 * (error.wait ?? 2), signal);
    }
  }
}

// Yields the events of a stream, and throws where one is an error or the stream breaks off.
export async function* events(path, options) {
  const answer = await call(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new CallError(LOST);
    }
    if (piece.done) throw new CallError(LOST);
    const parts = (rest + piece.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment that keeps the connection open
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new CallError(event.error.message);
      yield event;
    }
  }
}
