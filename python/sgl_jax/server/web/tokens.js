// Tokens: those of an answer with their probabilities and alternatives, and those of a prompt.
import { html, useState, useRef, useLayoutEffect } from "./vendor/preact-htm.js";

const BYTE = /\\x([0-9a-f]{2})/g; // how the API spells bytes that are no character on their own

// Returns a reader of an event's scores. Each token has its text, logprob and alternatives; its `piece` of the answer, where
// that is another text; where this begins, `at`; and whether it begins `amid` a character.
export function scoreReader(special) {
  const decoder = new TextDecoder(), encoder = new TextEncoder();
  let at = 0, tail = [], amid = false; // characters, the last bytes, whether these end inside a character
  const token = (text, logprob, top, bytes) => {
    const found = { text, logprob, top, at, ...(amid && { amid }) };
    const piece = special.has(text) ? "" : decoder.decode(bytes, { stream: true });
    if (!special.has(text)) {
      tail = [...tail, ...bytes].slice(-3);
      const length = (options) => new TextDecoder().decode(new Uint8Array(tail), options).length;
      amid = length() > length({ stream: true });
    }
    at += piece.length;
    return piece === text ? found : { ...found, piece };
  };
  const bytesOf = (text) => text.split(BYTE).flatMap((part, i) => (i % 2 ? parseInt(part, 16) : [...encoder.encode(part)]));
  return ({ content, tokens, token_logprobs, top_logprobs }) => content
    ? content.map((each) => token(each.token, each.logprob, each.top_logprobs.map((other) => [other.token, other.logprob]), new Uint8Array(each.bytes)))
    : tokens.map((text, i) => token(text, token_logprobs[i], Object.entries(top_logprobs[i]), new Uint8Array(bytesOf(text))));
}

// Returns the beginning of an answer in which `text` stands in place of a token, or null where the server cannot go on from
// it: in a thought or a call, with a special token, amid a character, with nothing but space in a chat.
export function beginning({ tokens, content, head = "" }, token, text, { special, plain }) {
  const raw = tokens.map((each) => each.piece ?? each.text).join("");
  const own = content.slice(head.length);
  const start = raw.endsWith(own) ? raw.length - own.length : raw.lastIndexOf(own); // a stop string may stand behind it
  const before = token.at - start;
  const outside = start < 0 || (before < 0 && before + token.text.length <= 0);
  if (outside || token.amid || special.has(text) || text.match(BYTE)) return null;
  const found = head + own.slice(0, Math.max(0, before)) + (before < 0 ? text.trimStart() : text);
  return (plain ? found : found.trim()) ? found : null;
}

const shown = (text) => text.replace(/\n/g, "↵\n");
const named = (text) => text.replace(/\n/g, "↵").replace(/ /g, "␣");
const percent = (logprob) => { const p = 100 * Math.exp(logprob); return p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %"; };
const shade = (logprob) => [0.9, 0.6, 0.3, 0.1].filter((bound) => Math.exp(logprob) < bound).length;

// An answer's tokens, the less likely the darker. Arrow keys go along them, Enter to the alternatives.
export function Tokens({ turn, special, plain, onPick }) {
  const [active, setActive] = useState(-1);
  const place = useRef();
  const go = (event, i) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1 }[event.key];
    if (to !== undefined) place.current.querySelectorAll(".token")[to]?.focus();
    else if (event.key === "Enter") place.current.querySelector(".alternatives button:enabled")?.focus();
    else return;
    event.preventDefault();
  };
  const close = () => setActive(-1);
  return html`<div class="tokens" ref=${place} onMouseLeave=${close} onfocusout=${({ relatedTarget }) => place.current.contains(relatedTarget) || close()}>
    ${turn.head}${turn.tokens.map((token, i) => html`<span class="token p${shade(token.logprob)} ${special.has(token.text) ? "special" : ""}"
      tabindex=${i === Math.max(active, 0) ? 0 : -1} onMouseEnter=${() => setActive(i)} onFocus=${() => setActive(i)}
      onKeyDown=${(event) => go(event, i)}>${shown(token.text)}</span>`)}
    ${turn.tokens[active] && html`<${Alternatives} at=${place.current.querySelectorAll(".token")[active]} token=${turn.tokens[active]}
      text=${(text) => beginning(turn, turn.tokens[active], text, { special, plain })} onPick=${onPick} onClose=${close} />`}
  </div>`;
}

function Alternatives({ at, token, text, onPick, onClose }) {
  const box = useRef();
  useLayoutEffect(() => { // beneath its token, and inside the page
    const frame = box.current.parentElement;
    const { left, bottom } = at.getClientRects()[0];
    const from = frame.getBoundingClientRect();
    box.current.style.left = `${Math.max(0, Math.min(left - from.left, from.width - box.current.offsetWidth))}px`;
    box.current.style.top = `${bottom - from.top}px`;
    const escape = ({ key }) => {
      if (key !== "Escape") return;
      if (box.current.contains(document.activeElement)) at.focus();
      onClose();
    };
    addEventListener("keydown", escape);
    return () => removeEventListener("keydown", escape);
  }, [at]);
  const others = token.top.filter(([other]) => other !== token.text);
  const all = [[token.text, token.logprob], ...others].sort((a, b) => b[1] - a[1]);
  return html`<div class="alternatives" ref=${box} aria-label="Alternatives" onMouseDown=${(event) => event.preventDefault()}>
    ${all.map(([other, logprob]) => {
      const start = text(other);
      return html`<button class=${other === token.text ? "taken" : ""} disabled=${start === null || !onPick} onClick=${() => onPick(start)}>
        <code>${named(other)}</code><meter value=${Math.exp(logprob)}></meter><span>${percent(logprob)}</span></button>`;
    })}
  </div>`;
}

// The prompt of an answer by token, those from the prefix cache in another colour; as text; the template that wrote it.
export function Prompt({ tokens, cached, special, text, template, onClose }) {
  const [view, setView] = useState("Tokens");
  const dialog = useRef();
  useLayoutEffect(() => dialog.current.showModal(), []);
  const views = template ? ["Tokens", "Text", "Template"] : ["Tokens", "Text"];
  return html`<dialog ref=${dialog} class="prompt" onClose=${onClose}>
    <header>${views.map((name) => html`<button aria-pressed=${view === name} onClick=${() => setView(name)}>${name}</button>`)}
      <span class="muted small">${tokens.length} tokens${cached === undefined ? "" : `, ${cached} from the cache`}</span>
      <button aria-label="Close" onClick=${() => dialog.current.close()}>✕</button></header>
    ${view !== "Tokens" ? html`<pre>${view === "Text" ? text : template}</pre>` : html`<pre>${tokens.map((token, i) =>
      html`<span class="piece ${i < cached ? "cached" : ""} ${special.has(token) ? "special" : ""}">${shown(token)}</span>`)}</pre>`}
  </dialog>`;
}
