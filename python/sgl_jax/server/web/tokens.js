// Tokens: those of an answer with their probabilities and alternatives, and those of a prompt.
import { html, useState, useRef, useLayoutEffect } from "./vendor/preact-htm.js";

const BYTE = /\\x[0-9a-f]{2}/; // how the API spells bytes that are no character on their own

// Returns a function that reads the scores of an event as tokens: text, logprob, alternatives; `at`, where each begins in
// the answer's text, in which special tokens do not stand; and whether it is special, or begins amid a character.
export function scoreReader(special) {
  const decoder = new TextDecoder();
  let at = 0, bytes = 0, decoded = 0;
  const chat = ({ token, logprob, top_logprobs, bytes: own }) => {
    const found = { text: token, logprob, top: top_logprobs.map((each) => [each.token, each.logprob]), at };
    if (special.has(token)) return { ...found, special: true };
    if (bytes !== decoded) found.amid = true;
    const text = decoder.decode(new Uint8Array(own), { stream: true });
    at += text.length;
    bytes += own.length;
    decoded += new TextEncoder().encode(text).length;
    return found;
  };
  const plain = ({ tokens, token_logprobs, top_logprobs, text_offset }) => tokens.map((text, i) => (
    { text, logprob: token_logprobs[i], top: Object.entries(top_logprobs[i]), at: text_offset[i], special: special.has(text) }
  ));
  return (scores) => (scores.tokens ? plain(scores) : (scores.content ?? []).map(chat));
}

// Returns the beginning of an answer in which `text` stands in place of a token, or null where the server cannot go on
// from it: in a thought or a call, in a special token, amid a character.
export function beginning({ tokens, content, head = "" }, token, text, special) {
  const raw = tokens.map((each) => (each.special ? "" : each.text)).join("");
  const own = content.slice(head.length);
  const start = BYTE.test(raw) ? tokenEnd(tokens) - own.length : raw.endsWith(own) ? raw.length - own.length : raw.lastIndexOf(own);
  const inside = token.at >= start || token.at + token.text.length > start;
  if (start < 0 || !inside || token.amid || special.has(text) || BYTE.test(text)) return null;
  return head + own.slice(0, Math.max(0, token.at - start)) + (token.at < start ? text.trimStart() : text);
}

const tokenEnd = (tokens) => { const last = tokens.at(-1); return last.at + (last.special ? 0 : last.text.length); };

const shown = (text) => text.replace(/\n/g, "↵\n");
const named = (text) => text.replace(/\n/g, "↵").replace(/ /g, "␣") || "(nothing)";
const percent = (logprob) => { const p = 100 * Math.exp(logprob); return p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %"; };
const shade = (logprob) => { const p = Math.exp(logprob); return p >= 0.9 ? 0 : p >= 0.6 ? 1 : p >= 0.3 ? 2 : p >= 0.1 ? 3 : 4; };

// An answer's tokens, the less likely the darker. Arrow keys go from one to the next, Enter to its alternatives.
export function Tokens({ turn, special, onPick }) {
  const [active, setActive] = useState(-1);
  const place = useRef();
  const go = (event, i) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1 }[event.key];
    if (to !== undefined) place.current.querySelectorAll(".token")[to]?.focus();
    else if (event.key === "Enter") place.current.querySelector(".alternatives button:enabled")?.focus();
    else return;
    event.preventDefault();
  };
  return html`<div class="tokens" ref=${place} onMouseLeave=${() => setActive(-1)}>
    ${turn.head}${turn.tokens.map((token, i) => html`<span class="token p${shade(token.logprob)} ${token.special ? "special" : ""}"
      tabindex=${i === Math.max(active, 0) ? 0 : -1} onMouseEnter=${() => setActive(i)} onFocus=${() => setActive(i)}
      onKeyDown=${(event) => go(event, i)}>${shown(token.text)}</span>`)}
    ${turn.tokens[active] && html`<${Alternatives} at=${place.current.querySelectorAll(".token")[active]} token=${turn.tokens[active]}
      text=${(text) => beginning(turn, turn.tokens[active], text, special)} onPick=${onPick} />`}
  </div>`;
}

function Alternatives({ at, token, text, onPick }) {
  const box = useRef();
  useLayoutEffect(() => { // beneath its token, and inside the page
    const frame = box.current.parentElement;
    const last = at.getClientRects();
    const { left, bottom } = last[0];
    const from = frame.getBoundingClientRect();
    box.current.style.left = `${Math.max(0, Math.min(left - from.left, from.width - box.current.offsetWidth))}px`;
    box.current.style.top = `${bottom - from.top}px`;
  }, [at]);
  const all = token.top.some(([other]) => other === token.text) ? token.top : [[token.text, token.logprob], ...token.top];
  return html`<div class="alternatives" ref=${box} role="group" aria-label="Alternatives">
    ${all.map(([other, logprob]) => {
      const start = text(other);
      return html`<button class=${other === token.text ? "taken" : ""} disabled=${start === null || !onPick} onClick=${() => onPick(start)}
        title=${start === null ? "The server cannot go on from here" : "Continue from this token"}>
        <code>${named(other)}</code><meter value=${Math.exp(logprob)}></meter><span>${percent(logprob)}</span></button>`;
    })}
  </div>`;
}

// The prompt of an answer: its tokens, those from the prefix cache in another colour; its text; the template that wrote it.
export function Prompt({ tokens, cached, special, text, template, onClose }) {
  const [view, setView] = useState("Tokens");
  const dialog = useRef();
  useLayoutEffect(() => dialog.current.showModal(), []);
  const views = template ? ["Tokens", "Text", "Template"] : ["Tokens", "Text"];
  return html`<dialog ref=${dialog} class="prompt" onClose=${onClose}>
    <header>${views.map((name) => html`<button aria-pressed=${view === name} onClick=${() => setView(name)}>${name}</button>`)}
      <span class="muted small">${tokens.length} tokens${cached === undefined ? "" : `, ${cached} of them cached when it was answered`}</span>
      <button aria-label="Close" onClick=${() => dialog.current.close()}>✕</button></header>
    ${view !== "Tokens" ? html`<pre>${view === "Text" ? text : template}</pre>` : html`<pre>${tokens.map((token, i) =>
      html`<span class="piece ${i < cached ? "cached" : ""} ${special.has(token) ? "special" : ""}">${shown(token)}</span>`)}</pre>`}
  </dialog>`;
}
